"""What pods do to a run, done to real processes: killed peers, notices, other hosts, other devices, hosts that differ."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys

import jax
import launch
import numpy as np
import pytest

import jkd
from jkd import configfile


def config(**more) -> jkd.Experiment:
    return configfile.resolve(configfile.load(launch.CONFIG), [f"{name}={value}" for name, value in more.items()])


def visits(steps: int) -> np.ndarray:
    """In how many of so many steps each example is drawn; where an epoch ends in a batch, it may be there twice."""
    run = config().nodes["student"]
    rows = run.data.batches(run.batch_size, seed=run.seed)
    drawn = sum(np.bincount(next(rows)["index"], minlength=run.data.train_size) > 0 for _ in range(steps))
    rows.close()
    return drawn


def kill(pair: list[subprocess.Popen], which: int) -> None:
    """One of two processes dies; the other ends by itself, soon, with an error that says so."""
    pair[which].kill()
    pair[which].wait()
    other = pair[1 - which]
    said = launch.end(other, within=30)
    # at a collective it is told at once; at the barrier that ends a save jax itself ends the process, once it misses the other
    assert other.returncode in (1, -signal.SIGABRT), said
    assert re.search(r"^jkd(\[1\])?: failed: \S|another task died|[Tt]erminating process because", said, re.M), said


def stopped_at(said: str) -> int:
    return int(re.search(r"^jkd: stopped student at step (\d+)", said, re.M)[1])


@pytest.mark.slow
def test_a_pod_that_is_killed_told_to_stop_and_started_with_other_hosts_and_devices_loses_nothing(tmp_path):
    """Two hosts, one, two, two again, and this process: each goes on from what the one before it left."""
    workdir = tmp_path / "pod"
    pair = launch.start_pair(workdir, devices=2, pause=0.003)
    launch.wait(lambda: launch.finished(workdir), *pair)
    kill(pair, 1)
    newest = launch.finished(workdir)[-1]

    # one host with four devices, and its parameters over two of them; it is told to stop
    one = launch.start(workdir, "--set", "student.mesh.fsdp=2", devices=4, pause=0.003)
    launch.wait(lambda: launch.finished(workdir)[-1] > newest, one)
    one.send_signal(signal.SIGTERM)
    said = launch.end(one)
    assert one.returncode == 75, said
    assert launch.went_on(said) == newest
    stopped = stopped_at(said)
    assert newest < stopped < 120
    assert launch.finished(workdir)[-1] == stopped

    # more hosts than wrote it; the first dies, which the others found each other through
    pair = launch.start_pair(workdir, devices=2, pause=0.003)
    launch.wait(lambda: launch.finished(workdir)[-1] > stopped, *pair)
    kill(pair, 0)
    assert launch.went_on(pair[0].log.read_text()) == stopped
    newest = launch.finished(workdir)[-1]

    # the first, not all, is told to stop (`test_checkpoint.py` tells the second)
    pair = launch.start_pair(workdir, devices=2, pause=0.003)
    launch.wait(lambda: launch.finished(workdir)[-1] > newest, *pair)
    pair[0].send_signal(signal.SIGTERM)
    said = [launch.end(process) for process in pair]
    assert [process.returncode for process in pair] == [75, 75], said
    assert launch.went_on(said[0]) == newest
    stopped = stopped_at(said[0])
    assert newest < stopped < 120
    assert launch.finished(workdir)[-1] == stopped  # one checkpoint, of both hosts
    assert len(list((workdir / "student" / "checkpoints" / str(stopped)).glob("manifest-*-of-2.json"))) == 2

    # this process, with eight devices, goes on to the end: every example as often as it should
    left = jkd.train(config(), workdir)
    assert jax.device_count() == 8
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


ORDER = """
import hashlib, os, random, socket, sys, time
if len(sys.argv) > 1:
    time.time = time.time_ns = lambda: 10**9
    socket.gethostname = lambda: "elsewhere"
    os.getpid, _ = (lambda: 7), random.seed(5)
import launch
from jkd import configfile
run = configfile.load(launch.CONFIG)().nodes["student"]
rows = run.data.batches(run.batch_size, seed=run.seed, start=30)
print(hashlib.sha256(b"".join(next(rows)["image"].tobytes() for _ in range(3))).hexdigest())
rows.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("place", ["0", "1"])
def test_a_notice_while_the_others_are_not_there_yet_is_heard_at_once(tmp_path, place):
    """Whether it waits for them or looks for the first of them, in vain here."""
    port = launch.free_port()
    alone = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": place}
    with socket.create_server(("localhost", 0 if place == "0" else port)) as silent:
        silent.setblocking(False)
        process = launch.start(tmp_path / "alone", **alone)

        def looking() -> bool:
            try:
                found = silent.accept()[0] if place == "1" else socket.create_connection(("localhost", port))
            except OSError:
                return False
            found.close()
            return True

        launch.wait(looking, process)
        process.send_signal(signal.SIGTERM)
        said = launch.end(process, within=20)
    assert process.returncode == 75, said
    assert "jkd: stopped where nothing was to be saved; to go on: jkd train" in said


def test_the_order_of_the_data_knows_no_clock_no_host_and_no_process():
    """Epochs end within these batches. A second process is told another time, name, id and hash seed."""
    run = config().nodes["student"]
    rows = run.data.batches(run.batch_size, seed=run.seed, start=30)
    wanted = hashlib.sha256(b"".join(next(rows)["image"].tobytes() for _ in range(3))).hexdigest()
    rows.close()
    paths = os.pathsep.join(map(str, (launch.HERE.parent, launch.HERE)))
    told = launch.environment(PYTHONPATH=paths, PYTHONHASHSEED="12345", HOSTNAME="elsewhere", TZ="Asia/Tokyo")
    done = subprocess.run([sys.executable, "-c", ORDER, "elsewhere"], env=told, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == [wanted], done.stderr


def test_a_data_worker_that_dies_ends_the_run_and_the_same_call_goes_on(tmp_path):
    """With an error, and nobody waits for it; what lay ready is trained on first. A notice to all processes is not for a worker."""
    run = config(steps=60, every=5).nodes["student"]
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, train_maps=(), workers=1))
    started = []

    class Kill(jkd.Listener):
        def run_started(self, name, ctx, start):
            started.append(start)

        def stepped(self, name, step, steps, values, examples_per_s):
            if step in (7, 30) and len(started) == 1:
                (worker,) = multiprocessing.active_children()
                for number in (signal.SIGTERM, signal.SIGINT) if step == 7 else (signal.SIGKILL,):
                    os.kill(worker.pid, number)

    with pytest.raises(RuntimeError, match="Worker process was terminated unexpectedly with exit code -9"):
        jkd.train(run, tmp_path, listener=Kill())
    found = jkd.train(run, tmp_path, listener=Kill())
    assert started[0] == 0
    assert 30 <= started[1] < 60
    np.testing.assert_array_equal(found.state.memory.rows[: len(visits(1))], visits(60))


# what the storage library still says to the event loop of a save that failed, is said to a closed one
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(tmp_path):
    """A limit on the size of files stands for the full disk. Metrics that could not be written then are written later.

    It is full again when the run is told to stop: it says from where the next call goes on, and that one does.
    """
    workdir, limits, told, started = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE), [], []

    class Disk(jkd.Listener):
        def run_started(self, name, ctx, start):
            started.append(start)

        def stepped(self, name, step, steps, values, examples_per_s):
            if step in (5, 10) and started == [0]:
                launch.wait(lambda: launch.finished(workdir)[-1:] == [step // 3 * 3])
                resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
            if step == 8:
                launch.wait(lambda: told)
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            if step == 10 and started == [0]:
                os.kill(os.getpid(), signal.SIGTERM)

        def message(self, text):
            told.append(text)

    try:
        with pytest.raises(jkd.Stopped) as stopped:
            jkd.train(config(steps=14, every=3), workdir, listener=Disk())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(told) == 2
    for step, line in zip((6, 11), told, strict=True):
        assert re.match(rf"checkpoint {step} could not be written: File too large.*; training goes on$", line)
    assert launch.finished(workdir) == [3, 9]
    assert stopped.value.step == 9
    found = jkd.train(config(steps=14, every=3), workdir, listener=Disk())
    assert started == [0, 9]
    assert launch.finished(workdir) == [12, 14]
    lines = [json.loads(line) for line in (workdir / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 15))
    np.testing.assert_array_equal(found.state.memory.rows[: len(visits(1))], visits(14))
