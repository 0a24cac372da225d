"""Self-distillation from within one network."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Recipe, Vars, label_weight
from jkd.recipes.heads import pooled
from jkd.recipes.logits import hard_labels, with_task
from jkd.recipes.projectors import Linear
from jkd.schedules import Schedule
from jkd.types import Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class USKD(Recipe):
    """Universal self-distillation: ``CE`` and three soft labels made from the student itself, `jkd.losses.uskd`.

    The label's target is smoothed by how sure the student is of each example against the batch; the other classes follow Zipf's
    law in the order that the student and a weak head (linear, on pooled features of an earlier layer) give them; the weak head
    learns from the labels. The ranks are those of the authors' code (see the loss).

    Args:
        student_taps: one, an earlier layer.
        alpha, beta, mu: weights of the label, of the other classes and of the weak head: 0.1 each on CIFAR-100, 1, 0.1 and 0.005
            on ImageNet.
        weight: of all three; number or schedule.
        task_weight: of the labels' own term; 0 leaves it out.
    """

    alpha: float = 0.1
    beta: float = 0.1
    mu: float = 0.1
    weight: float | Schedule = 1.0
    task_weight: float = 1.0

    citation: ClassVar[str] = (
        "Yang et al., From Knowledge Distillation to Self-Knowledge Distillation, ICCV 2023, arXiv:2303.13005 (its USKD)"
    )
    family: ClassVar[str] = "self"
    needs_teacher: ClassVar[bool] = False
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def __post_init__(self):
        if len(self.student_taps) != 1:
            raise InputError(f"USKD: student_taps = {self.student_taps}: give one, an earlier layer for the weak head")

    @property
    def couples_batch(self) -> bool:
        return True  # the mean certainty of the batch

    def init(self, key, ctx):
        width = ctx.student_outputs.taps[self.student_taps[0]].shape[-1]
        return Vars(params={"weak_head": Linear().init(key, (width,), (ctx.classes,))})

    def terms(self, vars, student, teacher, batch, *, clock, key):
        weak = Linear()(vars.params["weak_head"], pooled(student.taps[self.student_taps[0]]))
        weights, known = dict(alpha=self.alpha, beta=self.beta, mu=self.mu), label_weight(batch)
        values = losses.uskd(student.logits, weak, hard_labels(batch), where=known > 0, **weights)
        return with_task(self.task_weight, student, batch) | {"own": Term(values, known, schedules.at(self.weight, clock))}
