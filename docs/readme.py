"""Writes the table of methods in README.md from the catalogue. python docs/readme.py"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from jkd import catalogue

README = Path(__file__).parent.parent / "README.md"
MARK = {"golden": "**{}**", "formula": "{}", "mechanism": "*{}*"}


def table() -> str:
    """Families and their methods; how a name is set says how far it is held to its paper."""
    lines = ["| family | methods |", "|---|---|"]
    for family, group in itertools.groupby(catalogue.entries(), key=lambda entry: entry.family):
        lines.append(f"| {family} | {', '.join(MARK[entry.evidence].format(entry.name) for entry in group)} |")
    return "\n".join(lines)


def written(readme: str) -> str:
    """The README with the table between its markers."""
    return re.sub(r"(<!-- methods: .*? -->\n).*?(<!-- /methods -->)", lambda m: f"{m[1]}{table()}\n{m[2]}", readme, flags=re.S)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
