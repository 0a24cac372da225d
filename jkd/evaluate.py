"""The student, the teacher, and how far they agree, over an evaluation set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd import losses, sharding
from jkd.context import Context
from jkd.recipe import label_weight
from jkd.state import Frozen, State
from jkd.step import make_eval_step
from jkd.types import Array, Batch, Outputs

BINS = 15
"""Bins of equal width for the calibration error (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3)."""

Sums = dict[str, Array]


def measure(student: Outputs, teacher: Outputs | None, batch: Batch) -> Sums:
    """Weighted sums over a batch that `summarise` turns into metrics; sums of batches add up.

    Args:
        student: with logits ``[..., classes]``; of one without them nothing is measured.
        teacher: likewise, or None.
        batch: ``label`` int ``[...]`` and the weights.
    """
    if not student.has_logits:
        return {}
    weight = label_weight(batch)
    everyone = batch["weight"]
    logits = student.logits.astype(jnp.float32)
    sums = _task(logits, batch["label"], weight)
    if teacher is not None and teacher.has_logits and teacher.logits_shape == student.logits_shape:
        theirs = teacher.logits.astype(jnp.float32)
        sums |= {f"teacher_{name}": value for name, value in _task(theirs, batch["label"], weight).items()}
        agree = (logits.argmax(-1) == theirs.argmax(-1)).astype(jnp.float32)
        sums |= {
            "all": everyone.sum(),
            "agreement": (agree * everyone).sum(),
            "kl": (losses.forward_kl(logits, theirs) * everyone).sum(),
        }
    return sums


def _task(logits: Array, label: Array, weight: Array) -> Sums:
    probabilities = jax.nn.softmax(logits)
    confidence = probabilities.max(-1)
    correct = (logits.argmax(-1) == label).astype(jnp.float32)
    place = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)

    def binned(values: Array) -> Array:
        return jnp.zeros(BINS).at[place.reshape(-1)].add((values * weight).reshape(-1))

    return {
        "weight": weight.sum(),
        "correct": (correct * weight).sum(),
        "nll": (losses.cross_entropy(logits, label) * weight).sum(),
        "bin_confidence": binned(confidence),
        "bin_correct": binned(correct),
    }


def summarise(sums: dict[str, Any]) -> dict[str, float]:
    """Metrics from `measure`'s sums.

    ``accuracy`` 0..1, ``nll`` nats, ``ece`` 0..1; with a teacher also ``agreement`` (share of equal first choices), ``kl``
    (KL(teacher || student), nats), ``teacher_accuracy``, ``teacher_nll`` and ``teacher_ece``. What needs labels is left out where
    no example has one.
    """
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}

    def task(prefix: str) -> dict[str, float]:
        total = float(sums[f"{prefix}weight"])
        if not total:
            return {}
        gap = np.abs(sums[f"{prefix}bin_confidence"] - sums[f"{prefix}bin_correct"])
        return {
            f"{prefix}accuracy": float(sums[f"{prefix}correct"]) / total,
            f"{prefix}nll": float(sums[f"{prefix}nll"]) / total,
            f"{prefix}ece": float(gap.sum()) / total,
        }

    metrics = task("") if sums else {}
    if sums.get("all"):
        everyone = float(sums["all"])
        metrics |= {name: float(sums[name]) / everyone for name in ("agreement", "kl")} | task("teacher_")
    return metrics


def make_evaluate(ctx: Context) -> Callable[[State, Frozen], dict[str, float]] | None:
    """``evaluate(state, frozen) -> metrics`` over the run's evaluation data; None where it has none.

    What is measured is the recipe's product, with the average in the student's place where the run says so.
    """
    run, process = ctx.run, (jax.process_index(), jax.process_count())
    data = run.data
    if data is None or not data.has_eval:
        return None
    # the training batch, or the smallest multiple of the mesh that holds a smaller evaluation set
    rows = min(run.batch_size, -(-data.eval_size // ctx.batch_shards) * ctx.batch_shards)
    eval_step = make_eval_step(ctx, measure, ema=run.evaluate_ema)

    def evaluate(state: State, frozen: Frozen) -> dict[str, float]:
        total: Sums | None = None
        for batch in data.eval_batches(rows, process=process):
            sums = eval_step(state, frozen, sharding.put_batch(batch, ctx.mesh))
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
        return summarise(jax.device_get(total)) if total is not None else {}

    return evaluate
