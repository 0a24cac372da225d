"""Hyperparameters that change during a run: a schedule is a value, ``float | Schedule``, wherever a number may be one.

Schedules hold fractions of the run, never step counts, so they follow whatever ``steps`` finally is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax.numpy as jnp

from jkd.types import Array


@dataclasses.dataclass(frozen=True)
class Clock:
    """Where a run stands.

    Args:
        step: updates done so far (traced inside a step).
        steps: updates in the whole run.
        epoch: passes over the training data so far, a fraction; ``step`` where the size of the data is not known.
    """

    step: Array | int
    steps: int
    epoch: Array | float

    @property
    def fraction(self) -> Array:
        """``step / steps``, float32 in 0..1."""
        return jnp.asarray(self.step, jnp.float32) / self.steps


class Schedule(Protocol):
    """``schedule(clock) -> float32 scalar``, traceable. A frozen dataclass, so that it is its own config."""

    def __call__(self, clock: Clock) -> Array: ...


def at(value: float | Schedule, clock: Clock) -> Array:
    """The number that ``value`` is at this moment, float32."""
    return jnp.asarray(value(clock) if callable(value) else value, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """From ``start`` to ``end`` between two fractions of the run, constant outside them."""

    start: float
    end: float
    begin: float = 0.0
    until: float = 1.0

    def __call__(self, clock: Clock) -> Array:
        return self.start + (self.end - self.start) * _progress(clock, self.begin, self.until)


@dataclasses.dataclass(frozen=True)
class Cosine:
    """Half a cosine from ``start`` to ``end`` between two fractions of the run, constant outside them."""

    start: float
    end: float = 0.0
    begin: float = 0.0
    until: float = 1.0

    def __call__(self, clock: Clock) -> Array:
        return self.end + (self.start - self.end) * (1 + jnp.cos(jnp.pi * _progress(clock, self.begin, self.until))) / 2


@dataclasses.dataclass(frozen=True)
class WarmupCosine:
    """Linearly from 0 to ``peak`` over the first ``warmup`` of the run, then half a cosine down to ``end``.

    The first update is not wasted: at step 0 the value is that of one step into the warm-up.
    """

    peak: float
    warmup: float = 0.05
    end: float = 0.0

    def __call__(self, clock: Clock) -> Array:
        warm = (clock.fraction + 1 / clock.steps) / self.warmup if self.warmup else jnp.float32(1)
        return jnp.minimum(warm, 1) * Cosine(self.peak, self.end, begin=self.warmup)(clock)


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """``value`` times each factor whose fraction of the run has been reached.

    Example: ``Piecewise(0.05, {150/240: 0.1, 180/240: 0.1, 210/240: 0.1})`` is CIFAR's step decay.
    """

    value: float
    factors: Mapping[float, float]

    def __call__(self, clock: Clock) -> Array:
        value = jnp.float32(self.value)
        for fraction, factor in self.factors.items():
            # compared in whole steps: a fraction such as 150/240 is not exact in float32
            value = jnp.where(jnp.asarray(clock.step) >= round(fraction * clock.steps), value * factor, value)
        return value


@dataclasses.dataclass(frozen=True)
class Epochs:
    """Linearly from 0 to ``value`` over the first ``epochs`` epochs; the epoch that runs counts as done (DKD, ReviewKD)."""

    value: float
    epochs: float

    def __call__(self, clock: Clock) -> Array:
        return self.value * jnp.minimum((jnp.floor(jnp.asarray(clock.epoch, jnp.float32)) + 1) / self.epochs, 1)


def _progress(clock: Clock, begin: float, until: float) -> Array:
    if begin == until:
        return jnp.float32(clock.fraction >= begin)
    return jnp.clip((clock.fraction - begin) / (until - begin), 0, 1)
