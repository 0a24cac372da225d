"""What a person sees of a training: a progress bar, messages, the final table. The bar stays away where no terminal is."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from jkd.context import Context
from jkd.loop import Listener, Summary
from jkd.samples import Sample

COLUMNS = ("parameters", "accuracy", "nll", "bits_per_byte", "ece", "agreement", "examples_per_s")
"""Of the final table; the first and the last are counts, the others fractions, nats or, of text alone, bits."""
_TITLES = {"nll": "NLL", "bits_per_byte": "bits/byte", "ece": "ECE", "examples_per_s": "examples/s"}


class Watch(Listener):
    """A `Listener` for the terminal: bar and messages on stderr, so that stdout holds the table alone.

    Args:
        file: where bar and messages go; the bar only where it is a terminal.
    """

    def __init__(self, file: TextIO | None = None):
        self.console = Console(file=file or sys.stderr, highlight=False)
        self.ctx: Context | None = None
        """Of the run that was started last: it explains what ran out of memory."""
        self.name = ""
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def run_started(self, name: str, ctx: Context, start: int) -> None:
        self.name, self.ctx = name, ctx
        self.close()
        if start:
            self.message(f"{name}: goes on after step {start}")
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[rate]} examples/s"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._bar.add_task(name, total=ctx.steps, completed=start, loss="…", rate="…")
            self._bar.start()

    def stepped(self, name: str, step: int, steps: int, values: Mapping[str, float], examples_per_s: float) -> None:
        if self._bar is not None:
            loss = f"{values['loss']:.4f}" if "loss" in values else "…"
            self._bar.update(self._task, completed=step, loss=loss, rate=_count(examples_per_s))

    def message(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def run_finished(self, name: str, summary: Summary) -> None:
        self.close()
        self.message(f"{name}: {_line(summary)}")

    def said(self, name: str, sample: Sample) -> None:
        self.message(f"{name} goes on with {_end(sample.prompt)!r}: {sample.text!r}")
        if sample.teacher is not None:
            self.message(f"its teacher: {sample.teacher!r}")

    def skipped(self, name: str, summary: Summary) -> None:
        self.close()
        self.message(f"{name}: was finished before: {_line(summary)}")

    def close(self) -> None:
        """Ends the bar, whatever became of the run."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def table(summary: Mapping[str, Mapping[str, Any]], *, title: str = "", file: TextIO | None = None) -> None:
    """Prints one row for each run; a metric is a number, a pair (mean, standard deviation), or None where there is none."""
    console = Console(file=file or sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file has no width: nothing is cut
    grid = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    grid.add_column("run")
    shown = [name for name in COLUMNS if name != "bits_per_byte" or any(name in metrics for metrics in summary.values())]
    for name in shown:
        grid.add_column(_TITLES.get(name, name), justify="right")
    for run, metrics in summary.items():
        grid.add_row(run, *(_cell(name, metrics.get(name)) for name in shown))
    console.print(grid)


def statistics(summaries: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """``{run: {metric: {"mean": …, "std": …}}}`` over several summaries; the sample standard deviation (0 of one)."""
    import numpy as np

    found: dict[str, dict[str, dict[str, float]]] = {}
    for run in summaries[0]:
        for name, first in summaries[0][run].items():
            values = [summary[run][name] for summary in summaries]
            if isinstance(first, str) or any(value is None for value in values):
                continue
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            found.setdefault(run, {})[name] = {"mean": float(np.mean(values)), "std": spread}
    return found


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    form = _count if name in (COLUMNS[0], COLUMNS[-1]) else "{:.4f}".format
    if not isinstance(value, tuple):
        return form(value)
    mean, spread = value
    return form(mean) if name == "parameters" else f"{form(mean)} ± {form(spread)}"


def _end(text: str, length: int = 24) -> str:
    return text if len(text) <= length else "…" + text[-length:]


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _line(summary: Summary) -> str:
    shown = [f"{_TITLES.get(name, name)} {_cell(name, summary[name])}" for name in COLUMNS[1:] if summary.get(name) is not None]
    return ", ".join(shown) or f"{_count(summary['parameters'])} parameters"
