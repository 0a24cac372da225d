"""What pods do to a run, done to real processes: killed peers, notices, other hosts, other devices, hosts that differ."""

from __future__ import annotations

import re
import runpy
import shutil
import signal

import jax
import launch
import numpy as np
import pytest

import jkd


def config(**more) -> jkd.Experiment:
    return runpy.run_path(str(launch.CONFIG))["config"](**more)


def visits(steps: int) -> np.ndarray:
    """How often each example is drawn in so many steps."""
    run = config().nodes["student"]
    rows = run.data.batches(run.batch_size, seed=run.seed)
    drawn = np.concatenate([next(rows)["index"] for _ in range(steps)])
    rows.close()
    return np.bincount(drawn, minlength=run.data.train_size)


@pytest.mark.slow
def test_a_pod_that_is_killed_told_to_stop_and_started_with_other_devices_loses_nothing(tmp_path):
    workdir = tmp_path / "pod"
    # two hosts of two devices; the second is killed
    pair = launch.start_pair(workdir, devices=2, pause=0.003)
    reached = launch.wait(lambda: launch.finished(workdir), *pair)[-1]
    pair[1].kill()
    said = launch.end(pair[0], within=30)
    assert pair[0].returncode == 1, said
    assert re.search(r"^jkd: failed: \S", said, re.M), said
    assert launch.finished(workdir)[-1] >= reached

    # started again; the second, not the first, is told to stop
    newest = launch.finished(workdir)[-1]
    pair = launch.start_pair(workdir, devices=2, pause=0.003)
    launch.wait(lambda: launch.finished(workdir)[-1] > newest, *pair)
    pair[1].send_signal(signal.SIGTERM)
    said = [launch.end(process) for process in pair]
    assert [process.returncode for process in pair] == [75, 75], said
    assert launch.went_on(said[0]) == newest
    stopped = int(re.search(r"^jkd: stopped student at step (\d+)", said[0], re.M)[1])
    assert newest < stopped < 120
    assert launch.finished(workdir)[-1] == stopped  # one checkpoint, of both hosts
    assert len(list((workdir / "student" / "checkpoints" / str(stopped)).glob("manifest-*-of-2.json"))) == 2

    # one host with four devices, and its parameters over two of them
    one = launch.start(workdir, "--set", "student.mesh.fsdp=2", devices=4)
    said = launch.end(one)
    assert one.returncode == 0, said
    assert launch.went_on(said) == stopped

    # what it left, read by a process with eight devices: the same bits, and every example as often as it should
    left = jkd.train(config(), workdir)
    assert jax.device_count() == 8
    assert jkd.trees.sha256(jax.device_get(left.student.params)) == left.summary["student"]["params_sha256"]
    np.testing.assert_array_equal(left.state.memory.rows[: len(visits(1))], visits(120))
    untouched = jkd.train(config()).student.params
    for found, wanted in zip(jax.tree.leaves(left.student.params), jax.tree.leaves(untouched), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_hosts_that_differ_are_refused_at_the_start_and_told_how(tmp_path):
    workdir = tmp_path / "pod"
    pair = launch.start_pair(workdir, second=("--set", "steps=60"))
    said = [launch.end(process) for process in pair]
    for process, line in zip(pair, said, strict=True):
        assert process.returncode == 2, line
        assert "process 1 was started with another config or other code than process 0 (student.steps: 120 -> 60" in line

    other = tmp_path / "other"  # code that was edited, and that no repository knows
    shutil.copytree(launch.HERE.parent / "jkd", other / "jkd", ignore=shutil.ignore_patterns("__pycache__"))
    edited = other / "jkd" / "losses" / "__init__.py"
    edited.write_text(edited.read_text() + "\n")
    pair = launch.start_pair(workdir, package=other)
    said = [launch.end(process) for process in pair]
    for process, line in zip(pair, said, strict=True):
        assert process.returncode == 2, line
        assert re.search(r'than process 0 \(code: "[0-9a-f]{16}" -> "[0-9a-f]{16}"', line), line
    assert not (workdir / "student").exists()
