"""The chunked losses are those of whole logits, values and gradients, and hold no array of all tokens and classes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import losses
from jkd.losses import chunked

TOKENS, VOCAB, DIM, TEACHER_DIM = (3, 17), 203, 8, 12
SCHEDULES = {
    "tokens": chunked.Tokens(5, None),
    "tokens, tiled": chunked.Tokens(16, 60),
    "vocabulary": chunked.Vocabulary(31),
    "chosen": None,
}
NAMED = {
    "forward_kl": {},
    "reverse_kl": {},
    "js": dict(beta=0.3),
    "skew_forward_kl": dict(lam=0.2),
    "skew_reverse_kl": dict(lam=0.2),
    "alpha_beta": dict(alpha=0.2, beta=0.7),
}


def draw(dtype=np.float32):
    rng = np.random.default_rng(0)
    scale = 3 / np.sqrt(DIM)
    return dict(
        student_hidden=rng.normal(size=(*TOKENS, DIM)).astype(dtype),
        student_head=(scale * rng.normal(size=(DIM, VOCAB))).astype(dtype),
        teacher_hidden=rng.normal(size=(*TOKENS, TEACHER_DIM)).astype(dtype),
        teacher_head=(scale * rng.normal(size=(TEACHER_DIM, VOCAB))).astype(dtype),
    )


LABELS = np.random.default_rng(1).integers(0, VOCAB, TOKENS).astype(np.int32)
WEIGHTS = (np.random.default_rng(2).random(TOKENS) * (np.random.default_rng(3).random(TOKENS) > 0.3)).astype(np.float32)


def whole(name, given, **options):
    logits = [jnp.einsum("...d,dv->...v", given[f"{side}_hidden"], given[f"{side}_head"]) for side in ("student", "teacher")]
    return getattr(losses, name)(*logits, **options)


def close(found, wanted, tolerance):
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * scale)


def value_and_gradient(loss, given):
    def total(given):
        values = loss(given)
        return jnp.sum(values * WEIGHTS), values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(given)
    return values, gradient


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMED)
def test_each_is_its_twin_on_whole_logits(name, schedule):
    """Values to 1e-6 and gradients to 1e-5 of the largest, float32; both hidden states and both heads get gradients."""
    given, options = draw(), NAMED[name] | dict(temperature=2.0)
    chosen = dict(schedule=SCHEDULES[schedule], weights=WEIGHTS if schedule == "chosen" else None)
    values, gradient = value_and_gradient(lambda given: getattr(chunked, name)(**given, **options, **chosen), given)
    wanted, wanted_gradient = value_and_gradient(lambda given: whole(name, given, **options), given)
    assert values.shape == TOKENS
    close(values, wanted, 2e-6)
    close(gradient, wanted_gradient, 1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_mix_in_one_pass_and_its_weighted_sum(schedule):
    given = draw()
    mix = [(0.5, chunked.CrossEntropy()), (2.0, chunked.ForwardKL())]
    options = dict(labels=LABELS, temperature=2.0, schedule=SCHEDULES[schedule])

    def wanted(given):
        logits = given["student_hidden"] @ given["student_head"]
        return 0.5 * losses.cross_entropy(logits, LABELS) + 2 * whole("forward_kl", given, temperature=2.0)

    values, gradient = value_and_gradient(wanted, given)
    total, summed = jax.jit(jax.value_and_grad(lambda given: chunked.weighted_sum(mix, **given, **options, weights=WEIGHTS)))(
        given
    )
    close(chunked.per_token(mix, **given, **options), values, 2e-6)
    close(total, (values * WEIGHTS).sum(), 2e-6)
    close(summed, gradient, 1e-5)
    labels_alone = chunked.cross_entropy(given["student_hidden"], given["student_head"], LABELS, schedule=SCHEDULES[schedule])
    close(labels_alone, losses.cross_entropy(given["student_hidden"] @ given["student_head"], LABELS), 2e-6)


@pytest.mark.parametrize("schedule", ["tokens", "vocabulary"])
def test_bias_softcap_and_padded_columns(schedule):
    given, rng = draw(), np.random.default_rng(4)
    bias, classes = rng.normal(size=VOCAB).astype(np.float32), VOCAB - 6

    def head(kernel):
        return chunked.Head(kernel, bias=bias, softcap=5.0, classes=classes)

    def capped(hidden, kernel):
        return (5.0 * jnp.tanh((hidden @ kernel + bias[None, None]) / 5.0))[..., :classes]

    def mine(given):
        heads = {side: head(given[side]) for side in ("student_head", "teacher_head")}
        return chunked.forward_kl(**given | heads, schedule=SCHEDULES[schedule])

    def theirs(given):
        sides = (capped(given[f"{side}_hidden"], given[f"{side}_head"]) for side in ("student", "teacher"))
        return losses.forward_kl(*sides)

    found, wanted = value_and_gradient(mine, given), value_and_gradient(theirs, given)
    close(found[0], wanted[0], 2e-6)
    close(found[1], wanted[1], 1e-5)
    assert not np.asarray(found[1]["student_head"])[:, classes:].any()


@pytest.mark.parametrize("schedule", [chunked.Tokens(16, None), chunked.Vocabulary(64)], ids=["tokens", "vocabulary"])
def test_no_array_of_all_tokens_and_classes(schedule):
    tokens, vocab = 512, 2048

    def loss(student_hidden, student_head, teacher_hidden, teacher_head):
        options = dict(weights=jnp.ones(tokens), schedule=schedule)
        return chunked.weighted_sum(chunked.ForwardKL(), student_hidden, student_head, teacher_hidden, teacher_head, **options)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((tokens, 16), (16, vocab), (tokens, 24), (24, vocab))]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    largest = tokens * vocab * 4
    assert compiled.memory_analysis().temp_size_in_bytes < largest / 3
    assert f"[{tokens},{vocab}]" not in compiled.as_text()


def test_bfloat16_is_summed_in_float32():
    given = draw()
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), given)
    values = chunked.forward_kl(**half)
    assert values.dtype == jnp.float32
    exact = whole("forward_kl", jax.tree.map(lambda x: x.astype(jnp.float32), half))
    # what is left is the rounding of bfloat16 products, not of bfloat16 sums over 203 classes
    close(values, exact, 2e-2)


def test_mistakes_name_the_argument():
    given = draw()
    with pytest.raises(ValueError, match=r"student_head must be \[dim, vocab\] with the dim of student_hidden"):
        chunked.forward_kl(**given | {"student_head": given["student_head"][1:]})
    with pytest.raises(ValueError, match="the same classes"):
        chunked.forward_kl(**given | {"student_head": given["student_head"][:, 1:]})
    with pytest.raises(ValueError, match="labels must be given"):
        chunked.per_token(chunked.CrossEntropy(), given["student_hidden"], given["student_head"])
