"""What language models said to the same text, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from jkd.report.compare import Group, Role, Row, teachers_of
from jkd.report.records import Record

_ORDER: tuple[Role, ...] = ("teacher", "control", "method")


@dataclasses.dataclass(frozen=True)
class Voice:
    """How one of them goes on.

    Args:
        role: whose words these are.
        label: the run's name, or ``teacher`` of one that is no run.
        text: the words.
    """

    role: Role
    label: str
    text: str


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A prompt and what followed: teachers first, then the control, then the methods."""

    prompt: str
    voices: tuple[Voice, ...]


def sampled(group: Group) -> list[Sampled]:
    """By prompt, of the first seed of each run that has a sample; empty where no run is a language model's."""
    by_prompt: dict[str, list[tuple[Row, Record]]] = {}
    for role in _ORDER:
        for row in (row for row in group.rows if row.role == role):
            record = next((record for record in row.finished if record.sample), None)
            if record is not None:
                by_prompt.setdefault(str(record.sample["prompt"]), []).append((row, record))
    return [Sampled(prompt, tuple(_voices(found))) for prompt, found in by_prompt.items()]


def _voices(found: Sequence[tuple[Row, Record]]) -> Iterator[Voice]:
    names = [row.name for row, _ in found]
    # a teacher that is no run here is known from what its students' runs heard it say; the same words are the same teacher's
    heard: dict[str, str] = {}
    for row, record in found:
        theirs = record.sample["teacher"]
        if theirs is not None and not teachers_of(record.run, names):
            heard.setdefault(theirs, row.name)
    for text, student in heard.items():
        yield Voice("teacher", "teacher" if len(heard) == 1 else f"teacher of {student}", text)
    for row, record in found:
        yield Voice(row.role, row.name, str(record.sample["text"]))
