"""What an accelerator is made to do: a language model's step, a vision transformer's, and the head of a large vocabulary.

    python benchmarks/accelerator.py --write                        # all, kept in benchmarks/results/accelerator.jsonl
    python benchmarks/page.py --render                              # from there into docs/benchmarks.md
    python benchmarks/accelerator.py --only lm --set microbatches=16

``lm``: decoders of the shapes of Llama 3.1 8B and Llama 3.2 1B with random weights, KL and cross-entropy of 32,768 tokens a step in 8
microbatches, bfloat16, the teacher's weights too, AdamW in float32, every activation of a microbatch kept: about 50 GB with cuDNN's
attention, so for 80 GB and more. ``vit``: DeiT-B to DeiT-S, both with their distillation token (with it tokens are 198, and cuDNN's
attention wants an even number), 512 images of 224 x 224. Both are runs of `config`, and what is told of them is what `jkd bench`
tells. ``head``: losses between the heads of such decoders in blocks beside the same on whole logits (benchmarks/chunked.py), 4,096
tokens, bfloat16. One JSON line for each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of the device's memory; JAX would take three quarters

import jax
import numpy as np

from jkd import Experiment, Run, configfile, data, models, optim, provenance, recipes
from jkd.bench import measure
from jkd.bench.workload import Workload
from jkd.models.rope import Rope

RESULTS = Path(__file__).parent / "results" / "accelerator.jsonl"
GOALS = {"lm": 0.50, "vit": 0.45, "head": 0.95}
"""MFU against the datasheet at least; of ``head`` the time beside whole logits at most."""
HEADS = ("forward_kl", "reverse_kl", "js", "forward_kl + cross_entropy")
LLAMA = dict(vocab=128_256, kv_heads=8, rope=Rope(theta=5e5), remat=None)


def config(*, tiny=False, rows=16, length=2048, microbatches=8, images=512):
    """The two runs; ``tiny`` tries whether they go."""
    teacher = models.decoder.Config(dim=4096, depth=32, heads=32, hidden=14_336, **LLAMA)
    student = models.decoder.Config(dim=2048, depth=16, heads=32, hidden=8192, tied=True, **LLAMA)
    base, small = (size(distillation_token=True) for size in (models.vit.base, models.vit.small))
    if tiny:
        rows, length, microbatches, images = 16, 16, 2, 16
        shape = dict(vocab=256, depth=1, heads=2, hidden=32, remat=None)
        teacher, student = (models.decoder.Config(dim=dim, **shape) for dim in (32, 16))
        shape = dict(size=(32, 32), depth=1, heads=2, classes=10, distillation_token=True)
        base, small = (models.vit.Config(dim=dim, **shape) for dim in (32, 16))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2 * images, *small.size, 3), np.uint8)
    shared = dict(steps=1000, compute_dtype="bfloat16", teacher_dtype="bfloat16", evaluate_every=0)
    return Experiment(
        lm=Run(
            student=student,
            teacher=teacher,
            recipe=recipes.TokenKD(weight=0.9, task_weight=0.1),
            data=data.arrays(tokens=rng.integers(0, student.vocab, (4 * rows, length), np.int32), name="random tokens"),
            optimizer=optim.adamw(1e-4, weight_decay=0.1, clip=1.0),
            batch_size=rows,
            microbatches=microbatches,
            **shared,
        ),
        vit=Run(
            student=small,
            teacher=base,
            recipe=recipes.KD(),
            data=data.arrays(image=pixels, label=rng.integers(0, small.classes, 2 * images), classes=small.classes),
            optimizer=optim.adamw(1e-3, weight_decay=0.05),
            batch_size=images,
            **shared,
        ),
    )


def step(name: str, sets: list[str], steps: int) -> dict[str, Any]:
    """What `jkd bench` tells of a run."""
    run = measure.runs_of(configfile.resolve(config, sets), name)[name]
    return measure.measure(Workload(name, run), steps=steps)


def head(tiny: bool, rounds: int) -> dict[str, Any]:
    """What benchmarks/chunked.py tells of each loss."""
    import chunked

    shape = chunked.TINY if tiny else chunked.Shape(rows=2, time=2048, vocab=128_256, student=2048, teacher=4096)
    told = [chunked.head(name, shape, rounds, "bfloat16") for name in HEADS]
    return {"shape": [shape.tokens, shape.vocab, shape.student, shape.teacher], "dtype": "bfloat16", "losses": told}


def main(argv: list[str] | None = None) -> None:
    from kept import where

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, on any device: does it run?")
    parser.add_argument("--only", nargs="*", choices=tuple(GOALS), default=tuple(GOALS))
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="NAME=VALUE", help="as of `jkd bench`")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--write", action="store_true", help=f"keep the lines in {RESULTS.name}")
    arguments = parser.parse_args(argv)
    if arguments.write and (arguments.tiny or jax.default_backend() == "cpu"):
        parser.error("--write is for an accelerator, at full shapes")
    sets = ["tiny=true", *arguments.sets] if arguments.tiny else arguments.sets
    typed = sys.argv[1:] if argv is None else argv
    about = {
        **where(),
        "command": shlex.join(["python", "benchmarks/accelerator.py", *typed]),
        "versions": provenance.package_versions(),
    }
    for what in arguments.only:
        steps = 2 if arguments.tiny else arguments.steps
        found = head(arguments.tiny, steps) if what == "head" else step(what, sets, steps)
        line = {"what": what, "goal": GOALS[what], **about, "measured": found}
        print(json.dumps(line), flush=True)
        if arguments.write:
            keep(line)
        gc.collect()  # the next one wants the memory


def keep(line: dict[str, Any]) -> None:
    """Puts a line in the place of the older one of its kind."""
    lines = [json.loads(text) for text in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    kept = {each["what"]: each for each in lines} | {line["what"]: line}
    RESULTS.write_text("".join(json.dumps(kept[what]) + "\n" for what in GOALS if what in kept))


if __name__ == "__main__":
    main()
