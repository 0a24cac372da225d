"""The terminal's table, and the same as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from jkd.report import curves
from jkd.report.columns import DASH, Column, columns
from jkd.report.compare import Group, Row
from jkd.report.samples import Sampled, sampled

DIFFERENCES = 6
"""Most columns for what the configs differ in; JSON has all."""
MOST_VOICES = 8
"""Most lines of what language models say."""


def table(groups: Sequence[Group], *, file: TextIO | None = None) -> None:
    """Prints a row for each run; columns that the terminal has no room for are named below it."""
    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 1000  # a file has no width: nothing is left out
    differing = list(dict.fromkeys(name for group in groups for name in group.differences))
    shown, found = differing[:DIFFERENCES], columns(groups)
    fits = found
    boundless = console.options.update(max_width=10_000)
    while True:
        grid = _grid(groups, shown, fits)
        if len(fits) <= 1 or Measurement.get(console, boundless, grid).maximum <= console.width:
            break
        fits = fits[:-1]
    console.print(grid)
    notes = "; ".join(f"{column.title}: {column.note}" for column in fits if column.note)
    if notes:
        console.print(Text(notes, style="dim"))
    for one in [one for group in groups for one in sampled(group)]:
        _said(one, console)
    left_out = [*(column.title for column in found[len(fits) :]), *differing[DIFFERENCES:]]
    if left_out:
        console.print(Text(f"not shown here, but by --json: {'; '.join(left_out)}", style="dim"))


def _said(one: Sampled, console: Console) -> None:
    """A line for each of a few voices, cut where the terminal ends."""
    if len(one.voices) > MOST_VOICES:
        console.print(Text(f"what {len(one.voices)} runs say is in the page and in --json", style="dim"))
        return
    width = min(console.width, 160)
    label = max(len(voice.label) for voice in one.voices)
    prompt, room = repr(one.prompt), width - len("after :")
    console.print(Text(f"after {prompt if len(prompt) <= room else '…' + prompt[1 - room :]}:"), soft_wrap=True)
    for voice in one.voices:
        line = f"  {voice.label:<{label}}  {voice.text!r}"
        console.print(Text(line if len(line) <= width else line[: width - 1] + "…"), soft_wrap=True)


def as_json(groups: Sequence[Group]) -> str:
    """A list of groups: label, folders, differences, and of each run role, status, means, deviations, every seed's value, what is
    drawn over the steps (mean, least and most over seeds), and what each seed's language model says."""
    return json.dumps([_group(group) for group in groups], indent=1, ensure_ascii=False)


def _grid(groups: Sequence[Group], differing: Sequence[str], found: Sequence[Column]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("run", no_wrap=True)
    for name in differing:
        grid.add_column(name, no_wrap=True)
    for column in found:
        grid.add_column(column.title, justify="right", no_wrap=True)
    for group in groups:
        if len(groups) > 1:
            grid.add_section()
            grid.add_row(Text(group.label, style="bold"))
        values = [_short(group.differences.get(name, "")) for name in differing]
        for row in group.rows:
            label = Text(row.name) + Text(f" ({row.status})" if row.status else "", style="yellow")
            grid.add_row(label, *values, *(column.cell(row) or DASH for column in found))
    return grid


def _short(text: str) -> str:
    return text if len(text) <= 24 else text[:23] + "…"


def _group(group: Group) -> dict[str, Any]:
    return {
        "label": group.label,
        "folders": [str(folder.path) for folder in group.folders],
        "differences": dict(group.differences),
        "runs": {row.name: _row(row) for row in group.rows},
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "role": row.role,
        "status": row.status or ("finished" if len(row.finished) == len(row.records) else "some seeds finished"),
        "seeds": {"finished": len(row.finished), "of": len(row.records)},
        "metrics": {
            name: {"mean": stat.mean, "std": stat.std, "values": list(stat.values)} for name, stat in row.stats.items()
        },
        "curves": {name: _curve(row, name) for name in curves.names(row.records.values(), "") if name != "step"},
        "samples": [dict(record.sample) for record in row.finished if record.sample],
        "published": None if row.published is None else {"accuracy": row.published[0], "control": row.published[1]},
    }


def _curve(row: Row, name: str) -> dict[str, list[float]]:
    points = curves.curve(row.records.values(), name)
    return {part: [getattr(point, part) for point in points] for part in ("step", "mean", "low", "high")}
