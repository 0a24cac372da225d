"""Optimizers against transcriptions of their definitions in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jkd import optim
from jkd.schedules import Clock, Linear

STEPS = 6


def parameters(seed):
    rng = np.random.default_rng(seed)
    return {"norm": {"scale": rng.normal(size=3)}, "dense": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)}}


def float32(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def run(optimizer):
    """Parameters after a few steps with given gradients."""
    rule = optimizer.build(lambda count: Clock(count, STEPS, count))
    params = float32(parameters(0))
    state, update = rule.init(params), jax.jit(rule.update)
    for step in range(STEPS):
        change, state = update(float32(parameters(step + 1)), state, params)
        params = optax.apply_updates(params, change)
    return params


def each(function, *trees):
    return jax.tree.map(function, *trees)


def close(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.9, 5e-2), (0.9, 0.0), (0.0, 5e-2)])
def test_sgd_is_that_of_pytorch(momentum, weight_decay, nesterov):
    params, buffer = parameters(0), None
    for step in range(STEPS):  # torch.optim.SGD, dampening 0
        gradient = each(lambda g, p: g + weight_decay * p, parameters(step + 1), params)
        if momentum:
            buffer = gradient if buffer is None else each(lambda b, g: momentum * b + g, buffer, gradient)
            gradient = each(lambda g, b: g + momentum * b, gradient, buffer) if nesterov else buffer
        params = each(lambda p, g: p - 0.1 * g, params, gradient)
    close(run(optim.sgd(0.1, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)), params)


def adamw(rate, weight_decay, decays, b1=0.9, b2=0.999, eps=1e-8):
    params = parameters(0)
    first, second = (each(np.zeros_like, params) for _ in range(2))
    for step in range(STEPS):
        gradient, t = parameters(step + 1), step + 1
        first = each(lambda m, g: b1 * m + (1 - b1) * g, first, gradient)
        second = each(lambda v, g: b2 * v + (1 - b2) * g * g, second, gradient)
        move = each(lambda m, v: m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps), first, second)  # noqa: B023
        params = each(lambda p, u: p - rate(step) * (u + weight_decay * decays(p) * p), params, move)  # noqa: B023
    return params


def test_adamw_decays_what_has_two_axes_or_more_by_default():
    close(run(optim.adamw(0.1, weight_decay=0.5)), adamw(lambda step: 0.1, 0.5, lambda p: p.ndim >= 2))


def test_patterns_say_what_decays():
    found = run(optim.adamw(0.1, weight_decay=0.5, decay=("*", "!*kernel")))
    close(found, adamw(lambda step: 0.1, 0.5, lambda p: p.ndim < 2))


def test_the_learning_rate_may_be_a_schedule_and_scales_the_decay():
    found = run(optim.adamw(Linear(0.1, 0.0), weight_decay=0.5))
    close(found, adamw(lambda step: 0.1 * (1 - step / STEPS), 0.5, lambda p: p.ndim >= 2))


def test_clipping_bounds_the_norm_over_the_whole_group_before_anything_else():
    params = parameters(0)
    for step in range(STEPS):
        gradient = parameters(step + 1)
        norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
        params = each(lambda p, g: p - 0.1 * (g * min(1, 0.5 / norm) + 0.2 * p), params, gradient)  # noqa: B023
    close(run(optim.sgd(0.1, momentum=0.0, weight_decay=0.2, clip=0.5)), params)


def test_any_transformation_of_optax_fits():
    found = run(optim.from_optax(0.1, optax.scale_by_sign))
    params = parameters(0)
    for step in range(STEPS):
        params = each(lambda p, g: p - 0.1 * np.sign(g), params, parameters(step + 1))
    close(found, params)
    decayed = run(optim.from_optax(0.1, optax.scale_by_sign, weight_decay=0.1, decay=("dense/*",)))
    assert not np.allclose(decayed["dense"]["bias"], found["dense"]["bias"])
    close(decayed["norm"], found["norm"])


def test_optimizers_are_values():
    assert optim.sgd(0.1) == optim.sgd(0.1) != optim.sgd(0.1, nesterov=True)
    assert optim.adamw(Linear(1, 0)) == optim.adamw(Linear(1, 0)) != optim.adamw(Linear(1, 0), b2=0.95)
