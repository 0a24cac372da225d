"""Methods that hand on a ranking: of documents for a query, or of the classes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax

from jkd import losses, schedules
from jkd.recipe import Recipe, label_weight
from jkd.recipes.logits import hard_labels
from jkd.recipes.views import view
from jkd.schedules import Schedule
from jkd.types import Array, Outputs, Term

NEGATIVE = "it is a Batch of as many rows, each query with another document"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MarginMSE(Recipe):
    """Margin-MSE: ``((s+ - s-) - (t+ - t-))²``, the student's margin between two documents of a query against the teacher's.

    Two models' scores may have any offset. A batch's rows are queries with a relevant document, the rows of ``batch["negative"]`` the
    same queries with another; both have the teacher's answers in ``"teacher"`` where these were prepared. The authors' teacher is
    the mean score of three (`jkd.Ensemble` with ``mean="logits"``). A score is ``heads["score"]`` or else the first logit.

    Args:
        weight: number or schedule.
    """

    weight: float | Schedule = 1.0

    citation: ClassVar[str] = (
        "Hofstätter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation, 2020"
    )
    family: ClassVar[str] = "ranking"
    requires: ClassVar[str] = 'a view "negative" of the batch: the same queries with other documents'
    same_classes: ClassVar[bool] = False
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def forward(self, models, batch, key):
        negative = view(self, batch, "negative", NEGATIVE)
        first, second = jax.random.split(key)
        theirs = models.teacher(batch), models.teacher(negative)
        positive, models = models.student(batch, key=first)
        other, models = models.student(negative, key=second)
        return (positive, other), theirs, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        scores = [score(outputs) for outputs in (*student, *teacher)]
        return {"margin": Term(losses.margin_mse(*scores), batch["weight"], schedules.at(self.weight, clock))}


def score(outputs: Outputs) -> Array:
    """``[batch]``: the head ``score``, or the first logit."""
    values = outputs.heads.get("score")
    values = outputs.logits if values is None else values
    return values[..., 0] if values.ndim > 1 else values


@dataclasses.dataclass(frozen=True, kw_only=True)
class PLD(Recipe):
    """Plackett-Luce distillation: ``sum_k p_o(k) (log sum_(j >= k) exp z_o(j) - z_o(k))``, and nothing else.

    o is the label, then the other classes as the teacher ranks them, p the teacher's probabilities. It takes the place of
    cross-entropy and distillation both, without a weight between them; a teacher certain of the label makes it the cross-entropy.
    The label's weight is the teacher's probability of it: no code was published that says otherwise. Every row needs its label.

    Args:
        temperature: of the teacher's probabilities alone.
    """

    temperature: float | Schedule = 1.0

    citation: ClassVar[str] = (
        "Bassam, Zhu & Bian, PLD: A Choice-Theoretic List-Wise Knowledge Distillation, NeurIPS 2025, arXiv:2506.12542"
    )
    family: ClassVar[str] = "ranking"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        temperature = schedules.at(self.temperature, clock)
        values = losses.pld(student.logits, teacher.logits, hard_labels(batch), teacher_temperature=temperature)
        return {"pld": Term(values, label_weight(batch))}
