"""What language models say at the end of a run: exact words of models that count, on several devices, and what goes wrong."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jkd import data, recipes, samples
from jkd.data.tokenizer import Bytes
from jkd.networks import models_of
from jkd.resolve import make_context
from jkd.state import init_state
from jkd.step import deployed
from jkd.types import Model, Outputs

TEXTS = ["abcdefgh", "12345678"] * 8
WIDTH = 264  # splits over eight devices


class Later(Bytes):
    """Every byte's number is one more, after a token for the beginning."""

    size = 258
    begin = 0
    end = 257

    def encode(self, text, *, special=False):
        return super().encode(text) + 1

    def decode(self, tokens, *, special=False):
        return super().decode([token - 1 for token in tokens if 0 < token < 257])


def counting(vocab):
    """After token n it says n + 1; its cache is a count."""

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        heads = {"cache": batch["cache"] + batch["tokens"].shape[1]} if "cache" in batch else {}
        hidden = jnp.take(params["embed"], batch["tokens"], axis=0)
        return Outputs(hidden=hidden, head=params["head"], heads=heads), buffers

    params = {"embed": np.eye(vocab, WIDTH, dtype=np.float32), "head": 50 * np.eye(WIDTH, vocab, 1, dtype=np.float32)}
    return Model(
        init=lambda key: (params, {}),
        apply=apply,
        params=params,
        buffers={},
        cache=lambda rows, length, dtype=jnp.float32: jnp.int32(0),
        name="counting",
    )


@pytest.fixture(scope="module")
def stand():
    """A run whose sides have two vocabularies, its first state, parameters over eight devices."""
    text = data.documents(TEXTS, eval=TEXTS[:1], length=8, layout="pad", teacher_tokenizer=Later())
    run = tiny.run(
        student=counting(257), teacher=counting(258), recipe=recipes.ULD(), data=text, batch_size=8, mesh=tiny.FSDP, steps=1
    )
    ctx = make_context(run)
    state, frozen = init_state(ctx, jax.random.key(0))
    return ctx, state, frozen


def said(ctx, state, frozen):
    told = []
    product = deployed(ctx, models_of(ctx, state, frozen))
    return samples.sample(ctx, product, state, frozen, told.append), told


def mute(model, message):
    def apply(params, buffers, batch, **options):
        raise RuntimeError(f"{message}\nand so on")

    return dataclasses.replace(model, apply=apply)


def test_both_sides_go_on_with_one_text_each_in_its_own_vocabulary(stand):
    ctx, state, frozen = stand
    split = state.params["student"]["embed"]
    assert split.addressable_shards[0].data.shape == (257, WIDTH // 8)
    found, told = said(*stand)
    assert told == []
    assert found.prompt == "abcd"
    # 96 tokens from e on, of which those below 128 are letters by themselves
    wanted = bytes(range(ord("e"), 128)).decode()
    assert found.text.startswith(wanted)
    assert found.teacher.startswith(wanted)


def test_what_goes_wrong_is_told_and_costs_the_sample_alone(stand):
    ctx, state, frozen = stand
    broken = {name: mute(model, f"no room for the {name}") for name, model in ctx.networks.items()}
    none, told = said(dataclasses.replace(ctx, networks=broken), state, frozen)
    assert none is None
    assert told == ["no sample of what the student says: no room for the student"]
    found, told = said(dataclasses.replace(ctx, networks={**ctx.networks, "teacher": broken["teacher"]}), state, frozen)
    assert found.text.startswith("efgh")
    assert found.teacher is None
    assert told == ["no sample of what the teacher says: no room for the teacher"]


def test_models_that_say_nothing_are_passed_over(stand):
    ctx, state, frozen = stand
    silent = tiny.network()  # no cache
    assert said(dataclasses.replace(ctx, networks={**ctx.networks, "student": silent}), state, frozen) == (None, [])


def test_a_prompt_is_what_stands_before_what_is_counted():
    row = {"tokens": np.arange(10), "mask": np.arange(10) < 8}
    assert samples._prompt(row).tolist() == [0, 1, 2, 3]  # text: half of what is real
    assert samples._prompt({"tokens": np.arange(1000)}).tolist() == list(range(samples.PROMPT))
    assert samples._prompt(row | {"loss_mask": np.arange(10) >= 6}).tolist() == list(range(6))
    assert samples._prompt(row | {"loss_mask": np.ones(10)}).tolist() == [0, 1, 2, 3]
    assert samples._prompt({"tokens": np.arange(1)}).tolist() == [0]
