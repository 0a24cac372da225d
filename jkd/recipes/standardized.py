"""Logit standardisation: methods that compare logits whose mean and scale are taken off first."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from jkd.errors import InputError
from jkd.recipe import Recipe
from jkd.recipes.logits import KD
from jkd.schedules import Schedule
from jkd.targets import standardize
from jkd.types import Outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standardized(Recipe):
    """Another recipe on logits with mean 0 and deviation 1, of student and teacher alike.

    ``Standardized(recipe=DKD(temperature=2.0))``. The labels' term (``task``) keeps the student's own logits, as the authors' code
    has it; everything else, what is remembered too, sees standardised ones.

    Difference: the authors wrap `MLLD` too. It is refused here, as every method whose ``forward`` is its own: what such a method
    makes of the two sides (several views there) is not one answer each, whose logits could be exchanged.

    Args:
        recipe: a method that runs the two networks once on the batch.

    Raises:
        InputError: the method has a ``forward``, ``updates``, ``deploy``, ``prepare`` or ``sampling`` of its own.
    """

    recipe: Recipe

    citation: ClassVar[str] = "Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, around any logit recipe"
    family: ClassVar[str] = "logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def __post_init__(self):
        for hook in ("forward", "updates", "deploy", "prepare", "sampling"):
            if getattr(type(self.recipe), hook) is not getattr(Recipe, hook):
                raise InputError(f"Standardized: {type(self.recipe).__name__} has a {hook} of its own, so it cannot be wrapped")
        for side in ("student_taps", "teacher_taps"):
            object.__setattr__(self, side, getattr(self.recipe, side))

    @property
    def same_classes(self) -> bool:  # type: ignore[override]
        return self.recipe.same_classes

    @property
    def teacher_gradient(self) -> Literal["stop", "through"]:  # type: ignore[override]
        return self.recipe.teacher_gradient

    @property
    def couples_batch(self) -> bool:
        return self.recipe.couples_batch

    def init(self, key, ctx):
        return self.recipe.init(key, ctx)

    def terms(self, vars, student, teacher, batch, *, clock, key):
        own = self.recipe.terms(vars, student, teacher, batch, clock=clock, key=key)
        terms = self.recipe.terms(vars, _standard(student), _standard(teacher), batch, clock=clock, key=key)
        # of each pair, what is not taken is dead code
        return {name: own[name] if name == "task" else term for name, term in terms.items()}

    def observe(self, vars, student, teacher, batch):
        return self.recipe.observe(vars, _standard(student), _standard(teacher), batch)

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return self.recipe.remember(memory, observed, batch, terms=terms, clock=clock, key=key)


def _standard(outputs: Any) -> Outputs:
    return outputs.replace(logits=standardize(outputs.logits))


@dataclasses.dataclass(frozen=True, kw_only=True)
class StandardizedKD(KD):
    """`KD` on standardised logits: ``task_weight * CE + weight * T² * KL``, with the constants of the paper.

    `Standardized` does the same for any other logit recipe.
    """

    temperature: float | Schedule = 2.0
    weight: float | Schedule = 9.0

    citation: ClassVar[str] = "Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024, arXiv:2403.01427"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        own = super().terms(vars, student, teacher, batch, clock=clock, key=key)
        return own | {"kd": super().terms(vars, _standard(student), _standard(teacher), batch, clock=clock, key=key)["kd"]}
