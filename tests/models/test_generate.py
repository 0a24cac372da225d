"""Generation: against the whole row at once, the distribution that is drawn from, prompts of several lengths, mixtures, silence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import fill, jit

from jkd.errors import InputError
from jkd.models import decoder
from jkd.models.generate import Sampling, Speaker, generate, rollout
from jkd.types import Outputs

TINY = decoder.Config(vocab=24, tokens=21, dim=16, depth=2, heads=2, hidden=24, logit_softcap=30.0)
PROMPTS = jnp.asarray(np.random.default_rng(0).integers(0, 21, (3, 6)), jnp.int32)
MASK = jnp.asarray([[1] * 6, [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.fixture(scope="module")
def model():
    model = fill(TINY.build())
    params = {**model.params, "head": {"kernel": 8 * model.params["head"]["kernel"]}}  # so sure that top_p cuts
    return model.with_weights(params, {})


def test_the_likeliest_text_is_that_of_the_whole_row(model):
    found = jit(functools.partial(generate, model, length=5, key=jax.random.key(0), sampling=Sampling(0.0)))(PROMPTS, mask=MASK)
    whole = jit(lambda tokens, mask: model.apply(model.params, {}, {"tokens": tokens, "mask": mask})[0].logits)
    said = np.asarray(found.tokens)
    for row, real in enumerate(np.asarray(MASK) > 0):
        # each token from the row so far, whose padding does not matter
        text = np.concatenate([np.asarray(PROMPTS)[row, real], said[row]])
        padded = np.zeros((3, 12), np.int32)
        padded[:, : len(text)] = text
        logits = whole(jnp.asarray(padded), jnp.arange(12)[None].repeat(3, 0) < len(text))[0]
        np.testing.assert_array_equal(logits[real.sum() - 1 : len(text) - 1].argmax(-1), said[row])
    assert found.mask.all()


def chain(rows, vocab=5, seed=1):
    """A speaker whose next token depends on the last one alone, by a table of logits; its cache is a count."""
    table = jnp.asarray(2 * np.random.default_rng(seed).normal(size=(vocab, vocab)), jnp.float32)

    def says(batch):
        return Outputs(table[batch["tokens"]], heads={"cache": {"read": batch["cache"]["read"] + batch["tokens"].shape[1]}})

    return np.asarray(jax.nn.softmax(table), np.float64), Speaker(says, lambda rows, length: {"read": jnp.int32(0)})


def test_tokens_are_drawn_from_the_distribution_that_is_asked_for():
    rows = 20000
    table, speaker = chain(rows)
    keys = jax.random.split(jax.random.key(2), rows)
    prompts = jnp.full((rows, 2), 3, jnp.int32)
    for sampling in (Sampling(), Sampling(temperature=0.5), Sampling(top_p=0.6)):
        found = jit(functools.partial(rollout, (speaker,), length=2, sampling=sampling))(prompts, keys=keys)
        wanted = table ** (1 / (sampling.temperature))
        wanted /= wanted.sum(-1, keepdims=True)
        order = np.argsort(-wanted, axis=-1)
        falling = np.take_along_axis(wanted, order, -1)
        kept = np.take_along_axis(falling.cumsum(-1) - falling < sampling.top_p, order.argsort(-1), -1)
        wanted = np.where(kept, wanted, 0)
        wanted /= wanted.sum(-1, keepdims=True)
        first, second = np.asarray(found.tokens).T
        # a share of 20000 draws: standard deviation at most 0.0036
        np.testing.assert_allclose(np.bincount(first, minlength=5) / rows, wanted[3], atol=0.015)
        often = np.bincount(first).argmax()
        share = np.bincount(second[first == often], minlength=5) / (first == often).sum()
        np.testing.assert_allclose(share, wanted[often], atol=0.03)
        assert not kept.all() or sampling.top_p == 1


def test_a_mixture_is_the_mean_of_probabilities():
    rows = 20000
    (one, first), (two, second) = chain(rows), chain(rows, seed=2)
    mixed = (Speaker(first.says, first.room, 0.8), Speaker(second.says, second.room, 0.2))
    keys = jax.random.split(jax.random.key(3), rows)
    found = jit(functools.partial(rollout, mixed, length=1))(jnp.full((rows, 1), 2, jnp.int32), keys=keys)
    share = np.bincount(np.asarray(found.tokens)[:, 0], minlength=5) / rows
    np.testing.assert_allclose(share, 0.8 * one[2] + 0.2 * two[2], atol=0.015)


def test_a_row_depends_on_its_own_key_and_prompt_and_is_silent_after_the_end():
    rows = 64
    _, speaker = chain(rows)
    say = jit(functools.partial(rollout, (speaker,), length=12, end=0))
    keys = jax.random.split(jax.random.key(4), rows)
    prompts = jnp.arange(rows, dtype=jnp.int32)[:, None] % 5
    found = say(prompts, keys=keys)
    turned = say(prompts[::-1], keys=keys[::-1])
    np.testing.assert_array_equal(found.tokens, turned.tokens[::-1])
    tokens, mask = np.asarray(found.tokens), np.asarray(found.mask)
    for row in range(rows):
        ends = np.flatnonzero(tokens[row] == 0)
        spoken = 12 if not ends.size else ends[0] + 1
        np.testing.assert_array_equal(mask[row], np.arange(12) < spoken)
        assert not tokens[row, spoken:].any()
    assert 0 < mask[:, -1].sum() < rows


def test_wrong_values():
    with pytest.raises(InputError, match="temperature=-1"):
        Sampling(temperature=-1)
    with pytest.raises(InputError, match="top_p=0"):
        Sampling(top_p=0)
