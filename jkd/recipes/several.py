"""Methods with several teachers that are more than their mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Recipe, Update, Vars
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Linear
from jkd.schedules import Clock, Schedule
from jkd.schedules import Linear as Line
from jkd.types import Array, Outputs, Term, Tree


def members(teacher: Outputs) -> list[Array]:
    """The logits of an ensemble's members, in order; of another teacher its own."""
    found: list[Array] = []
    while (own := teacher.heads.get(str(len(found)))) is not None:
        found.append(own)
    return found or [teacher.logits]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MEALV2(Recipe):
    """MEAL V2: ``CE(mean_k softmax(z_t^k), z_s) + reversal * BCE(D(z_s), D(mean_k z_t^k))``, and no label.

    The members of the teacher (`jkd.Ensemble`) are averaged as probabilities for the student's target, as logits for the
    discriminator D, a perceptron with two outputs, student or teacher, and a ReLU after each layer, the last too. D learns from its
    own update, before the student moves; both ask the teachers, which XLA makes one pass of unless there are microbatches. The
    student starts from trained weights, with little or no weight decay (the authors take a pretrained network and SGD at 0.01).

    The authors' code descends the sum of both losses with student and D alike, so that the student helps D; the default is theirs.
    With ``reversal = -1`` the student is D's adversary, as discriminators usually have; what the paper's text says of the sign could
    not be read. Their D moves in the same step as the student, and is initialised by PyTorch's default, this one LeCun-normal.

    Args:
        hidden: widths of D's two hidden layers; the authors' for 1000 classes (an eighth and a sixty-fourth).
        reversal: the factor of D's loss in the student's; 1 is that of the authors' code. Number or schedule.
    """

    hidden: tuple[int, ...] = (125, 15)
    reversal: float | Schedule = 1.0

    citation: ClassVar[str] = (
        "Shen & Savvides, MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks, 2020, "
        "arXiv:2009.08453"
    )
    family: ClassVar[str] = "several teachers"
    requires: ClassVar[str] = "an Ensemble of teachers (one network will do)"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    @property
    def updates(self):
        return (
            Update(groups=("discriminator",), forward=self.look, terms=self.tell_apart, name="discriminator"),
            Update(groups=("student",)),
        )

    def init(self, key, ctx):
        if any(logits.shape[-1] != ctx.classes for logits in members(ctx.teacher_outputs)):
            raise InputError(f"MEALV2: every teacher must know the student's {ctx.classes} classes")
        widths = (ctx.classes, *self.hidden, 2)
        layers = {
            str(i): Linear().init(jax.random.fold_in(key, i), (inputs,), (outputs,))
            for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        }
        return Vars(params={"discriminator": layers})

    def look(self, models, batch, key):
        student, teacher, _ = self.forward(models, batch, key)
        return student, teacher, models  # the student's statistics move when the student does, once a step

    def tell_apart(self, vars, student, teacher, batch, *, clock, key):
        return {"loss": Term(told_apart(vars.params["discriminator"], student.logits, teacher), batch["weight"])}

    def terms(self, vars, student, teacher, batch, *, clock, key):
        answers = jnp.stack([jax.nn.log_softmax(logits.astype(jnp.float32)) for logits in members(teacher)])
        # the logarithm of the mean of the probabilities, but for a constant that no softmax sees
        mean = jax.nn.logsumexp(answers, axis=0)
        apart = told_apart(vars.params["discriminator"], student.logits, teacher)
        return {
            "similarity": Term(losses.soft_cross_entropy(student.logits, mean), batch["weight"]),
            "adversary": Term(apart, batch["weight"], schedules.at(self.reversal, clock)),
        }


def told_apart(layers: Tree, student: Array, teacher: Outputs) -> Array:
    """D's loss of each example, ``[batch]``: binary cross-entropy, the mean over both sides' two answers.

    The student's is to be (1, 0), that of the mean of the members' logits (0, 1).
    """

    def answer(logits: Array) -> Array:
        for i in range(len(layers)):
            logits = jax.nn.relu(Linear()(layers[str(i)], logits))
        return logits

    mine = answer(student.astype(jnp.float32))
    theirs = answer(jnp.stack([logits.astype(jnp.float32) for logits in members(teacher)]).mean(0))
    yes, no = jnp.stack([mine[..., 0], theirs[..., 1]]), jnp.stack([mine[..., 1], theirs[..., 0]])
    return (jax.nn.softplus(-yes) + jax.nn.softplus(no)).sum(0) / 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowledgeConcentration(Recipe):
    """``CE + weight * sum_k v_k L_k``: one student of specialists k, each taken in when it has become easy enough (v_k of 0 or 1).

    L_k compares the student's logits of the classes that specialist k knows with the specialist's own: by default every class is a
    yes/no question (binary KL, the binary cross-entropy less the teacher's entropy: the same gradient, and the pace then reads only
    what the student has still to learn). ``v_k = 1`` where the running mean of L_k is not above
    ``min + pace * (max - min)`` of those means: the easiest alone at pace 0, all at pace 1. At the first step, where no mean is known,
    all count.

    The specialists are the members of a `jkd.Ensemble`; with ``mean=None`` they may know different classes. The paper's text on
    weights and pace could not be read: this is the mechanism that its abstract names, with a threshold of our own. Its third part, a
    last layer in which each group of classes has a slice of its own, is a matter of the student's network.

    Args:
        classes: for each specialist, in the ensemble's order, the student's classes that its logits stand for, in their order; ``()``
            where every one knows all of them.
        loss: ``loss(student_logits, teacher_logits, temperature=T) -> [batch]``: `jkd.losses.binary_kl`, or
            `jkd.losses.forward_kl` for specialists whose probabilities sum to 1 over their classes.
        temperature: T.
        pace: from 0 to 1; number or schedule. By default it grows over the first half of the run.
        momentum: of the running means.
        weight: of the specialists; number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
    """

    classes: tuple[tuple[int, ...], ...] = ()
    loss: Callable[..., Any] = losses.binary_kl
    temperature: float = 1.0
    pace: float | Schedule = Line(0.0, 1.0, until=0.5)
    momentum: float = 0.9
    weight: float | Schedule = 1.0
    task_weight: float = 1.0

    same_classes: ClassVar[bool] = False
    citation: ClassVar[str] = (
        "Gao et al., Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN, 2017, arXiv:1711.07607"
    )
    family: ClassVar[str] = "several teachers"
    requires: ClassVar[str] = "an Ensemble of specialists"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "mechanism"

    def init(self, key, ctx):
        widths = [logits.shape[-1] for logits in members(ctx.teacher_outputs)]
        known = [len(block) for block in self.classes] or [ctx.classes] * len(widths)
        if known != widths:
            raise InputError(f"KnowledgeConcentration.classes: {known} classes for specialists with {widths} logits")
        for block in self.classes:
            if not all(0 <= one < ctx.classes for one in block):
                raise InputError(f"KnowledgeConcentration.classes: {block}: the student's classes are 0 to {ctx.classes - 1}")
        return Vars(memory={"loss": jnp.zeros(len(widths))})

    def admitted(self, memory: Tree, clock: Clock) -> Array:
        """v ``[specialists]``: 1 where a specialist is learned from."""
        mean = memory["loss"]
        spread = mean.max() - mean.min()
        # scaled so that the hardest is exactly 1: no rounding keeps it out at pace 1
        place = jnp.where(spread > 0, (mean - mean.min()) / jnp.where(spread > 0, spread, 1), 0)
        return jnp.where(place <= schedules.at(self.pace, clock), 1.0, 0.0)

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = with_task(self.task_weight, student, batch)
        weights = schedules.at(self.weight, clock) * self.admitted(vars.memory, clock)
        for k, theirs in enumerate(members(teacher)):
            mine = student.logits[..., jnp.asarray(self.classes[k])] if self.classes else student.logits
            values = self.loss(mine, theirs, temperature=self.temperature)
            terms[f"specialist{k}"] = Term(values, batch["weight"], weights[k])
        return terms

    def remember(self, memory, observed, batch, *, terms, clock, key):
        found = jnp.stack([terms[f"specialist{k}"] for k in range(len(memory["loss"]))])
        blend = self.momentum * memory["loss"] + (1 - self.momentum) * found
        return {"loss": jnp.where(clock.step == 0, found, blend)}
