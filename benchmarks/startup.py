"""How long it takes from the command to the end of a run's first step, without compiled programs at hand and with them.

    python benchmarks/startup.py                     # jkd train digits, the teacher's first step; two minutes
    python benchmarks/startup.py lm_stdlib --rounds 3
    python benchmarks/startup.py --write             # and the line into benchmarks/results/startup.json, for docs/benchmarks.md

Cold and warm alternate, each in a process of its own; a cold one starts with an empty folder of compiled programs, which the warm one
after it finds filled. ``to_first_step`` is what a user waits: imports, data, compilation, the step; ``step`` is of that the part from
the run's start (state and programs are made there). Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kept import keep, where

from jkd.bench.pairs import Ratio, Times

RESULTS = Path(__file__).parent / "results" / "startup.json"
TINY = Path(__file__).parent / "dispatch.py"  # which is a config too
ONCE = """
import sys, time
START = float(sys.argv[1])
from jkd import configfile, devices, programcache
devices.start("cpu")
programcache.start()
import jax, jkd
class First(jkd.Listener):
    def run_started(self, name, ctx, step):
        self.began = time.time()
    def stepped(self, name, step, steps, values, examples_per_s):
        print(time.time() - START, time.time() - self.began, flush=True)
        import os
        os._exit(0)
jkd.train(configfile.resolve(configfile.load(sys.argv[2]), sys.argv[3:]), listener=First())
"""


def first_step(config: str, folder: Path, sets: Sequence[str]) -> tuple[float, float]:
    """Seconds to the end of the first step, from the start of the process and from that of the run."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", ONCE, str(time.time()), config, *sets]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    whole, step = map(float, said.split()[-2:])
    return whole, step


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="digits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help=f"keep it in {RESULTS.name}")
    parser.add_argument("--tiny", action="store_true", help="one round of a network that compiles quickly: does it run?")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="NAME=VALUE", help="as of `jkd train`")
    arguments = parser.parse_args(argv)
    config, rounds = (str(TINY), 1) if arguments.tiny else (arguments.config, arguments.rounds)
    cold, warm = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(first_step(config, Path(folder), arguments.sets))
            warm.append(first_step(config, Path(folder), arguments.sets))
    found: dict[str, Any] = {"config": config, **where()}
    for place, name in enumerate(("to_first_step", "step")):
        pair = [[seconds[place] for seconds in times] for times in (warm, cold)]
        found[name] = {"warm": Times.of(pair[0]).median, "cold": Times.of(pair[1]).median, "ratio": str(Ratio.of(*pair))}
    print(json.dumps(found))
    if arguments.write:
        keep(RESULTS, config, found)


if __name__ == "__main__":
    main()
