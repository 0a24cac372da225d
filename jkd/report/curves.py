"""Numbers over a training, seeds together."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence

from jkd.report.records import Record

MOST = 160
"""Points of a curve; of longer ones, neighbours become one."""


@dataclasses.dataclass(frozen=True)
class Point:
    """Mean, least and most over seeds."""

    step: float
    mean: float
    low: float
    high: float


Curve = tuple[Point, ...]


def curve(records: Iterable[Record], name: str, *, scale: float = 1.0) -> Curve:
    """A number of ``metrics.jsonl`` over the steps; empty where no seed has it."""
    found: dict[int, list[float]] = {}
    for record in records:
        for line in record.lines:
            value = line.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                found.setdefault(line["step"], []).append(scale * value)
    points = [Point(step, statistics.fmean(values), min(values), max(values)) for step, values in sorted(found.items())]
    return tuple(_thin(points))


def names(records: Iterable[Record], prefix: str) -> list[str]:
    """What stands behind a prefix in the lines: ``train/share/`` gives the terms."""
    found = {name: None for record in records for line in record.lines for name in line if name.startswith(prefix)}
    return [name.removeprefix(prefix) for name in found]


def _thin(points: Sequence[Point]) -> list[Point]:
    size = -(-len(points) // MOST)
    return [_merged(points[start : start + size]) for start in range(0, len(points), size or 1)]


def _merged(points: Sequence[Point]) -> Point:
    step, mean = (statistics.fmean(getattr(point, name) for point in points) for name in ("step", "mean"))
    return Point(step, mean, min(point.low for point in points), max(point.high for point in points))
