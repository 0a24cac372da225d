"""A checkpoint brings everything back exactly, or says which file is not what it was; nothing else is ever restored."""

from __future__ import annotations

import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from stored import Kept, assert_same, bits, damage, devices, saved, shapes, state

from jkd import optim, sharding
from jkd.checkpoint import Checkpoints
from jkd.config import Ema
from jkd.errors import InputError
from jkd.resolve import make_context
from jkd.sharding import MeshShape
from jkd.state import State, init_state
from jkd.step import make_step

HELPER = Path(__file__).with_name("checkpoint_process.py")


@pytest.fixture
def checkpoints(tmp_path):
    with Kept(tmp_path / "checkpoints", keep=3) as kept:
        yield kept


def test_everything_comes_back_bit_for_bit_in_its_place(checkpoints):
    one = state(seed=3)
    checkpoints.save(3, one, {})
    found, _, step = checkpoints.restore(shapes(one))
    assert step == 3
    assert_same(found, one)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == jax.tree.map(lambda leaf: leaf.sharding, one)
    assert_same(checkpoints.restore(one)[0], one)  # arrays say as well as shapes what is wanted


@pytest.mark.parametrize(("before", "after"), [(8, 1), (8, 4), (1, 8), (2, 8)])
def test_values_do_not_depend_on_the_devices(checkpoints, before, after):
    one = state(devices(before))
    checkpoints.save(1, one, {})
    found, *_ = checkpoints.restore(shapes(one, devices(after)))
    assert_same(found, one)
    assert {leaf.sharding.mesh.size for leaf in jax.tree.leaves(found)} == {after}


def test_a_run_goes_on_as_if_it_had_not_stopped(checkpoints):
    run = tiny.run(optimizer=optim.adamw(1e-2), ema=Ema(decay=0.5), mesh=MeshShape(data=2, fsdp=4))
    ctx = make_context(run, tiny.batch(run.batch_size))
    one, frozen = init_state(ctx, jax.random.key(0))
    step, rows = make_step(ctx), [sharding.put_batch(batch, ctx.mesh) for batch in tiny.batches(8)]
    for number, batch in enumerate(rows):
        if number == 4:
            checkpoints.save(4, one, {})  # and its arrays are donated in the next line
        one, _ = step(one, frozen, batch)
    again, _, at = checkpoints.restore(shapes(one))
    for batch in rows[at:]:
        again, _ = step(again, frozen, batch)
    assert_same(again, one)


def test_a_saved_state_may_be_donated_at_once(checkpoints):
    move = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 3 + 1, tree), donate_argnums=0)
    for mesh in (devices(1), devices(8)):
        for trial in range(8):
            place = NamedSharding(mesh, P("x") if trial % 2 else P())
            tree = move(
                {f"{size}": jax.device_put(np.arange(size, dtype=np.float32) + trial, place) for size in (8, 4096, 1 << 18)}
            )
            wanted = jax.tree.map(lambda leaf: np.array(leaf), tree)
            checkpoints.save(trial, tree, {})
            for _ in range(3):
                tree = move(tree)
            found, *_ = checkpoints.restore(shapes(tree), trial)
            assert_same(jax.device_get(found), wanted)


@pytest.mark.parametrize(
    ("options", "metrics", "kept", "best"),
    [
        (dict(keep=2), [0.5, 0.9, 0.1, 0.2], [3, 4], None),
        (dict(keep=1), [0.5, 0.9, 0.1, 0.2], [4], None),
        (dict(keep=2, best="score"), [0.5, 0.9, 0.1, 0.2], [2, 3, 4], 2),
        (dict(keep=1, best="-score"), [0.5, 0.1, 0.9, 0.2], [2, 4], 2),
        (dict(keep=1, best="score"), [0.5, 0.9, 0.9, None], [3, 4], 3),
        (dict(keep=1, best="-score"), [0.5, math.nan, None, 0.7], [1, 4], 1),
        (dict(keep=1, best="score"), [None, None, math.nan, None], [4], None),
        (dict(keep=1, best="score"), [math.inf, 3.0, 2.0, 1.0], [1, 4], 1),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, options, metrics, kept, best):
    mesh = devices(1)
    tree = {"x": jax.device_put(jnp.arange(4), NamedSharding(mesh, P()))}
    with Kept(tmp_path, **options) as checkpoints:
        for step, value in enumerate(metrics, 1):
            checkpoints.save(step, tree, {}, None if value is None else {"score": value, "other": 1.0})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step(), checkpoints.lines) == (kept, best, [])
    with Kept(tmp_path, **options) as again:  # the same is known to another process
        assert (again.steps(), again.best_step()) == (kept, best)
        again.save(9, tree, {}, {"score": 0.0})
        again.wait()
        assert best is None or best in again.steps() or options["best"] == "-score"


def test_a_checkpoint_of_another_model_is_refused(checkpoints):
    saved(checkpoints, 1)
    like = shapes(state())
    wider = shapes(state(width=32))
    with pytest.raises(
        InputError,
        match=r"checkpoint 1 is of another model or optimizer: params/student/dense/kernel is float32\[8, 16\] in the checkpoint, "
        r"float32\[8, 32\] in this run \(4 of \d+ arrays differ\)",
    ):
        checkpoints.restore(wider)
    more = State(**{**vars(like), "buffers": {"student": {"mean": like.step}}})
    with pytest.raises(InputError, match=r"buffers/student/mean is not there in the checkpoint, int32\[\] in this run"):
        checkpoints.restore(more)
    less = State(**{**vars(like), "ema": {}})
    with pytest.raises(
        InputError, match=r"ema/student/params/dense/bias is float32\[4\] in the checkpoint, not there in this run"
    ):
        checkpoints.restore(less)
    half = State(**{**vars(like), "step": jax.ShapeDtypeStruct((), jnp.int16, sharding=like.step.sharding)})
    with pytest.raises(InputError, match=r"step is int32\[\] in the checkpoint, int16\[\] in this run"):
        checkpoints.restore(half)
    with pytest.raises(InputError, match="no sharding"):
        checkpoints.restore(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), like))


def test_meta_comes_back_exactly(checkpoints):
    rng = np.random.default_rng(0)
    meta = {
        "position": 12,
        "nested": {"list": [1, 2.5, None, True, "é\n"], "float": [0.1, 1e300, -0.0, math.inf]},
        "weights": rng.random(50),
        "bfloat16": np.asarray(jnp.asarray(rng.random((2, 3)), jnp.bfloat16)),
        "bools": np.array([[True], [False]]),
        "scalar": np.float32(0.1),
        "empty": np.zeros((0, 4), np.int16),
        "nan": np.array([np.nan, -0.0]),
        "jax": jnp.arange(3),
    }
    tree = {"x": jax.device_put(jnp.arange(4), NamedSharding(devices(1), P()))}
    checkpoints.save(1, tree, meta)
    _, found, _ = checkpoints.restore(tree)
    assert list(found) == list(meta)
    assert (found["position"], found["nested"]) == (12, meta["nested"])
    assert isinstance(found["scalar"], np.float32)
    for name in ("weights", "bfloat16", "bools", "scalar", "empty", "nan", "jax"):
        assert bits(np.asarray(found[name])) == bits(np.asarray(meta[name])), name


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({"a": {"b": [1, object()]}}, r"meta\['a'\]\['b'\]\[1\] is a object"),
        ({"a": {3: 1}}, r"meta\['a'\] has the key 3"),
        ({"a": np.array([None])}, r"meta\['a'\] is a ndarray"),
        ({"a": {1, 2}}, "is a set"),
    ],
)
def test_what_json_cannot_keep_is_refused(checkpoints, meta, said):
    with pytest.raises(InputError, match=said):
        checkpoints.save(1, {"x": jnp.zeros(3)}, meta)
    assert checkpoints.steps() == []


def test_a_metric_that_is_not_measured_is_told(tmp_path):
    with Kept(tmp_path, best="acuracy") as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)}, {}, {"accuracy": 0.5})
        checkpoints.save(2, {"x": jnp.zeros(3)}, {})
    assert checkpoints.lines == ["best = 'acuracy': step 1 was measured without it; did you mean 'accuracy'?"]


def test_bad_arguments(tmp_path):
    with pytest.raises(InputError, match="keep = 0"):
        Checkpoints(tmp_path, keep=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write checkpoints to .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_full_disk_is_reported_and_the_next_save_works(tmp_path):
    """A limit on the size of files stands for the full disk: writes fail in the same places, and no privileges are needed."""
    done = helper("full", tmp_path)
    # tensorstore's own threads may find that nobody waits for their other writes any more, and say so; orbax says nothing
    assert "Error writing" not in done.stderr
    assert "orbax" not in done.stderr
    lines = done.stdout.splitlines()
    for step, failed in ((2, lines.pop(0)), (4, lines.pop(3))):
        assert re.fullmatch(rf"checkpoint {step} could not be written: File too large( \(.*\))?; training goes on", failed)
    assert lines == ["[1] ['1']", "restored 1", "[3] ['3']", "[3] ['3']", "restored 3", "[5] ['5']", "restored 5"]


def test_killed_in_the_middle_of_a_save(tmp_path):
    """Three processes in turn go on from what the last one left; each but the last kills itself somewhere in a save."""
    reached = 0
    for turn in range(3):
        done = helper("killed", tmp_path, turn, check=turn == 2)
        words = done.stdout.split()
        assert done.returncode == (0 if turn == 2 else -9), done
        assert words[0] == "restored"
        assert int(words[1]) >= reached, "a finished checkpoint was lost"
        reached = max(int(words[1]), int(words[-1]))  # the last whose `wait` returned
    assert reached >= 9


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each keeps a manifest of what it wrote; both choose the same checkpoint; one process reads what two wrote.

    A save that one of them cannot write is none, both say so at once, and the next one works. Ctrl-C in one stops both at one step.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, str(HELPER), "pair", str(tmp_path), address]
    pair = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(2))
        for index in range(2)
    ]
    try:
        answers = [process.communicate(timeout=240) for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [0, 0], answers
    lines, others = ([line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in answers)
    assert re.fullmatch(r"told at \d+ stays \[False, True, True, True\]", lines[-1])
    failed = [(lines.pop(place), others.pop(place)) for place in (4, 5)]
    for step, (first, second) in zip((5, 6), failed, strict=True):
        why = re.fullmatch(rf"checkpoint {step} could not be written: (File too large.*); training goes on", second)[1]
        assert first == f"checkpoint {step} could not be written: process 1: {why}; training goes on"
    assert lines == others
    assert lines[0] == "steps [2, 3]"
    assert re.fullmatch(r"checkpoint 3: arrays/ocdbt\.process_1/.* does not match its checksum; using checkpoint 2", lines[1])
    assert lines[2:4] == ["restored 2 True True", "steps [2, 4]"]
    assert lines[4:-1] == ["steps [2, 4] True", "steps [2, 4] True", "steps [4, 7]"]
    with Kept(tmp_path) as checkpoints:
        place = NamedSharding(devices(8), P("x"))
        like = {"rows": jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place)}
        like["same"] = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(devices(8), P()))
        found, meta, step = checkpoints.restore(like)
        assert (step, meta) == (7, {"host": 0})
        np.testing.assert_array_equal(found["rows"], np.arange(1024, dtype=np.float32).reshape(16, 64) * 7)
        np.testing.assert_array_equal(found["same"], found["rows"])
        Path(tmp_path, "7", "manifest-1-of-2.json").unlink()
        assert checkpoints.steps() == [4]


def test_nothing_is_printed(tmp_path, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        saved(checkpoints, 1, 2)
        damage(Path(tmp_path, "2", "leaves.json"), "flipped")
        checkpoints.restore(shapes(state()))
    assert capfd.readouterr() == ("", "")


def environment(count: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={count}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(HELPER.parent.parent)}


def helper(*arguments, check: bool = True) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HELPER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(1), timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done
