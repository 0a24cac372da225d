"""Which charts a run gets, from what its records hold: a chart whose numbers are not there is not drawn."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from jkd.report import curves, svg
from jkd.report.columns import number
from jkd.report.compare import Group, Role, Row, teachers_of
from jkd.report.curves import Curve
from jkd.report.records import Record

STYLES: dict[Role, str] = {"method": "student", "stage": "student", "control": "control", "teacher": "teacher"}
"""Classes of the page's CSS."""
_METRICS = {
    "bits_per_byte": ("Bits per byte", 1.0),
    "accuracy": ("Accuracy, %", 100.0),
    "nll": ("NLL, nats", 1.0),
    "ece": ("Expected calibration error, %", 100.0),
    "agreement": ("Agreement with the teacher, %", 100.0),
    "kl": ("KL(teacher || student), nats", 1.0),
}
_LESS = {"bits_per_byte", "kl"}
"""What is better the smaller it is."""
_FEW = 20
"""Most classes that are drawn in their order, each with its name."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with its words.

    Args:
        title: what is drawn.
        drawing: SVG.
        legend: ``(style, text)`` of what there is to tell apart.
        note: how to read it.
    """

    title: str
    drawing: str
    legend: tuple[tuple[str, str], ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class _Side:
    """The run itself, its control, or its teacher."""

    style: str
    label: str
    row: Row | None
    """None of a teacher that is no run here: what is known of it, the run's own evaluations hold."""
    own: Row

    def curve(self, kind: str, name: str, scale: float = 1.0) -> Curve:
        if self.row is not None:
            return curves.curve(self.row.records.values(), f"{kind}/{name}", scale=scale)
        return curves.curve(self.own.records.values(), f"{kind}/teacher_{name}", scale=scale) if kind == "eval" else ()

    def sums(self, kind: str) -> dict[str, list[float]]:
        """Of every finished seed together."""
        if self.row is not None and self.row.finished:
            return _pooled(self.row.finished, kind)
        return _pooled(self.own.finished, f"teacher_{kind}") if self.style == "teacher" else {}

    def stat(self, name: str, digits: int, scale: float) -> str:
        row, name = (self.row, name) if self.row is not None else (self.own, f"teacher_{name}")
        return number(row.stats[name], digits, scale=scale) if name in row.stats else ""


def overview(group: Group) -> list[Figure]:
    """Every run beside control and teacher: how well it does, and how near it comes to the teacher."""
    found = [_dots(group, name) for name in ("bits_per_byte", "accuracy", "agreement", "kl")]
    return [figure for figure in found if figure is not None]


def figures(group: Group, row: Row) -> list[Figure]:
    """The charts of one run, beside its control and its teacher."""
    sides = _sides(group, row)
    others = {name for name in curves.names(row.records.values(), "eval/") if not name.startswith("teacher_")} - set(_METRICS)
    found: list[Figure | None] = [
        _curves("Training loss", "train", "loss", sides, note="each recipe's own: another recipe's is on another scale")
    ]
    for name in ("bits_per_byte", "accuracy", *sorted(others), "nll", "ece", "agreement", "kl"):
        title, scale = _METRICS.get(name, (name.replace("_", " "), 1.0))
        found.append(_curves(title, "eval", name, sides, scale=scale))
    found += [_reliability(sides), _classes(sides), _shares(row), _cosines(row), _norms(row)]
    return [figure for figure in found if figure is not None]


def _sides(group: Group, row: Row) -> list[_Side]:
    by_name = {each.name: each for each in group.rows}
    found = [_Side(STYLES[row.role], row.name, row, row)]
    control = group.row("control")
    if control is not None and row.role in ("method", "stage"):
        found.append(_Side("control", control.name, control, row))
    if row.first.run.get("teacher") is not None and row.role != "teacher":
        named = teachers_of(row.first.run, by_name)
        found.append(_Side("teacher", "teacher", by_name[named[0]] if len(named) == 1 else None, row))
    return found


def _curves(title: str, kind: str, name: str, sides: Sequence[_Side], *, scale: float = 1.0, note: str = "") -> Figure | None:
    drawn = [(side.style, side.label, side.curve(kind, name, scale)) for side in sides]
    if not drawn[0][2]:  # the run's own
        return None
    drawn = [each for each in drawn if each[2]]
    return _lines(title, drawn, note=note, spread=any(len(side.own.records) > 1 for side in sides))


def _lines(
    title: str,
    drawn: Sequence[tuple[str, str, Curve]],
    *,
    low: float | None = None,
    high: float | None = None,
    log: bool | None = None,
    note: str = "",
    spread: bool = False,
) -> Figure:
    points = [point for _, _, curve in drawn for point in curve]
    ends = [value for point in points for value in (point.low, point.high)]
    if log is None:
        log = min(ends) > 0 and max(ends) > 50 * min(ends)
    x = svg.axis((point.step for point in points), low=0, high=max(point.step for point in points))
    chart = svg.Chart(x, svg.axis(ends, low=low, high=high, log=log), below="step")
    for style, _, curve in reversed(drawn):
        chart.band([(point.step, point.low, point.high) for point in curve] if spread else [], style)
    for style, _, curve in reversed(drawn):
        chart.line([(point.step, point.mean) for point in curve], style, dots=len(curve) <= 12)
    ending = ", ".join(f"{label} ends at {curve[-1].mean:.4g}" for _, label, curve in drawn)
    return Figure(title, chart.svg(f"{title}: {ending}"), tuple((style, label) for style, label, _ in drawn), note)


def _reliability(sides: Sequence[_Side]) -> Figure | None:
    drawn = [(side, bins) for side in sides if sum((bins := side.sums("bins")).get("weight", ()))]
    if not drawn or drawn[0][0] is not sides[0]:
        return None
    unit = svg.axis([], low=0, high=1)
    chart = svg.Chart(unit, unit, height=246, below="confidence")
    chart.line([(0, 0), (1, 1)], "ideal")
    for side, bins in reversed(drawn):
        total = sum(bins["weight"])
        full = [each for each in zip(bins["weight"], bins["confidence"], bins["correct"], strict=True) if each[0]]
        # a few examples say nothing: their bins are dots, and the line does not jump to them
        told_by = [each for each in full if each[0] >= total / 100]
        chart.line([(confidence / weight, correct / weight) for weight, confidence, correct in told_by], side.style)
        for weight, confidence, correct in full:
            told = f"{side.label}: {weight:g} examples, confidence {confidence / weight:.2f}, accuracy {correct / weight:.2f}"
            chart.dot(confidence / weight, correct / weight, side.style, radius=1.5 + 6 * math.sqrt(weight / total), title=told)
    legend = tuple((side.style, f"{side.label}, ECE {side.stat('ece', 1, 100)} %") for side, _ in drawn)
    note = (
        "accuracy over confidence in 15 bins; size: share of the examples, below 1 % off the line; the diagonal is calibrated"
    )
    return Figure("Reliability", chart.svg("Reliability: " + "; ".join(text for _, text in legend)), legend, note)


def _classes(sides: Sequence[_Side]) -> Figure | None:
    sums = {side.style: side.sums("classes") for side in sides[:2]}
    if not all(sums.get(style) for style in ("student", "control")):
        return None
    ours, theirs, known = sums["student"], sums["control"], sides[0].own.first.classes
    gains = [
        (100 * (a / n - b / m), known[place] if place < len(known) else str(place))
        for place, (a, n, b, m) in enumerate(
            zip(ours["correct"], ours["weight"], theirs["correct"], theirs["weight"], strict=True)
        )
        if n and m
    ]
    if not gains:
        return None
    if len(gains) > _FEW:
        gains.sort(reverse=True)
    y = svg.axis([gain for gain, _ in gains] + [0.0])
    named = [_clipped(name) for _, name in gains] if len(gains) <= _FEW else []
    longest = max(map(len, named), default=0)
    # names that have no room beside each other stand on end
    upright = longest * 6.5 * len(gains) > svg.WIDTH - 60
    room = 16 + round(5.6 * longest) if upright else 32
    chart = svg.Chart(
        svg.Axis(0, len(gains), ticks=()),
        y,
        height=174 + room,
        bottom=room,
        below="" if named else "classes, from gain to loss",
    )
    gap = 0.12 if len(gains) <= 60 else 0.0
    for place, (gain, name) in enumerate(gains):
        style, told = ("gain" if gain >= 0 else "loss"), f"class {name}: {gain:+.1f} points"
        chart.bar(place + gap, place + 1 - gap, min(0.0, gain), max(0.0, gain), style, told)
    for place, word in enumerate(named):
        chart.text(
            chart.along(place + 0.5), 174 + (6 if upright else 14), word, "end" if upright else "middle", upright=upright
        )
    chart.line([(0, 0), (len(gains), 0)], "zero")
    better, worse = sum(gain > 0 for gain, _ in gains), sum(gain < 0 for gain, _ in gains)
    ends = sorted(gains)
    note = f"{better} classes better, {worse} worse; most: class {ends[-1][1]} ({ends[-1][0]:+.1f}), least: class {ends[0][1]} "
    note = f"{note}({ends[0][0]:+.1f})".replace("-", "−")
    return Figure("Accuracy of each class, above the control's, points", chart.svg(f"Gain by class: {note}"), (), note)


def _shares(row: Row) -> Figure | None:
    terms = curves.names(row.records.values(), "train/share/")
    found = {term: curves.curve(row.records.values(), f"train/share/{term}", scale=100) for term in terms}
    if len(terms) < 2:
        return None
    steps = sorted({point.step for curve in found.values() for point in curve})
    at = {term: {point.step: point.mean for point in curve} for term, curve in found.items()}
    chart = svg.Chart(svg.axis(steps, low=0, high=max(steps)), svg.axis([], low=0, high=100), below="step")
    floor = dict.fromkeys(steps, 0.0)
    for place, term in enumerate(terms):
        top = {step: floor[step] + at[term].get(step, 0.0) for step in steps}
        chart.band([(step, floor[step], top[step]) for step in steps], f"area {_term(place)}")
        floor = top
    legend = tuple((_term(place), term) for place, term in enumerate(terms))
    ending = ", ".join(f"{term} ends at {curve[-1].mean:.0f} %" for term, curve in found.items())
    return Figure("Shares of the terms in the loss, %", chart.svg(f"Shares: {ending}"), legend)


def _cosines(row: Row) -> Figure | None:
    drawn = _by_term(row, "gradient/cosine/")
    if not drawn:
        return None
    note = "1: the term pulls the student where the labels do; 0: elsewhere; −1: against them"
    return _lines("Cosine of each term's gradient to the task's", drawn, low=-1, high=1, log=False, note=note)


def _norms(row: Row) -> Figure | None:
    drawn = _by_term(row, "gradient/norm/")
    return _lines("Norm of each term's gradient", drawn) if len(drawn) > 1 else None


def _by_term(row: Row, prefix: str) -> list[tuple[str, str, Curve]]:
    """Each term in the colour that it has among the shares."""
    order = curves.names(row.records.values(), "train/share/")
    terms = sorted(
        curves.names(row.records.values(), prefix), key=lambda term: order.index(term) if term in order else len(order)
    )
    found = [
        (_term(order.index(term) if term in order else len(order)), term, curves.curve(row.records.values(), prefix + term))
        for term in terms
    ]
    return [each for each in found if each[2]]


def _term(place: int) -> str:
    return f"term{place % 6}"


def _dots(group: Group, name: str) -> Figure | None:
    """A line for each run, the best on top: seeds, mean and deviation; control and teacher run through."""
    title, scale = _METRICS[name]
    rows = [row for row in group.rows if name in row.stats and row.role != "stage"]
    if len(rows) < 2:
        return None
    sign = -1 if name in _LESS else 1
    rows.sort(key=lambda row: sign * row.stats[name].mean)
    stats = [row.stats[name] for row in rows]
    values = [scale * value for stat in stats for value in (*stat.values, *stat.span)]
    widest = max(len(row.name) for row in rows)
    chart = svg.Chart(
        svg.axis(values), svg.Axis(-0.5, len(rows) - 0.5), height=44 + 18 * len(rows), left=min(140, 14 + 7 * min(widest, 18))
    )
    for row in rows:
        if row.role in ("control", "teacher"):
            mean = scale * row.stats[name].mean
            chart.line([(mean, -0.5), (mean, len(rows) - 0.5)], STYLES[row.role])
    for place, row in enumerate(rows):
        stat, style = row.stats[name], STYLES[row.role]
        chart.text(chart.left - 6, chart.across(place), _clipped(row.name), "end", middle=True, style=f"name {style}")
        chart.line([(scale * end, place) for end in stat.span] if stat.std else [], f"spread {style}")
        for value in stat.values if stat.std else ():
            chart.dot(scale * value, place, f"seed {style}", radius=2)
        chart.dot(scale * stat.mean, place, style, radius=4, title=f"{row.name}: {number(stat, 3, scale=scale)}")
    told = "; ".join(f"{row.name} {number(row.stats[name], 2, scale=scale)}" for row in reversed(rows))
    note = "mean, standard deviation and each seed" if group.seeds > 1 else ""
    return Figure(title, chart.svg(f"{title}: {told}"), (), note)


def _clipped(text: str) -> str:
    return text if len(text) <= 18 else text[:17] + "…"


def _pooled(records: Iterable[Record], kind: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for record in records:
        for name, values in record.details.get(kind, {}).items():
            found[name] = [a + b for a, b in zip(found.get(name, [0.0] * len(values)), values, strict=True)]
    return found
