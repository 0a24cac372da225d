"""Time and memory of each loss against the plain transcription of its formula. One JSON line for each measurement.

    python benchmarks/losses.py [--tiny] [--only NAME ...] [--seconds 1.0]

What is timed is value and gradient (with respect to the first input) of the mean, jitted. The two run in turn, so that a slow
moment of the machine hits both, and the median of the paired ratios is printed. ``temp_bytes`` is what XLA allocates beyond
inputs and outputs.
"""

from __future__ import annotations

import argparse
import json
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


def revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def compiled(function, hyper, inputs):
    def mean(first, *rest):
        return jnp.mean(function(first, *rest, **hyper))

    program = jax.jit(jax.value_and_grad(mean)).lower(*inputs).compile()
    return program, program.memory_analysis().temp_size_in_bytes


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
    while len(pairs) < (2 if tiny else 15) or (time.perf_counter() < stop and len(pairs) < 1000):
        pairs.append((seconds(ours, inputs), seconds(theirs, inputs)))
    times = np.array(pairs[1:])
    return {
        "loss": name,
        "shape": list(shape),
        "us": round(float(np.median(times[:, 0])) * 1e6, 1),
        "plain_us": round(float(np.median(times[:, 1])) * 1e6, 1),
        "ratio": round(float(np.median(times[:, 0] / times[:, 1])), 3),
        "temp_bytes": our_bytes,
        "plain_temp_bytes": their_bytes,
        "pairs": len(times),
    }


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, two repetitions: does it run?")
    parser.add_argument("--only", nargs="*", help="names of losses")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each loss")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    where = {
        "device": device.device_kind if device.platform != "cpu" else platform.processor() or platform.machine(),
        "backend": device.platform,
        "jax": jax.__version__,
        "revision": revision(),
    }
    for name, plain, inputs, shape, hyper in ROWS:
        if not options.only or name in options.only:
            budget = 0.0 if options.tiny else options.seconds
            print(json.dumps(measure(name, plain, inputs, shape, hyper, tiny=options.tiny, budget=budget) | where), flush=True)


if __name__ == "__main__":
    main()
