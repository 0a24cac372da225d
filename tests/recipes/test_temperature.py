"""CTKD and InstanceCTKD: T goes where the student finds it harder."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import small
import tiny
from scipy.special import expit, log_softmax, softmax

from jkd.recipes import CTKD, InstanceCTKD

ROUNDING = 1e-4  # at T = 15 a KL of 6e-4 is the difference of logarithms near 1.6
BOTH = dict(student=small.student(), teacher=small.teacher())


def kd(theta, rows, *, span=20.0, each=False):
    """``T² KL`` at ``T = 1 + span * sigmoid(theta)``, float64: the mean, or of each example."""
    temperature = 1 + span * expit(np.broadcast_to(theta, tiny.ROWS))
    z_s, z_t = (np.float64(model.apply(model.params, {}, rows)[0].logits) / temperature[:, None] for model in BOTH.values())
    values = temperature**2 * (softmax(z_t, -1) * (log_softmax(z_t, -1) - log_softmax(z_s, -1))).sum(-1)
    return values if each else values.mean()


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
    np.testing.assert_allclose(metrics["term/kd"], kd(1.0, rows), rtol=ROUNDING)
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


def test_every_example_has_its_own_temperature_which_starts_as_the_global_one():
    """The first gradient of the last layer is by hand: of every example's loss by its theta, times lambda, over the hidden units."""
    rows = tiny.batch()
    recipe = InstanceCTKD(span=2.0, hidden=6, epochs=1.0)
    made = tiny.Engine(tiny.run(recipe=recipe, optimizer=tiny.UNIT, **BOTH), train_size=tiny.ROWS)
    found = made.train([rows, rows])
    np.testing.assert_allclose(found.metrics[0]["term/kd"], kd(1.0, rows, span=2.0), rtol=1e-5)
    params, after = (state.params["temperature"] for state in (found.start, found.first))
    gradient = jax.tree.map(np.subtract, params, after)
    logits = [np.float64(BOTH[side].apply(BOTH[side].params, {}, rows)[0].logits) for side in ("teacher", "student")]
    hidden = np.maximum(np.concatenate(logits, -1) @ params["first"]["kernel"] + params["first"]["bias"], 0)
    slope = (kd(1 + 1e-4, rows, span=2.0, each=True) - kd(1 - 1e-4, rows, span=2.0, each=True)) / 2e-4
    wanted = -0.9 * (hidden * slope[:, None]).mean(0)
    np.testing.assert_allclose(gradient["last"]["kernel"][:, 0], wanted, rtol=2e-3, atol=2e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(gradient["last"]["bias"], [-0.9 * slope.mean()], rtol=2e-3)
    # what the step changed is different for each example, and harder
    moved = hidden @ after["last"]["kernel"][:, 0] + after["last"]["bias"]
    assert np.ptp(moved) > 1e-4
    assert kd(moved, rows, span=2.0) > kd(1.0, rows, span=2.0)
