"""What a wheel carries."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from jkd import configfile


@pytest.mark.slow
def test_the_wheel_carries_configs_and_types(tmp_path):
    root = Path(configfile.__file__).parents[1]
    command = [sys.executable, "-m", "pip", "wheel", str(root), "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("jkd-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {"jkd/py.typed", "jkd/cli.py", "jkd/report/page.css", "jkd/_configs/digits.py"} <= held
    assert {name for name in held if name.startswith("jkd/_configs/") and name.endswith(".py")} == {
        f"jkd/_configs/{path.name}" for path in (root / "configs").glob("*.py")
    }
    assert not [name for name in held if name.partition("/")[0] not in ("jkd",) and ".dist-info" not in name]
    # away from the clone, the names still work
    command = [sys.executable, "-m", "jkd", "configs", "digits"]
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    away = {"PYTHONPATH": str(tmp_path / "installed"), "XLA_FLAGS": flags}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | away, capture_output=True, text=True, check=True)
    assert done.stdout == (root / "configs" / "digits.py").read_text()
    command = [sys.executable, "-m", "jkd", "describe", "digits"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | away, capture_output=True, text=True, check=True)
    assert "memory of the state, MiB" in done.stdout
