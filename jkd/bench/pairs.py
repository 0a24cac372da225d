"""Two things timed in turn: what a busy machine does to one it does to the other, so their ratio tells what neither time can."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, over several that were timed one by one.

    Args:
        min: the quickest.
        median: half of them took no longer.
        p90: nine of ten took no longer (the smallest time of which that is true).
        steps: how many there were.
    """

    min: float
    median: float
    p90: float
    steps: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        ordered = sorted(seconds)
        return cls(ordered[0], statistics.median(ordered), ordered[math.ceil(0.9 * len(ordered)) - 1], len(ordered))


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Time of the first over time of the second: above 1 the second is quicker.

    Args:
        median: of the ratios of all rounds.
        low: the smallest of them.
        high: the largest.
        rounds: how many there were.
    """

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Ratio:
        """Of seconds ``[rounds]`` that were measured in the same rounds."""
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios), len(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f}, {self.rounds} rounds)"


def alternate(steps: Sequence[Callable[[], float]], rounds: int, *, drop: int = 2) -> list[list[float]]:
    """Seconds ``[steps][rounds]`` that each step answers; every round runs all of them, and every second one backwards.

    Args:
        steps: functions that do one step and answer the seconds it took.
        rounds: how many are kept.
        drop: rounds before them that are not (caches fill, clocks rise).
    """
    found: list[list[float]] = [[] for _ in steps]
    for turn in range(drop + rounds):
        order = range(len(steps)) if turn % 2 == 0 else reversed(range(len(steps)))
        for place in order:
            seconds = steps[place]()
            if turn >= drop:
                found[place].append(seconds)
    return found
