"""The student, the teacher, and how far they agree, over an evaluation set."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd import compiler, losses, sharding, sparse, tokens
from jkd.context import Context
from jkd.data.batch import check_batch
from jkd.errors import InputError
from jkd.networks import models_of, step_key
from jkd.recipe import label_weight
from jkd.state import Frozen, State
from jkd.step import make_eval_step, objective
from jkd.types import Array, Batch, Outputs, Tree

BINS = 15
"""Bins of equal width for the calibration error (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, eq. 3)."""

Sums = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Args:
        metrics: numbers by name, see `summarise`.
        details: what a reliability diagram and a comparison of classes need, see `detail`.
    """

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    details: dict[str, dict[str, list[float]]] = dataclasses.field(default_factory=dict)


def measure(student: Outputs, teacher: Outputs | None, batch: Batch, *, oracle: Outputs | None = None) -> Sums:
    """Weighted sums over a batch that `summarise` turns into metrics; sums of batches add up.

    Args:
        student: with logits ``[..., classes]``; of one without them nothing is measured. Logits for each of a batch's ``tokens``
            say the token after it, and are made of (hidden, head) a piece at a time.
        teacher, oracle: likewise, or None.
        batch: ``label`` int ``[...]`` (of tokens what `jkd.tokens.next_tokens` says) and the weights.
    """
    if not student.has_logits:
        return {}
    label, weight, everyone = _asked(student, batch)
    others = {
        name: side
        for name, side in (("teacher", teacher), ("oracle", oracle))
        if side is not None and side.has_logits and side.logits_shape == student.logits_shape
    }
    found = sparse.by_position(functools.partial(_each, tuple(others)), label, student, *others.values())
    sums = _task(found["student"], label, weight, student.logits_shape[-1])
    if label.ndim == 2 and "bytes" in batch:
        sums["bytes"] = (tokens.following(batch["bytes"]) * weight).sum()
    if others:
        compared = ("agreement", "kl", "oracle_agreement", "oracle_kl")
        sums |= {"all": everyone.sum()} | {name: (found[name] * everyone).sum() for name in compared if name in found}
    if "teacher" in others:
        theirs = _task(found["teacher"], label, weight, student.logits_shape[-1])
        sums |= {f"teacher_{name}": value for name, value in theirs.items()}
    return sums


def _asked(student: Outputs, batch: Batch) -> tuple[Array, Array, Array]:
    """Labels, their weights, and the weights of what needs no label."""
    label = batch.get("label")
    if "tokens" in batch and student.logits_shape[:-1] == batch["tokens"].shape and (label is None or label.ndim == 1):
        label, weight = tokens.next_tokens(batch)
        return label, weight, weight
    return batch["label"], label_weight(batch), batch["weight"]


def _each(names: tuple[str, ...], label: Array, student: Array, *others: Array) -> dict[str, Any]:
    """What is measured of each position by itself, from logits ``[..., classes]`` of the student and of the others by name."""
    student = student.astype(jnp.float32)
    found: dict[str, Any] = {"student": _answer(student, label)}
    for name, other in zip(names, others, strict=True):
        other, prefix = other.astype(jnp.float32), "" if name == "teacher" else f"{name}_"
        found[f"{prefix}agreement"] = (student.argmax(-1) == other.argmax(-1)).astype(jnp.float32)
        found[f"{prefix}kl"] = losses.forward_kl(student, other)
        found |= {"teacher": _answer(other, label)} if name == "teacher" else {}
    return found


def _answer(logits: Array, label: Array) -> dict[str, Any]:
    return {
        "correct": (logits.argmax(-1) == label).astype(jnp.float32),
        "nll": losses.cross_entropy(logits, label),
        "confidence": jax.nn.softmax(logits).max(-1),
    }


def _task(answer: dict[str, Array], label: Array, weight: Array, classes: int) -> Sums:
    confidence, correct = answer["confidence"], answer["correct"]
    place = jnp.clip((confidence * BINS).astype(jnp.int32), 0, BINS - 1)

    def binned(values: Array | float, place: Array, bins: int) -> Array:
        return jnp.zeros(bins).at[place.reshape(-1)].add((values * weight).reshape(-1))

    sums = {
        "weight": weight.sum(),
        "correct": (correct * weight).sum(),
        "nll": (answer["nll"] * weight).sum(),
        "bin_weight": binned(1.0, place, BINS),
        "bin_confidence": binned(confidence, place, BINS),
        "bin_correct": binned(correct, place, BINS),
    }
    if label.ndim == 1:  # one answer for each example: not the tokens of a text, whose classes are a vocabulary
        sums |= {"class_weight": binned(1.0, label, classes), "class_correct": binned(correct, label, classes)}
    return sums


def summarise(sums: dict[str, Any]) -> dict[str, float]:
    """Metrics from `measure`'s sums.

    ``accuracy`` 0..1, ``nll`` nats, ``ece`` 0..1; with a teacher also ``agreement`` (share of equal first choices), ``kl``
    (KL(teacher || student), nats), ``teacher_accuracy``, ``teacher_nll`` and ``teacher_ece``; with an oracle ``oracle_agreement`` and
    ``oracle_kl``. What needs labels is left out where
    no example has one. Of text whose ``bytes`` are known also ``bits_per_byte`` and ``teacher_bits_per_byte``, whatever the
    vocabulary. Of a student without logits only ``term/…``: each of the recipe's terms, as a mean over the evaluation data.
    """
    sums = {name: np.asarray(value, np.float64) for name, value in sums.items()}

    def task(prefix: str) -> dict[str, float]:
        total = float(sums[f"{prefix}weight"])
        if not total:
            return {}
        size = float(sums.get("bytes", 0.0))
        gap = np.abs(sums[f"{prefix}bin_confidence"] - sums[f"{prefix}bin_correct"])
        return {
            f"{prefix}accuracy": float(sums[f"{prefix}correct"]) / total,
            f"{prefix}nll": float(sums[f"{prefix}nll"]) / total,
            f"{prefix}ece": float(gap.sum()) / total,
        } | ({f"{prefix}bits_per_byte": float(sums[f"{prefix}nll"] / size / np.log(2))} if size else {})

    terms = [name for name in sums if name.startswith("term/")]
    metrics = {name: float(sums[name] / sums[f"weight of {name}"]) for name in terms if sums[f"weight of {name}"]}
    metrics |= task("") if "weight" in sums else {}
    if sums.get("all"):
        everyone = float(sums["all"])
        compared = ("agreement", "kl", "oracle_agreement", "oracle_kl")
        metrics |= {name: float(sums[name]) / everyone for name in compared if name in sums}
        metrics |= task("teacher_") if "teacher_weight" in sums else {}
    return metrics


def detail(sums: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """What `measure`'s sums say beyond single numbers, as sums, so that those of several seeds add up.

    ``bins``: ``weight`` (of the examples), ``confidence`` and ``correct`` in each of the `BINS` of confidence; ``classes``:
    ``weight`` and ``correct`` of each class's examples, where an example has one label. With a teacher also ``teacher_bins`` and
    ``teacher_classes``.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for prefix in ("", "teacher_"):
        for part, kind in (("bins", "bin"), ("classes", "class")):
            names = {what: f"{prefix}{kind}_{what}" for what in ("weight", "confidence", "correct")}
            if there := {what: np.asarray(sums[name]).tolist() for what, name in names.items() if name in sums}:
                found[prefix + part] = there
    return found


def make_evaluate(ctx: Context) -> Callable[[State, Frozen], Evaluation] | None:
    """``evaluate(state, frozen) -> Evaluation`` over the run's evaluation data; None where it has none.

    What is measured is the recipe's product, with the average in the student's place where the run says so.
    """
    run, process = ctx.run, (jax.process_index(), jax.process_count())
    data = run.data
    if data is None or not data.has_eval:
        return None
    # the training batch, or the smallest multiple of the mesh that holds a smaller evaluation set
    rows = min(run.batch_size, -(-data.eval_size // ctx.batch_shards) * ctx.batch_shards)
    logits = ctx.student_outputs.has_logits
    eval_step = compiler.jit(make_eval_step(ctx, measure, ema=run.evaluate_ema) if logits else _make_terms(ctx), ctx.mesh)
    add = jax.jit(lambda total, sums: jax.tree.map(jnp.add, total, sums))  # one program, not one for each of the sums

    def evaluate(state: State, frozen: Frozen) -> Evaluation:
        total: Sums | None = None
        for batch in data.eval_batches(rows, process=process):
            check_batch(batch, ctx.classes)
            try:
                sums = eval_step(state, frozen, sharding.put_batch(batch, ctx.mesh))
            except InputError:
                if logits:
                    raise
                return Evaluation()  # these examples lack what the recipe reads of the training batches
            total = sums if total is None else add(total, sums)
        if total is None:
            return Evaluation()
        whole = jax.device_get(total)
        return Evaluation(summarise(whole), detail(whole))

    return evaluate


def _make_terms(ctx: Context) -> Callable[[State, Frozen, Batch], Sums]:
    """The recipe's terms on examples that no step has seen, the networks as they are used rather than trained."""

    def terms(state: State, frozen: Frozen, batch: Batch) -> Sums:
        models = models_of(ctx, state, frozen, ema=ctx.run.evaluate_ema)
        trained = models.call

        def call(*arguments: Any) -> tuple[Outputs, Tree]:
            *most, train, key = arguments
            return trained(*most, False, key)

        models = dataclasses.replace(models, call=call)
        batch, sums = sharding.constrain_batch(batch, ctx.mesh), Sums()
        for update in ctx.updates:
            _, (means, weights, *_) = objective(ctx, update, models, batch, step_key(state), None)
            sums |= {f"term/{name}": mean["term"] * weights[name] for name, mean in means.items()}
            sums |= {f"weight of term/{name}": weight for name, weight in weights.items()}
        return sums

    return terms
