"""Losses between hidden states and heads against the same on whole logits: memory, time, exactness. One JSON line for each.

    python benchmarks/chunked.py                     # a few minutes
    python benchmarks/chunked.py --only js --rounds 20
    python benchmarks/chunked.py --write             # all, and the lines into benchmarks/results/chunked.jsonl

``head`` rows: the weighted sum of a loss over all tokens and its gradient by the student's hidden states and head, jitted, float32;
whole logits are the products with the heads and `jkd.losses` on them. ``step`` rows: a whole training step (`jkd.make_step`) of two
decoders, teacher and student, with the recipe as it is, and with one that makes all logits at once. Calls of the two alternate in one
process; ``ratio`` is the median of the pairs' quotients, with the tenth and ninetieth percentile beside it. ``temp_bytes`` is what
XLA allocates beyond inputs and outputs, ``error`` the largest deviation of a gradient in parts of its largest entry.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from losses import device_name, revision

import jkd
from jkd import losses, models, optim, recipes, tokens
from jkd.losses import chunked

RESULTS = Path(__file__).parent / "results" / "chunked.jsonl"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a measurement: rows of texts, tokens of each, columns of both heads, widths and layers of both models."""

    rows: int = 8
    time: int = 256
    vocab: int = 32768
    student: int = 256
    teacher: int = 512
    depth: int = 4

    @property
    def tokens(self) -> int:
        return self.rows * self.time


TINY = Shape(rows=8, time=4, vocab=128, student=8, teacher=16, depth=1)

MIXES: dict[str, tuple[list[tuple[float, chunked.Part]], Callable[..., Any]]] = {
    "forward_kl": ([(1.0, chunked.ForwardKL())], lambda q, p, labels: losses.forward_kl(q, p)),
    "reverse_kl": ([(1.0, chunked.ReverseKL())], lambda q, p, labels: losses.reverse_kl(q, p)),
    "js": ([(1.0, chunked.JS(0.5))], lambda q, p, labels: losses.js(q, p, beta=0.5)),
    "skew_forward_kl": ([(1.0, chunked.SkewForwardKL(0.1))], lambda q, p, labels: losses.skew_forward_kl(q, p, lam=0.1)),
    "alpha_beta": ([(1.0, chunked.AlphaBeta(0.5, 0.5))], lambda q, p, labels: losses.alpha_beta(q, p, alpha=0.5, beta=0.5)),
    "cross_entropy": ([(1.0, chunked.CrossEntropy())], lambda q, p, labels: losses.cross_entropy(q, labels)),
    "forward_kl + cross_entropy": (
        [(0.9, chunked.ForwardKL()), (0.1, chunked.CrossEntropy())],
        lambda q, p, labels: 0.9 * losses.forward_kl(q, p) + 0.1 * losses.cross_entropy(q, labels),
    ),
}


def paired(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Both in turn, ``rounds`` times after a first call of each."""

    def seconds(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - start

    pairs = np.array([(seconds(ours), seconds(theirs)) for _ in range(rounds + 1)][1:])
    low, middle, high = np.quantile(pairs[:, 0] / pairs[:, 1], [0.1, 0.5, 0.9])
    own, other = np.median(pairs, axis=0)
    return {
        "ms": round(1e3 * own, 1),
        "whole_logits_ms": round(1e3 * other, 1),
        "ratio": round(middle, 3),
        "ratio_range": [round(low, 3), round(high, 3)],
    }


def memory(ours: Any, theirs: Any) -> dict[str, float]:
    own, other = (program.memory_analysis().temp_size_in_bytes for program in (ours, theirs))
    return {"temp_bytes": own, "whole_logits_temp_bytes": other, "temp_ratio": round(own / other, 4)}


def heads(name: str, shape: Shape, dtype: str) -> tuple[tuple[Any, Any], list[Any]]:
    """Both sides' hidden states and heads, and the compiled programs: in blocks, and of whole logits."""
    mix, whole = MIXES[name]
    rng = np.random.default_rng(0)

    def draw(*sizes: int, scale: float = 1.0) -> Any:
        return jnp.asarray(scale * rng.normal(size=sizes), dtype)

    student = draw(shape.tokens, shape.student), draw(shape.student, shape.vocab, scale=2 / np.sqrt(shape.student))
    teacher = draw(shape.tokens, shape.teacher), draw(shape.teacher, shape.vocab, scale=2 / np.sqrt(shape.teacher))
    labels = jnp.asarray(rng.integers(0, shape.vocab, shape.tokens), jnp.int32)
    weights = jnp.asarray(rng.uniform(0, 2, shape.tokens) / shape.tokens, jnp.float32)
    reads_teacher = name != "cross_entropy"

    def in_blocks(student: Any, teacher: Any) -> Any:
        sides = (*student, *teacher) if reads_teacher else student
        return chunked.weighted_sum(mix, *sides, labels=labels, weights=weights)

    def at_once(student: Any, teacher: Any) -> Any:
        logits, wanted = (jnp.matmul(*side, preferred_element_type=jnp.float32) for side in (student, teacher))
        return jnp.sum(weights * whole(logits, wanted, labels))

    return (student, teacher), [jax.jit(jax.value_and_grad(f)).lower(student, teacher).compile() for f in (in_blocks, at_once)]


def head(name: str, shape: Shape, rounds: int, dtype: str) -> dict[str, Any]:
    (student, teacher), programs = heads(name, shape, dtype)
    (value, gradient), (plain_value, plain_gradient) = (program(student, teacher) for program in programs)
    both = zip(gradient, plain_gradient, strict=True)
    error = max(float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b))) for a, b in both)
    times = paired(*(lambda program=program: program(student, teacher) for program in programs), rounds)
    off = abs(float(value / plain_value) - 1)
    return {"head": name, **times, **memory(*programs), "value_error": float(f"{off:.1e}"), "error": float(f"{error:.1e}")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtOnce(recipes.TokenKD):
    """The same terms as anybody would write them, of whole logits."""

    whole: Callable[..., Any]

    def terms(self, vars: Any, student: Any, teacher: Any, batch: Any, *, clock: Any, key: Any) -> dict[str, jkd.Term]:
        labels, weight = tokens.next_tokens(batch)
        logits = student.logits
        return {
            "kd": jkd.Term(self.whole(logits, teacher.logits), weight, self.weight),
            "task": jkd.Term(losses.cross_entropy(logits, labels), weight, self.task_weight),
        }


def network(dim: int, shape: Shape) -> jkd.Model:
    heads = max(1, dim // 64)
    return models.decoder.Config(vocab=shape.vocab, dim=dim, depth=shape.depth, heads=heads, hidden=4 * dim).build()


def text(shape: Shape) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape.vocab, (shape.rows, shape.time)).astype(np.int32)


def stepping(recipe: jkd.Recipe, shape: Shape, dtype: str) -> tuple[Any, Callable[[], Any]]:
    """The step of two decoders as a compiled program, and a call that does the next one."""
    teacher = network(shape.teacher, shape)
    run = jkd.Run(
        student=network(shape.student, shape),
        teacher=teacher.with_weights(*teacher.init(jax.random.key(1))),
        recipe=recipe,
        optimizer=optim.adamw(1e-4),
        steps=1000,
        batch_size=shape.rows,
        compute_dtype=dtype,
    )
    index = np.arange(shape.rows, dtype=np.int32)
    batch = {"tokens": text(shape), "weight": np.ones(shape.rows, np.float32), "index": index}
    ctx = jkd.make_context(run, batch, train_size=shape.rows, devices=jax.devices()[:1])
    state, frozen = jkd.init_state(ctx, jax.random.key(0))
    rows = jkd.put_batch(batch, ctx.mesh)
    program = jkd.make_step(ctx).lower(state, frozen, rows).compile()

    def call() -> Any:
        nonlocal state
        state, metrics = program(state, frozen, rows)
        return metrics

    return program, call


def steps(name: str, shape: Shape, dtype: str) -> tuple[Any, ...]:
    """The compiled steps, with the recipe as it is and with whole logits, and calls that do the next one of each."""
    divergence, whole = RECIPES[name]
    mixed = dict(divergence=divergence, weight=0.9, task_weight=0.1)
    both = recipes.TokenKD(**mixed), AtOnce(**mixed, whole=whole)
    return tuple(zip(*(stepping(recipe, shape, dtype) for recipe in both), strict=True))


def step(name: str, shape: Shape, rounds: int, dtype: str) -> dict[str, Any]:
    programs, calls = steps(name, shape, dtype)
    return {"step": name, **paired(*calls, rounds), **memory(*programs)}


RECIPES: dict[str, tuple[chunked.Part, Callable[..., Any]]] = {
    "forward KL and CE": (chunked.ForwardKL(), losses.forward_kl),
    "reverse KL and CE": (chunked.ReverseKL(), losses.reverse_kl),
    "JSD and CE": (chunked.JS(0.5), losses.js),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, one round: does it run?")
    parser.add_argument("--only", nargs="*", help="names of mixes or recipes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name}", type=int, help=f"default {field.default}")
    parser.add_argument("--write", action="store_true", help=f"write the lines to {RESULTS.name} too")
    options = parser.parse_args(arguments)
    shape = TINY if options.tiny else Shape()
    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)}
    shape = dataclasses.replace(shape, **{name: value for name, value in given.items() if value is not None})
    rounds = 1 if options.tiny else options.rounds
    where = {"device": device_name(), "backend": jax.default_backend(), "jax": jax.__version__, "revision": revision()}
    lines = []
    jobs = [(name, lambda name=name: head(name, shape, rounds, options.dtype)) for name in MIXES]
    jobs += [(name, lambda name=name: step(name, shape, rounds, options.dtype)) for name in RECIPES]
    for name, job in jobs:
        if not options.only or name in options.only:
            lines.append(json.dumps(job() | {"dtype": options.dtype} | dataclasses.asdict(shape) | where))
            print(lines[-1], flush=True)
    if options.write:
        RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
