"""Cross selective fusion: levels of a hierarchical transformer, each mixed with all deeper ones before the teacher is matched."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Recipe, Vars
from jkd.recipes.features import tap_shapes
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Linear, batch_norm, norm_init
from jkd.recipes.review import enlarged, unit
from jkd.schedules import Schedule
from jkd.types import Array, Term, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransKD(Recipe):
    """``CE + weight * sum over levels of CWD(fusion of the student's levels, teacher's level) + sum_i w_i * mean (P_i e_s - e_t)²``.

    Feature fusion: from the deepest level upwards, a level's map (1x1 convolution, BatchNorm) and what came from the deeper ones
    (enlarged) are added up weighted, channel by channel, with a softmax over the two that reads their pooled sum; a 3x3 convolution
    makes the teacher's channels of the mixture, which CWD compares: for each channel the KL between softmaxes over positions.
    Patch embeddings: a learned linear map P_i takes the student's (e_s) to the teacher's width. Fusion and losses are those of the
    authors' code, TransKD-Base; their two optimisation modules (global-local mixer, embedding assistant) are left out, and
    initialisation is He-normal. Labels may be ``[batch, height, width]``, those of a segmentation.

    Args:
        student_taps, teacher_taps: the stages' maps ``[batch, height, width, channels]`` from shallow to deep, and after them one
            patch embedding (``[batch, tokens, dim]`` or a map) for each of ``embedding_weights``.
        weight: of the feature maps; number or schedule.
        embedding_weights: of the patch embeddings, in order; the authors' for four stages. ``()`` for fusion alone.
        temperature: of CWD's softmaxes.
        middle: channels in which levels are mixed.
        task_weight: of the labels' term; 0 leaves it out.
        norm: BatchNorm in the fusions; without it examples stay independent.
    """

    weight: float | Schedule = 1.0
    embedding_weights: tuple[float, ...] = (0.1, 0.1, 0.5, 1.0)
    temperature: float = 1.0
    middle: int = 64
    task_weight: float = 1.0
    norm: bool = True

    same_classes: ClassVar[bool] = False
    citation: ClassVar[str] = (
        "Liu et al., TransKD: Transformer Knowledge Distillation for Efficient Semantic Segmentation, 2022, arXiv:2202.13393"
    )
    family: ClassVar[str] = "transformers"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def __post_init__(self):
        embeddings = len(self.embedding_weights)
        if len(self.student_taps) != len(self.teacher_taps) or self.levels < 1:
            raise InputError(
                f"TransKD: {len(self.student_taps)} student_taps and {len(self.teacher_taps)} teacher_taps; give as many on each "
                f"side: the stages, then {embeddings} patch embeddings (one for each of embedding_weights)"
            )

    @property
    def levels(self) -> int:
        """How many of the taps are stages."""
        return len(self.student_taps) - len(self.embedding_weights)

    @property
    def couples_batch(self) -> bool:
        return self.norm

    def init(self, key, ctx):
        shapes = tap_shapes(self, ctx)
        for tap, pair in zip(self.student_taps, shapes[: self.levels], strict=False):
            if any(len(shape) != 4 for shape in pair):
                raise InputError(f"TransKD: {tap!r} gives {pair[0]} and {pair[1]}: a stage is [batch, height, width, channels]")
        he, squeezed = jax.nn.initializers.he_normal(), max(self.middle // 16, 32)
        fusions: dict[str, Tree] = {}
        for i, (mine, theirs) in enumerate(shapes[: self.levels]):
            first, second, third, fourth = jax.random.split(jax.random.fold_in(key, i), 4)
            fusion = {"in": {"kernel": he(first, (1, 1, mine[-1], self.middle))}}
            fusion["out"] = {"kernel": he(second, (3, 3, self.middle, theirs[-1]))}
            if i < self.levels - 1:
                fusion["squeeze"] = {"kernel": he(third, (self.middle, squeezed))}
                fusion["select"] = Linear().init(fourth, (squeezed,), (2 * self.middle,))
            if self.norm:
                for name in fusion.keys() - {"select"}:
                    fusion[name] |= norm_init(fusion[name]["kernel"].shape[-1])
            fusions[str(i)] = fusion
        own = jax.random.fold_in(key, self.levels)
        aligned = {
            str(i): Linear().init(jax.random.fold_in(own, i), mine, theirs)
            for i, (mine, theirs) in enumerate(shapes[self.levels :])
        }
        return Vars(params={"projector": {"fusion": fusions} | ({"embedding": aligned} if aligned else {})})

    def fused(self, params: Tree, maps: list[Array], kept: Array) -> list[Array]:
        """The student's levels as they are compared, in the teacher's channels."""
        found: list[Array] = []
        deeper: Array | None = None
        for i in reversed(range(len(maps))):
            fusion = params[str(i)]
            mixed = unit(fusion["in"], maps[i], kept)
            if deeper is not None:
                mixed = select(fusion, mixed, enlarged(deeper, mixed.shape), kept)
            found.insert(0, unit(fusion["out"], mixed, kept))
            deeper = mixed
        return found

    def terms(self, vars, student, teacher, batch, *, clock, key):
        params, kept = vars.params["projector"], batch["weight"] > 0
        mine, theirs = [student.taps[tap] for tap in self.student_taps], [teacher.taps[tap] for tap in self.teacher_taps]
        terms = with_task(self.task_weight, student, batch)
        weight = schedules.at(self.weight, clock)
        fused = self.fused(params["fusion"], mine[: self.levels], kept)
        for i, pair in enumerate(zip(fused, theirs[: self.levels], strict=True)):
            terms[f"fusion{i}"] = Term(losses.channel_wise(*pair, temperature=self.temperature), batch["weight"], weight)
        for i, (share, one, other) in enumerate(
            zip(self.embedding_weights, mine[self.levels :], theirs[self.levels :], strict=True)
        ):
            values = losses.mse(Linear()(params["embedding"][str(i)], one), other)
            terms[f"embedding{i}"] = Term(values, batch["weight"], share)
        return terms


def select(params: Tree, first: Array, second: Array, kept: Array) -> Array:
    """``a * first + (1 - a) * second``, a for each example and channel: two maps mixed as selective kernels are.

    The pooled sum of both is squeezed (BatchNorm, ReLU) and gives two numbers for each channel; a is their softmax.
    """
    squeezed = (first + second).mean((1, 2)) @ params["squeeze"]["kernel"].astype(first.dtype)
    if "scale" in params["squeeze"]:
        squeezed = batch_norm(params["squeeze"], squeezed, kept)
    each = Linear()(params["select"], jax.nn.relu(squeezed)).reshape(len(first), 2, 1, 1, -1)
    share = jax.nn.softmax(each.astype(jnp.float32), axis=1).astype(first.dtype)
    return first * share[:, 0] + second * share[:, 1]
