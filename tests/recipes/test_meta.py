"""FST and Meta Pseudo Labels: whole steps by hand, the sign of the feedback, and few labels made to go further."""

from __future__ import annotations

import dataclasses

import claims
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import tiny
from test_selftrain import accuracies, jitter, labels_alone
from tiny import RATE, close, logits

from jkd import data, losses, optim
from jkd.config import Ema, StudentEma
from jkd.recipe import Vars
from jkd.recipes import FST, MPL, View

MOMENTUM = 0.9
SGD = optim.sgd(RATE, momentum=MOMENTUM)


def streams(rows: int = tiny.ROWS, seed: int = 0) -> dict:
    """Labelled rows, unlabelled ones and their strong view; some weights are not 1."""
    other = {name: tiny.batch(rows, seed=seed + 5, ragged=True)[name] for name in ("image", "weight", "index")}
    strong = other | {"image": tiny.batch(rows, seed=seed + 6)["image"]}
    return tiny.batch(rows, seed=seed, ragged=True) | {"unlabelled": other | {"strong": strong}}


def mean(values, weight):
    return (values * weight).sum() / weight.sum()


def known(rows):
    return rows["weight"] * rows["labelled"]


@pytest.mark.parametrize("ahead", [0, 2])
def test_fsts_teacher_follows_virtual_students_and_stays_there(ahead):
    """Two steps of SGD with momentum: with no virtual step a Mean Teacher's self-training, and the moments are the real ones'."""
    rows, threshold, decay = streams(), 0.45, 0.6
    run = tiny.run(
        recipe=FST(ahead=ahead, threshold=threshold), teacher=StudentEma(), ema=Ema(decay=decay), optimizer=SGD, steps=2
    )
    made = tiny.Engine(run, rows)
    student, start = made.ctx.student, made.start.params["student"]
    more = rows["unlabelled"]

    def gradient(own, teacher):
        p = jax.nn.softmax(logits(student, teacher, more))
        sure = mean((p.max(-1) >= threshold).astype(jnp.float32), more["weight"])

        def loss(own):
            labelled = losses.cross_entropy(logits(student, own, rows), rows["label"])
            pseudo = losses.cross_entropy(logits(student, own, more["strong"]), p.argmax(-1))
            return mean(labelled, known(rows)) + sure * mean(pseudo, more["weight"])

        return jax.grad(loss)(own), sure

    @jax.jit
    def moved(own, trace, teacher):
        found, sure = gradient(own, teacher)
        trace = jax.tree.map(lambda g, t: g + MOMENTUM * t, found, trace)
        return tiny.down(own, trace), trace, sure

    def average(old, new):
        return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)

    found = made.train([rows, rows])
    own, teacher, trace = start, start, jax.tree.map(np.zeros_like, start)
    for metrics in found.metrics:
        future, moments = own, trace
        for _ in range(ahead):
            future, moments, _ = moved(future, moments, teacher)
            teacher = average(teacher, future)
        own, trace, sure = moved(own, trace, teacher)
        np.testing.assert_allclose(metrics["coef/pseudo"], sure, rtol=1e-5)
        assert 0 < sure < 1
        teacher = average(teacher, own)
    close(found.state.params["student"], own)
    close(found.state.ema["student"]["params"], teacher)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Telling(MPL):
    """MPL that remembers the labels it drew."""

    def init(self, key, ctx):
        return Vars(memory=super().init(key, ctx).memory | {"drawn": jnp.zeros(tiny.ROWS, jnp.int32)})

    def observe(self, vars, student, teacher, batch):
        return student["drawn"].astype(jnp.int32)

    def remember(self, memory, observed, batch, **rest):
        return super().remember(memory, observed, batch, **rest) | {"drawn": observed}


def test_both_networks_of_mpl_move_as_by_hand():
    """The second step too, whose feedback is measured against the moving average of the first."""
    rows, rate = streams(), 0.25
    recipe = Telling(uda_weight=0.7, uda_temperature=0.75, uda_threshold=0.4, rate=rate)
    run = tiny.run(recipe=recipe, optimizer={"student": SGD, "teacher": optim.sgd(RATE, momentum=0.0)}, steps=2)
    made = tiny.Engine(run, rows)
    student, teacher = made.ctx.student, made.ctx.teacher
    more = rows["unlabelled"]

    def label_loss(model, own):
        return mean(losses.cross_entropy(logits(model, own, rows), rows["label"]), known(rows))

    def imitation(own, drawn):
        return mean(losses.cross_entropy(logits(student, own, more["strong"]), drawn), more["weight"])

    def instruction(own, drawn, feedback):
        target = jax.nn.softmax(jax.lax.stop_gradient(logits(teacher, own, more)) / 0.75)
        strong = logits(teacher, own, more["strong"])
        uda = jnp.where(target.max(-1) >= 0.4, -(target * jax.nn.log_softmax(strong)).sum(-1), 0)
        repeated = losses.cross_entropy(strong, drawn)
        return label_loss(teacher, own) + 0.7 * mean(uda, more["weight"]) + feedback * mean(repeated, more["weight"])

    @jax.jit
    def moved(pupil, master, drawn, trace, average):
        """Both networks one step on, the student's moments, the improvement and its average."""
        trace = jax.tree.map(lambda g, t: g + MOMENTUM * t, jax.grad(imitation)(pupil, drawn), trace)
        after = tiny.down(pupil, trace)
        improvement = label_loss(student, pupil) - label_loss(student, after)
        average += rate * (improvement - average)
        gradient = jax.grad(instruction)(master, drawn, improvement - average)
        return after, tiny.down(master, gradient), trace, improvement, average

    found = made.train([rows, rows])
    pupil, master = made.start.params["student"], made.start.params["teacher"]
    trace, average = jax.tree.map(np.zeros_like, pupil), 0.0
    for state, metrics in zip((found.first, found.state), found.metrics, strict=True):
        drawn = state.memory["drawn"]
        pupil, master, trace, improvement, average = moved(pupil, master, drawn, trace, average)
        np.testing.assert_allclose(metrics["term/improvement"], improvement, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(metrics["coef/feedback"], improvement - average, rtol=1e-4, atol=1e-6)
        close(state.params["student"], pupil)
        close(state.params["teacher"], master)
    assert len(set(drawn.tolist())) > 1
    np.testing.assert_allclose(found.state.memory["improvement"], average, rtol=1e-4)


@pytest.mark.parametrize(("turn", "sign"), [(0, 1), (1, -1)])
def test_mpls_feedback_is_positive_where_the_labels_it_drew_made_the_student_better(turn, sign):
    """A teacher that is sure draws what it says: the true labels of the very rows that the student is tested on, or wrong ones."""
    rows = tiny.batch(16)
    sure = 30 * np.eye(tiny.CLASSES, dtype=np.float32)[(rows["label"] + turn) % tiny.CLASSES]
    unlabelled = {name: rows[name] for name in ("image", "weight", "index")} | {"teacher_logits": sure}
    rows |= {"teacher_logits": sure, "unlabelled": unlabelled | {"strong": unlabelled}}
    found = small.Terms(MPL(), rows, student=tiny.student(), teacher=small.echo("teacher"), optimizer=tiny.SGD)
    assert sign * found.mean("improvement") > 0.05
    assert sign * found.terms["feedback"][2] > 0.05


# --- few labels --------------------------------------------------------------------------------------------------------------

VIEWS = {"augment": (data.At("unlabelled", View("strong", jitter(0.7))), jitter(0.2), data.At("unlabelled", jitter(0.2)))}


@pytest.mark.slow
def test_a_student_that_sees_labels_through_its_teacher_alone_beats_one_that_sees_ten_of_them():
    fields = VIEWS | {"teacher": claims.mlp(10, 64, 5), "optimizer": optim.from_optax(3e-3, optax.scale_by_adam)}
    found = accuracies(MPL(), **fields)
    assert (found > labels_alone() + 0.03).all(), (found, labels_alone())


@pytest.mark.slow
def test_a_teacher_from_the_future_labels_better_than_one_from_the_past():
    """Two moons of which eight examples have a label: the average, whose answers are the pseudo-labels, after as many real steps."""
    size, batch_size, steps = 400, 100, 300
    test = claims.moons(2000, seed=99, noise=0.15)
    views = (data.At("unlabelled", View("strong", jitter(0.2))), jitter(0.05), data.At("unlabelled", jitter(0.05)))

    def batches(seed):
        image, label = claims.moons(size, seed=seed, noise=0.15)
        few = claims.rows(image, label, np.concatenate([np.flatnonzero(label == c)[:4] for c in range(2)]))
        for i in claims.epochs(size, batch_size, steps * batch_size // size, seed):
            yield few | {"unlabelled": claims.rows(image, label, i)}

    def accuracy(ahead):
        run = tiny.run(
            recipe=FST(ahead=ahead, threshold=0.8),
            student=claims.mlp(2, 32, 2),
            teacher=StudentEma(),
            ema=Ema(decay=0.99, warmup=True),
            optimizer=optim.adamw(3e-3),
            augment=views,
            steps=steps,
            batch_size=8,
        )
        trial = claims.Trial(run, next(batches(0)))
        averages = [trial.student(batches(seed), seed=seed, average=True) for seed in range(3)]
        return np.array([(trial.answers(own, test[0]).argmax(-1) == test[1]).mean() for own in averages])

    past, future = accuracy(0), accuracy(3)
    assert (future > past).all(), (future, past)
    assert future.mean() > past.mean() + 0.01, (future, past)
