"""Methods that hand on how a transformer's self-attention relates tokens: no width, depth or head count has to agree for that."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax.numpy as jnp

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.losses._maps import einsum
from jkd.recipe import Recipe
from jkd.recipes.logits import with_task
from jkd.schedules import Schedule
from jkd.types import Array, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SelfAttention(Recipe):
    """What the two methods on the projections of one attention layer share."""

    same_classes: ClassVar[bool] = False  # attention is compared, classes are not
    family: ClassVar[str] = "transformers"

    def _check_taps(self, count: int, what: str) -> None:
        for side in ("student_taps", "teacher_taps"):
            if len(getattr(self, side)) != count:
                raise InputError(f"{type(self).__name__}: {side} = {getattr(self, side)}: give {what}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniLM(_SelfAttention):
    """``weight * mean over heads and tokens of KL(A_t || A_s) + KL(R_t || R_s)`` in one layer, and no label.

    A holds the rows of ``softmax(q k^T / sqrt(d))``, R those of ``softmax(v v^T / sqrt(d))``, head by head: both sides have as many
    heads, of any width. Tokens where ``batch["mask"]`` is 0 count neither as queries nor as keys, and no token is compared with one
    of another document (``batch["segment"]``). The student learns what the teacher's last layer attends to, without any task, and is
    fine-tuned afterwards (another `Run`). Where teacher and student are far apart the paper puts an assistant between them: a run of
    its own.

    Args:
        student_taps, teacher_taps: query, key and value of one layer on each side, the last in the paper: projections
            ``[batch, tokens, heads, dim]``, or ``[batch, tokens, heads * dim]``. Tap what the attention multiplies: where
            positions are rotated into queries and keys, what comes after that.
        student_heads, teacher_heads: attention heads, for projections that have no axis for them.
        weight: of the two terms; number or schedule.
        task_weight: of a labels' term; 0 in the paper.
    """

    student_heads: int | None = None
    teacher_heads: int | None = None
    weight: float | Schedule = 1.0
    task_weight: float = 0.0

    citation: ClassVar[str] = (
        "Wang et al., MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers, NeurIPS "
        "2020, arXiv:2002.10957"
    )
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def __post_init__(self):
        self._check_taps(3, "three: query, key and value of one layer")

    def terms(self, vars, student, teacher, batch, *, clock, key):
        mine = [by_head(student.taps[tap], self.student_heads, "MiniLM.student_heads") for tap in self.student_taps]
        theirs = [by_head(teacher.taps[tap], self.teacher_heads, "MiniLM.teacher_heads") for tap in self.teacher_taps]
        if mine[0].shape[1] != theirs[0].shape[1]:
            raise InputError(
                f"MiniLM: the student has {mine[0].shape[1]} attention heads, the teacher {theirs[0].shape[1]}; MiniLMv2 cuts both "
                "sides into relation heads instead"
            )
        weight, among = schedules.at(self.weight, clock), dict(mask=batch.get("mask"), segment=batch.get("segment"))
        values = {
            "attention": losses.attention_kl(scores(*mine[:2]), scores(*theirs[:2]), **among),
            "values": losses.value_relation_kl(mine[2], theirs[2], **among),
        }
        terms = {name: Term(value, batch["weight"], weight) for name, value in values.items()}
        return with_task(self.task_weight, student, batch) | terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniLMv2(_SelfAttention):
    """``weight / n * sum over n taps of mean over relation heads and tokens of KL(R_t || R_s)``, and no label.

    R holds the rows of ``softmax(x x^T / sqrt(d))``, x a tap of all attention heads side by side, cut anew into ``relation_heads``
    parts: heads and widths of the two sides are free. The n taps are queries, keys and values, with a third of the weight each.
    Tokens where ``batch["mask"]`` is 0 count neither as queries nor as keys, and no token is compared with one of another document
    (``batch["segment"]``).

    Args:
        student_taps, teacher_taps: query, key and value of one layer on each side: projections ``[batch, tokens, heads, dim]``, or
            ``[batch, tokens, heads * dim]``. The student's layer is its last, the teacher's the last of a base model and an upper
            one of a large model (21 of 24 for BERT-large).
        relation_heads: it divides the width (heads * dim) of both sides. 48 for base, 64 for large teachers in the paper.
        weight: of the sum; number or schedule.
        task_weight: of a labels' term; 0 in the paper.
    """

    relation_heads: int = 48
    weight: float | Schedule = 1.0
    task_weight: float = 0.0

    citation: ClassVar[str] = (
        "Wang et al., MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers, Findings of "
        "ACL 2021, arXiv:2012.15828"
    )
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def __post_init__(self):
        self._check_taps(
            max(len(self.student_taps), 1), "as many on each side, at least one: query, key and value of one layer"
        )

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = with_task(self.task_weight, student, batch)
        weight = schedules.at(self.weight, clock) / len(self.student_taps)
        for i, pair in enumerate(zip(self.student_taps, self.teacher_taps, strict=True)):
            mine, theirs = (side_by_side(outputs.taps[tap]) for outputs, tap in zip((student, teacher), pair, strict=True))
            widths = mine.shape[-1], theirs.shape[-1]
            if self.relation_heads < 1 or any(width % self.relation_heads for width in widths):
                raise InputError(
                    f"MiniLMv2.relation_heads = {self.relation_heads}: it must divide the widths of both sides, {widths}"
                )
            among = dict(mask=batch.get("mask"), segment=batch.get("segment"))
            values = losses.self_relation_kl(mine, theirs, heads=self.relation_heads, **among)
            terms[f"relation{i}"] = Term(values, batch["weight"], weight)
        return terms


def by_head(projection: Array, heads: int | None, field: str) -> Array:
    """``[batch, heads, tokens, dim]`` of ``[batch, tokens, heads, dim]``, or of ``[batch, tokens, heads * dim]``."""
    if projection.ndim == 3:
        if heads is None or heads < 1 or projection.shape[-1] % heads:
            raise InputError(f"{field} = {heads}: give the number of attention heads in a projection {projection.shape}")
        projection = projection.reshape(*projection.shape[:-1], heads, -1)
    if projection.ndim != 4:
        raise InputError(
            f"{field}: a projection is [batch, tokens, heads, dim] or [batch, tokens, heads * dim], not {projection.shape}"
        )
    if heads not in (None, projection.shape[2]):
        raise InputError(f"{field} = {heads}: the projection {projection.shape} has {projection.shape[2]} heads; leave it out")
    return jnp.swapaxes(projection, 1, 2)


def side_by_side(projection: Array) -> Array:
    """``[batch, tokens, heads * dim]`` of either form of a projection."""
    return projection.reshape(*projection.shape[:2], -1)


def scores(queries: Array, keys: Array) -> Array:
    """``q k^T / sqrt(d)``, ``[batch, heads, tokens, tokens]``, in float32."""
    queries, keys = (x.astype(jnp.float32) for x in (queries, keys))
    return einsum("bhid,bhjd->bhij", queries, keys) / math.sqrt(queries.shape[-1])
