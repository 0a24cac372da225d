"""Workers of benchmarks/pair.py, tried on tiny shapes in processes of their own; nothing is said of their times."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_workers_step_in_turn():
    workers = [f"{sys.executable} {BENCHMARKS / which} --tiny" for which in ("kd_step.py vision jkd --cached", "lm_step.py")]
    # one device, as for users: the tests' own processes have eight
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    inherited = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_FLAGS": flags}
    command = [sys.executable, str(BENCHMARKS / "pair.py"), *workers, "--rounds", "1"]
    done = subprocess.run(command, env=inherited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ratio"]["rounds"] == 1
    assert min(found["first"]["min"], found["second"]["min"]) > 0
