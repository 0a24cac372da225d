"""Recipes on texts in the step: cut into microbatches, with rows of its own among the data's, and with a split vocabulary."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jkd import losses, models, sharding, sparse
from jkd.losses.chunked.parts import CrossEntropy, Each, ForwardKL
from jkd.models import decoder
from jkd.recipes import AKL, GKD, SALT, TAID, MiniLLM, RandomSamplingKD, Rollout, TokenKD, TopKKD
from jkd.recipes.bytoken import by_part, relative
from jkd.resolve import make_context
from jkd.state import init_state, step_shapes
from jkd.step import make_step
from jkd.types import Outputs

VOCAB, ROWS, TIME = 2048, 32, 17
"""Rows times time times classes is more than `jkd.recipes.bytoken.WHOLE`: no logits are made."""
RULES = tuple(rule for rule in decoder.RULES if rule[0] != "head/kernel")


def network(seed: int, **options):
    config = models.decoder.Config(**dict(vocab=VOCAB, dim=16, depth=2, heads=4, kv_heads=4, hidden=32, tied=True) | options)
    return tiny.weights(config.build(), seed=seed)


def texts(rows: int = ROWS, time: int = TIME, vocab: int = VOCAB) -> dict:
    """Ragged: rows of other weights and lengths, some said by the student itself, in no order that a cut would respect."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.1, 2, rows) * (rng.random(rows) > 0.2)
    batch = {"tokens": rng.integers(0, vocab, (rows, time)).astype(np.int32), "weight": weight.astype(np.float32)}
    batch["mask"] = (np.arange(time)[None] < rng.integers(3, time + 1, (rows, 1))).astype(np.uint8)
    batch["loss_mask"] = (rng.random((rows, time)) > 0.3).astype(np.uint8)
    return batch | {"own": (rng.random(rows) > 0.6).astype(np.float32), "index": np.arange(rows, dtype=np.int32)}


def run_of(**fields):
    recipe = TokenKD(temperature=2.0, weight=0.7, task_weight=0.6)
    given = dict(student=network(1), teacher=network(2, dim=24), recipe=recipe, optimizer=tiny.UNIT, batch_size=ROWS)
    return tiny.run(**given | fields)


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


SAID = Rollout(prompt=4, length=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        AKL(task_weight=0.5),
        TAID(),
        GKD(rollout=SAID),
        MiniLLM(rollout=SAID),
        SALT(),
        TopKKD(k=8, task_weight=0.5),
        RandomSamplingKD(draws=8, task_weight=0.5),
    ],
    ids=lambda recipe: type(recipe).__name__,
)
def test_no_step_holds_the_logits_of_a_text(recipe):
    """1,040 tokens of 8,192 classes: no array of the compiled step is as large as an eighth of their product."""
    rows, time, vocab = 16, 65, 8192
    sides = dict(student=network(1, vocab=vocab, depth=1), teacher=network(2, vocab=vocab, depth=1))
    run = run_of(recipe=recipe, batch_size=rows, **sides)
    ctx = make_context(run, texts(rows, time, vocab), devices=jax.devices()[:1])
    program = make_step(ctx).lower(*step_shapes(ctx)).compile()
    assert max(sizes(program.as_text())) < rows * time * vocab // 8


def test_what_belongs_to_a_token_is_cut_with_its_logits(monkeypatch):
    """Where a side answers with plain logits: temperature and an `Each`'s rows go their way. Values and slopes as in one piece."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    hidden, head, teacher = draw(2, 39, 4), draw(4, 9), Outputs(draw(2, 39, 9))
    temperature, scale = jnp.exp(draw(2, 39) / 3), jnp.exp(draw(2, 39))
    mix = [(1.0, Each(scaled, (scale, jnp.float32(2)))), (0.5, ForwardKL()), (1.0, CrossEntropy())]
    labels = jnp.asarray(rng.integers(0, 9, (2, 39)))

    def found():
        def total(hidden, head):
            values = by_part(mix, Outputs(hidden=hidden, head=head), teacher, labels=labels, temperature=temperature)
            return sum((value * scale).sum() for value in values), values

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(hidden, head)

    whole = found()
    monkeypatch.setattr(sparse, "by_position", functools.partial(sparse.by_position, whole=0))
    for one, two in zip(jax.tree.leaves(whole), jax.tree.leaves(found()), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-5, atol=1e-5)


def scaled(student, teacher, scale, by):
    return by * losses.reverse_kl(student, teacher * scale[..., None])
