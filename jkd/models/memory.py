"""The key-value cache of a decoder: arrays of fixed shape that a loop carries.

A tree of ``key`` and ``value`` ``[depth, rows, length, kv_heads, head_dim]``. Once a call has written to it, also ``position``
``[rows, length]``, of the token in each column or -1 where there is none to see (padding, a finished row), and ``filled``, how many
columns are in use. All rows write to the same columns, so prompts of several lengths leave holes, which nobody sees.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jkd.types import Array, Tree


def empty_cache(depth: int, rows: int, length: int, heads: int, dim: int, dtype: Any) -> Tree:
    """Room for ``length`` tokens in each row."""
    shape = (depth, rows, length, heads, dim)
    return {"key": jnp.zeros(shape, dtype), "value": jnp.zeros(shape, dtype)}


def placed(cache: Tree, position: Array, real: Array, windows: list[int | None]) -> tuple[Tree, Array, Array | None]:
    """New tokens get their columns and positions, before their keys are known.

    Args:
        cache: empty, or as an earlier call gave it back.
        position: ``[rows, new]`` among the new tokens.
        real: ``[rows, new]`` bool; the others are never seen.
        windows: how far each kind of layer sees, None for everything.

    Returns:
        The cache with the new positions; the positions in the whole row; ``[kinds, rows, 1, new, length]`` bool, which columns each
        new token sees, or None where the cache was empty: then they see one another alone.
    """
    rows, length = position.shape[0], cache["key"].shape[2]
    was_empty = "position" not in cache
    if was_empty:
        cache = {**cache, "position": jnp.full((rows, length), -1, jnp.int32), "filled": jnp.zeros((), jnp.int32)}
    else:
        position = position + cache["position"].max(1, keepdims=True) + 1
    new = jnp.where(real, position, -1)
    held = jax.lax.dynamic_update_slice(cache["position"], new, (0, cache["filled"]))
    cache = {**cache, "position": held}
    if was_empty:
        return cache, position, None
    behind = position[:, :, None] - held[:, None, :]
    visible = (held[:, None, :] >= 0) & (behind >= 0)
    seen = jnp.stack([visible if window is None else visible & (behind < window) for window in windows])
    return cache, position, seen[:, :, None]


def advanced(cache: Tree, columns: int) -> Tree:
    """The cache after all layers have written ``columns`` tokens."""
    return {**cache, "filled": cache["filled"] + columns}


class Memory:
    """The cache while one layer runs.

    Args:
        cache: of all layers, its positions `placed`.
        layer: whose turn it is.
        seen: what `placed` gave.
    """

    def __init__(self, cache: Tree, layer: Array, seen: Array | None):
        self.cache, self.layer, self.seen = cache, layer, seen

    def write(self, key: Array, value: Array) -> None:
        """Keeps the new tokens' ``[rows, new, kv_heads, head_dim]``; a loop that carries the cache does this in place."""
        start = (self.layer, 0, self.cache["filled"], 0, 0)
        for name, new in (("key", key), ("value", value)):
            held = self.cache[name]
            self.cache = {**self.cache, name: jax.lax.dynamic_update_slice(held, new[None].astype(held.dtype), start)}

    def read(self, dtype: Any) -> tuple[Array, Array]:
        """All keys and values of this layer, ``[rows, length, kv_heads, head_dim]``."""
        own = lambda name: jax.lax.dynamic_index_in_dim(self.cache[name], self.layer, keepdims=False).astype(dtype)  # noqa: E731
        return own("key"), own("value")
