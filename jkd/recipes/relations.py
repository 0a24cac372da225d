"""Methods that compare how the examples of a batch lie to each other."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Vars
from jkd.recipes.features import Match, tap_shapes
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Linear
from jkd.schedules import Schedule
from jkd.types import Array, Term, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class SP(Match):
    """Similarity preserving: ``CE + weight * mean (G_s - G_t)²``, G the cosines between the batch's examples.

    Weight 3000 and the tap (the last feature map) are the CIFAR benchmark's.
    """

    loss: Callable[..., Any] = losses.similarity_preserving
    weight: float | Schedule = 3000.0
    couples: bool = True

    citation: ClassVar[str] = "Tung & Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, arXiv:1907.09682"
    family: ClassVar[str] = "relations"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PKT(Match):
    """Probabilistic knowledge transfer: ``CE + weight * mean p log(p / q)`` of neighbours' probabilities.

    Weight 30000 (of a mean over pairs) and the tap (pooled features) are the CIFAR benchmark's.
    """

    loss: Callable[..., Any] = losses.pkt
    weight: float | Schedule = 30000.0
    couples: bool = True

    citation: ClassVar[str] = "Passalis & Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018"
    family: ClassVar[str] = "relations"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RKD(Match):
    """Relational KD: ``CE + weight * distance + angle_weight * angle``.

    Distances between pairs (over their mean) and angles between triples of examples, each under the Huber loss. Weights 25 and 50
    and the tap (pooled features) are the CIFAR benchmark's.

    Args:
        weight: of the distances.
        angle_weight: of the angles.
    """

    weight: float | Schedule = 25.0
    angle_weight: float | Schedule = 50.0
    couples: bool = True

    citation: ClassVar[str] = "Park et al., Relational Knowledge Distillation, CVPR 2019, arXiv:1904.05068"
    family: ClassVar[str] = "relations"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms, kept = with_task(self.task_weight, student, batch), batch["weight"] > 0
        parts = {"distance": (losses.rkd_distance, self.weight), "angle": (losses.rkd_angle, self.angle_weight)}
        pairs = self.pairs(vars, student, teacher, batch)
        for name, (loss, weight) in parts.items():
            for i, (mine, theirs) in enumerate(pairs):
                place = "" if len(pairs) == 1 else str(i)
                terms[name + place] = Term(loss(mine, theirs, where=kept), batch["weight"], schedules.at(weight, clock))
        return terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class CC(Match):
    """Correlation congruence: ``CE + weight * mean over neighbours b of <d_b, d_(b+1)>``, d = |e_s - e_t|.

    e are linear maps of both sides' features to ``dim``, both trained. This is the code that the authors gave to the CIFAR
    benchmark (Tian et al., ICLR 2020), with its weight 0.02; the paper compares correlation matrices under a Gaussian kernel.

    Args:
        student_taps, teacher_taps: one on each side, the pooled features.
        dim: of the embeddings.
    """

    weight: float | Schedule = 0.02
    couples: bool = True
    dim: int = 128

    citation: ClassVar[str] = "Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, arXiv:1904.01802"
    family: ClassVar[str] = "relations"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def __post_init__(self):
        super().__post_init__()
        if len(self.student_taps) != 1:
            raise InputError(f"CC: student_taps = {self.student_taps}: give one, the pooled features")

    def init(self, key, ctx):
        return Vars(params={"projector": embeddings_init(key, *tap_shapes(self, ctx)[0], self.dim)})

    def terms(self, vars, student, teacher, batch, *, clock, key):
        taps = student.taps[self.student_taps[0]], teacher.taps[self.teacher_taps[0]]
        mine, theirs = embeddings(vars.params["projector"], *taps)
        values = losses.correlation_congruence(mine, theirs, where=batch["weight"] > 0)
        match = Term(values, batch["weight"], schedules.at(self.weight, clock))
        return with_task(self.task_weight, student, batch) | {"match": match}


def embeddings_init(key: Array, student_shape: tuple[int, ...], teacher_shape: tuple[int, ...], dim: int) -> Tree:
    """One linear map for each side, from all features of an example to ``dim``."""
    sides = zip(("student", "teacher"), jax.random.split(key), (student_shape, teacher_shape), strict=True)
    return {side: Linear().init(own, (math.prod(shape[1:]),), (dim,)) for side, own, shape in sides}


def embeddings(params: Tree, student_features: Array, teacher_features: Array) -> tuple[Array, Array]:
    """``[batch, dim]`` of both sides."""
    mine, theirs = (features.reshape(features.shape[0], -1) for features in (student_features, teacher_features))
    return Linear()(params["student"], mine), Linear()(params["teacher"], theirs)
