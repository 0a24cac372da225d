"""Layers that several networks are made of, in whatever dtype their parameters come."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jkd import sharding
from jkd.models.attention import attend

Array = jax.Array


def gather(path: str, layer: nnx.Module) -> None:
    """Within a scan over the stack at ``path``: this layer's parameters are made whole; see `jkd.sharding.one_layer`."""
    state = nnx.state(layer, nnx.Param)
    flat = {tuple(map(str, where)): leaf for where, leaf in nnx.to_flat_state(state)}
    whole = sharding.one_layer(path, {where: leaf.get_value() for where, leaf in flat.items()})
    for where, leaf in flat.items():
        leaf.set_value(whole[where])
    nnx.update(layer, state)


class Embed(nnx.Module):
    """A row of a table for each integer: ``[...]`` to ``[..., dim]``; numbers beyond the table give NaN."""

    def __init__(self, rows: int, dim: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (rows, dim)))

    def __call__(self, numbers: Array) -> Array:
        return jnp.take(self.embedding[...], numbers, axis=0)


class RMSNorm(nnx.Module):
    """``x / rms(x) * scale`` over the last axis, in float32; ``scale`` is stored less 1 where ``centered``."""

    def __init__(self, features: int, *, epsilon: float, centered: bool = False):
        self.scale = nnx.Param((jnp.zeros if centered else jnp.ones)((features,)))
        self.epsilon, self.offset = epsilon, 1.0 if centered else 0.0

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].astype(jnp.float32) + self.offset
        return (normal * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention in both directions: ``[batch, time, dim]`` to the same.

    ``segment`` int ``[batch, time]``: tokens see each other only where these are equal.
    """

    def __init__(self, dim: int, heads: int, dropout: float, rngs: nnx.Rngs):
        init = nnx.initializers.truncated_normal(0.02)
        # One linear map of the whole width each; the heads are axes of its output.
        make = lambda: nnx.LinearGeneral(dim, (heads, dim // heads), kernel_init=init, rngs=rngs)  # noqa: E731
        self.query, self.key, self.value = make(), make(), make()
        self.out = nnx.LinearGeneral((heads, dim // heads), dim, axis=(-2, -1), kernel_init=init, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: Array, segment: Array | None = None) -> Array:
        attended = attend(self.query(x), self.key(x), self.value(x), causal=False, segment=segment)
        return self.dropout(self.out(attended))
