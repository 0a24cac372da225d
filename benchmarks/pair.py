"""Two programs stepped in turn: the ratio of their times, each in its own process, whatever else the machine does.

    python benchmarks/pair.py "python ours.py" "othervenv/bin/python theirs.py" --rounds 20

A worker prints the line READY when it has warmed up; then, for each line that it reads, it does one step and prints one line with
the seconds that this took. At the end of its input it leaves. What it prints to stderr is passed on. `serve` is the worker's side,
for one that has jkd at hand. Printed: one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from jkd.bench.pairs import Ratio, Times, alternate

PAUSE = 0.4
"""Seconds before a step: threads of numerical libraries wait for their next piece of work busily for about a fifth of a second (OpenMP
does), which the other program would have to share the cores with."""


class Worker:
    """A program that steps when told to."""

    def __init__(self, command: str):
        self._command = command
        self._process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        while (line := self._line()) != "READY":
            print(f"{command}: {line}", file=sys.stderr)

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self.close()
            raise SystemExit(f"{self._command}: ended with exit code {code}")
        return line.strip()

    def __call__(self) -> float:
        """One step; the seconds that the worker says it took."""
        time.sleep(PAUSE)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait()


@contextlib.contextmanager
def workers(commands: list[str]) -> Iterator[list[Worker]]:
    """They warm up one after the other, so that none measures while another compiles."""
    with contextlib.ExitStack() as stack:
        made = []
        for command in commands:
            made.append(Worker(command))
            stack.callback(made[-1].close)
        yield made


def blocked(call: Callable[[], Any]) -> Callable[[], float]:
    """``call``, which gives arrays of JAX, as a step: it waits for them, and answers the seconds."""
    import jax

    def step() -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    return step


def serve(step: Callable[[], float], *, warm: int = 2) -> None:
    """A worker's side: ``step`` does one step and answers its seconds; the first ``warm`` are told to nobody."""
    for _ in range(warm):
        step()
    print("READY", flush=True)
    for _ in sys.stdin:
        print(step(), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commands", nargs=2, metavar="COMMAND")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args(argv)
    with workers(arguments.commands) as pair:
        first, second = alternate(pair, arguments.rounds)
    found = {
        "first": {"command": arguments.commands[0], **dataclasses.asdict(Times.of(first))},
        "second": {"command": arguments.commands[1], **dataclasses.asdict(Times.of(second))},
        "ratio": dataclasses.asdict(Ratio.of(first, second)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
