"""Methods that remember a distribution for every training example."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.recipe import Bank, Recipe, Vars, label_weight
from jkd.recipes.logits import task
from jkd.schedules import Schedule
from jkd.types import Array, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSKD(Recipe):
    """Progressive self-distillation: ``CE((1 - a_e) y + a_e P_i, q)``, ``a_e = alpha * e / E`` in epoch e of E, from 1.

    P_i is the student's own answer to example i one epoch ago; in the first epoch (and wherever an example has none yet) it is the
    label. No T, no second term.

    Args:
        alpha: share of the own answer in the last epoch.
    """

    alpha: float = 0.8

    citation: ClassVar[str] = "Kim et al., Self-Knowledge Distillation with Progressive Refinement of Targets, ICCV 2021"
    family: ClassVar[str] = "self"
    requires: ClassVar[str] = "data of known size"
    needs_teacher: ClassVar[bool] = False
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def init(self, key, ctx):
        # a clock does not know how many epochs the run has
        epochs = jnp.float32(ctx.steps / ctx.steps_per_epoch)
        return Vars(memory={"answers": Bank.full(ctx, (ctx.classes,)), "epochs": epochs})

    def terms(self, vars, student, teacher, batch, *, clock, key):
        label, classes = batch["label"], student.logits.shape[-1]
        own = jax.nn.one_hot(label, classes) if label.ndim == batch["weight"].ndim else label.astype(jnp.float32)
        held = vars.memory["answers"][batch["index"]]
        held = jnp.where(held.sum(-1, keepdims=True) > 0, held, own)
        epoch = jnp.floor(jnp.asarray(clock.epoch, jnp.float32)) + 1
        share = self.alpha * jnp.minimum(epoch / vars.memory["epochs"], 1)
        return {"task": Term(losses.cross_entropy(student.logits, (1 - share) * own + share * held), label_weight(batch))}

    def observe(self, vars, student, teacher, batch):
        return jax.nn.softmax(student.logits.astype(jnp.float32))

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return {**memory, "answers": memory["answers"].write(batch["index"], observed, batch["weight"])}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELR(Recipe):
    """Early-learning regularisation: ``CE + weight * mean log(1 - <t_i, q_i>)``, against the memorisation of wrong labels.

    t_i is a moving average of the student's own answers to example i, from 0, this step's included; q is clipped to
    ``[1e-4, 1 - 1e-4]``. The gradient passes q alone and pulls it towards what was learned early, which wrong labels come to
    contradict. This is the one-network form, ELR; ELR+ (two networks, mixup) is another.

    Args:
        weight: 3 on CIFAR-10, 7 on CIFAR-100; number or schedule.
        momentum: of t; 0.7 on CIFAR-10, 0.9 on CIFAR-100.
    """

    weight: float | Schedule = 3.0
    momentum: float = 0.7

    citation: ClassVar[str] = "Liu et al., Early-Learning Regularization Prevents Memorization of Noisy Labels, NeurIPS 2020"
    family: ClassVar[str] = "self"
    requires: ClassVar[str] = "data of known size"
    needs_teacher: ClassVar[bool] = False
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def init(self, key, ctx):
        return Vars(memory=Bank.full(ctx, (ctx.classes,)))

    def terms(self, vars, student, teacher, batch, *, clock, key):
        target = self._target(vars.memory, self.observe(vars, student, teacher, batch), batch)
        agreement = (jax.lax.stop_gradient(target) * _clipped(student.logits)).sum(-1)
        regulariser = Term(jnp.log(1 - agreement), batch["weight"], schedules.at(self.weight, clock))
        return {"task": task(student, batch), "early": regulariser}

    def observe(self, vars, student, teacher, batch):
        answer = _clipped(student.logits)
        return answer / answer.sum(-1, keepdims=True)

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return memory.write(batch["index"], self._target(memory, observed, batch), batch["weight"])

    def _target(self, memory: Bank, answer: Array, batch) -> Array:
        return self.momentum * memory[batch["index"]] + (1 - self.momentum) * answer


def _clipped(logits: Array) -> Array:
    return jnp.clip(jax.nn.softmax(logits.astype(jnp.float32)), 1e-4, 1 - 1e-4)
