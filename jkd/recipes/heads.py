"""Methods that use the teacher's own head, or give the student a second one; what they deploy is more than the student."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.losses._maps import adaptive_average_pool
from jkd.recipe import Models, Recipe, Vars
from jkd.recipes.features import Match, tap_shapes
from jkd.recipes.logits import task, with_task
from jkd.recipes.projectors import Pointwise, Projector, conv, moments, norm_init, normalised, project
from jkd.schedules import Schedule
from jkd.types import Array, Model, Outputs, Term, Tree, subtree

KEPT = 0.9  # of the running averages, at each step


@dataclasses.dataclass(frozen=True, kw_only=True)
class _TeacherHead(Match):
    """What the two methods on the teacher's head share."""

    teacher_head: str = "head"

    teacher_gradient: ClassVar[Literal["stop", "through"]] = "through"
    requires: ClassVar[str] = "a teacher whose last layer is a module of its own (teacher_head); taps before its pooling"

    def __post_init__(self):
        super().__post_init__()
        if len(self.student_taps) != 1:
            raise InputError(f"{type(self).__name__}: student_taps = {self.student_taps}: give one, the last feature map")

    def ask_head(self, models: Models, features: Array) -> tuple[Outputs, Models]:
        """The answer of the teacher's head to projected features."""
        if models.params.get("teacher") is None or not subtree(models.params["teacher"], self.teacher_head):
            raise InputError(f"{type(self).__name__}.teacher_head: the teacher has no parameters under {self.teacher_head!r}")
        return models.apply("teacher", pooled(features), part=self.teacher_head)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimKD(_TeacherHead):
    """A reused classifier: ``mean (projector(student) - teacher)²``, and the teacher's own head answers.

    The projector has a 1x1, a 3x3 and a 1x1 convolution, each with BatchNorm and ReLU, over half the teacher's channels. Student
    features are averaged down to the teacher's height and width first, or the teacher's to the student's. Product: student,
    projector and the teacher's head. There is no label and no soft target in the paper's loss; ``task_weight`` adds labels.

    Args:
        student_taps, teacher_taps: one on each side, the last feature map (or a vector), the teacher's as its pool reads it.
        teacher_head: path of the teacher's module from pooled features to logits.
        weight: of the match; number or schedule.
        factor: the teacher's channels over those of the projector's middle.
        batch_norm: BatchNorm in the projector; without it examples stay independent.
    """

    task_weight: float = 0.0
    factor: int = 2
    batch_norm: bool = True

    citation: ClassVar[str] = (
        "Chen et al., Knowledge Distillation with the Reused Teacher Classifier, CVPR 2022, arXiv:2203.14001"
    )
    family: ClassVar[str] = "heads"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    @property
    def couples_batch(self) -> bool:
        return self.batch_norm

    def init(self, key, ctx):
        ((mine, theirs),) = tap_shapes(self, ctx)
        middle = max(1, theirs[-1] // self.factor)
        widths, sizes = (mine[-1], middle, middle, theirs[-1]), (1, 3 if len(mine) == 4 else 1, 1)
        params: dict[str, Tree] = {}
        # the size that the student's map is averaged down to: an array because a tree holds nothing else, read by its shape
        size = tuple(min(pair) for pair in zip(mine[1:-1], theirs[1:-1], strict=True)) if len(mine) == 4 else ()
        buffers: dict[str, Tree] = {"size": jnp.zeros(size)}
        for i, (inputs, outputs, side) in enumerate(zip(widths[:-1], widths[1:], sizes, strict=True)):
            kernel = jax.nn.initializers.he_normal()(jax.random.fold_in(key, i), (side, side, inputs, outputs))
            params[str(i)] = {"kernel": kernel} | norm_init(outputs)
            if self.batch_norm:
                buffers[str(i)] = {"mean": jnp.zeros(outputs), "variance": jnp.ones(outputs)}
        return Vars(params={"projector": params}, buffers={"projector": buffers})

    def forward(self, models, batch, key):
        teacher = models.teacher(batch)
        student, models = models.student(batch, key=key)
        inputs = {"features": student.taps[self.student_taps[0]], "weight": batch["weight"]}
        projected, models = models.apply(PROJECTOR, inputs, group="projector", train=True)
        features = projected.heads["features"]
        answer, models = self.ask_head(models, features)
        return student.replace(logits=answer.logits, heads={**student.heads, "projected": features}), teacher, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        values = losses.mse(student.heads["projected"], teacher.taps[self.teacher_taps[0]])
        match = Term(values, batch["weight"], schedules.at(self.weight, clock))
        return with_task(self.task_weight, student, batch) | {"match": match}

    def deploy(self, models):
        student, head = models.networks["student"], models.networks["teacher"].submodule(self.teacher_head)
        trees = (models.params, models.buffers)
        params, buffers = (
            {
                "student": tree["student"],
                "projector": tree["projector"],
                "head": subtree(tree["teacher"], self.teacher_head),
            }
            for tree in trees
        )
        tap = self.student_taps[0]

        def apply(params, buffers, batch, *, taps=(), train=False, key=None):
            wanted = tuple(dict.fromkeys((tap, *taps)))
            own, of_student = student.apply(params["student"], buffers["student"], batch, taps=wanted, train=train, key=key)
            inputs = {"features": own.taps[tap]} | ({"weight": batch["weight"]} if "weight" in batch else {})
            projected, of_projector = PROJECTOR.apply(params["projector"], buffers["projector"], inputs, train=train)
            answer, _ = head.apply(params["head"], buffers["head"], pooled(projected.heads["features"]))
            outputs = Outputs(answer.logits, heads=own.heads, taps={path: own.taps[path] for path in taps})
            return outputs, {**buffers, "student": of_student, "projector": of_projector}

        return Model(
            init=lambda key: (params, buffers),
            apply=apply,
            params=params,
            buffers=buffers,
            paths=student.paths,
            preprocess=student.preprocess,
            couples_batch=student.couples_batch or self.batch_norm,
            name=f"{student.name} with the head of {models.networks['teacher'].name}",
        )


def _project(params: Tree, buffers: Tree, batch: Any, *, taps=(), train: bool = False, key=None) -> tuple[Outputs, Tree]:
    """SimKD's projector as a network: ``features`` and ``weight`` ``[batch]`` to ``heads["features"]``, with running statistics."""
    features, new = batch["features"], dict(buffers)
    if features.ndim == 4:
        features = adaptive_average_pool(features, *buffers["size"].shape)
    for i in range(len(params)):
        layer = params[str(i)]
        kernel = layer["kernel"]
        features = conv(features, kernel) if features.ndim == 4 else features @ kernel[0, 0].astype(features.dtype)
        if str(i) in buffers:
            wide, running = features.astype(jnp.float32), buffers[str(i)]
            shape = (1,) * (wide.ndim - 1) + (-1,)
            if train:
                kept = batch["weight"] > 0 if "weight" in batch else None
                mean, variance = moments(wide, kept)
                seen = {"mean": mean.reshape(-1), "variance": variance.reshape(-1)}
                new[str(i)] = {name: KEPT * running[name] + (1 - KEPT) * jax.lax.stop_gradient(seen[name]) for name in seen}
            else:
                mean, variance = (running[name].astype(jnp.float32).reshape(shape) for name in ("mean", "variance"))
            features = normalised(layer, wide, mean, variance).astype(features.dtype)
        features = jax.nn.relu(features)
    return Outputs(heads={"features": features}), new


def _no_init(key: Array) -> tuple[Tree, Tree]:
    raise InputError("SimKD's projector is made by SimKD.init, which knows its shapes")


PROJECTOR = Model(init=_no_init, apply=_project, params={}, buffers={}, couples_batch=True, name="projector")


def pooled(features: Array) -> Array:
    """The mean over the positions of a map; vectors as they are."""
    return features.mean((1, 2)) if features.ndim == 4 else features


@dataclasses.dataclass(frozen=True, kw_only=True)
class SRRL(_TeacherHead):
    """Softmax regression: ``CE + weight * mean (x_s - x_t)² + head_weight * mean (head(x_s) - z_t)²``.

    x_s are the student's features through a 1x1 convolution, BatchNorm and ReLU, x_t the teacher's, both averaged over positions;
    the teacher's frozen head reads x_s, so that an error counts by what the head makes of it.

    Args:
        student_taps, teacher_taps: one on each side, the last feature map (or a vector).
        teacher_head: path of the teacher's module from pooled features to logits.
        weight: of the features; number or schedule.
        head_weight: of the head's answers; number or schedule. 5 on CIFAR-100, 1 on ImageNet.
    """

    projector: Projector | None = Pointwise(batch_norm=True, relu=True)
    head_weight: float | Schedule = 5.0

    citation: ClassVar[str] = "Yang et al., Knowledge Distillation via Softmax Regression Representation Learning, ICLR 2021"
    family: ClassVar[str] = "heads"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def forward(self, models, batch, key):
        teacher = models.teacher(batch)
        student, models = models.student(batch, key=key)
        params = models.params["projector"]["0"] if self.projector is not None else {}
        features = pooled(project(self.projector, params, student.taps[self.student_taps[0]], batch["weight"] > 0))
        answer, models = self.ask_head(models, features)
        return student.replace(heads={**student.heads, "projected": features, "teacher_head": answer.logits}), teacher, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        features = losses.mse(student.heads["projected"], pooled(teacher.taps[self.teacher_taps[0]]))
        answers = losses.logit_mse(student.heads["teacher_head"], teacher.logits)
        return with_task(self.task_weight, student, batch) | {
            "features": Term(features, batch["weight"], schedules.at(self.weight, clock)),
            "head": Term(answers, batch["weight"], schedules.at(self.head_weight, clock)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeiT(Recipe):
    """A distillation token: ``(1 - weight) * CE(z, y) + weight * CE(z_token, argmax z_t)`` (hard labels).

    For students whose Outputs have ``heads["distillation"]`` (`jkd.models.vit` with ``distillation_token=True``). Product: the mean
    of the two heads' probabilities, as in the paper; the authors' code takes the mean of their logits.

    Args:
        weight: of the teacher's decisions.
        label_smoothing: of the labels' term, 0.1 in the paper.
    """

    weight: float = 0.5
    label_smoothing: float = 0.1

    citation: ClassVar[str] = "Touvron et al., Training data-efficient image transformers, ICML 2021, arXiv:2012.12877"
    family: ClassVar[str] = "heads"
    requires: ClassVar[str] = 'a student with heads["distillation"] (models.vit: distillation_token=True)'
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        if "distillation" not in student.heads:
            raise InputError("DeiT: the student's Outputs have no heads['distillation'] (models.vit: distillation_token=True)")
        decided = losses.cross_entropy(student.heads["distillation"], teacher.logits.argmax(-1))
        return {
            "task": task(student, batch, coef=1 - self.weight, label_smoothing=self.label_smoothing),
            "token": Term(decided, batch["weight"], self.weight),
        }

    def deploy(self, models):
        student = super().deploy(models)

        def apply(params, buffers, batch, **options):
            outputs, buffers = student.apply(params, buffers, batch, **options)
            answers = jnp.stack([outputs.logits, outputs.heads["distillation"]]).astype(jnp.float32)
            mean = jax.nn.logsumexp(jax.nn.log_softmax(answers), axis=0) - jnp.log(2.0)
            return outputs.replace(logits=mean), buffers

        return dataclasses.replace(student, apply=apply)
