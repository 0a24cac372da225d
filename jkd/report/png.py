"""A picture of every run against control and teacher, for READMEs and slides; drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from jkd.errors import InputError, MissingExtra
from jkd.report.compare import Group, Row

COLOURS = {"method": "#0b62b5", "control": "#b84a00", "teacher": "#00734f"}
_DASHES = {"control": (0, (6, 3)), "teacher": (0, (1.5, 2))}


def png(groups: Sequence[Group]) -> bytes:
    """Accuracy of each run, the best on top: its seeds, mean and sample standard deviation; a panel for each group.

    Raises:
        InputError: no run is finished and has an accuracy.
        MissingExtra: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtra("a picture needs matplotlib: pip install 'jkd[train]'") from error
    panels = [(group, rows) for group in groups if (rows := _ranked(group))]
    if not panels:
        raise InputError("there is no finished run with an accuracy to draw")
    lines = sum(len(rows) for _, rows in panels)
    figure = Figure(figsize=(7.5, 0.8 * len(panels) + 0.27 * lines + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    heights = [len(rows) + 1 for _, rows in panels]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (group, rows) in zip(axes, panels, strict=True):
        _panel(ax, rows)
        ax.set_title(_title(group, len(panels)), loc="left", fontsize=10)
    axes[-1].set_xlabel("accuracy on the evaluation data, %")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160)
    return file.getvalue()


def _ranked(group: Group) -> list[Row]:
    rows = [row for row in group.rows if "accuracy" in row.stats and row.role != "stage"]
    return sorted(rows, key=lambda row: row.stats["accuracy"].mean)


def _title(group: Group, panels: int) -> str:
    seeds = f"{group.seeds} seeds: each, mean and standard deviation" if group.seeds > 1 else "one seed"
    return f"{group.label}\n{seeds}" if panels > 1 else seeds


def _panel(ax: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        stat, colour = row.stats["accuracy"], COLOURS[row.role]
        if row.role != "method":
            ax.axvline(100 * stat.mean, color=colour, linestyle=_DASHES[row.role], linewidth=1.2, zorder=1)
        if stat.std is not None:
            ax.scatter(
                [100 * value for value in stat.values],
                [place] * len(stat.values),
                s=14,
                facecolors="none",
                edgecolors=colour,
                zorder=3,
            )
            ax.errorbar(100 * stat.mean, place, xerr=100 * stat.std, color=colour, linewidth=1.6, capsize=3, zorder=2)
        ax.scatter([100 * stat.mean], [place], s=38, color=colour, zorder=4)
    ax.set_yticks(range(len(rows)), [row.name for row in rows])
    for label, row in zip(ax.get_yticklabels(), rows, strict=True):
        label.set_color(COLOURS[row.role] if row.role != "method" else "#1b1f24")
    ax.set_ylim(-0.7, len(rows) - 0.3)
    ax.grid(axis="x", color="#d9dee5", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
