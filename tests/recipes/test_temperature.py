"""CTKD: T goes where the student finds it harder."""

from __future__ import annotations

import numpy as np
import pytest
import small
import tiny
from scipy.special import expit, log_softmax, softmax

from jkd.recipes import CTKD

BOTH = dict(student=small.student(), teacher=small.teacher())


def kd(theta: float, rows) -> float:
    """``T² KL`` at ``T = 1 + 20 sigmoid(theta)``, float64."""
    temperature = 1 + 20 * expit(theta)
    z_s, z_t = (np.float64(model.apply(model.params, {}, rows)[0].logits) / temperature for model in BOTH.values())
    return temperature**2 * (softmax(z_t, -1) * (log_softmax(z_t, -1) - log_softmax(z_s, -1))).sum(-1).mean()


def theta_gradient(recipe, rows, **fields):
    made = tiny.Engine(tiny.run(recipe=recipe, optimizer=tiny.UNIT, **BOTH | fields), train_size=tiny.ROWS)
    found = made.train([rows])
    return float(made.start.params["temperature"]["theta"] - found.first.params["temperature"]["theta"]), found.metrics[0]


@pytest.mark.parametrize(("reversal", "epochs"), [(-1.0, 1.0), (-1.0, 10.0), (1.0, 1.0), (0.0, 1.0)])
def test_thetas_gradient_is_that_of_the_term_times_lambda(reversal, epochs):
    rows = tiny.batch()
    found, metrics = theta_gradient(CTKD(reversal=reversal, epochs=epochs), rows)
    slope = (kd(1 + 1e-4, rows) - kd(1 - 1e-4, rows)) / 2e-4
    scale = reversal * (1 - np.cos(np.pi / epochs)) / 2
    np.testing.assert_allclose(metrics["term/kd"], kd(1.0, rows), rtol=1e-5)
    np.testing.assert_allclose(found, 0.9 * scale * slope, rtol=2e-3, atol=1e-7)


def test_the_temperature_moves_to_raise_the_distillation_loss():
    rows = tiny.batch()
    found, _ = theta_gradient(CTKD(epochs=1.0), rows)
    assert kd(1 - found, rows) > kd(1.0, rows)
    found, _ = theta_gradient(CTKD(reversal=1.0, epochs=1.0), rows)
    assert kd(1 - found, rows) < kd(1.0, rows)


def test_reversal_leaves_the_students_gradient_as_it_is():
    gradients = []
    for reversal in (-1.0, 1.0):
        run = tiny.run(recipe=CTKD(reversal=reversal, epochs=1.0), optimizer=tiny.UNIT, **BOTH)
        gradients.append(tiny.Engine(run, train_size=tiny.ROWS).gradient(tiny.batch())["student"])
    assert tiny.distance(*gradients) < 1e-6
