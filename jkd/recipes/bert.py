"""Encoders distilled before, or for, a task: TinyBERT and DistilBERT, and how the layers of two depths are paired."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from jkd import losses, schedules, tokens
from jkd.errors import InputError
from jkd.losses.chunked.parts import CrossEntropy, ForwardKL, Part
from jkd.recipe import Recipe, Vars
from jkd.recipes.bytoken import by_part, relative
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Linear, Projector, project
from jkd.recipes.transformers import by_head, scores
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Outputs, Term

Evidence = Literal["golden", "formula", "mechanism"]


def evenly(student_depth: int, teacher_depth: int) -> tuple[int, ...]:
    """The teacher's layer for each of the student's, from 0: layer i learns from ``(i + 1) k - 1``, k the depths' ratio (TinyBERT).

    Raises:
        InputError: the teacher's depth is no multiple of the student's.
    """
    if student_depth < 1 or teacher_depth % student_depth:
        raise InputError(f"evenly({student_depth}, {teacher_depth}): the teacher's depth must be a multiple of the student's")
    ratio = teacher_depth // student_depth
    return tuple((layer + 1) * ratio - 1 for layer in range(student_depth))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyBERT(Recipe):
    """``weight * (sum over layers of mean (A_s - A_t)² + sum over layers and embedding of mean (W h_s - h_t)²) + soft_weight * soft
    cross-entropy / C + task_weight * CE``.

    A is ``q k^T / sqrt(d)`` before the softmax, head by head: both sides have as many heads. W is one linear map for all layers.
    The soft cross-entropy is at ``temperature`` without its square and averaged over the C classes, as in the authors' code.

    The paper's stages are runs: general distillation and the intermediate part of the task's (``soft_weight=0``, the default), then
    the prediction part (``weight=0, soft_weight=1``). `ernie_tiny` strings such stages together. Means are over real tokens
    (``batch["mask"]``), those of attention over pairs of one document (``batch["segment"]``); the authors count padding.

    Args:
        student_hidden, teacher_hidden: taps ``[batch, tokens, dim]``, pair by pair: the embedding and every student layer.
        student_attention, teacher_attention: pairs of taps ``(query, key)`` for every layer that is compared: projections
            ``[batch, tokens, heads, dim]``.
        projector: W; None where the widths agree and none is wanted.
        weight: of attention and hidden states; number or schedule.
        soft_weight: of the prediction; 0 leaves it out.
        temperature: of the prediction; 1 in the paper.
        task_weight: of a labels' term; 0 in the paper.

    Raises:
        InputError: taps that do not pair, or none at all where ``weight`` is not 0.
    """

    student_hidden: tuple[str, ...] = ()
    teacher_hidden: tuple[str, ...] = ()
    student_attention: tuple[tuple[str, str], ...] = ()
    teacher_attention: tuple[tuple[str, str], ...] = ()
    projector: Projector | None = Linear()
    weight: float | Schedule = 1.0
    soft_weight: float | Schedule = 0.0
    temperature: float = 1.0
    task_weight: float = 0.0

    same_classes: ClassVar[bool] = False  # the general stages have none
    citation: ClassVar[str] = (
        "Jiao et al., TinyBERT: Distilling BERT for Natural Language Understanding, Findings of EMNLP 2020, arXiv:1909.10351"
    )
    family: ClassVar[str] = "transformers"
    evidence: ClassVar[Evidence] = "formula"

    def __post_init__(self):
        for what in ("hidden", "attention"):
            mine, theirs = (getattr(self, f"{side}_{what}") for side in ("student", "teacher"))
            if len(mine) != len(theirs):
                raise InputError(
                    f"TinyBERT: {len(mine)} taps student_{what}, {len(theirs)} teacher_{what}; give as many on each side"
                )
        if self._compares and not (self.student_hidden or self.student_attention):
            raise InputError(
                "TinyBERT: no taps; give student_hidden and teacher_hidden, student_attention and teacher_attention"
            )
        for side in ("student", "teacher"):
            pairs = getattr(self, f"{side}_attention")
            taps = (*getattr(self, f"{side}_hidden"), *(tap for pair in pairs for tap in pair)) if self._compares else ()
            object.__setattr__(self, f"{side}_taps", tuple(dict.fromkeys(taps)))

    @property
    def _compares(self) -> bool:
        return callable(self.weight) or self.weight != 0

    @property
    def couples_batch(self) -> bool:
        return self._compares and self.projector is not None and self.projector.couples_batch

    def init(self, key, ctx):
        if self.projector is None or not (self._compares and self.student_hidden):
            return Vars()
        shapes = [
            outputs.taps[taps[0]].shape
            for outputs, taps in ((ctx.student_outputs, self.student_hidden), (ctx.teacher_outputs, self.teacher_hidden))
        ]
        return Vars(params={"projector": self.projector.init(key, *shapes)})

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = with_task(self.task_weight, student, batch)
        weight, among = schedules.at(self.weight, clock), dict(mask=batch.get("mask"), segment=batch.get("segment"))
        for i, pair in enumerate(zip(self.student_attention, self.teacher_attention, strict=True)):
            if self._compares:
                both = _scores(student, pair[0]), _scores(teacher, pair[1])
                if both[0].shape != both[1].shape:
                    raise InputError(
                        f"TinyBERT: the student has {both[0].shape[1]} attention heads, the teacher {both[1].shape[1]}; MiniLMv2 "
                        "cuts both sides into relation heads instead"
                    )
                terms[f"attention{i}"] = Term(losses.attention_scores_mse(*both, **among), batch["weight"], weight)
        for i, (mine, theirs) in enumerate(zip(self.student_hidden, self.teacher_hidden, strict=True)):
            if self._compares:
                mapped = project(self.projector, vars.params.get("projector"), student.taps[mine], batch["weight"] > 0)
                values = losses.mse(mapped, teacher.taps[theirs])
                terms[f"hidden{i}"] = Term(values, _counted(batch, values), weight)
        if callable(self.soft_weight) or self.soft_weight:
            # the loss has T² inside, the authors' has not
            classes, square = student.logits.shape[-1], self.temperature**2
            soft = losses.soft_cross_entropy(student.logits, teacher.logits, temperature=self.temperature) / (classes * square)
            terms["soft"] = Term(soft, batch["weight"], schedules.at(self.soft_weight, clock))
        return terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBERT(Recipe):
    """``weight * T² KL(teacher_T || student_T) + task_weight * CE of masked tokens + cosine_weight * mean (1 - cos(h_s, h_t))``.

    KL and cosine are over real tokens, the cross-entropy over the masked ones (``batch["masked"]`` 1, `jkd.data.MaskTokens` makes
    them): no shift, each place predicts its own token, ``label`` ``[batch, tokens]``. The last hidden states have one width on both
    sides. The authors start the student from every other layer of its teacher.

    Args:
        student_taps, teacher_taps: the last layer on each side, one path; empty for no cosine.
        temperature: T; 2 in the authors' code.
        weight, task_weight, cosine_weight: 5, 2 and 1, as their README trains it; 0 leaves a term out.
        masked_only: the KL over masked tokens alone, a choice of their code.
    """

    temperature: float | Schedule = 2.0
    weight: float | Schedule = 5.0
    task_weight: float = 2.0
    cosine_weight: float = 1.0
    masked_only: bool = False

    citation: ClassVar[str] = (
        "Sanh et al., DistilBERT, a distilled version of BERT: smaller, faster, cheaper and lighter, 2019, arXiv:1910.01108"
    )
    family: ClassVar[str] = "transformers"
    evidence: ClassVar[Evidence] = "formula"

    def __post_init__(self):
        for side in ("student_taps", "teacher_taps"):
            if self.cosine_weight and len(getattr(self, side)) != 1:
                raise InputError(f"DistilBERT: {side} = {getattr(self, side)}: give the last layer, or cosine_weight=0")

    def terms(self, vars, student, teacher, batch, *, clock, key):
        if self.task_weight or self.masked_only:
            for name in ("masked", "label"):
                if name not in batch:
                    raise InputError(
                        f"DistilBERT reads batch[{name!r}] of masked tokens: put jkd.data.MaskTokens into Run.augment"
                    )
        real = batch["weight"][:, None] * tokens.real(batch)
        masked = real * batch["masked"] if "masked" in batch else real
        counted, coef = masked if self.masked_only else real, schedules.at(self.weight, clock)
        temperature = schedules.at(self.temperature, clock)
        mix: list[tuple[Any, Part]] = [(coef * relative(counted, real), ForwardKL())]
        mix += [(self.task_weight * relative(masked, real), CrossEntropy())] if self.task_weight else []
        asked = dict(labels=batch.get("label"), temperature=temperature, weights=real)
        kd, *task = by_part(mix, student, teacher, **asked)
        terms = {"kd": Term(kd, counted, coef)}
        if task:
            terms["task"] = Term(task[0], masked, self.task_weight)
        if self.cosine_weight:
            (mine,), (theirs,) = self.student_taps, self.teacher_taps
            values = losses.cosine_distance(student.taps[mine], teacher.taps[theirs])
            terms["cosine"] = Term(values, real, self.cosine_weight)
        return terms


def _scores(outputs: Outputs, taps: tuple[str, str]) -> Array:
    return scores(*(by_head(outputs.taps[tap], None, "TinyBERT attention taps") for tap in taps))


def _counted(batch: Batch, values: Any) -> Array:
    """The weight of every token ``[batch, tokens]`` that is real; of features that are no tokens the row's own."""
    if "mask" not in batch or values.ndim != 2:
        return batch["weight"]
    return batch["weight"][:, None] * (batch["mask"] > 0)
