"""Writes docs/losses.md from the docstrings of jkd.losses and jkd.targets. python docs/losses.py > docs/losses.md

A docstring is: one line of maths (the formula in double backticks); anything else; then the sections Args, Returns, Source,
(Code versus paper) and Example. Source is ``[acronym, other name] citation``.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECTIONS = ("Args", "Returns", "Source", "Code versus paper", "Example")
REQUIRED = ("Args", "Returns", "Source", "Example")


def parse(function) -> dict[str, str]:
    """The docstring's first line as ``maths``, the text before the first section, and the sections, by name.

    Raises:
        ValueError: the docstring does not have the layout above.
    """
    text = inspect.getdoc(function) or ""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    found = {"maths": parts[0].split("\n")[0]} | {
        name: inspect.cleandoc(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    where = f"{function.__module__}.{function.__name__}"
    if missing := [name for name in REQUIRED if not found.get(name)]:
        raise ValueError(f"{where}: the docstring has no {', '.join(missing)}")
    if not re.search("``.+``", found["maths"]):
        raise ValueError(f"{where}: the first line must hold the formula in double backticks, got {found['maths']!r}")
    source = re.fullmatch(r"\[([^\]]+)\] (.+)", " ".join(found["Source"].split()))
    if source is None:
        raise ValueError(f"{where}: Source must be '[acronym] citation', got {found['Source']!r}")
    if ">>>" not in found["Example"]:
        raise ValueError(f"{where}: Example has no doctest")
    return found | {"acronym": source[1], "citation": source[2]}


def public(package) -> dict[str, list]:
    """The package's public functions by the module that holds them, in the order of ``__all__``."""
    found: dict[str, list] = {}
    for name in package.__all__:
        function = getattr(package, name)
        found.setdefault(function.__module__, []).append(function)
    return found


def golden() -> set[str]:
    """Names of the functions that are held to numbers of the authors' code."""
    index = json.loads((ROOT / "tests/golden/index.json").read_text())
    return {name for case in index for name in re.findall(r"(?:losses|targets)\.(\w+)\(", case["call"])}


def cell(text: str) -> str:
    return text.replace("``", "`").replace("|", r"\|")


def page() -> str:
    checked = golden()
    lines = ["<!-- Made by: python docs/losses.py > docs/losses.md -->", "# Losses and targets"]
    for package in (importlib.import_module("jkd.losses"), importlib.import_module("jkd.targets")):
        lines += ["", f"## {package.__name__}", "", (inspect.getdoc(package) or "").replace("``", "`")]
        for module, functions in public(package).items():
            about = (inspect.getdoc(importlib.import_module(module)) or "").split("\n\n")[0].replace("\n", " ")
            lines += ["", f"### {module.split('.')[-1]}", "", about.replace("``", "`"), ""]
            lines += ["| name | value | known as | source | authors' numbers |", "|---|---|---|---|---|"]
            for function in functions:
                doc = parse(function)
                status = "yes" if function.__name__ in checked else "no"
                row = (f"`{function.__name__}`", cell(doc["maths"]), cell(doc["acronym"]), cell(doc["citation"]), status)
                lines.append(f"| {' | '.join(row)} |")
    lines += [
        "",
        "*authors' numbers*: value and gradient equal to 1e-5 what the authors' code (or a well-known re-implementation, named in"
        " `tests/golden/index.json`) prints. Every function is also held to a float64 NumPy formula written from its paper.",
        "",
        "`python benchmarks/losses.py` compares time and memory of each loss with the plain transcription of its formula.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
