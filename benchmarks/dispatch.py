"""A network so small that calling the device costs more than its step: several steps for each call beside one. Prints one JSON line.

    python benchmarks/dispatch.py                 # half a minute
    python benchmarks/dispatch.py --write         # and kept in benchmarks/results/small.json, for docs/benchmarks.md

A multilayer perceptron of three layers and width 32 on digits, KD from one of width 64, batch 64, AdamW; both in one process, in turn.
``ratio``: time of a step with one step for each call over that with ``--per-call``, each call waited for; ``in_loop``: the same
of steps made as training makes them, the next one called while one runs, reading included, medians of three rounds each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from kept import keep, where

from jkd import Experiment, Run, data, models, optim, recipes
from jkd.bench import measure
from jkd.bench.workload import Workload

RESULTS = Path(__file__).parent / "results" / "small.json"


def config(*, steps_per_call=1):
    """The runs; ``jkd bench benchmarks/dispatch.py --run student --set steps_per_call=16`` tells more of them."""
    shared = dict(data=data.digits(), steps=5000, batch_size=64, optimizer=optim.adamw(3e-3))
    student, teacher = (models.mlp.Config(features=64, hidden=(width, width), classes=10) for width in (32, 64))
    return Experiment(
        teacher=Run(student=teacher, recipe=recipes.Supervised(), **shared),
        student=Run(student=student, teacher="teacher", recipe=recipes.KD(), steps_per_call=steps_per_call, **shared),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-call", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--tiny", action="store_true", help="two rounds: does it run?")
    parser.add_argument("--write", action="store_true", help=f"keep it in {RESULTS.name}")
    arguments = parser.parse_args(argv)
    rounds = 2 if arguments.tiny else arguments.rounds
    run = measure.runs_of(config(), "student")["student"]
    several = dataclasses.replace(run, steps_per_call=arguments.per_call)
    works = [Workload("student", each) for each in (run, several)]
    found: dict[str, Any] = measure.paired(*works, rounds=rounds)
    loop = [work.loop(max(3, rounds))[0] for work in works]
    told = {
        "per_call": arguments.per_call,
        "step_s": [found[which]["time_per_step"]["median"] for which in ("first", "second")],
        "ratio": found["ratio"],
        "in_loop_s": loop,
        "in_loop": loop[0] / loop[1],
        **where(),
    }
    print(json.dumps(told))
    if arguments.write:
        keep(RESULTS, "calls", told)


if __name__ == "__main__":
    main()
