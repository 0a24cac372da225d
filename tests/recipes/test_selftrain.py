"""Learning from unlabelled examples: the numbers, FlexMatch's memory by hand, and few labels made to go further."""

from __future__ import annotations

import dataclasses
import functools

import claims
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax

from jkd import data, optim
from jkd.config import Ema, StudentEma
from jkd.errors import InputError
from jkd.recipes import FixMatch, FlexMatch, MeanTeacher, Supervised, View
from jkd.recipes.selftrain import Rampup
from jkd.resolve import make_context
from jkd.schedules import Clock

CLASSES = 5


def logits(seed, count, sharpness=3.0):
    return (sharpness * np.random.default_rng(seed).normal(size=(count, CLASSES))).astype(np.float32)


def echoed(labelled: int = 4, unlabelled: int = 12, *, seed: int = 0) -> dict:
    """A batch whose students answer what it says, on every view; one of the unlabelled rows is padding."""
    rows = {"label": np.arange(labelled, dtype=np.int32) % CLASSES, "weight": np.ones(labelled, np.float32)}
    rows |= {"student_logits": logits(seed, labelled), "teacher_logits": logits(seed + 10, labelled)}
    weight = np.ones(unlabelled, np.float32)
    weight[5] = 0
    stream = {"student_logits": logits(seed + 1, unlabelled), "weight": weight}
    stream |= {"index": np.arange(unlabelled, dtype=np.int32) * 2, "teacher_logits": logits(seed + 2, unlabelled)}
    stream["strong"] = {"student_logits": logits(seed + 3, unlabelled), "weight": weight}
    stream["second"] = {"teacher_logits": logits(seed + 4, unlabelled), "weight": weight}
    return rows | {"unlabelled": stream}


SIDES = dict(student=small.echo("student"), teacher=small.echo("teacher"))
ALONE = SIDES | {"teacher": None}


def test_fixmatch_divides_by_all_unlabelled_rows():
    rows = echoed()
    stream, found = rows["unlabelled"], small.Terms(FixMatch(threshold=0.6), rows, **ALONE)
    p = softmax(np.float64(stream["student_logits"]), -1)
    log_q = log_softmax(np.float64(stream["strong"]["student_logits"]), -1)
    chosen = (p.max(-1) >= 0.6) & (stream["weight"] > 0)
    assert 2 < chosen.sum() < 10
    wanted = -(chosen * log_q[np.arange(12), p.argmax(-1)]).sum() / 11
    np.testing.assert_allclose(found.mean("pseudo"), wanted, rtol=1e-5)
    task = -log_softmax(np.float64(rows["student_logits"]), -1)[np.arange(4), rows["label"]].mean()
    np.testing.assert_allclose(found.mean("task"), task, rtol=1e-5)


@pytest.mark.parametrize("stream", [True, False])
def test_mean_teachers_agreement_is_between_two_views(stream):
    rows = echoed() if stream else {key: value for key, value in echoed().items() if key != "unlabelled"}
    found = small.Terms(MeanTeacher(), rows, **SIDES)
    everything = rows["unlabelled"] if stream else rows
    other = everything["second"] if stream else rows
    q, p = (softmax(np.float64(z), -1) for z in (everything["student_logits"], other["teacher_logits"]))
    wanted = (((q - p) ** 2).mean(-1) * everything["weight"]).sum() / everything["weight"].sum()
    np.testing.assert_allclose(found.mean("agreement"), wanted, rtol=1e-5)


def test_mean_teachers_weight_grows_as_the_authors():
    ramp = Rampup(100.0, 4 / 15)
    found = [float(ramp(Clock(step, 150_000, 0.0))) for step in (0, 20_000, 40_000, 150_000)]
    np.testing.assert_allclose(found, [100 * np.exp(-5), 100 * np.exp(-1.25), 100, 100], rtol=1e-5)


def test_flexmatchs_thresholds_are_those_of_a_hand_calculation():
    """30 examples: counts 6, 3, 0, 1, 0 of 5 classes after some steps, 20 never chosen."""
    recipe = FlexMatch(examples=30)
    found = small.Terms(recipe, echoed(), **ALONE)

    def cutoffs(counts):
        memory = {**found.state.memory, "counts": jnp.array(counts)}
        return np.asarray(recipe.cutoff(type(found.ctx.vars)(memory=memory), jnp.arange(CLASSES)))

    # while most are unused: b = 6/20, 3/20, 0, 1/20, 0
    wanted = 0.95 * np.array([0.3 / 1.7, 0.15 / 1.85, 0, 0.05 / 1.95, 0])
    np.testing.assert_allclose(cutoffs([6, 3, 0, 1, 0, 20]), wanted, rtol=1e-5)
    # later the best class sets the scale: b = 1, 1/2, 0, 1/12, 1/4
    wanted = 0.95 * np.array([1, 0.5 / 1.5, 0, (1 / 12) / (23 / 12), 0.25 / 1.75])
    np.testing.assert_allclose(cutoffs([12, 6, 0, 1, 3, 8]), wanted, rtol=1e-5)
    np.testing.assert_array_equal(found.state.memory["counts"], [0, 0, 0, 0, 0, 30])


@pytest.mark.parametrize(("labelled", "microbatches"), [(4, 1), (4, 2), (8, 1), (8, 2), (16, 1)])
def test_flexmatch_remembers_the_class_that_each_example_was_last_sure_of(labelled, microbatches):
    """An answer that is not sure leaves what was written before; the step uses the thresholds from before it."""
    recipe, examples = FlexMatch(threshold=0.7, examples=30), 30
    steps = [echoed(labelled, seed=seed) for seed in (0, 20, 40)]
    run = tiny.run(recipe=recipe, batch_size=labelled, optimizer=optim.sgd(0.0), microbatches=microbatches, **ALONE)
    made = tiny.Engine(run, steps[0])
    chosen, state = np.full(examples, -1), made.fresh()
    for rows in steps:
        stream = rows["unlabelled"]
        p = softmax(np.float64(stream["student_logits"]), -1)
        guess, sure = p.argmax(-1), (p.max(-1) >= 0.7) & (stream["weight"] > 0)
        counts = np.bincount(np.where(chosen < 0, CLASSES, chosen), minlength=CLASSES + 1)
        learned = counts[:CLASSES] / counts.max()
        passed = (p.max(-1) >= (0.7 * learned / (2 - learned))[guess]) & (stream["weight"] > 0)
        log_q = log_softmax(np.float64(stream["strong"]["student_logits"]), -1)
        wanted = -(passed * log_q[np.arange(12), guess]).sum() / 11
        chosen[stream["index"][sure]] = guess[sure]
        state, metrics = made.step(state, made.frozen, made.put(rows))
        np.testing.assert_allclose(metrics["term/pseudo"], wanted, rtol=1e-5)
        np.testing.assert_array_equal(state.memory["chosen"].rows[:examples], chosen)
        counts = np.bincount(np.where(chosen < 0, CLASSES, chosen), minlength=CLASSES + 1)
        np.testing.assert_array_equal(state.memory["counts"], counts)
    assert (chosen >= 0).sum() > 5


def test_flexmatch_asks_the_data_how_many_unlabelled_examples_there_are():
    digits = data.digits(labelled=0.1)
    joined = data.join(data.labelled_only(digits), unlabelled=(digits, 2))
    strong = data.At("unlabelled", View("strong", data.Crop(1)))
    run = tiny.run(
        recipe=FlexMatch(), student=claims.mlp(64, 8, 10), teacher=None, data=joined, batch_size=8, augment=(strong,)
    )
    shapes = make_context(run, devices=jax.devices()[:1]).vars.memory
    assert shapes["chosen"].rows.shape == (digits.train_size,)


def test_views_start_from_what_came_before_them_and_leave_the_batch_alone():
    rows = {"image": jnp.zeros((4, 2, 2, 1)), "weight": jnp.ones(4), "other": {"weight": jnp.ones(2)}, "teacher": None}

    def add(batch, key):
        return {**batch, "image": batch["image"] + 1}

    found = View("strong", add, add)(rows, jax.random.key(0))
    assert set(found) == {*rows, "strong"}
    assert set(found["strong"]) == {"image", "weight"}
    assert (found["strong"]["image"] == 2).all()
    assert found["image"] is rows["image"]


MISSING = {
    "FixMatch: the batch has no 'unlabelled'; data.join": lambda rows: {k: v for k, v in rows.items() if k != "unlabelled"},
    "FixMatch: the batch has no 'strong'; Run.augment": lambda rows: (
        rows | {"unlabelled": {k: v for k, v in rows["unlabelled"].items() if k != "strong"}}
    ),
}


@pytest.mark.parametrize("message", MISSING)
def test_a_stream_or_view_that_is_not_there_is_told(message):
    with pytest.raises(InputError, match=message):
        small.Terms(FixMatch(), MISSING[message](echoed()), **ALONE)


def test_flexmatch_without_a_stream_says_what_to_give():
    with pytest.raises(InputError, match="FlexMatch.examples = None"):
        small.Terms(FlexMatch(), echoed(), **ALONE)


def test_flexmatch_lets_pass_more_of_a_class_that_is_hard():
    """Of class 1 the student is never as sure as of class 0, so its examples are seldom chosen: its threshold comes down."""
    count = 24
    label = np.arange(count) % 2
    sure = np.where(label == 0, 0.99, 0.85)
    p = np.full((count, CLASSES), 1e-3)
    p[np.arange(count), label], p[:, 2] = sure, 1 - sure
    rows = echoed(unlabelled=count)
    rows["unlabelled"] |= {"student_logits": np.log(p / p.sum(-1, keepdims=True)).astype(np.float32), "weight": np.ones(count)}

    def passed(recipe, counts=None):
        found = small.Terms(recipe, rows, **ALONE)
        memory = found.state.memory if counts is None else {**found.state.memory, "counts": jnp.array(counts)}
        state = dataclasses.replace(found.state, memory=memory)
        values = jax.jit(lambda state: small.evaluate(found.ctx, state, found.frozen, rows)["pseudo"][0])(state)
        chosen = np.asarray(values) > 0
        return chosen[label == 0].mean(), chosen[label == 1].mean()

    assert passed(FixMatch()) == (1, 0)
    assert passed(FlexMatch(examples=200), [150, 50, 0, 0, 0, 0]) == (1, 1)
    assert passed(FlexMatch(examples=200), [100, 100, 0, 0, 0, 0]) == (
        1,
        0,
    )  # a class that is learned as well as any is held as high


# --- few labels --------------------------------------------------------------------------------------------------------------

SEEDS = range(3)
EACH, SIZE, BATCH, STEPS = 2, 600, 100, 600


def jitter(spread):
    def add(batch, key):
        return {**batch, "image": batch["image"] + spread * jax.random.normal(key, batch["image"].shape)}

    return add


def noisy(name: str, spread: float) -> dict:
    """The run's augmentation: small noise on all rows, and a further view of the unlabelled ones."""
    further = data.At("unlabelled", View(name, jitter(spread)))
    return {"augment": (further, jitter(0.2), data.At("unlabelled", jitter(0.2)))}


def accuracies(recipe, **fields) -> np.ndarray:
    """On held-out examples of five clouds, of which two examples each have a label, for every seed."""
    test, labelled = claims.clusters(2000, seed=99, spread=0.7), EACH * CLASSES

    def batches(seed):
        image, label = claims.clusters(SIZE, seed=seed, spread=0.7)
        known = [np.flatnonzero(label == c)[:EACH] for c in range(CLASSES)]
        rows = claims.rows(image, label, np.concatenate(known))
        for i in claims.epochs(SIZE, BATCH, STEPS * BATCH // SIZE, seed):
            yield rows | {"unlabelled": claims.rows(image, label, i)}

    shared = dict(student=claims.mlp(10, 64, CLASSES), teacher=None, optimizer=optim.adamw(3e-3), batch_size=labelled)
    trial = claims.Trial(tiny.run(recipe=recipe, steps=STEPS, **shared | fields), next(batches(0)), train_size=labelled)
    students = [trial.student(batches(seed), seed=seed, average="ema" in fields) for seed in SEEDS]
    return np.array([(trial.answers(student, test[0]).argmax(-1) == test[1]).mean() for student in students])


@functools.cache
def labels_alone() -> np.ndarray:
    return accuracies(Supervised(), **noisy("second", 0.2))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [FixMatch(), FlexMatch(examples=SIZE)], ids=["FixMatch", "FlexMatch"])
def test_own_confident_answers_make_ten_labels_go_further(recipe):
    found = accuracies(recipe, **noisy("strong", 0.7))
    assert (found > labels_alone() + 0.03).all(), (found, labels_alone())


@pytest.mark.slow
def test_the_average_of_the_student_makes_ten_labels_go_further():
    average = dict(teacher=StudentEma(), ema=Ema(decay=0.98, warmup=True))
    found = accuracies(MeanTeacher(weight=Rampup(10.0, 0.5)), **average, **noisy("second", 0.2))
    assert (found > labels_alone() + 0.01).all(), (found, labels_alone())


@pytest.mark.slow
def test_mean_teacher_leaves_at_most_three_fifths_of_the_errors_on_two_moons():
    """Eight examples have a label. By seed the gain depends on where they are; the claim, and the average's, is of the mean."""
    size, batch_size, steps, seeds = 400, 100, 800, range(4)
    test = claims.moons(2000, seed=99)
    augment = (data.At("unlabelled", View("second", jitter(0.1))), jitter(0.1), data.At("unlabelled", jitter(0.1)))

    def batches(seed):
        image, label = claims.moons(size, seed=seed)
        few = claims.rows(image, label, np.concatenate([np.flatnonzero(label == c)[:4] for c in range(2)]))
        for i in claims.epochs(size, batch_size, steps * batch_size // size, seed):
            yield few | {"unlabelled": claims.rows(image, label, i)}

    def trained(recipe, **fields):
        shared = dict(student=claims.mlp(2, 64, 2), teacher=None, optimizer=optim.adamw(5e-3), augment=augment)
        run = tiny.run(recipe=recipe, steps=steps, batch_size=8, **shared | fields)
        trial = claims.Trial(run, next(batches(0)))
        return trial, [jax.device_get(trial.trained(batches(seed), seed=seed)) for seed in seeds]

    def error(trial, params):
        return np.array([(trial.answers(one, test[0]).argmax(-1) != test[1]).mean() for one in params])

    alone, states = trained(Supervised())
    supervised = error(alone, [state.params["student"] for state in states])
    trial, states = trained(MeanTeacher(weight=Rampup(30.0, 1.0)), teacher=StudentEma(), ema=Ema(decay=0.98, warmup=True))
    student = error(trial, [state.params["student"] for state in states])
    average = error(trial, [state.ema["student"]["params"] for state in states])
    assert student.mean() <= 0.6 * supervised.mean(), (student, supervised)
    assert average.mean() <= student.mean(), (average, student)
