"""What the engine adds to a step that is written by hand, told so that a busy machine hardly changes it. One JSON line for each.

    python benchmarks/engine.py                   # vision and lm of benchmarks/kd_step.py; two minutes on two cores
    python benchmarks/engine.py lm --write        # and kept in benchmarks/results/engine.json, for docs/benchmarks.md

All ratios are the engine's over the other's. ``operations``, ``bytes`` and ``temporaries`` are the compiler's own counts of the two
programs: the same on every machine that compiles them alike. ``processor`` is processor time of a step, all threads of the process
together, the two in turn; waiting for others is not in it. ``call_us`` is how long a call takes to come back while the device works
(arguments are taken apart and looked at, the program is started): the rest of a call is the program itself. ``call_part`` is the
difference of the two calls in parts of the step's processor time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import kd_step
from kept import keep, where

from jkd.bench.pairs import Ratio, Times, alternate
from jkd.bench.workload import Workload

RESULTS = Path(__file__).parent / "results" / "engine.json"


def counts(program: Any) -> dict[str, float]:
    cost = program.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    temporaries = program.memory_analysis().temp_size_in_bytes
    return {"operations": cost["flops"], "bytes": cost["bytes accessed"], "temporaries": temporaries}


def measured(call: Callable[[], Any]) -> tuple[Callable[[], float], list[float]]:
    """The call as a step that answers its processor seconds; and the seconds until each came back, to be filled."""
    returned: list[float] = []

    def step() -> float:
        start, spent = time.perf_counter(), time.process_time()
        found = call()
        returned.append(time.perf_counter() - start)
        jax.block_until_ready(found)
        return time.process_time() - spent

    return step, returned


def compared(what: str, tiny: bool, rounds: int) -> dict[str, Any]:
    work = Workload(what, {"vision": kd_step.vision, "lm": kd_step.lm}[what](tiny))
    step, arguments = kd_step.by_hand(what, Workload(what, work.ctx.run))
    program = step.lower(*arguments).compile()

    def engine() -> Any:
        work.dispatch()
        return work.state, work.metrics

    def plain() -> Any:
        nonlocal arguments
        *state, value = step(*arguments)
        arguments = (*state, *arguments[3:])
        return state, value

    ours, theirs = counts(work.compiled.program), counts(program)
    sides = [measured(call) for call in (engine, plain)]
    seconds = alternate([timed for timed, _ in sides], rounds)
    calls = [Times.of(returned[2:]).min for _, returned in sides]
    spent = [Times.of(each) for each in seconds]
    return {
        "what": what,
        **{name: ours[name] / theirs[name] for name in ours},
        "processor_s": [each.median for each in spent],
        "processor": {"least": spent[0].min / spent[1].min, **vars(Ratio.of(*seconds))},
        "call_us": [1e6 * each for each in calls],
        "call_part": (calls[0] - calls[1]) / spent[1].min,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="vision, lm; default: both")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, two rounds: does it run?")
    parser.add_argument("--write", action="store_true", help=f"keep it in {RESULTS.name}")
    arguments = parser.parse_args(argv)
    for what in arguments.what or ("vision", "lm"):
        found = compared(what, arguments.tiny, 2 if arguments.tiny else arguments.rounds) | where()
        print(json.dumps(found), flush=True)
        if arguments.write:
            keep(RESULTS, what, found)


if __name__ == "__main__":
    main()
