"""NNX modules written as others write them, which know nothing of jkd."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

DIM = 4


class Block(nnx.Module):
    """Calls one layer twice, and has a method of its own, a random stream of an odd name and batch statistics."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(DIM, DIM, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rng_collection="weird", rngs=rngs)
        self.norm = nnx.BatchNorm(DIM, rngs=rngs)

    def twice(self, x):
        return self.linear(nnx.tanh(self.linear(x)))

    def __call__(self, x):
        return self.norm(self.drop(self.twice(x)))


class Net(nnx.Module):
    """Lists, dicts, a scanned and rematerialised stack, a stored Rngs, a bare array."""

    def __init__(self, *, rngs):
        self.blocks = nnx.List([Block(rngs) for _ in range(2)])
        self.named = nnx.Dict(first=Block(rngs))
        self.data = nnx.data({"second": [Block(rngs)]})
        self.stack = _stack(rngs)
        self.rngs = rngs
        self.offset = jnp.ones((DIM,))
        self.head = nnx.Linear(DIM, 3, rngs=rngs)

    def features(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.data["second"][0](self.named["first"](x)) + self.offset[None]

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @nnx.remat
        def layers(block, x):
            return block(x)

        return layers(self.stack, x)

    def __call__(self, x):
        return self.head(self.features(x))


def _stack(rngs):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return Block(rngs)

    return make(rngs)


class Small(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(DIM, DIM, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(DIM, rngs=rngs)

    def __call__(self, x):
        return self.drop(self.norm(self.linear(x)))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), a, b)
