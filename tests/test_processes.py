"""Several processes train as one: real ones, over gloo on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from jkd import cache
from jkd.cache.training import keys_of

HERE = Path(__file__).parent
DEVICES = 4


def launch(count: int, out: Path) -> dict[str, np.ndarray]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, str(HERE / "two_processes.py")]
    processes = [
        subprocess.Popen(
            [*command, str(number), str(count), address, str(out)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(count)
    ]
    try:
        told = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(told)
    return dict(np.load(out))


@pytest.mark.slow
def test_two_processes_make_the_update_that_one_makes(tmp_path):
    one, two = (launch(count, tmp_path / f"{count}.npz") for count in (1, 2))
    assert one.keys() == two.keys()

    def part(found, case, when):
        leaves = [value.ravel().astype(np.float64) for name, value in found.items() if name.startswith(f"{case}/{when}")]
        return np.concatenate(leaves)

    for case in ("data", "fsdp", "mixup and BatchNorm"):
        np.testing.assert_array_equal(part(two, case, "start"), part(one, case, "start"))
        found, wanted = (part(run, case, "first") - part(run, case, "start") for run in (two, one))
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted), case
        found, wanted = part(two, case, "end"), part(one, case, "end")
        assert np.linalg.norm(found - wanted) < 1e-5 * np.linalg.norm(wanted), case
        np.testing.assert_allclose(part(two, case, "loss"), part(one, case, "loss"), rtol=2e-5)
    # both wrote their own rows' answers into one cache: the same as one would
    readers = [cache.Reader(tmp_path / f"{count}.npz.cache") for count in (1, 2)]
    assert [len(reader) for reader in readers] == [44, 44]
    assert {path.name[:11] for path in (tmp_path / "2.npz.cache").glob("shard-*")} == {"shard-00000", "shard-00001"}
    keys = keys_of({"image": tiny.batch(44)["image"]}, ("image",))
    found, wanted = (reader.answers(reader.rows(keys))["logits"] for reader in readers)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
