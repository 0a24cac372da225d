"""Several teachers: MEAL V2's mean and its discriminator, and the pace of Knowledge Concentration."""

from __future__ import annotations

import dataclasses

import claims
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from scipy.special import expit, log_softmax, softmax

from jkd import models, optim, schedules
from jkd.config import Ensemble
from jkd.errors import InputError
from jkd.recipes import MEALV2, KnowledgeConcentration, Supervised
from jkd.resolve import make_context
from jkd.types import Model

MEMBERS = small.teacher(members=(tiny.CLASSES, tiny.CLASSES))
SPECIALISTS = small.teacher(members=(2, 3), mean=None)
BLOCKS = ((3, 0), (1, 2, 4))


def answers(ensemble: Model, rows: dict) -> list[np.ndarray]:
    heads = ensemble.apply(ensemble.params, ensemble.buffers, rows)[0].heads
    return [np.float64(heads[name]) for name in "01"]


# --- MEAL V2 -----------------------------------------------------------------------------------------------------------------


def told_apart(layers: dict, mine, theirs, numpy=jnp):
    """Mean of four binary cross-entropies: (1, 0) of the student's answers, (0, 1) of the teachers'."""
    total = 0.0
    for x, target in ((mine, (1, 0)), (theirs, (0, 1))):
        for name in sorted(layers):
            x = numpy.maximum(x @ layers[name]["kernel"] + layers[name]["bias"][None], 0)
        for answer, wanted in zip(x.T, target, strict=True):
            chance = 1 / (1 + numpy.exp(-answer))
            total = total - numpy.log(chance if wanted else 1 - chance)
    return total / 4


def test_mealv2s_terms_are_those_of_the_members_and_not_of_what_the_ensemble_averages():
    rows = tiny.batch(8)
    del rows["label"], rows["labelled"]
    teacher = small.teacher(members=(tiny.CLASSES, tiny.CLASSES), mean="logits")
    found = small.Terms(MEALV2(hidden=(7, 3), reversal=-0.5), rows, student=small.student(), teacher=teacher)
    z, each = np.float64(tiny.logits(small.student(), small.student().params, rows)), answers(teacher, rows)
    wanted = -(softmax(each, -1).mean(0) * log_softmax(z, -1)).sum(-1).mean()
    np.testing.assert_allclose(found.mean("similarity"), wanted, rtol=1e-5)
    layers = jax.tree.map(np.float64, found.state.params["discriminator"])
    assert [layers[name]["kernel"].shape for name in "012"] == [(5, 7), (7, 3), (3, 2)]
    np.testing.assert_allclose(found.mean("adversary"), told_apart(layers, z, np.mean(each, 0), np).mean(), rtol=1e-5)
    assert (found.terms["similarity"][2], found.terms["adversary"][2]) == (1, -0.5)


def test_the_discriminator_moves_first_and_the_student_descends_both_losses_as_the_authors_code_does():
    """Batch statistics move once a step though the student runs in both updates."""
    student, teacher, rows = tiny.student(norm="batch", width=16), MEMBERS, tiny.batch()
    made = tiny.Engine(tiny.run(recipe=MEALV2(hidden=(7, 3)), student=student, teacher=teacher, optimizer=tiny.SGD), rows)
    found = made.train([rows])
    start, theirs = made.start.params, jnp.stack([jnp.asarray(answer, jnp.float32) for answer in answers(teacher, rows)])

    def answered(params):
        outputs, buffers = student.apply(params, student.buffers, rows, train=True)
        return outputs.logits, buffers

    def apart(layers, params):
        return told_apart(layers, answered(params)[0], theirs.mean(0)).mean()

    def similarity(params):
        return -(jax.nn.softmax(theirs).mean(0) * jax.nn.log_softmax(answered(params)[0])).sum(-1).mean()

    @jax.jit
    def by_hand(layers, params):
        layers = tiny.down(layers, jax.grad(apart)(layers, params))
        helps = jax.grad(apart, 1)(layers, params)
        moved = jax.tree.map(jnp.add, jax.grad(similarity)(params), helps)
        return layers, tiny.down(params, moved), helps, answered(params)[1], apart(layers, params)

    layers, params, helps, buffers, left = by_hand(start["discriminator"], start["student"])
    tiny.close(found.first.params, {"discriminator": layers, "student": params})
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(jax.device_get(helps))) > 1e-3
    tiny.close(found.first.buffers["student"], buffers)
    np.testing.assert_allclose(found.metrics[0]["term/adversary"], left, rtol=1e-5)
    assert found.metrics[0]["term/discriminator.loss"] > left


def test_mealv2_wants_the_same_classes_of_every_teacher():
    rows = tiny.batch()
    ctx = make_context(tiny.run(recipe=MEALV2(), student=small.student(), teacher=MEMBERS), rows, devices=jax.devices()[:1])
    assert ctx.vars.params["discriminator"]["1"]["kernel"].shape == (125, 15)
    with pytest.raises(InputError, match="MEALV2: every teacher must know the student's 5 classes"):
        make_context(tiny.run(recipe=MEALV2(), student=small.student(), teacher=SPECIALISTS), rows)


DIM, CLOUDS, SIZE = 10, 5, 64


def discriminant(dims: slice, *, sure: float = 1.0, classes: int = CLOUDS) -> Model:
    """The best answer to `claims.clusters` for one that sees these dimensions alone; its logits are ``sure`` times too large."""
    middle = np.random.default_rng(0).normal(size=(classes, DIM)).astype(np.float32)[:, dims]
    bias = -np.square(middle).sum(-1) / 2

    def answer(params, x):
        return sure * (x.reshape(len(x), -1)[:, dims] @ middle.T + bias[None])

    return models.from_function(answer, {}, name="discriminant")


@pytest.mark.slow
def test_the_mean_of_probabilities_teaches_better_than_the_mean_of_logits():
    """Of three teachers one is far too sure of what little it sees: of logits it is nearly all, of probabilities a third."""
    train, test = claims.clusters(2000, seed=0), claims.clusters(4000, seed=99)
    teachers = [discriminant(slice(0, 4)), discriminant(slice(4, 9)), discriminant(slice(9, 10), sure=20.0)]
    average = models.ensemble(teachers, mean="logits")

    def alone(params, buffers, batch, **options):
        outputs, buffers = average.apply(params, buffers, batch, **options)
        return outputs.replace(heads={}), buffers

    found = []
    for teacher in (models.ensemble(teachers), dataclasses.replace(average, apply=alone)):
        run = tiny.run(
            student=claims.mlp(DIM, 32, CLOUDS),
            teacher=teacher,
            recipe=MEALV2(hidden=(16, 8)),
            optimizer=optim.adamw(3e-3),
            batch_size=SIZE,
            steps=200,
        )
        trial = claims.Trial(run, claims.rows(*train, np.arange(SIZE)))
        right = []
        for seed in (0, 1):
            batches = (claims.rows(*train, i) for i in claims.epochs(2000, SIZE, 7, seed))
            right.append((trial.answers(trial.student(batches, seed=seed), test[0]).argmax(-1) == test[1]).mean())
        found.append(right)
    for probabilities, logits in zip(*found, strict=True):
        assert probabilities > logits + 0.05, found


# --- Knowledge Concentration -------------------------------------------------------------------------------------------------


def questions(mine: np.ndarray, theirs: np.ndarray, temperature: float) -> np.ndarray:
    """The binary cross-entropies of the classes less the teacher's entropies, times T², ``[batch]``."""
    p, q = expit(theirs / temperature), expit(mine / temperature)
    terms = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return temperature**2 * terms.sum(-1)


def test_each_specialist_is_asked_about_its_own_classes():
    rows = tiny.batch(8)
    recipe = KnowledgeConcentration(classes=BLOCKS, temperature=2.0, weight=3.0)
    found = small.Terms(recipe, rows, student=small.student(), teacher=SPECIALISTS)
    z = np.float64(tiny.logits(small.student(), small.student().params, rows))
    for k, (block, theirs) in enumerate(zip(BLOCKS, answers(SPECIALISTS, rows), strict=True)):
        wanted = questions(z[:, list(block)], theirs, 2.0)
        np.testing.assert_allclose(found.terms[f"specialist{k}"][0], wanted, rtol=1e-4)
        assert found.terms[f"specialist{k}"][2] == 3  # nothing is known of the pace at the first step
    assert found.terms["task"][2] == 1


def test_a_specialist_moves_the_student_only_when_it_is_admitted():
    """The rule by hand from the terms that were measured; the columns of the head are the specialists' own."""
    steps, pace = 6, schedules.Linear(0.0, 1.0, until=0.5)
    recipe = KnowledgeConcentration(classes=BLOCKS, pace=pace, momentum=0.5, task_weight=0.0)
    run = tiny.run(
        recipe=recipe, student=small.student(), teacher=SPECIALISTS, optimizer=optim.sgd(0.01, momentum=0.0), steps=steps
    )
    made = tiny.Engine(run)
    state, mean, admitted = made.fresh(), None, []
    for step, rows in enumerate(tiny.batches(steps)):
        before = jax.device_get(state.params["student"]["head"]["kernel"])
        state, metrics = made.step(state, made.frozen, made.put(rows))
        moved = np.abs(jax.device_get(state.params["student"]["head"]["kernel"]) - before).max(0)
        v = np.array([float(metrics[f"coef/specialist{k}"]) for k in range(2)])
        threshold = np.inf if mean is None else mean.min() + min(2 * step / steps, 1) * (mean.max() - mean.min())
        np.testing.assert_array_equal(v, np.ones(2) if mean is None else mean <= threshold * (1 + 1e-6))
        for k, block in enumerate(BLOCKS):
            assert (moved[list(block)] > 0).all() == bool(v[k])
            assert (moved[list(block)] == 0).all() == (not v[k])
        measured = np.array([float(metrics[f"term/specialist{k}"]) for k in range(2)])
        mean = measured if mean is None else 0.5 * mean + 0.5 * measured
        np.testing.assert_allclose(state.memory["loss"], mean, rtol=1e-5)
        admitted.append(v.sum())
    assert admitted == [2, 1, 1, 2, 2, 2]


def test_which_classes_a_specialist_knows_is_checked():
    def make(**fields):
        teacher = fields.pop("teacher", Ensemble(members=(small.teacher(classes=2), small.teacher(classes=3)), mean=None))
        ctx = make_context(
            tiny.run(recipe=KnowledgeConcentration(**fields), student=small.student(), teacher=teacher), tiny.batch()
        )
        return ctx.vars.memory["loss"].shape

    assert make(classes=BLOCKS) == (2,)
    assert make(teacher=small.teacher()) == (1,)
    with pytest.raises(
        InputError, match="KnowledgeConcentration.classes: \\[5, 5\\] classes for specialists with \\[2, 3\\] logits"
    ):
        make()
    with pytest.raises(InputError, match="\\(5, 0\\): the student's classes are 0 to 4"):
        make(classes=((5, 0), (1, 2, 3)))


@pytest.mark.slow
def test_one_student_of_specialists_beats_the_generalist_that_has_their_labels():
    """Each specialist answers for two of six classes (is it this one, or anything else); every twentieth image has a label."""
    classes, blocks = 6, ((0, 1), (2, 3), (4, 5))
    train, test = claims.clusters(1500, seed=0, classes=classes), claims.clusters(4000, seed=99, classes=classes)
    whole = discriminant(slice(0, DIM), classes=classes)

    def specialist(block):
        def answer(params, x):
            log_p = jax.nn.log_softmax(whole.apply({}, {}, {"image": x})[0].logits)[:, jnp.asarray(block)]
            return log_p - jnp.log1p(-jnp.exp(jnp.minimum(log_p, -1e-6)))

        return models.from_function(answer, {}, name="specialist")

    labelled = (np.arange(1500) % 20 == 0).astype(np.float32)
    found = []
    for recipe in (KnowledgeConcentration(classes=blocks), Supervised()):
        teacher = models.ensemble([specialist(block) for block in blocks], mean=None) if recipe.needs_teacher else None
        run = tiny.run(
            student=claims.mlp(DIM, 32, classes),
            teacher=teacher,
            recipe=recipe,
            optimizer=optim.adamw(3e-3),
            batch_size=SIZE,
            steps=230,
        )

        def rows(index):
            return claims.rows(*train, index) | {"labelled": labelled[index]}

        trial = claims.Trial(run, rows(np.arange(SIZE)))
        right = []
        for seed in (0, 1):
            params = trial.student((rows(i) for i in claims.epochs(1500, SIZE, 10, seed)), seed=seed)
            right.append((trial.answers(params, test[0]).argmax(-1) == test[1]).mean())
        found.append(right)
    for concentrated, generalist in zip(*found, strict=True):
        assert concentrated > generalist + 0.05, found
