"""Targets: each against what it should be by hand, its dtypes, gradients, leading shapes and bad input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Compiled, grad, value_and_grad
from jaxtyping import config as jaxtyping_config

import jkd.losses
import jkd.targets

losses, targets = Compiled(jkd.losses), Compiled(jkd.targets)

LEADING = [(), (5,), (2, 3), (2, 2, 3)]


def logits(leading, size=7, seed=0):
    return 2 * np.random.default_rng(seed).normal(size=(*leading, size))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def labels(leading, size=7):
    return np.asarray(np.random.default_rng(1).integers(0, size, size=leading), np.int32)


def kept(p, k):
    threshold = np.sort(p, -1)[..., -k][..., None]
    return p >= threshold


def by_marginal(z, k):
    p, top = softmax(z), kept(softmax(z), k)
    rest = np.where(top, 0, p).sum(-1, keepdims=True) / (z.shape[-1] - k)
    return np.where(top, p, rest)


def by_renormalised(z, k):
    p = np.where(kept(softmax(z), k), softmax(z), 0)
    return p / p.sum(-1, keepdims=True)


def by_progressive(z):
    return 0.3 * softmax(z) + 0.7 * np.eye(7)[labels(z.shape[:-1])]


# name: (jkd's logits, the distribution they stand for)
DISTRIBUTIONS = {
    "smooth": (lambda z: targets.smooth(z, epsilon=0.2), lambda z: 0.8 * softmax(z) + 0.2 / 7),
    "sharpen": (
        lambda z: targets.sharpen(z, temperature=0.5),
        lambda z: softmax(z) ** 2 / (softmax(z) ** 2).sum(-1, keepdims=True),
    ),
    "mean_probabilities": (
        lambda z: targets.mean_probabilities(jnp.stack([z, -z, 2 * z]), weights=jnp.array([1.0, 1.0, 2.0])),
        lambda z: (softmax(z) + softmax(-z) + 2 * softmax(2 * z)) / 4,
    ),
    "mean_probabilities at T": (
        lambda z: targets.mean_probabilities(jnp.stack([z, -z]), temperature=3.0) / 3,
        lambda z: (softmax(z / 3) + softmax(-z / 3)) / 2,
    ),
    "mean_logits": (lambda z: targets.mean_logits(jnp.stack([z, 3 * z])), lambda z: softmax(2 * z)),
    "mean_logits weighted": (
        lambda z: targets.mean_logits(jnp.stack([z, 3 * z]), weights=jnp.array([3, 1])),
        lambda z: softmax(1.5 * z),
    ),
    "hard": (targets.hard, lambda z: np.eye(7)[z.argmax(-1)]),
    "smoothed": (targets.smoothed, lambda z: by_marginal(z, 1)),
    "marginal": (lambda z: targets.marginal(z, k=3), lambda z: by_marginal(z, 3)),
    "renormalised": (lambda z: targets.renormalised(z, k=3), lambda z: by_renormalised(z, 3)),
    "progressive": (lambda z: targets.progressive(z, jnp.asarray(labels(z.shape[:-1])), alpha=0.3), by_progressive),
}
named = pytest.mark.parametrize("name", DISTRIBUTIONS)
ON_A_TARGET = value_and_grad(lambda student, target: losses.soft_cross_entropy(student, target).sum())


@named
def test_distribution(name):
    ours, expected = DISTRIBUTIONS[name]
    draws = [logits(leading) for leading in LEADING]
    with jax.enable_x64(True):
        values = jax.jit(lambda draws: [ours(z) for z in draws])(draws)
    for value, z in zip(values, draws, strict=True):
        assert value.shape == z.shape
        np.testing.assert_allclose(softmax(np.asarray(value)), expected(z), rtol=1e-12, atol=1e-14)


@named
def test_dtypes_and_extremes(name):
    """float32 at least, also out of bfloat16; never nan, and a loss on it is finite with a finite gradient at +-1e4."""
    ours = jax.jit(DISTRIBUTIONS[name][0])
    student = jnp.asarray(logits((5,), seed=3), jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        for z in (logits((5,)), np.zeros((5, 7)), 1e4 * np.sign(logits((5,))), 1e4 * np.eye(7)[:5]):
            value = ours(jnp.asarray(z, dtype))
            assert value.dtype == jnp.float32
            assert not np.any(np.isnan(value))
            loss, gradient = ON_A_TARGET(student, value)
            assert np.isfinite(loss)
            assert np.all(np.isfinite(gradient))
    with jax.enable_x64(True):
        assert jax.eval_shape(ours, logits((5,))).dtype == jnp.float64


def test_marginal_keeps_the_kept_exactly():
    """The stored classes' probabilities come back as they were, and the whole sums to 1."""
    z = jnp.asarray(logits((100,), 50), jnp.float32)
    before, after = softmax(np.asarray(z)), np.exp(targets.marginal(z, k=5))
    ids = np.argsort(-z, -1)[:, :5]
    np.testing.assert_allclose(np.take_along_axis(after, ids, -1), np.take_along_axis(before, ids, -1), rtol=1e-6)
    np.testing.assert_allclose(after.sum(-1), np.ones(100), rtol=1e-5)


def test_every_class_kept_is_the_teacher():
    z = jnp.asarray(logits((5,)), jnp.float32)
    for codec in (targets.marginal, targets.renormalised):
        np.testing.assert_allclose(codec(z, k=7), jax.nn.log_softmax(z), rtol=1e-5)


def test_standardize():
    z = logits((2, 3))
    with jax.enable_x64(True):
        value = targets.standardize(jnp.asarray(z))
        expected = (z - z.mean(-1, keepdims=True)) / (z.std(-1, keepdims=True, ddof=1) + 1e-7)
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_standardize_of_equal_logits_is_zero_with_a_small_gradient():
    function = value_and_grad(lambda z: jnp.sum(targets.standardize(z) ** 2))
    for z in (jnp.zeros(5), jnp.full(5, 1e4)):
        value, gradient = function(z)
        assert value == 0
        assert np.all(np.abs(gradient) < 10)


def test_noise_has_the_asked_scale_at_each_position():
    scale = jnp.array([0.0, 0.5, 2.0])
    drawn = targets.noise(jnp.zeros((3, 20000)), jax.random.key(0), scale=scale)
    np.testing.assert_allclose(drawn.std(-1), scale, rtol=0.03)  # 3 / sqrt(2 * 20000) is 0.015
    assert np.array_equal(drawn, targets.noise(jnp.zeros((3, 20000)), jax.random.key(0), scale=scale))


def test_interpolate_moves_from_student_to_teacher_and_has_no_gradient_for_the_student():
    student, teacher = jnp.asarray(logits((5,), seed=1), jnp.float32), jnp.asarray(logits((5,)), jnp.float32)
    np.testing.assert_allclose(targets.interpolate(student, teacher, t=0.0), student)
    np.testing.assert_allclose(targets.interpolate(student, teacher, t=1.0), teacher)
    assert not np.any(grad(lambda s: targets.interpolate(s, teacher, t=0.3).sum())(student))
    # Along the path the divergence from the student never falls (a geometric path).
    steps = [losses.forward_kl(student, targets.interpolate(student, teacher, t=t)) for t in jnp.linspace(0, 1, 11)]
    assert np.all(np.diff(np.stack(steps), axis=0) >= -1e-6)


def test_weights_of_zero_beside_masked_classes():
    """t = 1 ends at the teacher and t = 0 at the student, whatever the other masks; so with a teacher of weight 0."""
    student, teacher = jnp.array([0.0, -jnp.inf, 1.0]), jnp.array([1.0, 2.0, -jnp.inf])
    between = targets.interpolate(student, teacher, t=0.5)
    np.testing.assert_array_equal(between, [0.5, -np.inf, -np.inf])

    @jax.jit
    def run(t):
        def total(teacher, t):
            mixed = targets.interpolate(student, teacher, t=t)
            return jnp.sum(jnp.where(mixed > -jnp.inf, mixed, 0)), mixed

        gradients, mixed = jax.grad(total, argnums=(0, 1), has_aux=True)(teacher, t)
        return gradients, mixed, targets.mean_logits(jnp.stack([student, teacher]), weights=jnp.stack([1 - t, t]))

    # The slope of t is the sum of teacher less student over the classes that stay, a side at -inf counting as 0.
    for t, expected, kept, of_t in ((0.0, student, [0.0, 0.0, 0.0], 1 - 1), (1.0, teacher, [1.0, 1.0, 0.0], 1 + 2)):
        (slope, slope_of_t), mixed, mean = run(t)
        np.testing.assert_array_equal(mixed, expected)
        np.testing.assert_array_equal(mean, expected)
        np.testing.assert_array_equal(slope, kept)
        assert slope_of_t == of_t


def test_prototype():
    features, means = logits((2, 3), 4), logits((5,), 4, seed=2)
    cosines = features @ means.T / np.linalg.norm(features, axis=-1)[..., None] / np.linalg.norm(means, axis=-1)
    with jax.enable_x64(True):
        value = targets.prototype(jnp.asarray(features), jnp.asarray(means))
        np.testing.assert_allclose(value, np.concatenate([10 * cosines, np.zeros((2, 3, 1))], -1), rtol=1e-12)
        np.testing.assert_allclose(
            targets.prototype(jnp.asarray(features), jnp.asarray(means), scale=1.0, background=None), cosines, rtol=1e-12
        )
    gradient = grad(lambda f: targets.prototype(f, jnp.asarray(means)).sum())(jnp.zeros((2, 4)))
    assert np.all(np.isfinite(gradient))


def test_lelp_split_then_merge_is_the_teacher():
    z, a = logits((2, 3)), logits((2, 3, 7), 4, seed=5)
    with jax.enable_x64(True):
        split = targets.lelp_split(jnp.asarray(z), jnp.asarray(a))
        expected = (softmax(z)[..., None] * softmax(a)).reshape(2, 3, 28)
        np.testing.assert_allclose(jnp.exp(split), expected, rtol=1e-12)
        np.testing.assert_allclose(jnp.exp(targets.lelp_merge(split, subclasses=4)), softmax(z), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: targets.standardize(jnp.zeros((3, 1))), ValueError, r"logits must have at least 2 classes.*float32\[3,1\]"),
        (lambda: targets.smooth(jnp.zeros((3, 0))), ValueError, r"teacher_logits must have a non-empty classes axis"),
        (lambda: targets.smooth(jnp.zeros(())), ValueError, r"teacher_logits must be \[..., classes\]"),
        (lambda: targets.mean_logits(jnp.zeros(3)), ValueError, r"teacher_logits must be \[teachers, ..., classes\]"),
        (lambda: targets.mean_logits(jnp.zeros((2, 3)), weights=jnp.ones(3)), ValueError, r"weights must be \[teachers\]"),
        (
            lambda: targets.marginal(jnp.zeros((2, 3)), k=4),
            ValueError,
            r"k must lie between 1 and the number of classes, got 4",
        ),
        (lambda: targets.progressive(jnp.zeros((2, 3)), jnp.zeros(2), alpha=0.5), TypeError, r"labels must be integers"),
        (lambda: targets.prototype(jnp.zeros((2, 3)), jnp.zeros((4, 2))), ValueError, r"prototypes must be \[classes, dim\]"),
        (lambda: targets.lelp_split(jnp.zeros((2, 3)), jnp.zeros((3, 4))), ValueError, r"subclass_logits must be"),
        (lambda: targets.lelp_merge(jnp.zeros((2, 7)), subclasses=3), ValueError, r"subclasses must divide.*float32\[2,7\]"),
        (lambda: targets.interpolate(jnp.zeros(3), jnp.zeros(4), t=0.5), ValueError, r"same number of classes"),
    ],
)
def test_bad_input(call, error, message):
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(error, match=message):
            call()
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
