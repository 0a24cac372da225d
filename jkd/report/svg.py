"""Small charts as SVG text: drawn 360 wide, so that their lettering keeps its size on a phone, coloured by the page's CSS."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 32


@dataclasses.dataclass(frozen=True)
class Axis:
    """A range of values and where its ticks are.

    Args:
        low: value at the left or bottom.
        high: value at the right or top.
        log: logarithmic; both ends are positive.
        ticks: values that get a line and their text.
    """

    low: float
    high: float
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()

    def at(self, value: float) -> float:
        """0 at the low end, 1 at the high one; values outside are put on the edge."""
        low, high, value = (math.log(max(x, 1e-300)) if self.log else x for x in (self.low, self.high, value))
        return min(1.0, max(0.0, (value - low) / (high - low)))


def axis(values: Iterable[float], *, low: float | None = None, high: float | None = None, log: bool = False) -> Axis:
    """An axis that holds these values, with about four ticks at round numbers; ``low`` and ``high`` are ends that stay."""
    found = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    least, most = min(found), max(found)
    if log:
        first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
        last = max(last, first + 1)
        every = -(-(last - first) // 5)
        ticks = tuple((10.0**power, short(10.0**power)) for power in range(first, last + 1, every))
        return Axis(10.0**first, 10.0**last, True, ticks)
    least, most = (least if low is None else low), (most if high is None else high)
    if most <= least:
        most = least + (abs(least) or 1.0) * 0.1
    step = _round_step((most - least) / 4)
    bottom = least if low is not None else math.floor(least / step + 1e-9) * step
    top = most if high is not None else math.ceil(most / step - 1e-9) * step
    marks = [step * place for place in range(math.ceil(bottom / step - 1e-9), math.floor(top / step + 1e-9) + 1)]
    return Axis(bottom, top, False, tuple((mark, short(mark)) for mark in marks))


def short(value: float) -> str:
    """A tick's text: ``0.25``, ``40``, ``12k``, ``1e-05``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{round(value, 10):g}".replace("-", "−")


class Chart:
    """Axes and what is drawn on them, from back to front.

    Args:
        x: the horizontal axis.
        y: the vertical axis.
        height: of the whole drawing.
        left, bottom: room for what stands left of the axes, and below them.
        below: what the horizontal axis is.
    """

    def __init__(self, x: Axis, y: Axis, *, height: int = 206, left: int = _LEFT, bottom: int = _BOTTOM, below: str = ""):
        self.x, self.y, self.height, self.left, self.bottom = x, y, height, left, height - bottom
        self._parts: list[str] = []
        right, bottom = WIDTH - _RIGHT, self.bottom
        for value, text in y.ticks:
            at = self.across(value)
            self._parts.append(f'<path class="grid" d="M{left} {at}H{right}"/>')
            self.text(left - 6, at, text, "end", middle=True)
        for value, text in x.ticks:
            at = self.along(value)
            self._parts.append(f'<path class="grid" d="M{at} {_TOP}V{bottom}"/>')
            if text:
                self.text(at, bottom + 14, text, "end" if at > right - 10 else "middle")
        if below:
            self.text((left + right) / 2, height - 2, below)

    def along(self, value: float) -> float:
        return round(self.left + self.x.at(value) * (WIDTH - _RIGHT - self.left), 1)

    def across(self, value: float) -> float:
        return round(self.bottom - self.y.at(value) * (self.bottom - _TOP), 1)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        anchor: str = "middle",
        *,
        middle: bool = False,
        upright: bool = False,
        style: str = "",
    ) -> None:
        """Words at a place of the drawing, not of the axes; ``upright`` they rise to it from below."""
        turn = f' transform="rotate(-90 {x:g} {y:g})"' if upright else ""
        shift = ' dy=".35em"' if middle or upright else ""
        kind = f' class="{style}"' if style else ""
        self._parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{shift}{turn}{kind}>{html.escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], style: str, *, dots: bool = False) -> None:
        """Through these points; a single one becomes a dot."""
        places = [(self.along(x), self.across(y)) for x, y in points if math.isfinite(y)]
        if len(places) > 1:
            self._parts.append(f'<path class="line {style}" d="M{"L".join(f"{x} {y}" for x, y in places)}"/>')
        if dots or len(places) == 1:
            self._parts += [f'<circle class="{style}" cx="{x}" cy="{y}" r="2.5"/>' for x, y in places]

    def band(self, points: Sequence[tuple[float, float, float]], style: str) -> None:
        """The area between two curves: ``(x, low, high)``."""
        points = [point for point in points if all(map(math.isfinite, point))]
        if len(points) > 1:
            there = [f"{self.along(x)} {self.across(high)}" for x, _, high in points]
            back = [f"{self.along(x)} {self.across(low)}" for x, low, _ in reversed(points)]
            self._parts.append(f'<path class="band {style}" d="M{"L".join(there + back)}Z"/>')

    def bar(self, left: float, right: float, low: float, high: float, style: str, title: str = "") -> None:
        """A rectangle in the axes' values, with a word for who points at it."""
        x, width = self.along(left), self.along(right) - self.along(left)
        y, height = self.across(high), self.across(low) - self.across(high)
        self._parts.append(
            f'<rect class="{style}" x="{x}" y="{y}" width="{max(width, 0.3):.1f}" height="{height:.1f}">{_title(title)}</rect>'
        )

    def dot(self, x: float, y: float, style: str, *, radius: float = 3.5, title: str = "") -> None:
        self._parts.append(
            f'<circle class="{style}" cx="{self.along(x)}" cy="{self.across(y)}" r="{radius:.1f}">{_title(title)}</circle>'
        )

    def svg(self, label: str) -> str:
        """The drawing; ``label`` is what a screen reader says."""
        size = f'viewBox="0 0 {WIDTH} {self.height}"'
        return f'<svg {size} role="img" aria-label="{html.escape(label, quote=True)}">{"".join(self._parts)}</svg>'


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>" if text else ""


def _round_step(least: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least so large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= least * (1 - 1e-9))
