"""Methods whose temperature is learned."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.recipe import Recipe, Vars
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Linear
from jkd.schedules import Schedule
from jkd.types import Array, Outputs, Term, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class CTKD(Recipe):
    """Curriculum temperature: ``task_weight * CE + weight * T² KL(teacher_T || student_T)``, T against the student.

    ``T = start + span * sigmoid(theta)``, one learned number for all examples (`InstanceCTKD` has one for each). theta descends with
    its gradient times ``lambda``, which falls along a cosine from 0 to ``reversal``: a negative one reverses it, so that T rises or
    falls to make the task harder. theta is in the group ``temperature`` and moves by the run's optimizer, as in the authors' code.

    Args:
        start: smallest T.
        span: how far above it T may be.
        theta: at the start.
        reversal: lambda in the end.
        epochs: over which lambda gets there; the epoch that runs counts as done.
        weight: of the teacher's term; number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
    """

    start: float = 1.0
    span: float = 20.0
    theta: float = 1.0
    reversal: float = -1.0
    epochs: float = 10.0
    weight: float | Schedule = 0.9
    task_weight: float = 0.1

    citation: ClassVar[str] = "Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023, arXiv:2211.16231"
    family: ClassVar[str] = "logits"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def init(self, key, ctx):
        return Vars(params={"temperature": {"theta": jnp.float32(self.theta)}})

    def terms(self, vars, student, teacher, batch, *, clock, key):
        reached = jnp.minimum((jnp.floor(jnp.asarray(clock.epoch, jnp.float32)) + 1) / self.epochs, 1)
        scale = self.reversal * (1 - jnp.cos(jnp.pi * reached)) / 2
        theta = reversed_gradient(self.theta_of(vars.params["temperature"], student, teacher), scale)
        temperature = self.start + self.span * jax.nn.sigmoid(theta)
        kd = losses.forward_kl(student.logits, teacher.logits, temperature=temperature)
        return with_task(self.task_weight, student, batch) | {"kd": Term(kd, batch["weight"], schedules.at(self.weight, clock))}

    def theta_of(self, params: Tree, student: Outputs, teacher: Outputs) -> Array:
        """One number, or one for each example."""
        return params["theta"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstanceCTKD(CTKD):
    """Curriculum temperature by example: `CTKD` whose theta a perceptron with one hidden layer computes from both logits.

    The authors published the global form alone. Not theirs, therefore: the width; the last layer starts at 0 with bias ``theta``, so
    that all T start where the global one does; and the logits are read without gradient, else the reversal would reach the student.

    Args:
        hidden: width of the perceptron.
    """

    hidden: int = 128

    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "mechanism"

    def init(self, key, ctx):
        width = ctx.student_outputs.logits_shape[-1] + ctx.teacher_outputs.logits_shape[-1]
        last = {"kernel": jnp.zeros((self.hidden, 1)), "bias": jnp.full(1, self.theta)}
        return Vars(params={"temperature": {"first": Linear().init(key, (width,), (self.hidden,)), "last": last}})

    def theta_of(self, params, student, teacher):
        logits = jnp.concatenate([side.logits.astype(jnp.float32) for side in (teacher, student)], -1)
        hidden = jax.nn.relu(Linear()(params["first"], jax.lax.stop_gradient(logits)))
        return Linear()(params["last"], hidden)[..., 0]


def reversed_gradient(x: Array, scale: Array | float) -> Array:
    """x, whose gradient is multiplied by ``scale`` (-1 reverses it)."""
    return jax.lax.stop_gradient(x) + scale * (x - jax.lax.stop_gradient(x))
