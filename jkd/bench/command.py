"""What ``jkd bench`` does once its arguments are read."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

import jax

from jkd import configfile
from jkd.bench import measure, table
from jkd.bench.workload import Workload
from jkd.config import Experiment, Run
from jkd.errors import InputError


def run(arguments: argparse.Namespace) -> None:
    """Measures and prints; with ``--json`` also appends a line for each measurement to that file.

    Raises:
        InputError: options that do not go together, a config or run that is not there.
    """
    if (arguments.config is None) == (arguments.ab is None):
        raise InputError("give a CONFIG, or --ab A B")
    if arguments.steps < 1:
        raise InputError(f"--steps {arguments.steps}: give at least 1")
    if arguments.json is not None:
        _append(arguments.json, [])  # a file that cannot be written is told before anything is measured
    if arguments.ab is not None:
        if arguments.sweep or arguments.profile:
            raise InputError("--ab compares two runs: --sweep and --profile are for one CONFIG")
        first, second = [_one(text, arguments) for text in arguments.ab]  # a mistake in either is told before anything compiles
        found = measure.paired(Workload(*first), Workload(*second), rounds=arguments.steps)
        _tell(table.pair(found), [found], arguments)
        return
    experiment = _experiment(arguments.config, arguments.sets)
    runs = measure.runs_of(experiment, arguments.run)
    for name, why in measure.skipped(experiment, runs).items() if arguments.run is None else ():
        if not jax.process_index():
            print(f"{name} is left out: {why}", flush=True)
    for name, each in runs.items():
        if arguments.sweep:
            rows = []
            for row in measure.sweep(name, each):
                rows.append({"run": name, **row})
                _tell(table.swept(row) if len(rows) > 1 else f"{name}\n{table.swept(row)}", rows[-1:], arguments)
            continue
        found = measure.measure(Workload(name, each), steps=arguments.steps, profile=_profile(arguments.profile, name, runs))
        _tell(table.text(found), [found], arguments)


def _experiment(config: str, sets: list[str]) -> Experiment:
    return configfile.resolve(configfile.load(config), sets)


def _profile(folder: str | None, name: str, runs: Mapping[str, Run]) -> str | None:
    """A folder for each run where there are several: a viewer would show one of them."""
    return folder if folder is None or len(runs) == 1 else os.path.join(folder, name)


def _one(text: str, arguments: argparse.Namespace) -> tuple[str, Run]:
    """One side of ``--ab``: a config, after it options of its own; without ``--run`` its last run."""
    side = argparse.ArgumentParser(prog="--ab", add_help=False, exit_on_error=False)
    side.add_argument("config")
    side.add_argument("--set", dest="sets", action="append", default=[])
    side.add_argument("--run", default=arguments.run)
    try:
        own, more = side.parse_known_args(shlex.split(text))
    except (argparse.ArgumentError, ValueError) as error:
        raise InputError(f"--ab {text!r}: {error}") from None
    if more:
        raise InputError(f"--ab {text!r}: {more[0]} is no option here; --set NAME=VALUE and --run NAME are")
    runs = measure.runs_of(_experiment(own.config, [*arguments.sets, *own.sets]), own.run)
    return list(runs.items())[-1]


def _tell(text: str, lines: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    if jax.process_index():
        return
    print(text, flush=True)
    if arguments.json is not None:
        _append(arguments.json, lines)


def _append(path: str, lines: list[dict[str, Any]]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); --json FILE says where else") from None
