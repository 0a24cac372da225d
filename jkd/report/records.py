"""What `jkd train` left in a folder, read back: configs, results, metrics. Nothing is computed here and no weights are read."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from jkd.errors import InputError, nearest

RUN = "jkd.config:Run"
"""The class of a `jkd.Run` in ``config.json``."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One run of an experiment.

    Args:
        name: the node's.
        config: the node as ``config.json`` has it; of a function, what it closes over.
        summary: of the finished run; None where it is not finished.
        metrics: its last evaluation.
        details: sums by bin and by class (`jkd.evaluate.detail`).
        lines: ``metrics.jsonl``, ``{"step": …, name: value}`` in the order of the steps.
        sample: of a language model, ``prompt``, what its product says (``text``), and its ``teacher`` (`jkd.samples`); else empty.
        classes: their names, where the data know them.
    """

    name: str
    config: Any
    summary: dict[str, Any] | None
    metrics: dict[str, float]
    details: dict[str, dict[str, list[float]]]
    lines: tuple[dict[str, Any], ...]
    sample: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def step(self) -> int:
        """How far its records go."""
        return max((line["step"] for line in self.lines), default=0)

    @property
    def run(self) -> dict[str, Any]:
        """The config of the run; of a function that makes one, the run it closes over; empty where there is none."""
        return next(runs(self.config), {})


@dataclasses.dataclass(frozen=True)
class Folder:
    """An experiment's folder.

    Args:
        path: where it lies.
        given: the argument that led to it: itself, or the folder of ``jkd train --seeds`` that holds it.
        config: ``config.json``.
        records: its runs, in the order of the config; those that have not begun are there, empty.
        command: how it was trained, as one types it; empty where it was trained from Python.
        title: the first line of the config's docstring.
        published: numbers that the config names beside its runs, see `published_in`.
        published_on: what those are of.
    """

    path: epath.Path
    given: str
    config: dict[str, Any]
    records: dict[str, Record]
    command: str
    title: str
    published: dict[str, tuple[float, float | None]]
    published_on: str


def read(paths: Sequence[Any]) -> list[Folder]:
    """Every experiment in these folders: each is one, or holds some (``jkd train --seeds``, or all of ``runs/``).

    Raises:
        InputError: no such folder, one that holds no run, or a file in it that cannot be read.
    """
    found: list[Folder] = []
    for path in paths:
        here = [_folder(each, str(path)) for each in _experiments(epath.Path(path))]
        if not any(folder.records for folder in here):
            raise InputError(f"{path} holds nothing that jkd train left")
        found += [folder for folder in here if folder.records]
    return found


def runs(config: Any) -> Iterator[dict[str, Any]]:
    """Every `Run` in a part of ``config.json``, the outermost first."""
    if isinstance(config, dict):
        if config.get("class") == RUN:
            yield config
        config = list(config.values())
    if isinstance(config, list):
        for each in config:
            yield from runs(each)


def published_in(text: str, where: str) -> tuple[dict[str, tuple[float, float | None]], str]:
    """What a config file says was published: ``({run: (accuracy in %, that of the control beside it)}, of what)``.

    The file may define ``PUBLISHED = {"kd": 73.33, "simkd": (78.08, 73.09)}``, where a pair names the control that this row was
    published with (the others are beside ``PUBLISHED["control"]``), and ``PUBLISHED_ON``, a line on what they are of. Both are
    literals: the file is not run.

    Raises:
        InputError: they are something else.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise InputError(f"{where}, line {error.lineno}: {error.msg}") from None
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name) and target.id in ("PUBLISHED", "PUBLISHED_ON"):
                    found[target.id] = statement.value
    try:
        values = {name: ast.literal_eval(value) for name, value in found.items()}
        rows, on = dict(values.get("PUBLISHED", {})), str(values.get("PUBLISHED_ON", ""))
        pairs = {str(name): tuple(map(float, row if isinstance(row, tuple) else (row,))) for name, row in rows.items()}
        if any(len(pair) not in (1, 2) for pair in pairs.values()):
            raise ValueError
    except (ValueError, TypeError):
        raise InputError(
            f"{where}: PUBLISHED is no literal {{run: accuracy in %}} or {{run: (accuracy, its control)}}"
        ) from None
    control = pairs.get("control", (None,))[0]
    return {name: (pair[0], pair[1] if len(pair) > 1 else control) for name, pair in pairs.items()}, on


def _experiments(path: epath.Path) -> list[epath.Path]:
    if not path.is_dir():
        siblings = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: no such folder{nearest(path.name, siblings)}")
    if (path / "config.json").exists():
        return [path]
    if (path.parent / "config.json").exists():
        raise InputError(f"{path} is one run of an experiment; give {path.parent}")
    return [found for each in sorted(path.iterdir(), key=_natural) if each.is_dir() for found in _below(each)]


def _below(path: epath.Path) -> list[epath.Path]:
    """An experiment, or those of several seeds."""
    if (path / "config.json").exists():
        return [path]
    return [each for each in sorted(path.glob("seed*"), key=_natural) if (each / "config.json").exists()]


def _natural(path: epath.Path) -> list[Any]:
    """seed10 after seed9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _folder(path: epath.Path, given: str) -> Folder:
    config = _json(path / "config.json")
    records = {name: _record(name, node, path / name) for name, node in config.items()}
    records = {name: record for name, record in records.items() if record.run or record.lines or record.finished}
    command = title = on = ""
    published: dict[str, tuple[float, float | None]] = {}
    if (path / "config.py").exists():
        text = (path / "config.py").read_text()
        published, on = published_in(text, str(path / "config.py"))
        title = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    if (path / "command.json").exists():
        typed = _json(path / "command.json")
        command = shlex.join(["jkd", "train", typed["config"], *(word for each in typed["set"] for word in ("--set", each))])
    return Folder(path, given, config, records, command, title, published, on)


def _record(name: str, config: Any, folder: epath.Path) -> Record:
    result: Mapping[str, Any] = {}
    if (folder / "result.json").exists():
        result = _json(folder / "result.json")
    lines = []
    if (folder / "metrics.jsonl").exists():
        for text in (folder / "metrics.jsonl").read_text().splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # the last line of a run that was killed, or that is being written
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return Record(
        name,
        config,
        result.get("summary"),
        result.get("metrics", {}),
        result.get("details", {}),
        tuple(lines),
        {"teacher": None, **result["sample"]} if "sample" in result else {},
        tuple(result.get("classes", ())),
    )


def _json(file: epath.Path) -> Any:
    try:
        return json.loads(file.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} cannot be read: {error}") from None
