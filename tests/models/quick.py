"""What keeps these tests quick: compiling takes nearly all of their time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in a quarter of the time; the programs here are too small to gain from optimisation."""


def fill(model, seed=0):
    """The model with weights drawn by numpy, because compiling ``init`` takes longer than all that is tested with them."""
    numbers = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.ones(shape.shape, shape.dtype)
        fan_in = max(int(np.prod(shape.shape[:-1])), 1)
        return jnp.asarray(numbers.normal(size=shape.shape) / fan_in**0.5, shape.dtype)

    return model.with_weights(*jax.tree.map_with_path(leaf, (model.params, model.buffers)))
