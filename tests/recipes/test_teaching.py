"""Methods that prepare a teacher: MCMI."""

from __future__ import annotations

import claims
import jax
import numpy as np
import pytest
import small
import tiny
from scipy.special import softmax

from jkd import optim
from jkd.recipes import MCMI, Supervised

CLASSES = 5


def information(p: np.ndarray, label: np.ndarray, centroids: np.ndarray) -> float:
    return float((p * (np.log(p) - np.log(centroids[label]))).sum(-1).mean())


def means(p: np.ndarray, label: np.ndarray) -> np.ndarray:
    return np.stack([p[label == c].mean(0) for c in range(CLASSES)])


def test_mcmis_term_compares_with_the_class_means_of_the_epoch_before():
    epochs, parts = 3, [tiny.batch(16, seed=seed) for seed in (0, 1)]
    run = tiny.run(
        recipe=MCMI(), student=small.student(), teacher=None, optimizer=optim.sgd(0.2), steps=2 * epochs, batch_size=16
    )
    made = tiny.Engine(run, parts[0], train_size=32)
    label = np.concatenate([rows["label"] for rows in parts])
    state, answers = made.fresh(), []
    for step in range(2 * epochs):
        rows = parts[step % 2]
        logits = small.student().apply(jax.device_get(state.params["student"]), {}, rows)[0].logits
        answers.append(softmax(np.float64(logits), -1))
        state, metrics = made.step(state, made.frozen, made.put(rows))
        wanted = 0.0
        if step >= 2:
            first = 2 * (step // 2 - 1)
            wanted = information(answers[-1], rows["label"], means(np.concatenate(answers[first : first + 2]), label))
        np.testing.assert_allclose(metrics["term/information"], wanted, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(metrics["coef/information"], -0.1, rtol=1e-6)


@pytest.mark.slow
def test_fine_tuning_raises_the_information_and_keeps_the_accuracy():
    """More with more weight, on the examples it is tuned on; the accuracy is that on others."""
    size, batch_size, epochs = 600, 100, 20
    train, test = claims.clusters(size, seed=0, spread=0.7), claims.clusters(2000, seed=99, spread=0.7)
    shared = dict(student=claims.mlp(10, 48, CLASSES), teacher=None, batch_size=batch_size)
    example = claims.rows(*train, np.arange(batch_size))

    def trained(recipe, rate):
        steps = epochs * size // batch_size
        trial = claims.Trial(
            tiny.run(recipe=recipe, optimizer=optim.adamw(rate), steps=steps, **shared), example, train_size=size
        )

        def train_it(seed, params=None):
            batches = (claims.rows(*train, i) for i in claims.epochs(size, batch_size, epochs, seed))
            return trial.student(batches, seed=seed, params=params)

        return trial, train_it

    trial, first = trained(Supervised(), 3e-3)
    tuned = [trained(MCMI(weight=weight), 1e-3)[1] for weight in (0.0, 0.1, 0.3)]
    for seed in range(2):
        before, found = first(seed), []
        for tune in tuned:
            params = tune(seed, before)
            p = np.maximum(np.float64(trial.answers(params, train[0])), 1e-12)
            right = (trial.answers(params, test[0]).argmax(-1) == test[1]).mean()
            found.append((information(p, train[1], means(p, train[1])), right))
        (plain, accuracy), (some, _), (more, kept) = found
        assert plain < some < more, found
        assert more > 1.25 * plain, found
        assert kept > accuracy - 0.01, found
