"""The count of operations: against formulas by hand, and against XLA's own on programs without a scan."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny
from tiny import CLASSES, FEATURES, ROWS, network, weights

from jkd import flops, recipes
from jkd.models import decoder, resnet
from jkd.recipe import Update
from jkd.recipes import bytoken
from jkd.resolve import make_context
from jkd.state import step_shapes
from jkd.step import make_step

WIDTH = 64


def kd(rows=ROWS, **fields):
    """One device: a product that every device does for itself is then counted as XLA counts it."""
    networks = {"student": network(width=WIDTH), "teacher": weights(network(width=128))}
    return make_context(tiny.run(**networks | {"batch_size": rows} | fields), tiny.batch(rows), devices=jax.devices()[:1])


def test_a_product_costs_itself_again_for_each_operand_that_a_gradient_reaches():
    work = flops.of_step(kd())
    first, last = 2 * ROWS * FEATURES * WIDTH, 2 * ROWS * WIDTH * CLASSES
    assert work.teacher == 2 * ROWS * 128 * (FEATURES + CLASSES)
    assert work.student_forward == first + last
    assert work.student_backward == first + 2 * last  # no gradient of the image
    assert work.other == 0


def test_frozen_weights_have_no_gradient_of_their_own():
    work = flops.of_step(kd(trainable=("head/*",)))
    first, last = 2 * ROWS * FEATURES * WIDTH, 2 * ROWS * WIDTH * CLASSES
    assert (work.student_forward, work.student_backward) == (first + last, last)


def test_microbatches_change_no_work():
    assert flops.of_step(kd(microbatches=4)) == flops.of_step(kd())


def test_scans_count_every_turn_conditions_their_dearest_branch_and_what_nothing_reads_is_free():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    once = 2 * 4 * 8 * 8

    def scanned(x, w):
        return jax.lax.scan(lambda c, w: (c @ w, None), x, jnp.stack([w] * 5))[0]

    def chosen(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    def unread(x, w):
        x @ w
        return x

    assert flops.of_program(scanned, x, w) == 5 * once
    assert flops.of_program(chosen, x, w) == 2 * once
    assert flops.of_program(unread, x, w) == 0
    assert flops.of_program(jax.jit(jax.checkpoint(scanned)), x, w) == 5 * once


def test_an_update_of_every_third_step_counts_a_third_of_what_it_is_when_it_runs():
    """`updates` is a field of no recipe: this one's second update is its first, less often."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Twice(recipes.KD):
        @property
        def updates(self):
            return (Update(), Update(every=3, name="again"))

    once = flops.of_step(kd()).total
    ctx = kd(recipe=Twice())
    assert flops.of_step(ctx).total == pytest.approx(once * 4 / 3)
    assert flops.of_step(ctx, mean=False).total == 2 * once
    assert flops.of_program(make_step(ctx), *step_shapes(ctx)) == 2 * once  # nothing is computed again
    assert flops.executed(ctx) == pytest.approx(once * 4 / 3)


def test_rollouts_count_apart_and_every_turn_of_them():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Rolled(recipes.KD):
        def prepare(self, models, batch, key):
            def say(carry):
                turn, total = carry
                return turn + 1, total + models.student(batch, train=False)[0].logits.sum()

            total = jax.lax.while_loop(lambda carry: carry[0] < 3, say, (0, jnp.float32(0)))[1]
            return batch | {"teacher": models.teacher(batch), "weight": batch["weight"] + 0 * total}

    plain, ctx = flops.of_step(kd()), kd(recipe=Rolled())
    prepared = flops.of_prepare(ctx)
    assert flops.of_prepare(kd()) == flops.Work()
    assert prepared == flops.Work(teacher=plain.teacher, student_forward=3 * plain.student_forward)
    assert flops.of_step(ctx).total == plain.student  # the teacher's answer comes with the batch
    assert flops.executed(ctx) == prepared.total + plain.student


def test_stopped_gradients_stop():
    def f(w, x):
        return (jax.lax.stop_gradient(x @ w) @ w).sum()

    jaxpr = jax.make_jaxpr(f)(jnp.ones((8, 8)), jnp.ones((4, 8)))
    work = flops._count(jaxpr, [flops._STUDENT | flops._MOVES, 0])
    assert work.student_forward == 2 * 512
    assert work.student_backward == 512  # of the second product alone


@pytest.mark.parametrize(("groups", "strides"), [(1, (1, 1)), (4, (2, 2))])
def test_convolutions_against_xla(groups, strides):
    def f(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, strides, "VALID", dimension_numbers=dims, feature_group_count=groups)

    x, w = jnp.ones((2, 9, 9, 8)), jnp.ones((3, 3, 8 // groups, 16))
    assert flops.of_program(f, x, w) == pytest.approx(jax.jit(f).lower(x, w).cost_analysis()["flops"], rel=0.05)


@pytest.mark.parametrize("stride", [2, 3])
def test_the_gradient_of_a_stride_does_not_multiply_the_zeros_between(stride):
    """Without padding, and sides that the stride divides: every product of the forward pass comes three times."""

    def f(x, w):
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, w, (stride, stride), "VALID", dimension_numbers=dims)

    x, w = jnp.ones((2, 12, 12, 8)), jnp.ones((stride, stride, 8, 16))
    whole = jax.jit(lambda x, w: jax.vjp(f, x, w)[1](f(x, w)))
    ours = flops.of_program(whole, x, w)
    assert ours == pytest.approx(3 * flops.of_program(f, x, w), rel=0.05)
    assert ours == pytest.approx(whole.lower(x, w).compile().cost_analysis()["flops"], rel=0.05)


def test_a_step_without_scans_against_xla():
    """So large that products are nearly all the work."""
    ctx = kd(512, student=network(width=512, classes=200), teacher=weights(network(width=1024, classes=200)))
    step = make_step(ctx)
    xla = step.lower(*step_shapes(ctx)).cost_analysis()["flops"]
    ours = flops.of_program(step, *step_shapes(ctx))
    assert ours == pytest.approx(flops.of_step(ctx).total, rel=1e-6)
    assert 0.95 < ours / xla <= 1  # XLA counts elementwise work besides


def lm(**fields):
    return decoder.Config(vocab=256, dim=32, depth=3, heads=4, kv_heads=2, hidden=64, **fields).build()


@pytest.mark.parametrize(
    ("remat", "tied", "devices"),
    [(None, False, 1), (jax.checkpoint_policies.nothing_saveable, False, 1), (None, True, 2)],
    ids=["plain", "remat", "tied on two devices"],
)
def test_decoders_cost_2_operations_per_weight_and_token_frozen_and_6_trained(remat, tied, devices, monkeypatch):
    monkeypatch.setattr(bytoken, "WHOLE", 0)  # logits in blocks, however few
    rows, time = 2, 16
    batch = {"tokens": jnp.zeros((rows, time), jnp.int32), "weight": jnp.ones(rows), "index": jnp.arange(rows)}
    run = tiny.run(student=lm(remat=remat, tied=tied), teacher=lm(remat=None), recipe=recipes.TokenKD(), batch_size=rows)
    work = flops.of_step(make_context(run, batch, train_size=rows, devices=jax.devices()[:devices]))
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64  # query, key and value, out, gated mlp
    attention = 3 * 4 * rows * time * time * 32  # scores and values, all layers, no place left out
    tokens = rows * time
    forward = 2 * tokens * (3 * layer + 32 * 256) + attention
    assert work.teacher == pytest.approx(forward, rel=0.05)
    assert work.student == pytest.approx(3 * forward, rel=0.05)


def test_resnets_cost_what_their_convolutions_do():
    batch = {
        "image": jnp.zeros((2, 32, 32, 3)),
        "weight": jnp.ones(2),
        "label": jnp.zeros(2, jnp.int32),
        "labelled": jnp.ones(2),
    }
    run = tiny.run(student=resnet.cifar("resnet8", classes=10), teacher=None, recipe=recipes.Supervised(), batch_size=2)
    work = flops.of_step(make_context(run, batch, train_size=2, devices=jax.devices()[:1]))
    stem = 32 * 32 * 9 * 3 * 16
    stages = 2 * 32 * 32 * 9 * 16 * 16
    stages += 16 * 16 * (9 * 16 * 32 + 9 * 32 * 32 + 16 * 32)
    stages += 8 * 8 * (9 * 32 * 64 + 9 * 64 * 64 + 32 * 64)
    forward = 2 * 2 * (stem + stages + 64 * 10)
    assert work.student_forward == pytest.approx(forward, rel=0.05)
    assert work.student == pytest.approx(3 * forward - 2 * 2 * stem, rel=0.05)
