"""The page: one HTML file that needs nothing else, for phones and screens, light and dark."""

from __future__ import annotations

import html
import importlib.resources
import re
from collections.abc import Sequence

from jkd.report.columns import Column, columns, number
from jkd.report.compare import Group, Row
from jkd.report.figures import STYLES, Figure, figures, overview
from jkd.report.samples import Sampled, sampled

OPEN = 2
"""Runs whose charts are shown at once; of more, each is opened by its line."""


def page(groups: Sequence[Group]) -> str:
    """The whole file."""
    style = (importlib.resources.files("jkd.report") / "page.css").read_text(encoding="utf-8")
    names = ", ".join(group.label for group in groups)
    one = len(groups) == 1
    body = [f"<h1>{_text(_title(groups))}</h1>", *map(_command, groups if one else ()), _table(groups)]
    for group in groups:
        heading = "" if one else f"<h2>{_text(group.label)}</h2>{_command(group)}"
        body.append(f"<section>{heading}{_charts(group)}</section>")
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{_text(names)}</title>",
        f"<style>\n{style}</style>",
    ]
    lines = ["<!doctype html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", "<main>", *body, "</main>", "</body>"]
    return "\n".join([*lines, "</html>", ""])


def _title(groups: Sequence[Group]) -> str:
    titles = dict.fromkeys(group.folders[0].title for group in groups)
    return "; ".join(filter(None, titles)) or "Runs"


def _command(group: Group) -> str:
    text = "<br>".join(f"<code>{_text(command)}</code>" for command in _typed(group))
    return f'<p class="command">{text}</p>' if text else ""


def _typed(group: Group) -> list[str]:
    """What made the group, each command once; that of ``--seeds`` as it was."""
    found = dict.fromkeys(folder.command for folder in group.folders if folder.command)
    without = dict.fromkeys(re.sub(r" --set seed=\d+$", "", command) for command in found)
    return [f"{next(iter(without))} --seeds {len(found)}"] if len(found) > 1 and len(without) == 1 else list(found)


def _table(groups: Sequence[Group]) -> str:
    found = columns(groups)
    differing = list(dict.fromkeys(name for group in groups for name in group.differences))
    titles = "".join(f"<th>{_text(title)}</th>" for title in (*differing, *(column.title for column in found)))
    lines = [
        '<div class="scroll" tabindex="0" role="region" aria-label="All runs">',
        f"<table><thead><tr><th>run</th>{titles}</tr></thead>",
    ]
    for group in groups:
        lines.append("<tbody>")
        if len(groups) > 1:
            lines.append(f'<tr><th class="group" colspan="{1 + len(differing) + len(found)}">{_text(group.label)}</th></tr>')
        values = "".join(f'<td class="word">{_text(group.differences.get(name, ""))}</td>' for name in differing)
        lines += [_row(row, values, found) for row in group.rows]
        lines.append("</tbody>")
    notes = "".join(f"<li><b>{_text(column.title)}</b> {_text(column.note)}</li>" for column in found if column.note)
    return "\n".join([*lines, "</table></div>", f'<ul class="notes">{notes}</ul>'])


def _row(row: Row, values: str, found: Sequence[Column]) -> str:
    status = f' <span class="status">{_text(row.status)}</span>' if row.status else ""
    cells = "".join(f"<td>{_text(column.cell(row))}</td>" for column in found)
    return f'<tr class="{row.role}"><th scope="row">{_text(row.name)}{status}</th>{values}{cells}</tr>'


def _charts(group: Group) -> str:
    shown = [row for row in group.rows if row.role == "method"] or [row for row in group.rows if row.role != "stage"]
    said = "".join(map(_said, sampled(group)))
    return _figures(overview(group)) + said + "".join(_run(group, row, is_open=len(shown) <= OPEN) for row in shown)


def _run(group: Group, row: Row, *, is_open: bool) -> str:
    drawn = figures(group, row)
    if not drawn:
        return ""
    told = [row.status] if row.status else []
    if "bits_per_byte" in row.stats:
        told.append(f"{number(row.stats['bits_per_byte'], 4)} bits per byte")
    if "accuracy" in row.stats:
        told.append(f"{number(row.stats['accuracy'], 2, scale=100)} %")
    if "gain" in row.stats:
        told.append(f"{number(row.stats['gain'], 2, scale=100, sign='+')} over the control")
    summary = f"<summary><b>{_text(row.name)}</b> {_text(', '.join(told))}</summary>"
    recipe = row.first.run.get("recipe")
    text = f'<p class="recipe"><code>{_text(written(recipe))}</code></p>' if recipe else ""
    return f"<details{' open' if is_open else ''}>{summary}{text}{_figures(drawn)}</details>"


def written(value: object) -> str:
    """A part of ``config.json`` as one would write it."""
    if isinstance(value, dict):
        fields = ", ".join(f"{name}={written(item)}" for name, item in value.items() if name != "class")
        name = str(value.get("class", "")).rpartition(":")[2]
        return f"{name}({fields})" if "class" in value else f"{{{fields}}}"
    if isinstance(value, list):
        return f"({', '.join(map(written, value))})"
    return repr(value)


def _figures(drawn: Sequence[Figure]) -> str:
    return f'<div class="figures">{"".join(map(_figure, drawn))}</div>' if drawn else ""


def _figure(figure: Figure) -> str:
    legend = ""
    if figure.legend:
        sample = '<svg viewBox="0 0 22 8" aria-hidden="true"><path class="line {}" d="M1 4H21"/></svg>'
        items = "".join(f"<li>{sample.format(style)}{_text(text)}</li>" for style, text in figure.legend)
        legend = f'<ul class="legend">{items}</ul>'
    note = f'<p class="note">{_text(figure.note)}</p>' if figure.note else ""
    return f"<figure><figcaption>{_text(figure.title)}</figcaption>{legend}{figure.drawing}{note}</figure>"


def _said(one: Sampled) -> str:
    """A prompt, and beside each other what followed."""
    sides = "".join(
        f'<div class="{STYLES[voice.role]}"><h4>{_text(voice.label)}</h4>{_words(voice.text)}</div>' for voice in one.voices
    )
    note = "each goes on with the beginning of the first evaluation text, drawn with the same seed"
    prompt = f"<pre>{_printed(one.prompt)}</pre>"
    return f'<div class="samples"><h3>In their own words</h3><p class="note">{note}</p>{prompt}<div class="said">{sides}</div></div>'


def _words(text: str) -> str:
    return f"<pre>{_printed(text)}</pre>" if text.strip() else '<p class="note">no words</p>'


def _printed(text: str) -> str:
    """What a model says may hold anything: of what is no character HTML has, a mark is left."""
    return _text(re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text.replace("\r\n", "\n")))


def _text(text: str) -> str:
    return html.escape(text)
