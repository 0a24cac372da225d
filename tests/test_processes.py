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


def launch(count: int, out: Path, *cases: str) -> dict[str, np.ndarray]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={DEVICES // count}")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    command = [sys.executable, str(HERE / "several_processes.py")]
    processes = [
        subprocess.Popen(
            [*command, str(number), str(count), address, str(out), *cases],
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
def test_two_and_four_processes_make_the_update_that_one_makes(tmp_path):
    cases = {1: ("data", "fsdp", "mixup and BatchNorm"), 2: ("data", "fsdp", "mixup and BatchNorm"), 4: ("fsdp",)}
    found = {count: launch(count, tmp_path / f"{count}.npz", *names) for count, names in cases.items()}
    assert found[1].keys() == found[2].keys() > found[4].keys() > {"fsdp/loss0/loss"}

    def part(found, case, when):
        leaves = [value.ravel().astype(np.float64) for name, value in found.items() if name.startswith(f"{case}/{when}")]
        return np.concatenate(leaves)

    keys = keys_of({"image": tiny.batch(44)["image"]}, ("image",))
    readers = {count: cache.Reader(tmp_path / f"{count}.npz.cache") for count in cases}
    answers = {count: reader.answers(reader.rows(keys))["logits"] for count, reader in readers.items()}
    one = found[1]
    for count in (2, 4):
        several = found[count]
        for case in cases[count]:
            np.testing.assert_array_equal(part(several, case, "start"), part(one, case, "start"))
            moved, wanted = (part(run, case, "first") - part(run, case, "start") for run in (several, one))
            assert np.linalg.norm(moved - wanted) < 1e-5 * np.linalg.norm(wanted), case
            ended, wanted = part(several, case, "end"), part(one, case, "end")
            assert np.linalg.norm(ended - wanted) < 1e-5 * np.linalg.norm(wanted), case
            np.testing.assert_allclose(part(several, case, "loss"), part(one, case, "loss"), rtol=2e-5)
        # each wrote its own rows' answers into one cache: the same as one would
        assert len(readers[count]) == 44
        shards = {path.name[:11] for path in (tmp_path / f"{count}.npz.cache").glob("shard-*")}
        assert shards == {f"shard-{number:05d}" for number in range(count)}
        np.testing.assert_allclose(answers[count], answers[1], atol=1e-5)
