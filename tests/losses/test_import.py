"""``from jkd import losses, targets`` needs jax and numpy, and costs next to nothing beyond them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, time
import jax, jax.numpy
before, start = set(sys.modules), time.process_time()
from jkd import losses, targets
losses.forward_kl, targets.smooth
spent = time.process_time() - start
names = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([spent, sorted(names)]))
"""


@pytest.fixture(scope="module")
def imports():
    runs = [subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True) for _ in range(3)]
    return [json.loads(run.stdout) for run in runs]


def test_import_costs_little(imports):
    """At most 0.1 s of processor time, the best of three (a busy machine only ever adds)."""
    assert min(spent for spent, _ in imports) <= 0.1


def test_import_pulls_in_nothing(imports):
    """Neither the training stack nor the test tools; a missing jaxtyping is therefore no error either."""
    forbidden = {"flax", "grain", "orbax", "tensorflow_datasets", "optax", "jaxtyping", "beartype", "numpyro", "etils"}
    assert not forbidden & set(imports[0][1])
