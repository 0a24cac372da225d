"""Knowledge review: every level of the teacher is matched by a fusion of that level of the student and all deeper ones."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.recipe import Vars
from jkd.recipes.features import Match, tap_shapes
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Shape, batch_norm, conv, norm_init
from jkd.schedules import Schedule
from jkd.types import Array, Term, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReviewKD(Match):
    """``CE + warm-up * weight * sum over levels of HCL(fusion of the student's levels, teacher's level)``.

    From the deepest level upwards, a level's features (1x1 convolution, BatchNorm) are mixed with what came from the deeper ones
    (enlarged) by an attention of two maps, and a 3x3 convolution makes the teacher's shape of the mixture. HCL compares pyramids of
    averages. Fusions are those of the authors' code; their initialisation is He-normal here.

    Args:
        student_taps, teacher_taps: levels from shallow to deep, the pooled features last (the authors' form): all stages and
            ``pool``.
        weight: 5 for ResNet32x4 -> ResNet8x4, 0.6 to 8 for other pairs; number or schedule.
        middle: channels in which levels are mixed; at most as many as the student's deepest level has.
        warmup_epochs: epochs over which the term grows to full weight; 20 on CIFAR-100.
        norm: BatchNorm in the fusions; without it examples stay independent.
    """

    weight: float | Schedule = 5.0
    middle: int = 512
    warmup_epochs: float = 20.0
    norm: bool = True

    citation: ClassVar[str] = "Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, arXiv:2104.09044"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    @property
    def couples_batch(self) -> bool:
        return self.norm

    def init(self, key, ctx):
        shapes = [(_map_shape(mine), _map_shape(theirs)) for mine, theirs in tap_shapes(self, ctx)]
        middle = min(self.middle, shapes[-1][0][-1])
        fusions = {}
        for i, (mine, theirs) in enumerate(shapes):
            first, second, third = jax.random.split(jax.random.fold_in(key, i), 3)
            he = jax.nn.initializers.he_normal()
            fusion: dict[str, Tree] = {
                "in": {"kernel": he(first, (1, 1, mine[-1], middle))},
                "out": {"kernel": he(second, (3, 3, middle, theirs[-1]))},
            }
            if self.norm:
                fusion["in"] |= norm_init(middle)
                fusion["out"] |= norm_init(theirs[-1])
            if i < len(shapes) - 1:
                kernel = jax.nn.initializers.lecun_normal()(third, (1, 1, 2 * middle, 2))
                fusion["attention"] = {"kernel": kernel, "bias": jnp.zeros(2)}
            fusions[str(i)] = fusion
        return Vars(params={"projector": fusions})

    def pairs(self, vars, student, teacher, batch):
        kept, deeper = batch["weight"] > 0, None
        pairs: list[tuple[Array, Array]] = []
        for i in reversed(range(len(self.student_taps))):
            mine, theirs = _as_map(student.taps[self.student_taps[i]]), _as_map(teacher.taps[self.teacher_taps[i]])
            fusion = vars.params["projector"][str(i)]
            mixed = unit(fusion["in"], mine, kept)
            if deeper is not None:
                deeper = enlarged(deeper, mixed.shape)
                both = jnp.concatenate([mixed, deeper], -1)
                bias = fusion["attention"]["bias"].astype(both.dtype).reshape(1, 1, 1, 2)
                share = jax.nn.sigmoid(conv(both, fusion["attention"]["kernel"]) + bias)
                mixed = mixed * share[..., :1] + deeper * share[..., 1:]
            deeper = enlarged(mixed, theirs.shape)
            pairs.insert(0, (unit(fusion["out"], deeper, kept), theirs))
        return pairs

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = with_task(self.task_weight, student, batch)
        warm = schedules.Epochs(1.0, self.warmup_epochs)(clock) if self.warmup_epochs else 1.0
        weight = warm * schedules.at(self.weight, clock)
        for i, (mine, theirs) in enumerate(self.pairs(vars, student, teacher, batch)):
            terms[f"review{i}"] = Term(losses.hierarchical_context(mine, theirs), batch["weight"], weight)
        return terms


def unit(params: Tree, features: Array, kept: Array) -> Array:
    """A convolution, and BatchNorm over the examples that are ``kept`` where it has parameters for it."""
    features = conv(features, params["kernel"])
    return batch_norm(params, features, kept) if "scale" in params else features


def _as_map(features: Array) -> Array:
    """Pooled features are a map of one position."""
    return features.reshape(_map_shape(features.shape))


def _map_shape(shape: Shape) -> Shape:
    return (shape[0], 1, 1, shape[1]) if len(shape) == 2 else shape


def enlarged(features: Array, like: Shape) -> Array:
    """At the height and width of another shape, by the nearest value (cell i of n reads ``floor(i * size / n)``, as PyTorch)."""
    for axis in (1, 2):
        size, wanted = features.shape[axis], like[axis]
        if size != wanted:
            features = jnp.take(features, jnp.arange(wanted) * size // wanted, axis=axis)
    return features
