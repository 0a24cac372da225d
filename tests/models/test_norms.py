"""The zoo's BatchNorm against Flax's: the same numbers, statistics and gradients, with less kept for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jkd.models import norms

SHAPE = (6, 5, 4, 3)


def pair(**settings):
    rng = np.random.default_rng(0)
    both = [kind(3, rngs=nnx.Rngs(0), momentum=0.8, **settings) for kind in (nnx.BatchNorm, norms.BatchNormed)]
    for name, value in (("scale", rng.normal(size=3)), ("bias", rng.normal(size=3)), ("var", rng.uniform(0.5, 2, size=3))):
        for norm in both:
            getattr(norm, name).set_value(jnp.asarray(value, jnp.float32))
    return both


def draw(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return jnp.asarray(3 + rng.normal(size=SHAPE), dtype), jnp.asarray(rng.normal(size=SHAPE), jnp.float32)


def answers(norm, x, weights):
    """The answer, the gradients (and those of a function of them), and the statistics that stay."""
    graph, params, rest = nnx.split(norm, nnx.Param, ...)

    def loss(x, params):
        module = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))  # a copy of its own
        y = module(x)
        return jnp.sum(weights * y**2), (y, nnx.state(module, nnx.BatchStat))

    def slope(x, params):
        of_x, of_params = jax.grad(lambda *a: loss(*a)[0], (0, 1))(x, params)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves((of_x, of_params)))

    gradients, (y, statistics) = jax.grad(loss, (0, 1), has_aux=True)(x, params)
    return y, gradients, jax.grad(slope, (0, 1))(x, params), statistics


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 1e-2)])
def test_numbers_gradients_and_statistics_are_flaxs(dtype, tolerance):
    x, weights = draw(dtype)
    theirs, ours = (jax.jit(lambda x, norm=norm: answers(norm, x, weights))(x) for norm in pair())
    assert [leaf.dtype for leaf in jax.tree.leaves(theirs)] == [leaf.dtype for leaf in jax.tree.leaves(ours)]
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        # sums over 120 numbers of up to 50; of bfloat16 each gradient is rounded to 8 bits
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance * max(1, np.abs(a).max()))


def test_what_is_no_training_is_flaxs_own():
    x, _ = draw()
    kept = jnp.arange(SHAPE[0]).reshape(-1, 1, 1, 1) < 4
    for theirs, ours in (pair(), pair(use_running_average=True), pair(dtype=jnp.bfloat16)):
        for how in ({"use_running_average": True}, {"use_running_average": False, "mask": kept}, {}):
            a, b = theirs(x, **how), ours(x, **how)
            assert a.dtype == b.dtype
            # Flax computes in the dtype that it gives; numbers of up to 4 then lose a few of their 8 bits on the way
            np.testing.assert_allclose(np.float32(b), np.float32(a), rtol=2e-6, atol=0.05 if b.dtype == jnp.bfloat16 else 2e-6)


def test_statistics_that_are_returned_have_their_gradients_too():
    x, weights = draw()

    def loss(normalise):
        def inner(x):
            y, mean, variance = normalise(x, jnp.ones(3), jnp.zeros(3))
            return jnp.sum(weights * y) + jnp.sum(jnp.array([1.0, 2, 3]) * mean) + jnp.sum(jnp.array([3.0, 1, 2]) * variance)

        return jax.grad(inner)(x)

    def plain(x, scale, bias):
        mean, variance = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        return (x - mean) / jnp.sqrt(variance + 1e-5), mean[0, 0, 0], variance[0, 0, 0]

    ours = loss(lambda x, scale, bias: norms.normalised(x, scale, bias, 1e-5))
    np.testing.assert_allclose(ours, loss(plain), rtol=1e-4, atol=1e-5)


def test_nothing_but_the_features_is_kept_for_the_gradient():
    x, _ = draw()
    (_, scale, bias, *more) = jax.eval_shape(lambda x: norms._normalised(x, jnp.ones(3), jnp.ones(3), 1e-5)[1], x)
    assert [leaf.shape for leaf in (scale, bias, *more)] == [(3,)] * 4
