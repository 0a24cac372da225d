"""Writes docs/recipes.md from the catalogue of methods. python docs/recipes.py > docs/recipes.md"""

from __future__ import annotations

import inspect
import itertools
import sys

from jkd import catalogue, recipes

INTRO = """\
<!-- Made by: python docs/recipes.py > docs/recipes.md -->
# Recipes

Every method is one frozen dataclass of `jkd.recipes`; its fields are its hyperparameters, and their defaults the paper's or its
code's. `jkd recipes` prints this list, `help(recipes.KD)` a method's formula.

*needs*: a teacher; taps (paths of inner modules); labels, or (labels) where `task_weight=0` does without them; after the semicolon,
what else the run, its data or its networks must have. *held to*: golden = numbers of the authors' code, formula = the paper's
equations, mechanism = the behaviour that it states."""


def cell(text: str) -> str:
    return text.replace("``", "`").replace("|", r"\|")


def page() -> str:
    entries = catalogue.entries()
    lines = [INTRO, "", f"{len(entries)} methods."]
    for family, group in itertools.groupby(entries, key=lambda entry: entry.family):
        lines += ["", f"## {family}", "", "| recipe | what it does | needs | held to | source |", "|---|---|---|---|---|"]
        for entry in group:
            what = " ".join((inspect.getdoc(getattr(recipes, entry.name)) or "").split("\n\n")[0].split())
            needs = "; ".join(filter(None, (entry.needs, entry.requires)))
            row = (f"`{entry.name}`", cell(what), cell(needs), entry.evidence, cell(entry.citation or "-"))
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
