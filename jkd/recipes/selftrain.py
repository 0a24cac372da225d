"""Learning from unlabelled examples: agreement with one's own average, and one's own confident answers as labels.

The unlabelled examples are a stream of their own, of any size: ``data.join(data.labelled_only(d), unlabelled=(d, 7))``.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Bank, Recipe, Vars
from jkd.recipes.logits import task
from jkd.recipes.views import view
from jkd.schedules import Clock, Schedule
from jkd.types import Array, Outputs, Term

STREAM = "data.join(data.labelled_only(d), unlabelled=(d, 7)) adds it"
STRONG = 'Run.augment = (data.augment.At("unlabelled", recipes.View("strong", …)), …) adds it'


@dataclasses.dataclass(frozen=True)
class Rampup:
    """``value * exp(-5 (1 - x)²)``, x from 0 to 1 over the first part of the run; then ``value``."""

    value: float
    until: float

    def __call__(self, clock: Clock) -> Array:
        phase = 1 - jnp.minimum(clock.fraction / self.until, 1)
        return self.value * jnp.exp(-5 * phase * phase)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanTeacher(Recipe):
    """Mean Teacher: ``CE + weight * mean over classes (q - p)²`` of the probabilities of student and averaged student.

    For ``Run.teacher=jkd.StudentEma()`` with ``Run.ema=jkd.Ema(decay=schedules.Piecewise(0.99, {4/15: 0.999/0.99}))``; the average is
    the better product (``evaluate_ema=True``). All examples agree, labelled or not: those of ``batch["unlabelled"]`` where the data
    has that stream, else those of the batch itself. The teacher sees the view ``"second"`` of the rows (`View`) where there is
    one, else the student's own, in evaluation mode (in the authors' code with dropout and noise too).

    Args:
        weight: of the agreement. 100, and its growth over 40000 of 150000 steps, are the defaults of the authors' TensorFlow code.
    """

    weight: float | Schedule = Rampup(100.0, 4 / 15)

    citation: ClassVar[str] = "Tarvainen & Valpola, Mean teachers are better role models, NeurIPS 2017, arXiv:1703.01780"
    family: ClassVar[str] = "self-training"
    requires: ClassVar[str] = "Run.teacher = StudentEma() and Run.ema"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def forward(self, models, batch, key):
        rows = batch.get("unlabelled", batch)
        first, second = jax.random.split(key)
        teacher = models.teacher(rows.get("second", rows))
        student, models = models.student(batch, key=first)
        if rows is batch:
            return {"labelled": student, "all": student}, teacher, models
        everything, models = models.student(rows, key=second)
        return {"labelled": student, "all": everything}, teacher, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        mine, theirs = (jax.nn.softmax(side.logits.astype(jnp.float32)) for side in (student["all"], teacher))
        weight = batch.get("unlabelled", batch)["weight"]
        agreement = Term(losses.mse(mine, theirs), weight, schedules.at(self.weight, clock))
        return {"task": task(student["labelled"], batch), "agreement": agreement}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixMatch(Recipe):
    """FixMatch: ``CE + weight * mean over unlabelled rows of [max p >= threshold] CE(argmax p, q_strong)``.

    p is the student's own answer to the weak view (the rows themselves, through whatever ``Run.augment`` does to them), without
    gradient, in training mode. The mean divides by *all* unlabelled rows, those left out too. The three forward passes follow
    each other: a BatchNorm has the statistics of each by itself, where the authors' code mixes the three.

    Needs ``batch["unlabelled"]`` and its view ``"strong"`` (`View`); 7 unlabelled rows for each labelled one in the paper.

    Args:
        threshold: of the confidence.
        weight: of the pseudo-labels; number or schedule.
    """

    threshold: float = 0.95
    weight: float | Schedule = 1.0

    citation: ClassVar[str] = "Sohn et al., FixMatch, NeurIPS 2020, arXiv:2001.07685"
    family: ClassVar[str] = "self-training"
    requires: ClassVar[str] = "an unlabelled stream with a strong view"
    needs_teacher: ClassVar[bool] = False
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def forward(self, models, batch, key):
        rows = view(self, batch, "unlabelled", STREAM)
        strong = view(self, rows, "strong", STRONG)
        keys = jax.random.split(key, 3)
        student, models = models.student(batch, key=keys[0])
        weak, models = models.student(rows, key=keys[1])
        bold, models = models.student(strong, key=keys[2])
        return {"labelled": student, "weak": jax.lax.stop_gradient(weak), "strong": bold}, None, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        confidence, guess = confident(student["weak"])
        chosen = confidence >= self.cutoff(vars, guess)
        values = jnp.where(chosen, losses.cross_entropy(student["strong"].logits, guess), 0)
        pseudo = Term(values, batch["unlabelled"]["weight"], schedules.at(self.weight, clock))
        return {"task": task(student["labelled"], batch), "pseudo": pseudo}

    def cutoff(self, vars: Vars, guess: Array) -> float | Array:
        """The confidence that an answer needs, ``[rows]`` or one for all."""
        return self.threshold


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlexMatch(FixMatch):
    """FlexMatch: `FixMatch` with a threshold for each class, ``threshold * b_c / (2 - b_c)``.

    ``b_c = count_c / max(counts, unused)``: how many unlabelled examples the student has last been sure (``threshold``) to be of
    class c, over the most of all classes, or over those it was never sure of while they are more (the warm-up). So thresholds
    begin at 0: at first every answer passes, which short runs feel. A step uses those from before it.

    Args:
        examples: unlabelled examples there are; None to ask the run's data.
    """

    examples: int | None = None

    citation: ClassVar[str] = "Zhang et al., FlexMatch, NeurIPS 2021, arXiv:2110.08263"

    def init(self, key, ctx):
        size = self.examples
        if size is None:
            size = next(
                (data.train_size for name, data, _ in getattr(ctx.run.data, "streams", ()) if name == "unlabelled"), None
            )
        if size is None:
            raise InputError("FlexMatch.examples = None: the run's data has no stream 'unlabelled'; say how many rows it has")
        rows = -(-size // ctx.batch_shards) * ctx.batch_shards
        counts = jnp.zeros(ctx.classes + 1, jnp.int32).at[-1].set(size)  # the last: of none yet
        return Vars(memory={"chosen": Bank(jnp.full(rows, -1, jnp.int32)), "counts": counts})

    def cutoff(self, vars, guess):
        counts = vars.memory["counts"].astype(jnp.float32)
        learned = (counts / counts.max())[guess]
        return self.threshold * learned / (2 - learned)

    def observe(self, vars, student, teacher, batch):
        rows = batch["unlabelled"]
        confidence, guess = confident(student["weak"])
        seen = {"index": rows["index"], "guess": guess, "sure": rows["weight"] * (confidence >= self.threshold)}
        # as many rows as the batch, whatever the ratio: each entry travels with its own index, and what is added is not sure
        count = batch["weight"].shape[0]
        return jax.tree.map(lambda leaf: jnp.pad(leaf, (0, -len(leaf) % count)).reshape(count, -1), seen)

    def remember(self, memory, observed, batch, *, terms, clock, key):
        chosen = memory["chosen"].write(*(observed[name].reshape(-1) for name in ("index", "guess", "sure")))
        size, classes = memory["counts"].sum(), len(memory["counts"]) - 1
        counts = jnp.zeros(classes + 1, jnp.int32).at[jnp.where(chosen.rows < 0, classes, chosen.rows)].add(1)
        # the bank has a few rows more than examples, so that it splits evenly
        return {"chosen": chosen, "counts": counts.at[-1].set(size - counts[:-1].sum())}


def confident(outputs: Outputs) -> tuple[Array, Array]:
    """The largest probability of each row and its class, int32."""
    answer = jax.nn.softmax(outputs.logits.astype(jnp.float32))
    return answer.max(-1), answer.argmax(-1).astype(jnp.int32)
