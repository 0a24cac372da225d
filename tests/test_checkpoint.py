"""A checkpoint brings everything back exactly, or says which file is not what it was; nothing else is ever restored."""

from __future__ import annotations

import math
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from fsspec.implementations.memory import MemoryFileSystem
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import manifest, optim, sharding
from jkd.checkpoint import Checkpoints
from jkd.config import Ema
from jkd.errors import InputError
from jkd.recipe import Bank
from jkd.resolve import make_context
from jkd.sharding import MeshShape
from jkd.state import State, init_state
from jkd.step import make_step

HELPER = Path(__file__).with_name("checkpoint_process.py")


def devices(count: int) -> Mesh:
    return jax.make_mesh((count,), ("x",), devices=jax.devices()[:count], axis_types=(jax.sharding.AxisType.Auto,))


def state(mesh: Mesh | None = None, *, seed: int = 0, width: int = 16) -> State:
    """One of everything that a state may hold, rows over the mesh where they divide by it."""
    mesh = mesh or devices(8)
    rng = np.random.default_rng(seed)
    params = {
        "student": {
            "dense": {
                "kernel": rng.normal(size=(8, width)).astype(np.float32),
                "bias": np.float32([np.nan, -0.0, np.inf, 1e-42]),
            },
            "empty": {},
            "layers": [rng.normal(size=(8, 3)).astype(np.float32), np.float32(2.5)],
        },
        "head:a/b.c": {"kernel": jnp.asarray(rng.normal(size=(16, 2)), jnp.bfloat16)},
    }
    tree = State(
        step=jnp.int32(seed),
        params=params,
        optimizer={group: optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(tree) for group, tree in params.items()},
        buffers={"student": {}},
        ema={"student": {"params": jax.tree.map(lambda leaf: leaf * 2, params["student"]), "buffers": {}}},
        memory={
            "bank": Bank(jnp.asarray(rng.normal(size=(16, 4)), jnp.float16)),
            "counts": rng.integers(-(2**31), 2**31 - 1, size=(8,), dtype=np.int32),
            "flags": np.array([True, False, True]),
            "key": jax.random.key(5),
            "keys": jax.random.split(jax.random.key(6, impl="rbg"), 8),
            "nothing": None,
            "none": np.zeros((0, 3), np.float32),
            "tuple": (jnp.uint8(3), ()),
        },
        key=jax.random.key_data(jax.random.key(seed)),
    )
    return jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, spec(leaf, mesh))), tree)


def spec(leaf, mesh: Mesh) -> P:
    return P("x") if np.ndim(leaf) and leaf.shape[0] and leaf.shape[0] % mesh.size == 0 else P()


def shapes(tree, mesh: Mesh | None = None):
    def shape(leaf):
        place = NamedSharding(mesh, spec(leaf, mesh)) if mesh else leaf.sharding
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(shape, tree)


def bits(leaf) -> tuple:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (str(jax.random.key_impl(leaf)), *bits(jax.random.key_data(leaf)))
    return str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()


def assert_same(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for (path, one), other in zip(jax.tree_util.tree_flatten_with_path(found)[0], jax.tree.leaves(wanted), strict=True):
        assert bits(one) == bits(other), path


class Kept(Checkpoints):
    """Checkpoints that remember what they reported."""

    def __init__(self, directory, **options):
        self.lines: list[str] = []
        super().__init__(directory, report=self.lines.append, **options)


@pytest.fixture
def checkpoints(tmp_path):
    with Kept(tmp_path / "checkpoints", keep=3) as kept:
        yield kept


def saved(checkpoints: Checkpoints, *steps: int, **options) -> None:
    for step in steps:
        checkpoints.save(step, state(seed=step), {"position": step}, **options)
    checkpoints.wait()


def damage(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        flip(path, random.Random(3))


def flip(path: Path, rng: random.Random) -> bytes:
    """Changes one bit; returns what was there."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    return before


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


@pytest.mark.parametrize("how", ["flipped", "truncated", "longer", "deleted"])
def test_damage_is_named_and_the_checkpoint_before_is_used(checkpoints, how):
    saved(checkpoints, 1, 2)
    data = max(
        (path for path in Path(checkpoints.directory, "2").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    size = data.stat().st_size
    damage(data, how)
    found, meta, step = checkpoints.restore(shapes(state()))
    assert (step, meta) == (1, {"position": 1})
    assert_same(found, state(seed=1))
    said = {
        "flipped": "does not match its checksum",
        "truncated": f"has {size - 1} bytes, its manifest says {size}",
        "longer": f"has {size + 1} bytes, its manifest says {size}",
        "deleted": "is missing",
    }[how]
    name = data.relative_to(Path(checkpoints.directory, "2"))
    assert checkpoints.lines == [f"checkpoint 2: {name} {said}; using checkpoint 1"]
    assert checkpoints.steps() == [1]
    with pytest.raises(InputError, match=re.escape(f"checkpoint 2: {name} {said}")):
        Checkpoints(checkpoints.directory).restore(shapes(state()), 2)

    checkpoints.save(2, state(seed=22), {"position": 2})  # trained again, from checkpoint 1
    found, _, step = checkpoints.restore(shapes(state()))
    assert step == 2
    assert_same(found, state(seed=22))
    assert len(list(Path(checkpoints.directory).iterdir())) == 2


def test_a_flipped_bit_in_any_file_is_found(checkpoints):
    saved(checkpoints, 7)
    place = Path(checkpoints.directory, "7")
    files = sorted(path for path in place.rglob("*") if path.is_file())
    assert {"leaves.json", "meta-0.json", "manifest-0-of-1.json", "manifest.ocdbt", "_METADATA"} <= {
        path.name for path in files
    }
    rng = random.Random(0)
    for path in files:
        for _ in range(5):
            before = flip(path, rng)
            assert path.name in manifest.problem(checkpoints.directory / "7"), path
            path.write_bytes(before)
    assert manifest.problem(checkpoints.directory / "7") == ""


def test_where_none_is_whole_that_is_an_error(checkpoints):
    assert checkpoints.restore(shapes(state())) is None
    saved(checkpoints, 1, 2)
    for step in (1, 2):
        damage(Path(checkpoints.directory, str(step), "arrays", "_METADATA"), "flipped")
    with pytest.raises(
        InputError, match="checkpoint 1: arrays/_METADATA does not match its checksum; no checkpoint in .* is whole"
    ):
        checkpoints.restore(shapes(state()))
    assert checkpoints.lines == ["checkpoint 2: arrays/_METADATA does not match its checksum; using checkpoint 1"]
    with pytest.raises(InputError, match=r"no checkpoint of step 5 in .*; there are \[1, 2\]"):
        Checkpoints(checkpoints.directory).restore(shapes(state()), 5)


def test_an_unfinished_save_is_skipped_and_removed_by_the_next(checkpoints):
    saved(checkpoints, 1, 2)
    Path(checkpoints.directory, "2", "manifest-0-of-1.json").unlink()
    assert checkpoints.steps() == [1]
    assert checkpoints.restore(shapes(state()))[2] == 1
    assert checkpoints.lines == ["checkpoint 2 has no manifest: its save was not finished; using checkpoint 1"]
    saved(checkpoints, 3)
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["1", "3"]
    for step in ("1", "3"):
        Path(checkpoints.directory, step, "manifest-0-of-1.json").unlink()
    assert checkpoints.restore(shapes(state())) is None


class ObjectStore(MemoryFileSystem):
    """Files in memory, under ``s3://``; as in a bucket, a folder is there as long as something is in it."""

    protocol = "s3"
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("s3://", "memory://"))

    def mkdir(self, path, create_parents=True, **options):
        pass

    makedirs = mkdir


@pytest.fixture
def bucket():
    fsspec.register_implementation("s3", ObjectStore, clobber=True)
    ObjectStore.store.clear()
    return ObjectStore.store


def test_an_object_store(bucket):
    with Kept("s3://bucket/run/checkpoints", keep=1) as checkpoints:
        assert checkpoints.restore(shapes(state())) is None
        saved(checkpoints, 1, 2)
        found, meta, step = checkpoints.restore(shapes(state()))
        assert (step, meta) == (2, {"position": 2})
        assert_same(found, state(seed=2))
        assert {name.split("/")[4] for name in bucket} == {"2"}
        checkpoints.save(3, state(seed=3), {})
        checkpoints.wait()
        name = next(name for name in bucket if name.endswith("leaves.json"))
        ObjectStore().pipe_file(name, b"{}")
        with pytest.raises(InputError, match="checkpoint 3: leaves.json has 2 bytes"):
            checkpoints.restore(shapes(state()))
    assert checkpoints.lines == []


def test_a_store_that_cannot_be_reached_is_named():
    with pytest.raises(InputError, match="cannot write checkpoints to gs://bucket/run: .*gcsfs"):
        Checkpoints("gs://bucket/run")


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
    """Each keeps a manifest of what it wrote; both choose the same checkpoint; one process reads what two wrote, and back."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, str(HELPER), "pair", str(tmp_path), address]
    pair = [
        subprocess.Popen([*command, str(index)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(2))
        for index in range(2)
    ]
    try:
        answers = [process.communicate(timeout=60) for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [0, 0], answers
    lines, others = ([line for line in out.splitlines() if not line.startswith("[Gloo]")] for out, _ in answers)
    assert lines == others
    assert lines[0] == "steps [2, 3]"
    assert re.fullmatch(r"checkpoint 3: arrays/ocdbt\.process_1/.* does not match its checksum; using checkpoint 2", lines[1])
    assert lines[2:] == ["restored 2 True True", "steps [2, 4]"]
    with Kept(tmp_path) as checkpoints:
        place = NamedSharding(devices(8), P("x"))
        like = {"rows": jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=place)}
        like["same"] = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(devices(8), P()))
        found, meta, step = checkpoints.restore(like)
        assert (step, meta) == (4, {"host": 0})
        np.testing.assert_array_equal(found["rows"], np.arange(1024, dtype=np.float32).reshape(16, 64) * 4)
        np.testing.assert_array_equal(found["same"], found["rows"])
        Path(tmp_path, "4", "manifest-1-of-2.json").unlink()
        assert checkpoints.steps() == [2]


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
