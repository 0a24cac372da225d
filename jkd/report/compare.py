"""Runs side by side: seeds that belong together, what each run is to the others, means and spreads, and what configs differ in."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from jkd.report.records import Folder, Record, runs

Role = Literal["teacher", "control", "method", "stage"]
Seed = tuple[int, int]
"""Which experiment of a group, and which of its seeds (0 where its runs have one)."""


@dataclasses.dataclass(frozen=True)
class Stat:
    """A number over seeds: ``std`` is the sample standard deviation, None of one seed."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def std(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def span(self) -> tuple[float, float]:
        """One deviation below the mean, and one above."""
        return self.mean - (self.std or 0.0), self.mean + (self.std or 0.0)


@dataclasses.dataclass(frozen=True)
class Row:
    """A run over its seeds.

    Args:
        name: the run's.
        role: ``teacher`` where another run learns from it, ``control`` by name, ``stage`` where it only initialises the run
            whose name it has before ``_initial``, else ``method``.
        records: by seed.
        stats: of the finished ones, by name: what `jkd.loop` keeps in the summary and the evaluation, and ``gain``, the
            difference in accuracy to the control of the same seed.
        published: accuracy in percent and that of the control beside it, or None.
    """

    name: str
    role: Role
    records: Mapping[Seed, Record]
    stats: Mapping[str, Stat]
    published: tuple[float, float | None] | None

    @property
    def finished(self) -> list[Record]:
        return [record for record in self.records.values() if record.finished]

    @property
    def first(self) -> Record:
        return next(iter(self.records.values()))

    @property
    def status(self) -> str:
        """How far it is where no seed is finished; empty where one is."""
        if self.finished:
            return ""
        most = max(self.records.values(), key=lambda record: record.step)
        if not most.step:
            return "not begun"
        return f"at step {most.step:,} of {most.run['steps']:,}" if "steps" in most.run else f"at step {most.step:,}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Experiments that differ in their seeds alone.

    Args:
        label: its folders.
        folders: one for each seed, or one.
        rows: its runs.
        differences: ``{field: value}`` of what its config has otherwise than the other groups'.
    """

    label: str
    folders: tuple[Folder, ...]
    rows: tuple[Row, ...]
    differences: Mapping[str, str]

    def row(self, role: Role) -> Row | None:
        return next((row for row in self.rows if row.role == role), None)

    @property
    def seeds(self) -> int:
        return max(len(row.records) for row in self.rows)


def compare(folders: Sequence[Folder]) -> list[Group]:
    """Groups in the order given; the folders of ``jkd train --seeds`` are one, and so are folders whose configs are."""
    together: dict[str, list[Folder]] = {}
    first_of: dict[str, str] = {}
    for folder in folders:
        key = json.dumps(_seedless(folder.config), sort_keys=True)
        if re.fullmatch(r"seed\d+", folder.path.name):  # by one command, even where data made from a seed look different
            key = first_of.setdefault(str(folder.path.parent), key)
        together.setdefault(key, []).append(folder)
    groups = list(together.values())
    differences = _differences([_flat(_seedless(group[0].config)) for group in groups])
    return [
        Group(_label(group, folders), tuple(group), _rows(group), each) for group, each in zip(groups, differences, strict=True)
    ]


def _label(group: Sequence[Folder], folders: Sequence[Folder]) -> str:
    def name(folder: Folder) -> str:
        whole = all(any(each is one for one in group) for each in folders if each.given == folder.given)
        return folder.given if whole else str(folder.path)

    return ", ".join(dict.fromkeys(map(name, group)))


def _rows(group: Sequence[Folder]) -> tuple[Row, ...]:
    places = _places(group[0].config)
    records: dict[str, dict[Seed, Record]] = {}
    for at, folder in enumerate(group):
        for name, record in folder.records.items():
            place, seed = places.get(name, (name, 0))
            records.setdefault(place, {})[at, seed] = record
    taught = {places.get(name, (name, 0))[0] for name in _teachers(group[0].config)}
    control = records.get("control", {})

    def role(name: str) -> Role:
        if name in taught:
            return "teacher"
        if name == "control":
            return "control"
        return "stage" if name.removesuffix("_initial") != name and name.removesuffix("_initial") in records else "method"

    def row(name: str, found: dict[Seed, Record]) -> Row:
        stats = _stats([record for record in found.values() if record.finished])
        gains = _gains(found, control) if role(name) in ("teacher", "method") else []
        if gains:
            stats["gain"] = Stat(tuple(gains))
        return Row(name, role(name), found, stats, group[0].published.get(name))

    return tuple(row(name, found) for name, found in records.items())


def _stats(records: Sequence[Record]) -> dict[str, Stat]:
    """Of every number that all of these runs have."""
    found = [record.metrics | (record.summary or {}) for record in records]
    names = [name for name in found[0] if all(_is_number(one.get(name)) for one in found)] if found else []
    return {name: Stat(tuple(float(one[name]) for one in found)) for name in names}


def _gains(records: Mapping[Seed, Record], control: Mapping[Seed, Record]) -> list[float]:
    found = []
    for seed, record in records.items():
        beside = control.get(seed) or control.get((seed[0], 0))
        pair = [(each.summary or {}).get("accuracy") if each else None for each in (record, beside)]
        if pair[0] is not None and pair[1] is not None:
            found.append(pair[0] - pair[1])
    return found


def _teachers(config: Any) -> set[str]:
    """The names of runs that others learn from."""
    return {name for run in runs(config) for name in teachers_of(run, config)}


def teachers_of(run: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """The runs that a run's config names as its teacher, by themselves, in an ensemble or behind a cache."""
    found = set[str]()

    def note(text: str) -> str:
        found.add(text)
        return text

    _strings(note, run.get("teacher"))
    return [name for name in names if name in found]


def _places(config: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    """``{node: (row, seed)}`` of nodes that are seeds of one row: ``kd_0``, ``kd_1``, …, alike but for seeds and that number.

    Generations that learn from each other (``student_1`` from ``student_0``) are not alike, and so stay apart.
    """
    alike: dict[tuple[str, str], dict[str, int]] = {}
    for name, node in config.items():
        number = re.search(r"_(\d+)(?=_|$)", name)
        if number:
            its_own = re.compile(rf"{number[0]}(?=_|$)")
            unnumbered = _strings(functools.partial(its_own.sub, ""), _seedless(node))
            row = name[: number.start()] + name[number.end() :]
            alike.setdefault((row, json.dumps(unnumbered, sort_keys=True)), {})[name] = int(number[1])
    found: dict[str, tuple[str, int]] = {}
    for (row, _), members in alike.items():
        if len(members) > 1 and row not in config and sum(row == other for other, _ in alike) == 1:
            found |= {name: (row, seed) for name, seed in members.items()}
    return found


def _seedless(config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _seedless(value) for name, value in config.items() if name != "seed"}
    return [_seedless(each) for each in config] if isinstance(config, list) else config


def _strings(change: Callable[[str], str], config: Any) -> Any:
    if isinstance(config, dict):
        return {name: _strings(change, value) for name, value in config.items()}
    if isinstance(config, list):
        return [_strings(change, each) for each in config]
    return change(config) if isinstance(config, str) else config


def _flat(config: Any, path: str = "") -> dict[str, str]:
    """``{"student.recipe.temperature": "4.0", …}``; a list is one value, and an object's class is the value of its own path."""
    if isinstance(config, dict):
        found = {path: str(config["class"]).rpartition(":")[2]} if "class" in config and path else {}
        for name, value in config.items():
            if name != "class":
                found |= _flat(value, f"{path}.{name}" if path else name)
        return found
    return {path: config if isinstance(config, str) else json.dumps(config)}


def _differences(configs: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """What of each config is not the same in all, of the runs that all have.

    Fields of several runs that change together are told once, as ``*.field``; of an object of another class no more than that.
    """
    common = set.intersection(*({path.partition(".")[0] for path in config} for config in configs))
    paths = dict.fromkeys(path for config in configs for path in config if path.partition(".")[0] in common)
    values = {path: tuple(config.get(path, "-") for config in configs) for path in paths}
    differ = {path: each for path, each in values.items() if len(set(each)) > 1}
    nodes: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for path, each in differ.items():
        above = path
        while above and (above := above.rpartition(".")[0]) not in differ:
            pass
        if not above:
            node, _, field = path.partition(".")
            nodes.setdefault((field, each), []).append(node)
    names = {
        f"{'*' if len(found) > 1 else found[0]}{'.' if field else ''}{field}": each for (field, each), found in nodes.items()
    }
    return [{name: each[place] for name, each in names.items()} for place in range(len(configs))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
