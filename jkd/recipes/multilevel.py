"""Agreement of logits at several levels: of each example, between the examples of a batch, and between the classes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses
from jkd.recipe import Recipe
from jkd.recipes.logits import task
from jkd.recipes.views import view
from jkd.types import Array, Term

STRONG = 'Run.augment = (recipes.View("strong", …), …) adds it'


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLLD(Recipe):
    """Multi-level logit distillation on two views, the sum over temperatures of ``T² KL``, ``|Q Q^T - P P^T|² / B`` and
    ``|Q^T Q - P^T P|² / C``.

    Cross-entropy and KL on both views, the two correlations (without T²) on the weak one, which is the batch itself; the other is
    the view ``"strong"`` (`View`), the same for both sides. On the weak view KL and the examples' correlation count the half of the
    examples of which the teacher is less sure, the classes' correlation the half of the classes with less mass in the batch;
    means still divide by all.

    Code versus paper: masks are meant in the authors' code but multiply numbers that are means already, so that they act as
    constants, and two of the five temperatures take the weak view's logits for the strong one's. Here it is as meant.

    Args:
        temperatures: all that are summed.
        weight: of all three levels.
        task_weight: of the labels' terms.
        masked: the masks; without them every example and class counts.
    """

    temperatures: tuple[float, ...] = (4.0, 3.0, 5.0, 2.0, 6.0)
    weight: float = 0.9
    task_weight: float = 0.1
    masked: bool = True

    citation: ClassVar[str] = "Jin, Wang & Lin, Multi-Level Logit Distillation, CVPR 2023"
    family: ClassVar[str] = "logits"
    requires: ClassVar[str] = "a strong view of the batch"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    @property
    def couples_batch(self) -> bool:
        return True

    def forward(self, models, batch, key):
        strong = view(self, batch, "strong", STRONG)
        first, second = jax.random.split(key)
        theirs = models.teacher(batch), models.teacher(strong)
        weak, models = models.student(batch, key=first)
        bold, models = models.student(strong, key=second)
        return (weak, bold), theirs, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        kept = batch["weight"] > 0
        mine, theirs = student[0].logits, teacher[0].logits
        unsure, rare = self._masks(theirs, kept)
        kl = [self._sum(losses.forward_kl, s.logits, t.logits) for s, t in zip(student, teacher, strict=True)]
        examples = self._sum(losses.batch_correlation, mine, theirs, where=kept)
        classes = self._sum(class_rows, mine, theirs, where=kept)
        levels = {
            "kd_weak": unsure * kl[0],
            "kd_strong": kl[1],
            "examples": unsure * examples,
            "classes": jnp.broadcast_to((rare * classes).mean(), kept.shape),
        }
        return {
            "task": task(student[0], batch, coef=self.task_weight),
            "task_strong": task(student[1], batch, coef=self.task_weight),
        } | {name: Term(values, batch["weight"], self.weight) for name, values in levels.items()}

    def _sum(self, loss, *arrays, **options) -> Array:
        return sum((loss(*arrays, temperature=t, **options) for t in self.temperatures), jnp.float32(0))

    def _masks(self, logits: Array, kept: Array) -> tuple[Array, Array]:
        """1 for the rows, and for the classes, at or below their median."""
        answer = jax.nn.softmax(logits.astype(jnp.float32))
        if not self.masked:
            return jnp.ones(answer.shape[0]), jnp.ones(answer.shape[1])
        confidence, mass = answer.max(-1), jnp.where(kept[:, None], answer, 0).sum(0)
        middle, average = median(confidence, kept), median(mass, jnp.ones(len(mass), bool))
        return jnp.where(confidence <= middle, 1.0, 0.0), jnp.where(mass <= average, 1.0, 0.0)


def class_rows(mine: Array, theirs: Array, *, temperature: float, where: Array) -> Array:
    """``[classes]``: row by row of `jkd.losses.class_correlation`, whose value is their mean."""
    q, p = (jnp.where(where[:, None], jax.nn.softmax(z.astype(jnp.float32) / temperature), 0) for z in (mine, theirs))
    return jnp.square(q.T @ q - p.T @ p).sum(1)


def median(values: Array, kept: Array) -> Array:
    """Of the values that are kept, at least one."""
    ordered, count = jnp.sort(jnp.where(kept, values, jnp.inf)), kept.sum()
    return (ordered[jnp.maximum(count - 1, 0) // 2] + ordered[count // 2]) / 2
