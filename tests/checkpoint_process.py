"""What `test_checkpoint.py` runs in processes of its own: ``python checkpoint_process.py full|killed|pair DIRECTORY …``."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd.checkpoint import Checkpoints
from jkd.interrupts import Interrupts


def say(*words: object) -> None:
    print(*words, flush=True)


def noise(step: int, size: int = 1 << 20) -> dict:
    values = np.random.default_rng(step).random(size, np.float32)
    return {"x": jax.device_put(values), "step": jax.device_put(np.int32(step))}


def full(directory: str) -> None:
    with Checkpoints(directory, keep=1, report=say) as checkpoints:
        checkpoints.save(1, noise(1), {})
        checkpoints.wait()
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        for step, limit in ((2, 1 << 20), (4, 0)):  # the arrays fail; everything does
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
            checkpoints.save(step, noise(step), {})
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
            say(checkpoints.steps(), sorted(os.listdir(directory)))
            say("restored", checkpoints.restore(noise(0))[2])
            checkpoints.save(step + 1, noise(step + 1), {})
            checkpoints.wait()
            say(checkpoints.steps(), sorted(os.listdir(directory)))
        found, _, step = checkpoints.restore(noise(0))
        say("restored", step if np.array_equal(found["x"], noise(5)["x"]) else "something else")


def killed(directory: str, turn: str) -> None:
    checkpoints = Checkpoints(directory, keep=2, report=lambda line: None)
    restored = checkpoints.restore(noise(0))
    start = 0
    if restored is not None:
        found, meta, start = restored
        assert meta == {"position": start}
        assert int(found["step"]) == start
        assert np.array_equal(found["x"], noise(start)["x"])
    say("restored", start)
    for number, step in enumerate(range(start + 1, start + 6)):
        state = noise(step)
        if number == 2 and turn != "2":
            # somewhere in this save: in the copy, the write, the commit, the manifest or the clean-up
            delay = random.SystemRandom().uniform(0, 0.25)
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            checkpoints.save(step, state, {"position": step})
            checkpoints.wait()
            say(step)
            time.sleep(10)
        checkpoints.save(step, state, {"position": step})
        checkpoints.wait()
        say(step)
    assert len(os.listdir(directory)) == 2
    checkpoints.close()


def pair(directory: str, address: str, index: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, num_processes=2, process_id=int(index))
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    places = {"rows": NamedSharding(mesh, P("x")), "same": NamedSharding(mesh, P())}
    values = np.arange(1024, dtype=np.float32).reshape(16, 64)
    with Checkpoints(directory, keep=2, report=say) as checkpoints:

        def save(step: int, **meta: object) -> None:
            tree = {
                name: jax.make_array_from_callback((16, 64), place, lambda i: values[i] * step)
                for name, place in places.items()
            }
            checkpoints.save(step, tree, {"host": int(index)} | meta)
            checkpoints.wait()

        for step in (1, 2, 3):
            save(step)
        say("steps", checkpoints.steps())
        if index == "0":
            written = Path(directory, "3", "arrays", "ocdbt.process_1", "d").iterdir()
            path = max(written, key=lambda path: path.stat().st_size)
            raw = bytearray(path.read_bytes())
            raw[len(raw) // 2] ^= 1
            path.write_bytes(raw)
        like = {name: jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place) for name, place in places.items()}
        jax.experimental.multihost_utils.sync_global_devices("damaged")
        found, meta, step = checkpoints.restore(like)
        same = all(
            np.array_equal(shard.data, values[shard.index] * 2) for leaf in found.values() for shard in leaf.addressable_shards
        )
        say("restored", step, same, meta == {"host": int(index)})
        save(4)
        say("steps", checkpoints.steps())
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        for step, room, length in ((5, 64, 0), (6, 50_000, 100_000)):  # the second's disk is full: for its arrays; for its meta
            if index == "1":
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, most[1]))
            begun = time.monotonic()
            save(step, long="x" * length)
            resource.setrlimit(resource.RLIMIT_FSIZE, most)
            say("steps", checkpoints.steps(), time.monotonic() - begun < 30)
        save(7)
        say("steps", checkpoints.steps())
    with Interrupts() as interrupts:
        if index == "1":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        answers: list[bool] = []
        while len(answers) < 1000 and not all(answers[-3:] or [False]):
            answers.append(interrupts.stop())
            time.sleep(0.05)
    say("told at", len(answers), "stays", answers[-4:])


if __name__ == "__main__":
    {"full": full, "killed": killed, "pair": pair}[sys.argv[1]](*sys.argv[2:])
