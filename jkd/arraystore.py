"""Any pytree of arrays on disk, through orbax: saved in the background, brought back onto any mesh.

Orbax writes to local paths and ``gs://``. Elsewhere (``s3://``) its files go through a temporary local folder (``TMPDIR``), which only
works for one process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from jkd.errors import InputError
from jkd.types import Tree


class ArrayStore:
    """Writes one tree at a time. The files hold a flat dict, ``{path: array}``: the structure is that of ``like`` in `restore`.

    Args:
        meet: ``meet(key=…, timeout_ms=…)`` returns when all processes are there; how they wait for each other at the end of a save.
    """

    def __init__(self, meet: ocp.multihost.BarrierSyncFn) -> None:
        _reroute_logs()
        self._meet = meet
        self._checkpointer = _checkpointer(meet)
        self._on_the_way: tuple[tempfile.TemporaryDirectory, epath.Path] | None = None

    def save(self, place: epath.Path, tree: Tree) -> None:
        """Starts to write ``tree`` to the new directory ``place``; returns as soon as its arrays may be donated.

        Raises:
            OSError: the directory cannot be made.
        """
        # orbax refuses arrays without elements; `restore` makes them from their shape
        arrays = {name: _plain(leaf) for name, leaf in named(tree).items() if leaf.size}
        if not direct(place):
            self._on_the_way = tempfile.TemporaryDirectory(prefix="jkd-"), place
            place = epath.Path(self._on_the_way[0].name) / "arrays"
        self._checkpointer.save(place, args=ocp.args.PyTreeSave(arrays))

    def wait(self) -> None:
        """Returns when the tree is on disk.

        Raises:
            Exception: whatever orbax or tensorstore raised while writing. The store can be used again.
        """
        try:
            self._checkpointer.wait_until_finished()
            if self._on_the_way is not None:
                folder, place = self._on_the_way
                _copy(epath.Path(folder.name) / "arrays", place)
        except Exception:
            # One that failed to write its metadata raises that again at each later call, its `close` included.
            with contextlib.suppress(Exception):
                self._checkpointer.close()
            self._checkpointer = _checkpointer(self._meet)
            raise
        finally:
            if self._on_the_way is not None:
                self._on_the_way[0].cleanup()
                self._on_the_way = None

    def restore(self, place: epath.Path, like: Tree, *, padded: Collection[str] = ()) -> Tree:
        """The arrays at ``place`` as the tree ``like`` (arrays, or shapes with shardings), each in its place.

        `describe` must give the same for both trees, but for what is ``padded``: paths of leaves that are filled up with zeros, or
        cut, to the size that ``like`` has.

        Raises:
            InputError: a leaf of ``like`` has no sharding.
        """
        leaves = named(like)
        shapes = {name: _plain_shape(name, leaf) for name, leaf in leaves.items()}
        saved = {name: shape for name, shape in shapes.items() if math.prod(shape.shape)}
        how = ocp.checkpoint_utils.construct_restore_args(saved)
        how |= {name: dataclasses.replace(how[name], strict=False) for name in padded if name in how}
        args = ocp.args.PyTreeRestore(item=saved, restore_args=how)
        with contextlib.ExitStack() as stack:
            if not direct(place):
                folder = epath.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jkd-")))
                _copy(place, folder / "arrays")
                place = folder / "arrays"
            arrays = self._checkpointer.restore(place, args=args)
        values = []
        for name, leaf in leaves.items():
            shape = shapes[name]
            value = arrays[name] if name in arrays else jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
            values.append(jax.random.wrap_key_data(value, impl=_key_impl(leaf)) if _is_key(leaf) else value)
        return jax.tree.unflatten(jax.tree.structure(like), values)

    def close(self) -> None:
        self._checkpointer.close()


def describe(tree: Tree) -> dict[str, str]:
    """``{path: "float32[8, 16]"}`` of every leaf, in order; keys say which generator they are for (``key<fry>[]``)."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named(tree).items()}


def direct(place: epath.Path) -> bool:
    """Whether orbax can write there by itself."""
    return "://" not in str(place) or str(place).startswith("gs://")


def _copy(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            path.copy(target / path.name, overwrite=True)


def _checkpointer(meet: ocp.multihost.BarrierSyncFn) -> ocp.AsyncCheckpointer:
    # By default every replica writes a slice of a replicated array. Cutting them compiles a program for each shape and device,
    # while training waits; what is large enough for that to pay is split over fsdp anyway.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    # Uncompressed: trained weights shrink by 8 % at most, and saving them takes two to four times as long.
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False)
    return ocp.AsyncCheckpointer(handler, async_options=ocp.options.AsyncOptions(barrier_sync_fn=meet))


def named(tree: Tree) -> dict[str, Any]:
    """``{path: leaf}`` in the order of the tree's leaves; any pytree."""
    named: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        named[name if name not in named else f"{name}#{len(named)}"] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """Which generator a key is for, of a shape too: jax tells that of arrays only, traced ones included."""
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return impls[0]


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_shape(name: str, leaf: Any) -> jax.ShapeDtypeStruct:
    if getattr(leaf, "sharding", None) is None:
        raise InputError(f"restore: {name} has no sharding; give shapes with their shardings, or jax arrays")
    data = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if _is_key(leaf):
        data = jax.eval_shape(jax.random.key_data, data)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _reroute_logs() -> None:
    """Sends what orbax logs, and absl would print, to the logger ``jkd.orbax``, which is silent until it is given a handler."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)
        logging.getLogger("jkd.orbax").addHandler(logging.NullHandler())
        logging.getLogger("jkd.orbax").propagate = False  # absl itself gives the root logger a handler that prints


def _not_orbax(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
        return True
    target = logging.getLogger("jkd.orbax")
    if target.isEnabledFor(record.levelno):
        target.handle(record)
    return False
