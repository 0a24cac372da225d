"""Writes docs/commands.md from the command line's parser. python docs/commands.py > docs/commands.md"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator

from jkd.cli import parser

INTRO = """\
<!-- Made by: python docs/commands.py > docs/commands.md -->
# Commands

`jkd COMMAND --help` says the same in a terminal. A CONFIG is a file, or the name of a packaged config (`jkd configs` lists them); a
RUN_DIR is a folder that `jkd train` made.
Exit codes: 0 finished, 1 failed, 2 bad input, 75 stopped and resumable by the same command."""


def plain(text: str) -> str:
    """Without what Markdown would read as marks of its own."""
    return text.replace("<", "&lt;")


def commands() -> dict[str, argparse.ArgumentParser]:
    (found,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return found.choices


def argument(action: argparse.Action) -> str:
    """As it is typed, ``--workdir DIR``, with the bars that a table's cell must escape."""
    names = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or "|".join(action.choices or ()),)
    typed = [*action.option_strings[-1:], *(names if action.nargs != 0 else ())]
    return " ".join(typed).replace("|", r"\|")


def examples(epilog: str) -> Iterator[str]:
    """What the help shows below ``examples:``, with what is said about each line as a comment; then the rest as it is."""
    shown, *rest = epilog.strip().split("\n\n")
    lines = [re.sub(r" {2,}", "\0", line.strip(), count=1).partition("\0") for line in shown.splitlines()[1:]]
    width = max((len(typed) for typed, _, said in lines if said), default=0)
    yield "```bash"
    for typed, _, said in lines:
        yield f"{typed:<{width}}  # {said}" if said else typed
    yield "```"
    for paragraph in rest:
        yield ""
        yield plain(paragraph)


def page() -> str:
    found = commands()
    lines = [INTRO, "", "| command | what it does |", "|---|---|"]
    lines += [f"| [`jkd {name}`](#{name}) | {plain(made.description or '')} |" for name, made in found.items()]
    for name, made in found.items():
        lines += ["", f"## {name}", "", plain(made.description or ""), "", *examples(made.epilog or "")]
        if shown := [action for action in made._actions if action.help and action.dest not in ("help", "traceback")]:
            lines += ["", "| argument | |", "|---|---|"]
            lines += [f"| `{argument(action)}` | {plain(action.help or '')} |" for action in shown]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
