"""The table of methods: every recipe that `jkd.recipes` offers, read from the classes themselves."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import types
from typing import Any, Literal

from jkd import recipes
from jkd.errors import InputError
from jkd.recipe import Combine, Recipe


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method.

    Args:
        name: in `jkd.recipes`.
        family: of methods.
        citation: the paper.
        evidence: how far it is held to the authors' code or numbers; see `Recipe.evidence`.
        teacher: whether it needs one.
        taps: whether it needs module paths of the networks.
        labels: ``needed``, ``optional`` (``task_weight=0`` drops their term), or ``none``.
        requires: what else the run must have, in words; empty for nothing.
        fields: its hyperparameters and their defaults, as text.
    """

    name: str
    family: str
    citation: str
    evidence: str
    teacher: bool
    taps: bool
    labels: Literal["needed", "optional", "none"]
    requires: str
    fields: dict[str, str]

    @property
    def needs(self) -> str:
        """In a few words."""
        labels = {"needed": ["labels"], "optional": ["(labels)"], "none": []}[self.labels]
        return ", ".join([*(["teacher"] if self.teacher else []), *(["taps"] if self.taps else []), *labels]) or "-"


def entries() -> list[Entry]:
    """Every public recipe, by family and name."""
    found = []
    for name, kind in vars(recipes).items():
        if isinstance(kind, type) and issubclass(kind, Recipe) and not name.startswith("_") and kind is not Recipe:
            found.append(_entry(name, kind))
    return sorted(found, key=lambda entry: (entry.family, entry.name.lower()))


def as_json() -> str:
    """`entries` as a JSON list."""
    return json.dumps([dataclasses.asdict(entry) for entry in entries()], indent=1, ensure_ascii=False)


def as_text() -> str:
    """`entries` as a table, family by family."""
    table = entries()
    width, needs = (max(len(text) for text in texts) for texts in ([e.name for e in table], [e.needs for e in table]))
    lines, family = [], ""
    for entry in table:
        if entry.family != family:
            family = entry.family
            lines += ["", family]
        head = f"  {entry.name:<{width}}  {entry.needs:<{needs}}  {entry.evidence:<9}  "
        lines += textwrap.wrap(entry.citation or "-", 128, initial_indent=head, subsequent_indent=" " * len(head))
        if entry.requires:
            first, more = " " * (width + 4) + "+ ", " " * (width + 6)
            lines += textwrap.wrap(entry.requires, 128, initial_indent=first, subsequent_indent=more)
    legend = """
needs: a teacher; taps (paths of modules that it reads; jkd describe lists them); labels, (labels) if task_weight=0 does without
+ on the line below: what else the run, its data or its networks must have
checked against: golden = the authors' numbers, formula = the paper's equations, mechanism = the behaviour it states"""
    return "\n".join([*lines[1:], legend])


def _entry(name: str, kind: type[Recipe]) -> Entry:
    combined = issubclass(kind, Combine)
    needs_teacher = kind.needs_teacher if isinstance(kind.needs_teacher, bool) else True
    return Entry(
        name=name,
        family=kind.family,
        citation=kind.citation,
        evidence=kind.evidence,
        teacher=needs_teacher and not combined,
        taps=_needs_taps(kind) and not combined,
        labels=_labels(kind),
        requires=kind.requires,
        fields={field.name: _default(field) for field in dataclasses.fields(kind)},
    )


def _needs_taps(kind: type[Recipe]) -> bool:
    """Whether the recipe taps by default, or refuses to be made without taps."""
    required = [field.name for field in dataclasses.fields(kind) if _default(field) == "required"]
    if required:
        return any(name.endswith("taps") for name in required)
    try:
        made = kind()
    except InputError as error:
        return "taps" in str(error)
    return bool(made.student_taps or made.teacher_taps)


def _labels(kind: type[Recipe]) -> Literal["needed", "optional", "none"]:
    """What the code of its methods reads of a batch: labels by themselves, or only through the term that has a weight."""
    read = set[str]()
    for owner in kind.__mro__:
        if owner in (Recipe, Combine, object):
            break
        for function in vars(owner).values():
            if isinstance(function, types.FunctionType):
                read |= _mentions(function.__code__)
    if {"label", "hard_labels", "label_weight", "task"} & read:
        return "needed"
    return "optional" if "with_task" in read else "none"


def _mentions(code: types.CodeType) -> set[str]:
    inner = [_mentions(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    strings = {each for each in code.co_consts if isinstance(each, str)} & {"label"}
    return strings.union(code.co_names, *inner)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
        return getattr(value, "__name__", None) or repr(value)
    return "required" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())
