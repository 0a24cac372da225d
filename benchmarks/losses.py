"""Time and memory of each loss against the plain transcription of its formula. One JSON line for each measurement.

    python benchmarks/losses.py                     # two minutes
    python benchmarks/losses.py --only dkd pld --seconds 5
    python benchmarks/losses.py --write             # and the lines into benchmarks/results/losses.jsonl, for older ones

What is timed is value and gradient (with respect to the first input) of the mean, jitted. Calls of the two alternate, so that a
slow moment of the machine hits both, for ``--seconds`` and no less than 15 times: functions of less than a millisecond come to a
thousand calls. ``us`` and ``plain_us`` are the slowest of the quickest tenth (all else on a machine only adds time) and ``ratio``
is their quotient; ``noise`` is how much slower our median call was: beside one of 1.3 a ratio of 1.1 says nothing. ``temp_bytes``
is what XLA allocates beyond inputs and outputs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import plain_features
import plain_logits

from jkd import losses

ROWS = [*plain_logits.ROWS, *plain_features.ROWS]
TINY = plain_logits.TINY
RESULTS = Path(__file__).parent / "results" / "losses.jsonl"


def revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def compiled(function, hyper, inputs):
    def mean(first, *rest):
        return jnp.mean(function(first, *rest, **hyper))

    program = jax.jit(jax.value_and_grad(mean)).lower(*inputs).compile()
    return program, program.memory_analysis().temp_size_in_bytes


def device_name() -> str:
    device = jax.devices()[0]
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    return device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()}, {cores})"


def seconds(program, inputs) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    return time.perf_counter() - start


def measure(name, plain, make_inputs, shape, hyper, *, tiny: bool, budget: float) -> dict:
    shape = TINY if tiny else shape
    arrays = [np.asarray(x) for x in make_inputs(np.random.default_rng(0), shape)]
    inputs = [jnp.asarray(x, jnp.float32 if x.dtype == np.float64 else None) for x in arrays]
    own = plain_features.CALLS.get(name) or getattr(losses, name)
    (ours, our_bytes), (theirs, their_bytes) = (compiled(f, hyper, inputs) for f in (own, plain))
    (value, gradient), (plain_value, plain_gradient) = ours(*inputs), theirs(*inputs)
    # The comparison means nothing unless both compute the same (to float32, and to the eps that the transcriptions add).
    np.testing.assert_allclose(value, plain_value, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=0, atol=1e-3 * float(jnp.max(jnp.abs(plain_gradient))) + 1e-9)
    pairs = [(seconds(ours, inputs), seconds(theirs, inputs))]
    stop = time.perf_counter() + budget
    while len(pairs) < (3 if tiny else 16) or (time.perf_counter() < stop and len(pairs) < 5000):
        pairs.append((seconds(ours, inputs), seconds(theirs, inputs)))
    (quick, plain_quick), (middle, _) = np.quantile(pairs[1:], [0.1, 0.5], axis=0)
    return {
        "loss": name,
        "shape": list(shape),
        "us": round(quick * 1e6, 1),
        "plain_us": round(plain_quick * 1e6, 1),
        "ratio": round(quick / plain_quick, 3),
        "noise": round(middle / quick, 2),
        "temp_bytes": our_bytes,
        "plain_temp_bytes": their_bytes,
        "calls": len(pairs) - 1,
    }


def write(lines) -> None:
    """In the place of all older lines of the same losses. Each line says where and at which revision it was measured."""
    names = [name for name, *_ in ROWS]
    measured = {json.loads(line)["loss"] for line in lines}
    older = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    kept = [line for line in older if json.loads(line)["loss"] not in measured]
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(
        "".join(line + "\n" for line in sorted(kept + lines, key=lambda line: names.index(json.loads(line)["loss"])))
    )


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, three calls: does it run?")
    parser.add_argument("--only", nargs="*", help="names of losses")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each loss")
    parser.add_argument("--write", action="store_true", help=f"write the lines to {RESULTS.name} too")
    options = parser.parse_args(arguments)
    if options.write and options.tiny:
        parser.error("--write is for losses at their usual shapes, without --tiny")
    where = {"device": device_name(), "backend": jax.default_backend(), "jax": jax.__version__, "revision": revision()}
    lines = []
    for name, plain, inputs, shape, hyper in ROWS:
        if not options.only or name in options.only:
            budget = 0.0 if options.tiny else options.seconds
            measured = measure(name, plain, inputs, shape, hyper, tiny=options.tiny, budget=budget)
            lines.append(json.dumps(measured | where))
            print(lines[-1], flush=True)
    if options.write:
        write(lines)


if __name__ == "__main__":
    main()
