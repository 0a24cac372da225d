"""Schedules against their closed forms, at the first step, between, and at the last."""

from __future__ import annotations

import math

import jax
import numpy as np
import pytest

from jkd import schedules
from jkd.schedules import Clock, Cosine, Epochs, Linear, Piecewise, WarmupCosine

STEPS = 240


def values(schedule, steps=STEPS, per_epoch=10.0):
    return np.array([float(schedules.at(schedule, Clock(step, steps, step / per_epoch))) for step in range(steps + 1)])


FRACTION = np.arange(STEPS + 1) / STEPS
CASES = {
    "a number": (0.3, np.full(STEPS + 1, 0.3)),
    "linear": (Linear(2.0, 1.0), 2 - FRACTION),
    "linear within": (Linear(0.0, 1.0, begin=0.25, until=0.5), np.clip((FRACTION - 0.25) / 0.25, 0, 1)),
    "cosine": (Cosine(0.1), 0.05 * (1 + np.cos(np.pi * FRACTION))),
    "cosine to a floor": (Cosine(1.0, 0.2, until=0.5), 0.2 + 0.4 * (1 + np.cos(np.pi * np.clip(2 * FRACTION, 0, 1)))),
    "warm-up": (
        WarmupCosine(1.0, warmup=0.1),
        np.minimum((FRACTION + 1 / STEPS) / 0.1, 1) * 0.5 * (1 + np.cos(np.pi * np.clip((FRACTION - 0.1) / 0.9, 0, 1))),
    ),
    "no warm-up": (WarmupCosine(1.0, warmup=0.0), 0.5 * (1 + np.cos(np.pi * FRACTION))),
    "step decay": (
        Piecewise(0.05, {150 / 240: 0.1, 180 / 240: 0.1, 210 / 240: 0.1}),
        0.05 * 0.1 ** (np.arange(STEPS + 1)[:, None] >= np.array([150, 180, 210])[None]).sum(1),
    ),
    "epochs": (Epochs(2.0, 20), 2 * np.minimum((np.arange(STEPS + 1) // 10 + 1) / 20, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_is_its_closed_form_at_every_step(name):
    schedule, wanted = CASES[name]
    np.testing.assert_allclose(values(schedule), wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_schedule_traces_and_is_float32(name):
    schedule, wanted = CASES[name]
    found = jax.jit(lambda step: schedules.at(schedule, Clock(step, STEPS, step / 10)))(37)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted[37], rtol=2e-5)


@pytest.mark.parametrize("steps", [7, 100, 391 * 240, 1_000_003])
def test_step_decay_falls_at_the_very_step_whatever_the_total(steps):
    schedule = Piecewise(1.0, {150 / 240: 0.1})
    at = round(150 / 240 * steps)
    before, after = (float(schedule(Clock(step, steps, 0.0))) for step in (at - 1, at))
    assert (before, after) == (1.0, pytest.approx(0.1))


@pytest.mark.parametrize(
    "schedule", [WarmupCosine(1.0, warmup=1.0), Linear(0.0, 1.0, begin=0.5, until=0.5), Cosine(1.0, until=0.0)]
)
def test_an_interval_of_no_length_is_a_jump_and_not_nan(schedule):
    found = values(schedule)
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert found.max() <= 1


def test_the_first_update_of_a_warm_up_is_not_wasted():
    assert values(WarmupCosine(1.0, warmup=0.5))[0] == pytest.approx(2 / STEPS)


def test_schedules_follow_whatever_the_total_finally_is():
    for steps in (10, 1000):
        clock = Clock(steps // 2, steps, 0.0)
        assert float(Linear(0.0, 1.0)(clock)) == pytest.approx(0.5)
        assert float(clock.fraction) == 0.5


def test_schedules_are_values():
    assert Cosine(0.1) == Cosine(0.1) != Cosine(0.2)
    assert math.isclose(float(schedules.at(lambda clock: clock.epoch * 2, Clock(0, 1, 3.0))), 6)
