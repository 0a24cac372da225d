"""An NNX module as plain trees: which Variables are params, which buffers, which random state, and the way back."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jkd.models.adapt import shapes_of
from jkd.types import Tree

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """A module taken apart: its graph, and for each Variable its path, its kind and a copy that holds a shape."""

    graph: Any
    leaves: tuple[tuple[tuple, str, Any], ...]

    @classmethod
    def of(cls, module: nnx.Module) -> Network:
        graph, state = nnx.split(module)
        leaves = [(path, _kind(leaf), _with_value(leaf, shapes_of(_value(leaf)))) for path, leaf in nnx.to_flat_state(state)]
        return cls(graph, tuple(leaves))

    def split(self, module: nnx.Module) -> tuple[Tree, Tree]:
        """The params and buffers of a module of this structure."""
        values = {path: _value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(module))}
        pick = lambda kind: _nest({_text(path): values[path] for path, this, _ in self.leaves if this == kind})  # noqa: E731
        return pick("param"), pick("buffer")

    def build(self, params: Tree, buffers: Tree, key: jax.Array | None) -> nnx.Module:
        """A new module with these values; shapes take the place of random state where ``key`` is None."""
        trees = {"param": params, "buffer": buffers}
        state = []
        for number, (path, kind, leaf) in enumerate(self.leaves):
            if kind in trees:
                leaf = _with_value(leaf, _at(trees[kind], _text(path)))
            elif key is not None:
                leaf = _with_value(leaf, _random_state(_value(leaf), jax.random.fold_in(key, number)))
            state.append((path, leaf))
        # Without copy=True the module's Variables would be the ones above, and a later trace would find them used.
        return nnx.merge(self.graph, nnx.from_flat_state(state), copy=True)

    def updated(self, module: nnx.Module, buffers: Tree) -> Tree:
        """``buffers`` as the module's call left them, of the same structure and dtypes."""
        values = {path: _value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(module))}
        new = {}
        for path, kind, _ in self.leaves:
            if kind == "buffer":
                old = _at(buffers, _text(path))
                # The same dtypes, else buffers could not be carried through lax.scan.
                new[_text(path)] = jax.tree.map(lambda o, n: jnp.asarray(n, o.dtype), old, values.get(path, old))
        return _nest(new)

    def shapes(self) -> nnx.Module:
        """The module holding shapes."""
        blank = {kind: _nest({_text(p): _value(v) for p, k, v in self.leaves if k == kind}) for kind in ("param", "buffer")}
        return self.build(blank["param"], blank["buffer"], None)

    @property
    def names(self) -> dict[str, set[Path]]:
        return {kind: {_text(p) for p, k, _ in self.leaves if k == kind} for kind in ("param", "buffer")}

    @property
    def random(self) -> bool:
        return any(kind == "random" for _, kind, _ in self.leaves)

    @property
    def batch_statistics(self) -> bool:
        return any(isinstance(leaf, nnx.BatchStat) for _, _, leaf in self.leaves)


_HOST = (np.ndarray, np.generic, bool, int, float, complex)


def _value(leaf: Any) -> Any:
    value = leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
    return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, _HOST) else x, value)


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.copy(value) if isinstance(leaf, nnx.Variable) else value


def _kind(leaf: Any) -> str:
    dtypes = [x.dtype for x in jax.tree.leaves(_value(leaf)) if hasattr(x, "dtype")]
    if isinstance(leaf, nnx.RngState) or any(jnp.issubdtype(dtype, jax.dtypes.prng_key) for dtype in dtypes):
        return "random"
    return "param" if isinstance(leaf, nnx.Param) else "buffer"


def _random_state(shape: Any, key: jax.Array) -> Any:
    """Fresh keys where the stream holds keys (one, or one for each layer of a stack), zero where it counts draws."""

    def fresh(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.split(key, x.shape) if x.shape else key
        return jnp.zeros(x.shape, x.dtype)

    return jax.tree.map(fresh, shape)


def _text(path: tuple) -> Path:
    return tuple(map(str, path))


def _nest(flat: Mapping[Path, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def _at(tree: Any, path: Path) -> Any:
    return functools.reduce(operator.getitem, path, tree)
