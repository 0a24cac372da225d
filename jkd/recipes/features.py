"""Methods that match feature maps or embeddings at tapped modules, value by value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.losses._maps import match
from jkd.recipe import Recipe, Vars
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Pointwise, Projector, Regressor, project
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Term


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
        couples: True where ``loss`` compares examples; it is then called with ``where`` ``[batch]``, True = counted.
    """

    loss: Callable[..., Any] = losses.mse
    projector: Projector | None = None
    weight: float | Schedule = 1.0
    task_weight: float = 1.0
    couples: bool = False

    same_classes: ClassVar[bool] = False  # features are compared, classes are not
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
        params = {
            str(i): self.projector.init(jax.random.fold_in(key, i), mine, theirs)
            for i, (mine, theirs) in enumerate(tap_shapes(self, ctx))
        }
        return Vars(params={"projector": params})

    def pairs(self, vars: Vars, student: Any, teacher: Any, batch: Batch) -> list[tuple[Array, Array]]:
        """The taps to be compared, the student's projected."""
        kept, pairs = batch["weight"] > 0, []
        for i, (mine, theirs) in enumerate(zip(self.student_taps, self.teacher_taps, strict=True)):
            params = vars.params["projector"][str(i)] if self.projector is not None else {}
            pairs.append((project(self.projector, params, student.taps[mine], kept), teacher.taps[theirs]))
        return pairs

    def compare(self, vars: Vars, place: int, mine: Array, theirs: Array, batch: Batch) -> Array:
        """The loss of the pair with number ``place``, ``[batch, ...]``."""
        return self.loss(mine, theirs, where=batch["weight"] > 0) if self.couples else self.loss(mine, theirs)

    def share(self, place: int) -> float:
        """The factor of one pair in the sum."""
        return 1.0

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = with_task(self.task_weight, student, batch)
        weight = schedules.at(self.weight, clock)
        pairs = self.pairs(vars, student, teacher, batch)
        for i, (mine, theirs) in enumerate(pairs):
            name = "match" if len(pairs) == 1 else f"match{i}"
            terms[name] = Term(self.compare(vars, i, mine, theirs, batch), batch["weight"], weight * self.share(i))
        return terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitNet(Match):
    """Hints: ``CE + weight * mean (r(student tap) - teacher tap)²`` with a learned regressor r.

    The paper trains the hint first and soft targets afterwards; the benchmark (Tian et al., ICLR 2020), whose weight 100 and
    convolutional regressor these are, trains both together, and so does this.
    """

    projector: Projector | None = Regressor()
    weight: float | Schedule = 100.0

    citation: ClassVar[str] = "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VID(Match):
    """Variational information: ``CE + weight * sum over pairs of mean ((mu - t)² / v + log v) / 2``.

    mu is a regressor on the student's features (three 1x1 convolutions), v a learned variance for each channel that starts at
    ``variance``. Weight and regressor are the CIFAR benchmark's (Tian et al., ICLR 2020), whose taps are all stages but the last
    pooled one. Where the student's map is the larger, it is averaged down before the regressor, as there.

    Args:
        variance: where every v starts.
    """

    projector: Projector | None = Pointwise(layers=3)
    variance: float = 5.0

    citation: ClassVar[str] = "Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def init(self, key, ctx):
        start = jnp.log(jnp.expm1(self.variance - 1e-5))
        scales = {str(i): jnp.full(theirs[-1], start) for i, (_, theirs) in enumerate(tap_shapes(self, ctx))}
        return Vars(params={**super().init(key, ctx).params, "variance": {"log_scale": scales}})

    def pairs(self, vars, student, teacher, batch):
        taps = {}
        for mine, theirs in zip(self.student_taps, self.teacher_taps, strict=True):
            tap = student.taps[mine]
            taps[mine] = match(tap, teacher.taps[theirs])[0] if tap.ndim > 3 else tap
        return super().pairs(vars, student.replace(taps=taps), teacher, batch)

    def compare(self, vars, place, mine, theirs, batch):
        return losses.variational_information(mine, theirs, vars.params["variance"]["log_scale"][str(place)])


def tap_shapes(recipe: Recipe, ctx: Any) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the i-th student tap and the i-th teacher tap."""
    pairs = zip(recipe.student_taps, recipe.teacher_taps, strict=True)
    return [(ctx.student_outputs.taps[mine].shape, ctx.teacher_outputs.taps[theirs].shape) for mine, theirs in pairs]
