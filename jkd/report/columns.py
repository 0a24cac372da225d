"""What the tables show of a row: one list of columns for the terminal and for the page."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence

from jkd.report.compare import Group, Row, Stat

DASH = "–"


@dataclasses.dataclass(frozen=True)
class Column:
    """A column.

    Args:
        title: with its unit.
        cell: the text for a row; empty where it has none.
        note: what the title does not say.
    """

    title: str
    cell: Callable[[Row], str]
    note: str = ""


def columns(groups: Sequence[Group]) -> list[Column]:
    """Those that some row has something in, the most important first."""
    rows = [row for group in groups for row in group.rows]
    known = [
        Column(
            "bits per byte",
            _stat("bits_per_byte", _spread(4)),
            "of the evaluation text, whatever the vocabulary; less is better",
        ),
        Column("accuracy, %", _stat("accuracy", _percent(2))),
        Column("gain", _stat("gain", _percent(2, sign="+")), "difference in accuracy to the control of the same seed, points"),
        Column("published", _published, _published_on(groups)),
        Column("agreement, %", _stat("agreement", _percent(1)), "equal first choices with the teacher"),
        Column("NLL", _stat("nll", _spread(3)), "nats"),
        Column("ECE, %", _stat("ece", _percent(1)), "expected calibration error"),
        Column("KL", _stat("kl", _spread(3)), "KL(teacher || student), nats"),
        Column("examples/s", _stat("examples_per_s", _median), "median; training"),
        Column("parameters", _stat("parameters", _median)),
        Column("extra", _stat("extra_parameters", _median), "parameters that the method trains beside the student's"),
        Column("FLOPs", _stat("student_flops", _power), "of the student in a step, forward and backward"),
        Column("teacher FLOPs", _stat("teacher_flops", _power), "of a step"),
    ]
    names = dict.fromkeys(name for row in rows for name in row.stats)
    more = [
        Column(name.replace("_", " "), _stat(name, _spread(3))) for name in names if name not in _TOLD and not _of_teacher(name)
    ]
    shown = [*known[:4], *more, *known[4:]]
    seeds = Column("seeds", _seeds, "finished")
    lead = [seeds] if any(len(row.records) > 1 for row in rows) else []
    return [*lead, *(column for column in shown if any(column.cell(row) for row in rows))]


_TOLD = {
    "bits_per_byte",
    "accuracy",
    "gain",
    "agreement",
    "nll",
    "ece",
    "kl",
    "examples_per_s",
    "parameters",
    "extra_parameters",
    "student_flops",
    "steps",
}


def number(stat: Stat, digits: int, *, scale: float = 1.0, sign: str = "") -> str:
    """``98.22 ± 0.21``, or the number alone where there is one seed."""
    mean = f"{scale * stat.mean:{sign}.{digits}f}".replace("-", "−")
    return mean if stat.std is None else f"{mean} ± {scale * stat.std:.{digits}f}"


def _seeds(row: Row) -> str:
    finished, of = len(row.finished), len(row.records)
    return str(of) if finished == of else f"{finished} of {of}"


def _of_teacher(name: str) -> bool:
    return name.startswith("teacher_")


def _stat(name: str, text: Callable[[Stat], str]) -> Callable[[Row], str]:
    return lambda row: text(row.stats[name]) if name in row.stats else ""


def _percent(digits: int, sign: str = "") -> Callable[[Stat], str]:
    return lambda stat: number(stat, digits, scale=100, sign=sign)


def _spread(digits: int) -> Callable[[Stat], str]:
    return lambda stat: number(stat, digits)


def _median(stat: Stat) -> str:
    return f"{statistics.median(stat.values):,.0f}"


def _power(stat: Stat) -> str:
    size = statistics.median(stat.values)
    return f"{size:.2e}" if size else ""  # of a teacher that is not there


def _published(row: Row) -> str:
    if row.published is None:
        return ""
    accuracy, control = row.published
    gain = "" if control is None or row.role == "control" else f" ({accuracy - control:+.2f})".replace("-", "−")
    return f"{accuracy:.2f}{gain}"


def _published_on(groups: Sequence[Group]) -> str:
    on = dict.fromkeys(group.folders[0].published_on for group in groups)
    return "; ".join(["accuracy, % (gain over the control beside it)", *filter(None, on)])
