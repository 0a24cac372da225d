"""Recipes on texts in the step: cut into microbatches, with rows of its own among the data's, and with a split vocabulary."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
import tiny

from jkd import models, sharding
from jkd.models import decoder
from jkd.recipes import TokenKD
from jkd.recipes.bytoken import relative
from jkd.resolve import make_context
from jkd.state import init_state
from jkd.step import make_step

VOCAB, ROWS, TIME = 2048, 32, 17
"""Rows times time times classes is more than `jkd.recipes.bytoken.WHOLE`: no logits are made."""
RULES = tuple(rule for rule in decoder.RULES if rule[0] != "head/kernel")


def network(seed: int, **options):
    config = models.decoder.Config(**dict(vocab=VOCAB, dim=16, depth=2, heads=4, kv_heads=4, hidden=32, tied=True) | options)
    return tiny.weights(config.build(), seed=seed)


def texts() -> dict:
    """Ragged: rows of other weights and lengths, some said by the student itself, in no order that a cut would respect."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.1, 2, ROWS) * (rng.random(ROWS) > 0.2)
    batch = {"tokens": rng.integers(0, VOCAB, (ROWS, TIME)).astype(np.int32), "weight": weight.astype(np.float32)}
    batch["mask"] = (np.arange(TIME)[None] < rng.integers(3, TIME + 1, (ROWS, 1))).astype(np.uint8)
    batch["loss_mask"] = (rng.random((ROWS, TIME)) > 0.3).astype(np.uint8)
    return batch | {"own": (rng.random(ROWS) > 0.6).astype(np.float32), "index": np.arange(ROWS, dtype=np.int32)}


def run_of(**fields):
    recipe = TokenKD(temperature=2.0, weight=0.7, task_weight=0.6)
    return tiny.run(
        student=network(1), teacher=network(2, dim=24), recipe=recipe, optimizer=tiny.UNIT, batch_size=ROWS, **fields
    )


@pytest.fixture(scope="module")
def whole() -> tuple[dict, dict]:
    """``(gradient, metrics)`` of the first step, uncut, on one device."""
    return first(tiny.Engine(run_of(), texts()))


def first(engine: tiny.Engine) -> tuple[dict, dict]:
    found = engine.train([texts()])
    return jax.tree.map(np.subtract, found.start.params, found.first.params), found.metrics[0]


def test_rows_of_its_own_do_not_make_the_update_depend_on_microbatches(whole):
    """Each cut has another share of tokens that count for the labels; what is prepared for them is of the cut, the means are not."""
    gradient, metrics = first(tiny.Engine(run_of(microbatches=4), texts()))
    assert tiny.distance(gradient, whole[0]) < 1e-5
    for name in ("loss", "term/kd", "term/task"):
        np.testing.assert_allclose(metrics[name], whole[1][name], rtol=1e-5)


def test_a_mix_prepares_for_means_over_other_tokens():
    """The factor times the common weight, over the common sum, is the term's weight over its own sum."""
    rng = np.random.default_rng(0)
    among = rng.uniform(0, 2, (3, 5)) * (rng.random((3, 5)) > 0.2)
    weight = among * (rng.random((3, 5)) > 0.5)
    np.testing.assert_allclose(relative(weight, among) * among / among.sum(), weight / weight.sum(), rtol=1e-5)
    assert not np.asarray(relative(0 * weight, among)).any()


@pytest.mark.parametrize("tensor", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_with_a_split_vocabulary_gathers_none_of_it(whole, tensor):
    """The same update, and no gather in the compiled program has the size of a head or of a device's logits.

    The head is 16 x 2048; what a step may gather are layers and hidden states, all smaller.
    """
    mesh = sharding.MeshShape(data=8 // tensor, fsdp=1, tensor=tensor)
    run = run_of(mesh=mesh, rules=RULES, teacher_rules=RULES)
    ctx = make_context(run, texts(), devices=jax.devices())
    state, frozen = init_state(ctx, jax.random.key(0))
    embedding = state.params["student"]["embed"]["embedding"]
    assert embedding.sharding.shard_shape(embedding.shape)[0] == VOCAB // tensor
    start = jax.device_get(state.params)
    rows = sharding.put_batch(texts(), ctx.mesh)
    program = make_step(ctx).lower(state, frozen, rows).compile()
    after, metrics = program(state, frozen, rows)
    assert tiny.distance(jax.tree.map(np.subtract, start, jax.device_get(after.params)), whole[0]) < 1e-5
    np.testing.assert_allclose(metrics["loss"], whole[1]["loss"], rtol=1e-5)
    moved = [sizes(line) for line in program.as_text().splitlines() if re.search(r"= .*all-gather|= .*all-to-all", line)]
    assert max((max(one) for one in moved if one), default=0) < 16 * VOCAB // tensor
    # nor are all tokens times a device's part of the classes ever held
    assert max(sizes(program.as_text())) < ROWS * TIME * VOCAB // 8


def sizes(text: str) -> list[int]:
    """How many numbers the arrays have that a line of a compiled program speaks of."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+\w*)\[([\d,]*)\]", text)
    return [int(np.prod([int(length) for length in shape.split(",") if length] or [1])) for shape in shapes]
