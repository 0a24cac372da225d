"""Layers that several networks are made of, in whatever dtype their parameters come."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jkd import sharding
from jkd.losses.chunked.places import split, token_axes, token_shards
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

    def __call__(self, numbers: Array, collects: Array | None = None) -> Array:
        return looked_up(self.embedding[...], numbers, collects)

    def collects(self, batch: int) -> Array | None:
        """Where all gradients of the table are added before they are summed over devices, ``[shards, rows, dim]``.

        For a table that is read in two ways, by ``batch`` rows that are split over shards. XLA sums a partial result over devices
        where it is made, so two readers would send two arrays of the table's size. Of a copy for each shard, which lies where its
        rows of the batch do, there is nothing to sum: what sums is the gradient of copying, once. The copies' values are not read,
        so nothing is copied. None where the batch is not split.
        """
        mesh = jax.sharding.get_abstract_mesh()
        shards = token_shards(mesh, batch)
        if shards == 1:
            return None
        table = self.embedding[...].astype(jnp.promote_types(self.embedding.dtype, jnp.float32))
        return split(jnp.broadcast_to(table[None], (shards, *table.shape)), mesh, token_axes(mesh))


def looked_up(table: Array, numbers: Array, collects: Array | None = None) -> Array:
    """``table[numbers]``; the gradient goes to the copies in ``collects``, by shards of the first axis of ``numbers``, if given."""

    def read(table: Array, numbers: Array) -> Array:
        return jnp.take(table, numbers, axis=0)

    if collects is None:
        return read(table, numbers)
    like, mesh = jax.ShapeDtypeStruct(collects.shape[1:], collects.dtype), jax.sharding.get_abstract_mesh()

    def by_shard(numbers: Array, cotangent: Array) -> Array:
        return jax.linear_transpose(lambda table: read(table, numbers), like)(cotangent.astype(like.dtype))[0]

    def backward(numbers: Array, cotangent: Array) -> tuple[None, None, Array]:
        apart = (x.reshape(collects.shape[0], -1, *x.shape[numbers.ndim :]) for x in (numbers, cotangent))
        return None, None, split(jax.vmap(by_shard)(*apart), mesh, token_axes(mesh))

    collected = jax.custom_vjp(lambda table, numbers, collects: read(table, numbers))
    collected.defvjp(lambda table, numbers, collects: (read(table, numbers), numbers), backward)
    return collected(table, numbers, collects)


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
