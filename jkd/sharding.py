"""Where arrays live: one mesh of three axes, one rule from a parameter's path and shape to its place.

``data`` and ``fsdp`` both split the batch; ``fsdp`` splits the stored parameters too, and ``tensor`` the parameters that a rule
names. The axes are Auto: models need no annotation, and XLA places what is not constrained.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import trees
from jkd.errors import InputError
from jkd.types import Array, Batch, Tree

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
# Below this many scalars the latency of a gather costs more than the bytes that a split saves.
SMALLEST_SPLIT = 1024

Rules = tuple[tuple[str, P], ...]
"""``((glob on parameter paths, PartitionSpec), …)``; the first match wins, what matches none gets the default."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshShape:
    """How many devices each axis has; -1 (one axis only) takes what the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The mesh over these devices (all devices of all processes by default).

        Raises:
            InputError: the sizes do not multiply to the number of devices.
        """
        devices = jax.devices() if devices is None else devices
        sizes = [self.data, self.fsdp, self.tensor]
        if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
            raise InputError(f"mesh {self}: every size is positive, at most one of them -1")
        known = math.prod(size for size in sizes if size != -1)
        if -1 in sizes and len(devices) % known == 0:
            sizes[sizes.index(-1)] = len(devices) // known
        if math.prod(sizes) != len(devices):
            raise InputError(f"mesh {self}: {known} does not fit {len(devices)} devices; change mesh.data, .fsdp or .tensor")
        return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules = ()) -> P:
    """Where a parameter is stored: by the first rule that matches, else its largest divisible axis over ``fsdp``.

    Raises:
        InputError: a rule names more axes than the parameter has, an unknown mesh axis, or one that does not divide it.
    """
    for pattern, spec in rules:
        if trees.matches(path, (pattern,)):
            _check_rule(path, shape, mesh, pattern, spec)
            return spec
    size = mesh.shape["fsdp"]
    axes = [axis for axis in range(len(shape)) if shape[axis] % size == 0]
    if size == 1 or not axes or math.prod(shape) < SMALLEST_SPLIT:
        return P()
    # of equal axes the last: the output features, which are next to each other in memory
    best = max(axes, key=lambda axis: (shape[axis], axis))
    return P(*("fsdp" if axis == best else None for axis in range(best + 1)))


def _check_rule(path: str, shape: tuple[int, ...], mesh: Mesh, pattern: str, spec: P) -> None:
    what = f"sharding rule {pattern!r} -> {spec} for {path} {shape}"
    if len(spec) > len(shape):
        raise InputError(f"{what}: the rule names {len(spec)} axes, the parameter has {len(shape)}")
    for length, names in zip(shape, spec, strict=False):
        names = (names,) if isinstance(names, str) else names or ()
        for name in names:
            if name not in mesh.shape:
                raise InputError(f"{what}: no mesh axis {name!r}; there are {', '.join(AXES)}")
        if length % math.prod(mesh.shape[name] for name in names):
            raise InputError(f"{what}: {length} does not divide by the mesh axes {names}")


def parameter_specs(tree: Tree, mesh: Mesh, rules: Rules = ()) -> Tree:
    """`parameter_spec` of every leaf of a nested dict."""
    return trees.map_with_path(lambda path, leaf: parameter_spec(path, leaf.shape, mesh, rules), tree)


def like_parameters(state: Tree, params: Tree, specs: Tree) -> Tree:
    """Specs for an optimizer state: a leaf that ends in a parameter's path and has its shape lives where the parameter does."""
    places = {
        path: (leaf.shape, spec) for (path, leaf), spec in zip(trees.flatten(params).items(), _leaves(specs), strict=True)
    }

    def place(keys, leaf) -> P:
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in keys]
        for start in range(len(names)):
            shape, spec = places.get("/".join(names[start:]), (None, P()))
            if shape == leaf.shape:
                return spec
        return P()

    return jax.tree_util.tree_map_with_path(place, state)


def _leaves(specs: Tree) -> list[P]:
    return list(trees.flatten(specs).values()) if specs else []


def without_fsdp(spec: P) -> P:
    """The place of a parameter while it is used: whole along ``fsdp``."""

    def drop(names):
        if isinstance(names, tuple):
            kept = tuple(name for name in names if name != "fsdp")
            return kept or None
        return None if names == "fsdp" else names

    return P(*(drop(names) for names in spec))


def at_use(params: Tree, specs: Tree, mesh: Mesh, dtype: Any = None, *, later: tuple[str, ...] = ()) -> Tree:
    """Parameters as a network gets them: cast to the compute dtype, then gathered along ``fsdp``.

    The cast comes first so that bfloat16 travels. Without this constraint XLA is free to gather activations in the place of
    weights; with it, and gradients constrained to the stored places, gradients are reduced and scattered at once.

    Args:
        later: globs on paths that stay where they are, because the network gathers them itself (`one_layer`).
    """

    def place(path: str, leaf: Array, spec: P) -> Array:
        if dtype is not None and jnp.issubdtype(leaf.dtype, jnp.floating):
            leaf = leaf.astype(dtype)
        return leaf if trees.matches(path, later) else _gathered(leaf, spec, mesh)

    return trees.map_with_path(place, params, specs)


def _gathered(leaf: Array, spec: P, mesh: Any) -> Array:
    if "fsdp" not in jax.tree.leaves(tuple(spec)):
        return leaf
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, without_fsdp(spec)))


_STORED: contextvars.ContextVar[tuple[Tree, Mesh] | None] = contextvars.ContextVar("stored", default=None)


@contextlib.contextmanager
def storing(specs: Tree, mesh: Mesh) -> Iterator[None]:
    """While a network is traced within: where its parameters are stored, for `one_layer`."""
    before = _STORED.set((specs, mesh))
    try:
        yield
    finally:
        _STORED.reset(before)


def one_layer(path: str, params: Mapping[tuple[str, ...], Array]) -> dict[tuple[str, ...], Array]:
    """One layer's parameters, cut from the stack at ``path`` by a scan, gathered along ``fsdp``.

    A network that scans its layers calls this in the scan, so that one layer at a time is whole, in the backward pass too; its
    Model names the stack in ``stacked``. Outside a run, and within a model that is made of several, this is the identity.
    """
    if (stored := _STORED.get()) is None:
        return dict(params)
    places, mesh = trees.flatten(stored[0]), stored[1]
    place = lambda name: P(*places.get("/".join((path, *name)), P())[1:])  # noqa: E731
    return {name: _gathered(leaf, place(name), mesh) for name, leaf in params.items()}


def shardings(specs: Tree, mesh: Mesh) -> Tree:
    """NamedShardings for a tree of PartitionSpecs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda node: isinstance(node, P))


def constrain_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Inside a jitted function: rows over ``data`` and ``fsdp``."""
    return jax.tree.map(lambda rows: jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, BATCH)), batch)


def mesh_of(tree: Tree) -> Mesh | None:
    """The mesh of a run that a tree's arrays lie on; None where they lie on none."""
    places = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.axis_names == AXES), None)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows (NumPy) as one global array per name, split over ``data`` and ``fsdp``."""
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), np.asarray(rows)), batch
    )


def put_batches(batches: Sequence[Batch], mesh: Mesh) -> Batch:
    """Several batches of this process's rows as one, each leaf ``[batches, rows, ...]``, the rows split as by `put_batch`."""
    place = NamedSharding(mesh, P(None, *BATCH))
    return jax.tree.map(lambda *rows: jax.make_array_from_process_local_data(place, np.stack(rows)), *batches)


def put(tree: Tree, places: Tree) -> Tree:
    """Arrays, moved to their places; never more than one leaf in flight beyond what the places hold."""
    return jax.tree.map(jax.device_put, tree, places)


def whole(tree: Tree) -> Tree:
    """Every leaf as one NumPy array, on every process, wherever its parts are."""

    def gathered(leaf: Array) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
            leaf = jax.jit(lambda leaf: leaf, out_shardings=NamedSharding(mesh, P()))(leaf)
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(leaf)

    return jax.tree.map(gathered, tree)
