"""Inputs at the edge: classes, rows and entries that are masked out, numbers of few bits, and mistakes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Compiled
from jaxtyping import config as jaxtyping_config

import jkd.losses
import jkd.targets

losses = Compiled(jkd.losses)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def test_a_learned_temperature_has_its_slope_beside_what_is_left_out():
    """Scores of -inf, and what ``where`` drops (nan), give the value's derivative with respect to T that it has without them."""
    rng = np.random.default_rng(2)
    short = [rng.normal(size=(6, 8)) for _ in range(2)]
    masked, spoiled = ([np.concatenate([z, np.full((6, 3), fill)], -1) for z in short] for fill in (-np.inf, np.nan))

    def padded(targets, scores):
        return jnp.pad(targets, ((0, 0), (0, scores.shape[1] - 8)))

    def positives(z):
        return jnp.arange(z.shape[1])[None, :] < jnp.array([[2], [1], [3], [2], [1], [8]])

    functions = {
        "listwise_kl": lambda s, t, **more: jkd.losses.listwise_kl(s, t, **more),
        "soft_contrastive": lambda s, t, **more: jkd.losses.soft_contrastive(
            s, jax.nn.softmax(t[:, :8]) @ jnp.eye(8, len(s[0])), **more
        ),
        "channel_wise": lambda s, t, **more: jkd.losses.channel_wise(*(z[:, None, :, None] for z in (s, t)), **more),
        "decoupled_softmax": lambda s, t, **more: jkd.losses.decoupled_softmax(s, positives(s), **more),
        "soft_top_k": lambda s, t, **more: jkd.losses.soft_top_k(s, positives(s), k=2, **more),
        "mean_probabilities": lambda s, t, **more: jkd.targets.mean_probabilities(jnp.stack([s, t]), **more)[:, :8] ** 2,
    }
    with_where = ("listwise_kl", "soft_contrastive", "channel_wise")
    counted = np.arange(11) < np.full((6, 1), 8)

    def slope(name, inputs, **more):
        return jax.grad(lambda T: functions[name](*inputs, temperature=T, **more).sum())(2.0)

    @jax.jit
    def slopes(short, masked, spoiled, counted):
        found = {name: (slope(name, short), slope(name, masked)) for name in functions if name != "channel_wise"}
        for name in with_where:
            where = counted[:, None] if name == "channel_wise" else counted
            found[f"{name}(where=)"] = slope(name, short), slope(name, spoiled, where=where)
        return found

    for name, (expected, actual) in slopes(short, masked, spoiled, counted).items():
        assert expected != 0
        np.testing.assert_allclose(actual, expected, rtol=1e-8, err_msg=name)


DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "soft_cross_entropy",
    "js",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha_beta",
    "adaptive_kl",
    "listwise_kl",
)


def test_a_row_of_masked_classes_only():
    """It gives 0 and no gradient, over few and over many classes, and leaves the other rows alone."""

    def rows(name, student, teacher):
        if name == "soft_top_k":
            return jkd.losses.soft_top_k(student, jnp.ones(student.shape, bool), k=2)
        return getattr(jkd.losses, name)(student, teacher)

    def both(name, student, teacher):
        return rows(name, student, teacher), jax.grad(lambda s: rows(name, s, teacher).sum())(student)

    @jax.jit
    def run(few, many):
        found = {f"{name} of many": both(name, *many) for name in DIVERGENCES[:4]}
        return found | {name: both(name, *few) for name in (*DIVERGENCES, "soft_top_k")}

    full = [np.random.default_rng(3).normal(size=(2, 3, classes)) for classes in (5, 100)]
    masked = [np.where(np.arange(3)[:, None] == 1, -np.inf, pair) for pair in full]
    expected = run(*full)
    for name, (value, gradient) in run(*masked).items():
        np.testing.assert_allclose(value, np.array([1, 0, 1]) * expected[name][0], rtol=1e-9, err_msg=name)
        np.testing.assert_allclose(gradient, np.array([[1], [0], [1]]) * expected[name][1], rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ["forward_kl", "js", "binary_kl", "topk_forward_kl", "dist"])
def test_a_temperature_in_float16_is_squared_in_float32(name):
    pair = np.random.default_rng(1).normal(size=(2, 6, 10))
    inputs = (pair[0], np.zeros((6, 1), int), pair[1][:, :1] - 9, np.full(6, 0.5)) if name.startswith("topk") else pair
    value = getattr(losses, name)(*inputs, temperature=jnp.float16(300))
    np.testing.assert_allclose(value, getattr(losses, name)(*inputs, temperature=300.0), rtol=1e-10)


def test_labels_in_few_bits():
    """300 classes do not fit 8 bits, these labels do: with bounds that wrap, 44 is 300 too."""
    student, teacher = np.random.default_rng(4).normal(size=(2, 4, 300))
    narrow = np.array([0, 3, 44, 250], np.uint8)

    @jax.jit
    def run(labels):
        values = {name: getattr(jkd.losses, name)(student, teacher, labels) for name in ("dkd", "nkd", "pld", "uskd", "wsld")}
        values["cross_entropy"] = jkd.losses.cross_entropy(student, labels)
        return values | {"progressive": jkd.targets.progressive(teacher, labels, alpha=0.5)}

    expected = run(narrow.astype(np.int32))
    for name, value in run(narrow).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_ids_in_few_bits():
    """2^16 is the first number that uint16 does not hold, and the id of padding."""
    student = np.random.default_rng(5).normal(size=65536).astype(np.float32)
    ids, log_p = np.array([0, 65535, 0], np.uint16), np.log([0.5, 0.3, 1e-300]).astype(np.float32)
    rest = np.float32(0.2)
    value = losses.topk_forward_kl(student, ids, log_p, rest)
    np.testing.assert_array_equal(value, losses.topk_forward_kl(student, ids.astype(np.int32), log_p, rest))


ONE, LOGITS = np.ones((6, 10), np.float32), np.zeros((6, 10), np.float32)
MEMORY = {"student": ONE, "teacher": ONE, "student_scale": -1.0, "teacher_scale": np.float32(-1)}
MISTAKES = {
    "temperature [6,1]": (
        lambda: jkd.losses.forward_kl(LOGITS, LOGITS, temperature=np.ones((6, 1), np.float32)),
        ValueError,
        r"temperature must be a scalar, or one value for each position = \[6\].*got float32\[6,1\]",
    ),
    "temperature [3]": (
        lambda: jkd.losses.dkd(LOGITS, LOGITS, np.zeros(6, np.int32), temperature=np.ones(3, np.float32)),
        ValueError,
        r"temperature must be .*got float32\[3\]",
    ),
    "no labels": (
        lambda: jkd.losses.decoupled_softmax(LOGITS[:, :0], ONE[:, :0]),
        ValueError,
        r"student_scores must have a non-empty labels axis",
    ),
    "no channels": (
        lambda: jkd.losses.masked_generative(LOGITS[:, :0], LOGITS[:, :0]),
        ValueError,
        r"generated_features must have a non-empty channels axis",
    ),
    "complex mask": (
        lambda: jkd.losses.listwise_kl(LOGITS, LOGITS, where=ONE.astype(np.complex64)),
        TypeError,
        r"where must be a boolean or 0/1 array .*got complex64\[6,10\]",
    ),
    "scale": (
        lambda: jkd.losses.crd(ONE, ONE, np.arange(6), np.zeros((6, 1), int), MEMORY),
        TypeError,
        r"memory\['student_scale'\] must be an array, got float",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_by_name(mistake):
    call, error, pattern = MISTAKES[mistake]
    jaxtyping_config.update("jaxtyping_disable", True)  # users have no jaxtyping
    try:
        with pytest.raises(error, match=pattern):
            call()
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
