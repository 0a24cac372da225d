"""Methods that match feature maps or embeddings at tapped modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Recipe, Vars
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Projector, Regressor
from jkd.schedules import Schedule
from jkd.types import Array, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match(Recipe):
    """``task_weight * CE + weight * sum over pairs of mean loss(project(student tap), teacher tap)``.

    The general form of a method that compares tapped features pair by pair.

    Args:
        student_taps, teacher_taps: as many paths on each side; the i-th is compared with the i-th.
        loss: ``loss(student_features, teacher_features) -> [batch, ...]``, one of `jkd.losses` (with hyperparameters through
            ``functools.partial``).
        projector: learned map from a student's features to the teacher's shape, one for each pair; None for none.
        weight: of the sum; number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
        couples: True where ``loss`` compares examples.
    """

    loss: Callable[..., Any] = losses.mse
    projector: Projector | None = None
    weight: float | Schedule = 1.0
    task_weight: float = 1.0
    couples: bool = False

    citation: ClassVar[str] = "any loss of jkd.losses between tapped features"
    family: ClassVar[str] = "features"

    def __post_init__(self):
        if not self.student_taps or len(self.student_taps) != len(self.teacher_taps):
            raise InputError(
                f"{type(self).__name__}: {len(self.student_taps)} student_taps and {len(self.teacher_taps)} teacher_taps; "
                "give as many on each side, at least one"
            )

    @property
    def couples_batch(self) -> bool:
        return self.couples or (self.projector is not None and self.projector.couples_batch)

    def init(self, key, ctx):
        if self.projector is None:
            return Vars()
        pairs = enumerate(zip(self.student_taps, self.teacher_taps, strict=True))
        params = {
            str(i): self.projector.init(
                jax.random.fold_in(key, i), ctx.student_outputs.taps[mine].shape, ctx.teacher_outputs.taps[theirs].shape
            )
            for i, (mine, theirs) in pairs
        }
        return Vars(params={"projector": params})

    def project(self, vars: Vars, student: Any) -> list[Array]:
        """The student's taps, each in the teacher's shape."""
        taps = [student.taps[path] for path in self.student_taps]
        if self.projector is None:
            return taps
        return [self.projector(vars.params["projector"][str(i)], tap) for i, tap in enumerate(taps)]

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = with_task(self.task_weight, student, batch)
        weight = schedules.at(self.weight, clock)
        projected = self.project(vars, student)
        for i, (mine, path) in enumerate(zip(projected, self.teacher_taps, strict=True)):
            name = "match" if len(projected) == 1 else f"match{i}"
            terms[name] = Term(self.loss(mine, teacher.taps[path]), batch["weight"], weight)
        return terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitNet(Match):
    """Hints: ``CE + weight * mean (r(student tap) - teacher tap)²`` with a learned regressor r, eq. 3 of the paper.

    The paper trains the hint first and soft targets afterwards; the benchmark (Tian et al., ICLR 2020), whose weight 100 and
    convolutional regressor these are, trains both together, and so does this.
    """

    projector: Projector | None = Regressor()
    weight: float | Schedule = 100.0

    citation: ClassVar[str] = "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"
