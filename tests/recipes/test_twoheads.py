"""Two heads: the numbers, whose gradient reaches which, and the product."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax
from test_parity import FOLDER

from jkd import optim, schedules
from jkd.errors import InputError
from jkd.networks import models_of
from jkd.recipes import DHKD, DHO, KD
from jkd.resolve import make_context
from jkd.step import make_eval_step, make_term_gradients

POOL = dict(student_taps=("pool",))
BOTH = dict(student=small.student(), teacher=small.teacher())


def with_identity(recipe, rows, group, classes, **sides):
    """The recipe's mean values where its linear head in ``group`` is the identity on its tap."""
    found = small.Terms(recipe, rows, **sides)
    head = {"kernel": np.eye(classes, dtype=np.float32), "bias": np.zeros(classes, np.float32)}
    state = dataclasses.replace(found.state, params={**found.state.params, group: head})
    found.terms = jax.device_get(jax.jit(lambda *args: small.evaluate(found.ctx, *args))(state, found.frozen, rows))
    return found


def test_dhkds_term_is_the_authors_number():
    stored = np.load(FOLDER / "binary_kl_norm.npz")
    mine, theirs = (stored[f"in_{side}_logits"].astype(np.float32) for side in ("student", "teacher"))
    count, classes = mine.shape
    rows = {"second": mine, "teacher_logits": theirs, "student_logits": 0 * mine}
    rows |= {"label": np.zeros(count, np.int32), "weight": np.ones(count, np.float32)}
    sides = dict(student=small.echo("student"), teacher=small.echo("teacher"))
    found = with_identity(DHKD(student_taps=("second",)), rows, "second_head", classes, **sides)
    np.testing.assert_allclose(found.mean("auxiliary"), stored["expected"], rtol=2e-5)
    np.testing.assert_allclose(found.mean("task"), np.log(classes), rtol=1e-5)


@pytest.mark.parametrize("kind", [DHKD, DHO])
def test_the_teacher_does_not_move_the_labels_head(kind):
    run = tiny.run(recipe=kind(**POOL, task_weight=0.0), optimizer=tiny.UNIT, **BOTH)
    gradient = tiny.Engine(run).gradient(tiny.batch())
    for leaf in jax.tree.leaves(gradient["student"]["head"]):
        np.testing.assert_array_equal(leaf, 0)
    assert np.abs(gradient["student"]["late"]["kernel"]).max() > 1e-4
    assert np.abs(gradient["second_head"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize("kind", [DHKD, DHO])
def test_labels_do_not_move_the_teachers_head(kind):
    run = tiny.run(recipe=kind(**POOL, weight=0.0), optimizer=tiny.UNIT, **BOTH)
    gradient = tiny.Engine(run).gradient(tiny.batch())
    np.testing.assert_array_equal(gradient["second_head"]["kernel"], 0)
    assert np.abs(gradient["student"]["head"]["kernel"]).max() > 1e-4


def test_alignment_frees_the_auxiliary_gradient_of_its_part_against_the_labels():
    """With one sign of its weight the two gradients conflict, and with the other they do not."""
    keep = optim.from_optax(0.0, lambda: optax.trace(0.0))  # its trace is the gradient, and nothing moves
    sign = schedules.Piecewise(1.0, {1 / 2: -1.0})
    found = {}
    for align in (False, True):
        run = tiny.run(recipe=DHKD(**POOL, weight=sign, align=align), optimizer=keep, steps=2, **BOTH)
        states = tiny.Engine(run).train([tiny.batch()] * 2)
        found[align] = [
            np.concatenate([np.ravel(leaf) for own in state.optimizer.values() for leaf in jax.tree.leaves(own[0].trace)])
            for state in (states.first, states.state)
        ]
    both, against = (np.float64(gradient) for gradient in found[False])
    task, auxiliary = (both + against) / 2, (both - against) / 2
    conflicts = []
    for aligned, other in zip(found[True], (auxiliary, -auxiliary), strict=True):
        dot = other @ task
        conflicts.append(dot < 0)
        wanted = task + other - min(dot, 0) / (task @ task) * task
        np.testing.assert_allclose(aligned, wanted, rtol=1e-4, atol=1e-6 * np.abs(wanted).max())
    assert sorted(conflicts) == [False, True]


def test_dhkds_product_is_the_student():
    made = tiny.Engine(tiny.run(recipe=DHKD(**POOL), **BOTH))
    rows = tiny.batch()
    logits = make_eval_step(made.ctx, lambda student, teacher, batch: student.logits)(made.fresh(), made.frozen, made.put(rows))
    np.testing.assert_allclose(logits, small.student().apply(small.student().params, {}, rows)[0].logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unlabelled", [False, True])
def test_dhos_terms(unlabelled):
    rows = tiny.batch(8) | ({"unlabelled": tiny.batch(16, seed=1)} if unlabelled else {})
    found = small.Terms(DHO(**POOL), rows, **BOTH)
    head = found.state.params["second_head"]
    for name, part in [("kd", rows)] + ([("kd_unlabelled", rows["unlabelled"])] if unlabelled else []):
        (pool,) = small.taps(small.student(), part, "pool")
        mine = pool @ np.float64(head["kernel"]) + np.float64(head["bias"])
        theirs = np.float64(small.teacher().apply(small.teacher().params, {}, part)[0].logits)
        p = softmax(theirs / 2, -1)
        wanted = 4 * (p * (np.log(p) - log_softmax(mine / 2, -1))).sum(-1).mean()
        np.testing.assert_allclose(found.mean(name), wanted, rtol=1e-5)
        assert found.terms[name][2] == 0.5
    assert found.terms["task"][2] == 0.5
    assert len(found.terms) == 2 + unlabelled


def test_dhos_terms_are_less_at_odds_than_those_of_one_head():
    """Labels that the teacher contradicts: on one head the two gradients oppose each other, through two heads hardly."""
    batches = [tiny.batch(seed=seed) for seed in range(4)]
    for rows in batches:
        theirs = np.asarray(small.teacher().apply(small.teacher().params, {}, rows)[0].logits).argmax(-1)
        rows["label"] = ((theirs + 1) % tiny.CLASSES).astype(np.int32)

    def cosines(recipe):
        made = tiny.Engine(tiny.run(recipe=recipe, **BOTH))
        measure = make_term_gradients(made.ctx)
        return np.array([float(measure(made.fresh(), made.frozen, made.put(rows))["cosine/kd"]) for rows in batches])

    one, two = cosines(KD(temperature=2.0, weight=0.5, task_weight=0.5)), cosines(DHO(**POOL))
    assert (one < -0.2).all(), one
    assert (two > one + 0.2).all(), (one, two)


def product(recipe, rows):
    made = small.Terms(recipe, rows, **BOTH)
    return made, recipe.deploy(models_of(made.ctx, made.state, made.frozen))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (0.0, 1.0), (0.0, 0.5), (0.3, 2.0)])
def test_dhos_product_lies_between_its_two_heads(alpha, beta):
    rows = tiny.batch(8)
    made, found = product(DHO(**POOL, alpha=alpha, beta=beta), rows)
    outputs, _ = found.apply(found.params, found.buffers, rows, taps=("early",))
    (pool,) = small.taps(small.student(), rows, "pool")
    head = made.state.params["second_head"]
    second = (pool @ np.float64(head["kernel"]) + np.float64(head["bias"])) / beta
    first = np.float64(small.student().apply(small.student().params, {}, rows)[0].logits)
    np.testing.assert_allclose(
        softmax(np.float64(outputs.logits), -1), alpha * softmax(first, -1) + (1 - alpha) * softmax(second, -1), rtol=1e-4
    )
    assert set(outputs.taps) == {"early"}


def test_dhos_product_may_teach_in_its_turn():
    _, found = product(DHO(**POOL), tiny.batch(8))
    assert found.initialised
    make_context(tiny.run(recipe=KD(), student=small.student(), teacher=found), tiny.batch(), devices=jax.devices()[:1])


MADE_WRONG = {
    "DHKD: student_taps = \\(\\): give one": DHKD,
    "DHO: student_taps = .*: give one": lambda: DHO(student_taps=("early", "late")),
    "DHO\\(alpha=1.5\\)": lambda: DHO(**POOL, alpha=1.5),
}


@pytest.mark.parametrize("message", MADE_WRONG)
def test_a_recipe_that_cannot_be_is_refused(message):
    with pytest.raises(InputError, match=message):
        MADE_WRONG[message]()
