"""A state with one of everything that a checkpoint may hold, and ways to damage what is on disk."""

from __future__ import annotations

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd.checkpoint import Checkpoints
from jkd.recipe import Bank
from jkd.state import State


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
