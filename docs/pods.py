"""Writes the outputs of `jkd plan` into docs/pods.md, between its markers. python docs/pods.py

Each command of the page is run as it stands there, in a process of its own. TPUs need their compiler: pip install 'jkd[tpu]'.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("pods.md")
BLOCK = re.compile(r"<!-- plan: (?P<command>jkd plan [^\n]*) -->\n(?:.*?)<!-- /plan -->", re.S)


def run(command: str) -> str:
    """What a command prints."""
    _, *arguments = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PAGE.parent.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-m", "jkd", *arguments], env=environment, cwd=PAGE.parent.parent, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr}")
    return done.stdout


def block(command: str, output: str) -> str:
    """A command and its output as they stand in the page."""
    return f"<!-- plan: {command} -->\n```console\n$ {command}\n{output.rstrip()}\n```\n<!-- /plan -->"


def blocks(page: str) -> list[tuple[str, str]]:
    """``[(command, the block that holds it)]`` of the page."""
    return [(found["command"], found[0]) for found in BLOCK.finditer(page)]


def main() -> None:
    # the page is read again for each, and written when that is done: minutes pass between
    for command, _ in blocks(PAGE.read_text(encoding="utf-8")):
        output = run(command)
        page = PAGE.read_text(encoding="utf-8")
        before = dict(blocks(page))[command]
        PAGE.write_text(page.replace(before, block(command, output)), encoding="utf-8")
        print(f"{command}: {len(output.splitlines())} lines", file=sys.stderr)


if __name__ == "__main__":
    main()
