"""Methods that give the student a second head for the teacher, so that labels and teacher do not pull at the same weights."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Recipe, Update, Vars
from jkd.recipes.heads import pooled
from jkd.recipes.logits import task, with_task
from jkd.recipes.projectors import Linear
from jkd.schedules import Clock, Schedule
from jkd.types import Array, Model, Outputs, Term, Tree, quotient


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SecondHead(Recipe):
    """A linear head on one of the student's taps, in the group ``second_head``."""

    def __post_init__(self):
        if len(self.student_taps) != 1:
            raise InputError(
                f"{type(self).__name__}: student_taps = {self.student_taps}: give one, the features its head reads"
            )

    def init(self, key, ctx):
        if ctx.teacher_outputs is None or not ctx.teacher_outputs.has_logits:
            raise InputError(f"{type(self).__name__}: the teacher has no logits")
        width, classes = ctx.student_outputs.taps[self.student_taps[0]].shape[-1], ctx.teacher_outputs.logits_shape[-1]
        return Vars(params={"second_head": Linear().init(key, (width,), (classes,))})

    def second(self, params: Tree, student: Outputs) -> Array:
        """Logits of the second head."""
        return Linear()(params, pooled(student.taps[self.student_taps[0]]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DHKD(_SecondHead):
    """Dual-head KD: ``CE(z) + weight * T² sum_c KL(1/2 || sigmoid((z' - z_t) / T))``, z' of an auxiliary linear head.

    The teacher's logits are matched one by one, scale included, which no softmax sees; on one head this fights the cross-entropy,
    hence the second, which is thrown away. Product: the student with its own head. The auxiliary head is the authors' linear one.

    Args:
        student_taps: one, the pooled features.
        temperature: T.
        weight: of the teacher's term; 1 on CIFAR-100, 0.1 on ImageNet. Number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
        align: gradient alignment (see `aligned`), for a second backward pass; on in the authors' CIFAR-100 command, off in their
            ImageNet one.
    """

    temperature: float = 2.0
    weight: float | Schedule = 1.0
    task_weight: float = 1.0
    align: bool = True

    citation: ClassVar[str] = "Yang et al., Dual-Head Knowledge Distillation, 2024, arXiv:2411.08937"
    family: ClassVar[str] = "heads"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    @property
    def updates(self):
        return (Update(combine=aligned if self.align else None),)

    def terms(self, vars, student, teacher, batch, *, clock, key):
        auxiliary = self.second(vars.params["second_head"], student)
        values = losses.binary_kl_norm(auxiliary, teacher.logits, temperature=self.temperature)
        auxiliary_term = Term(values, batch["weight"], schedules.at(self.weight, clock))
        return with_task(self.task_weight, student, batch) | {"auxiliary": auxiliary_term}


def aligned(gradients: dict[str, Tree], *, clock: Clock, key: Array) -> Tree:
    """For `jkd.Update`: the sum of the terms' gradients, each freed of its part against that of ``task``.

    ``g <- g - min(<g, g_task>, 0) / |g_task|² g_task``, over all parameters as one vector, as DHKD's authors have it: PCGrad (Yu et
    al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020) where one side alone gives way.
    """
    if "task" not in gradients:
        return jax.tree.map(lambda *leaves: sum(leaves), *gradients.values())
    task = gradients["task"]
    others = [gradient for name, gradient in gradients.items() if name != "task"]
    against = sum((jnp.minimum(_dot(gradient, task), 0) for gradient in others), jnp.float32(0))
    share = 1 - quotient(against, _dot(task, task))
    return jax.tree.map(lambda own, *leaves: share * own + sum(leaves), task, *others)


def _dot(first: Tree, second: Tree) -> Array:
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return sum((jnp.vdot(a, b) for a, b in pairs), jnp.float32(0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DHO(_SecondHead):
    """Dual-head optimisation: ``task_weight * CE(z) + weight * (KD(z', labelled) + KD(z', unlabelled))``, KD at T with T².

    Product: ``alpha * softmax(z) + (1 - alpha) * softmax(z' / beta)``, whose two numbers the authors search on validation data. The
    unlabelled rows are ``batch["unlabelled"]`` where the data has that stream; else one mean is taken over all of the batch. The
    second head is a linear layer; on CLIP students the authors scale normalised features by 100 and start from the text's.

    Args:
        student_taps: one, the pooled features.
        temperature: T.
        weight: of the teacher's terms; number or schedule.
        task_weight: of the labels' term.
        alpha: share of the labels' head in the product.
        beta: temperature of the teacher's head in the product.
    """

    temperature: float = 2.0
    weight: float | Schedule = 0.5
    task_weight: float = 0.5
    alpha: float = 0.5
    beta: float = 1.0

    citation: ClassVar[str] = (
        "Kang et al., Simple yet Effective Semi-supervised Knowledge Distillation via Dual-Head Optimization"
    )
    family: ClassVar[str] = "heads"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise InputError(f"DHO(alpha={self.alpha}): a share, from 0 to 1")

    def forward(self, models, batch, key):
        first, second = jax.random.split(key)
        theirs = {"kd": models.teacher(batch)}
        student, models = models.student(batch, key=first)
        mine = {"kd": student}
        if "unlabelled" in batch:
            theirs["kd_unlabelled"] = models.teacher(batch["unlabelled"])
            mine["kd_unlabelled"], models = models.student(batch["unlabelled"], key=second)
        return mine, theirs, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = {"task": task(student["kd"], batch, coef=self.task_weight)}
        weights = {"kd": batch["weight"], "kd_unlabelled": batch.get("unlabelled", batch)["weight"]}
        for name, mine in student.items():
            answer = self.second(vars.params["second_head"], mine)
            values = losses.forward_kl(answer, teacher[name].logits, temperature=self.temperature)
            terms[name] = Term(values, weights[name], schedules.at(self.weight, clock))
        return terms

    def deploy(self, models):
        student, tap = models.networks["student"], self.student_taps[0]
        shares = [math.log(share) if share else -math.inf for share in (self.alpha, 1 - self.alpha)]

        def apply(params, buffers, batch, *, taps=(), train=False, key=None):
            wanted = tuple(dict.fromkeys((tap, *taps)))
            own, left = student.apply(params["student"], buffers["student"], batch, taps=wanted, train=train, key=key)
            second = self.second(params["second_head"], own)
            first, other = (jax.nn.log_softmax(z.astype(jnp.float32)) for z in (own.logits, second / self.beta))
            logits = jnp.logaddexp(shares[0] + first, shares[1] + other)
            outputs = own.replace(logits=logits, taps={path: own.taps[path] for path in taps})
            return outputs, {**buffers, "student": left}

        groups = ("student", "second_head")
        params = {group: models.params[group] for group in groups}
        buffers = {"student": models.buffers.get("student", {})}
        return Model(
            init=lambda key: (params, buffers),
            apply=apply,
            params=params,
            buffers=buffers,
            paths=student.paths,
            preprocess=student.preprocess,
            couples_batch=student.couples_batch,
            name=f"{student.name} with two heads",
        )
