"""Methods that remember a distribution for every example: the numbers, the lag of the bank, and what it is good for."""

from __future__ import annotations

import claims
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax

from jkd import optim
from jkd.recipe import Bank, Vars
from jkd.recipes import ELR, PSKD, Supervised
from jkd.schedules import Clock
from jkd.types import Outputs

CLASSES = 5


def each_step(recipe, batches, *, train_size, steps):
    """``[(student logits before the step, metrics, memory after it)]``."""
    run = tiny.run(recipe=recipe, student=small.student(), teacher=None, optimizer=optim.sgd(0.5), steps=steps, batch_size=4)
    made = tiny.Engine(run, batches[0], train_size=train_size)
    state, found = made.fresh(), []
    for rows in batches:
        logits, _ = small.student().apply(jax.device_get(state.params["student"]), {}, rows)
        state, metrics = made.step(state, made.frozen, made.put(rows))
        memory = jax.device_get(state.memory)
        found.append((np.asarray(logits.logits, np.float64), jax.device_get(metrics), memory))
    return found


def test_pskds_targets_are_the_answers_of_exactly_one_epoch_ago():
    epochs, parts = 3, [tiny.batch(4, seed=0), tiny.batch(4, seed=1)]
    steps = each_step(PSKD(), parts * epochs, train_size=8, steps=2 * epochs)
    for place, (logits, metrics, memory) in enumerate(steps):
        epoch, rows = place // 2, parts[place % 2]
        own = np.eye(CLASSES)[rows["label"]]
        before = softmax(steps[place - 2][0], -1) if epoch else own
        share = 0.8 * (epoch + 1) / epochs
        wanted = -(((1 - share) * own + share * before) * log_softmax(logits, -1)).sum(-1).mean()
        np.testing.assert_allclose(metrics["term/task"], wanted, rtol=2e-5)
        np.testing.assert_allclose(memory["answers"].rows[rows["index"]], softmax(logits, -1), atol=1e-6)


def test_pskd_takes_mixed_labels():
    rows = tiny.batch(4)
    mixed = softmax(np.random.default_rng(0).normal(size=(4, CLASSES)), -1).astype(np.float32)
    found = small.Terms(PSKD(), rows | {"label": mixed}, student=small.student(), teacher=None, train_size=4)
    logits = np.asarray(small.student().apply(small.student().params, {}, rows)[0].logits, np.float64)
    np.testing.assert_allclose(found.mean("task"), -(mixed * log_softmax(logits, -1)).sum(-1).mean(), rtol=1e-5)


def test_elrs_regulariser_and_targets_are_the_formula():
    parts = [tiny.batch(4, seed=0), tiny.batch(4, seed=1)]
    target = np.zeros((8, CLASSES))
    for place, (logits, metrics, memory) in enumerate(each_step(ELR(), parts * 3, train_size=8, steps=6)):
        rows = parts[place % 2]
        q = np.clip(softmax(logits, -1), 1e-4, 1 - 1e-4)
        target[rows["index"]] = 0.7 * target[rows["index"]] + 0.3 * q / q.sum(-1, keepdims=True)
        wanted = np.log(1 - (target[rows["index"]] * q).sum(-1)).mean()
        np.testing.assert_allclose(metrics["term/early"], wanted, rtol=2e-5)
        np.testing.assert_allclose(metrics["coef/early"], 3)
        np.testing.assert_allclose(memory.rows, target, atol=1e-6)


def test_elr_pulls_towards_what_was_learned_early():
    """Its gradient is that of q alone: it raises the logit of the remembered class and lowers the label's, whatever the label."""
    rows = tiny.batch(4)
    memory = Bank(jnp.eye(CLASSES)[jnp.array([2] * 4)] * 0.9)

    def early(logits):
        clock = Clock(0, 1, 0.0)
        return ELR().terms(Vars(memory=memory), Outputs(logits), None, rows, clock=clock, key=None)["early"].values.sum()

    slope = np.asarray(jax.grad(early)(jnp.zeros((4, CLASSES))))
    assert (slope[:, 2] < -0.1).all()
    assert (np.delete(slope, 2, 1) > 0).all()


SEEDS = range(3)


@pytest.mark.slow
def test_pskd_is_better_calibrated_than_cross_entropy():
    size, batch_size, count = 384, 64, 40
    test = claims.clusters(4000, seed=99, spread=1.6)
    student = claims.mlp(10, 64, CLASSES)
    gaps = {}
    for name, recipe in (("ce", Supervised()), ("pskd", PSKD())):
        shared = dict(student=student, teacher=None, optimizer=optim.adamw(3e-3), batch_size=batch_size)
        run = tiny.run(recipe=recipe, steps=count * (size // batch_size), **shared)
        trial = claims.Trial(run, claims.rows(*test, np.arange(batch_size)), train_size=size)
        gaps[name] = []
        for seed in SEEDS:
            train = claims.clusters(size, seed=seed, spread=1.6)
            params = trial.student((claims.rows(*train, i) for i in claims.epochs(size, batch_size, count, seed)), seed=seed)
            gaps[name].append(claims.ece(trial.answers(params, test[0]), test[1]))
    assert (np.array(gaps["pskd"]) < np.array(gaps["ce"]) - 0.02).all(), gaps


@pytest.mark.slow
def test_elr_memorises_fewer_wrong_labels():
    """40 % of the labels are drawn from the other classes."""
    size, batch_size, count = 384, 64, 60
    test = claims.clusters(2000, seed=99)
    student = claims.mlp(10, 96, CLASSES)
    memorised, accuracy = {}, {}
    for name, recipe in (("ce", Supervised()), ("elr", ELR())):
        shared = dict(student=student, teacher=None, optimizer=optim.adamw(3e-3), batch_size=batch_size)
        run = tiny.run(recipe=recipe, steps=count * (size // batch_size), **shared)
        trial = claims.Trial(run, claims.rows(*test, np.arange(batch_size)), train_size=size)
        memorised[name], accuracy[name] = [], []
        for seed in SEEDS:
            image, label = claims.clusters(size, seed=seed)
            rng = np.random.default_rng(seed)
            wrong = rng.random(size) < 0.4
            noisy = np.where(wrong, (label + rng.integers(1, CLASSES, size)) % CLASSES, label).astype(np.int32)
            batches = (claims.rows(image, noisy, i) for i in claims.epochs(size, batch_size, count, seed))
            params = trial.student(batches, seed=seed)
            memorised[name].append((trial.answers(params, image).argmax(-1) == noisy)[wrong].mean())
            accuracy[name].append((trial.answers(params, test[0]).argmax(-1) == test[1]).mean())
    assert np.max(memorised["elr"]) < 0.5 * np.min(memorised["ce"])
    assert np.min(accuracy["elr"]) > np.max(accuracy["ce"]) + 0.05
