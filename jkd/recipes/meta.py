"""Methods that look one step ahead: what an update would make of the student decides what it is taught.

Virtual steps are taken on the batch as a whole, so examples are coupled. The unlabelled examples are a stream of their own, with a
strong view: ``data.join(data.labelled_only(d), unlabelled=(d, 7))`` and `View`.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.recipe import Models, Recipe, Update, Vars
from jkd.recipes.logits import task
from jkd.recipes.selftrain import STREAM, STRONG, confident
from jkd.recipes.views import view
from jkd.schedules import Linear, Schedule
from jkd.types import Array, Batch, Outputs, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class FST(Recipe):
    """Learning from the future: ``CE + weight * r * mean CE(argmax p, q_strong)``, p of a teacher that is ahead of its student.

    The teacher is the student's moving average: ``Run.teacher=jkd.StudentEma()``, ``Run.ema=jkd.Ema(decay=0.999, warmup=True)``. Before
    each step the student takes ``ahead`` virtual steps on the same batch, each with the labels of the teacher of that moment, and
    the average follows every one of them; then the student goes back and takes the real step with the labels of that teacher, which
    stays where it is. r is the share of the unlabelled positions of which the teacher is sure. A step costs ``ahead + 1`` steps.

    This is the deep form, FST-D; the wide one averages students that went ahead on different batches. The optimizer goes back with
    the student: the authors' code leaves the virtual steps in its moments. Their strong view mixes classes of labelled images into
    the unlabelled ones (ClassMix), which is a matter of ``Run.augment``.

    Args:
        ahead: virtual steps; 0 is self-training with a Mean Teacher.
        threshold: of the confidence that counts as sure.
        weight: of the pseudo-labels; number or schedule.
    """

    ahead: int = 3
    threshold: float = 0.968
    weight: float | Schedule = 1.0

    citation: ClassVar[str] = (
        "Du et al., Learning from Future: A Novel Self-Training Framework for Semantic Segmentation, NeurIPS 2022, arXiv:2209.06993"
    )
    family: ClassVar[str] = "self-training"
    requires: ClassVar[str] = "Run.teacher = StudentEma() and Run.ema; an unlabelled stream with a strong view"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    @property
    def couples_batch(self) -> bool:
        return True

    def forward(self, models, batch, key):
        future = models
        for place in range(self.ahead):
            future = self._ahead(future, batch, jax.random.fold_in(key, place))
        teacher = {
            field: {**getattr(models, field), "teacher": getattr(future, field)["teacher"]} for field in ("params", "buffers")
        }
        return self._answers(dataclasses.replace(models, **teacher), batch, jax.random.fold_in(key, self.ahead))

    def terms(self, vars, student, teacher, batch, *, clock, key):
        weight = batch["unlabelled"]["weight"]
        confidence, guess = confident(teacher)
        sure = Term((confidence >= self.threshold).astype(jnp.float32), weight).mean()
        pseudo = Term(losses.cross_entropy(student["strong"].logits, guess), weight, schedules.at(self.weight, clock) * sure)
        return {"task": task(student["labelled"], batch), "pseudo": pseudo}

    def _answers(self, models: Models, batch: Batch, key: Array) -> tuple[dict[str, Outputs], Outputs | None, Models]:
        rows = view(self, batch, "unlabelled", STREAM)
        strong = view(self, rows, "strong", STRONG)
        first, second = jax.random.split(key)
        teacher = models.teacher(rows)
        student, models = models.student(batch, key=first)
        bold, models = models.student(strong, key=second)
        return {"labelled": student, "strong": bold}, teacher, models

    def _ahead(self, models: Models, batch: Batch, key: Array) -> Models:
        """The networks after one more virtual step of the student, which the average has followed."""

        def loss(own):
            student, teacher, left = self._answers(models.with_params(student=own), batch, key)
            terms = self.terms(Vars(), student, teacher, batch, clock=models.clock, key=key)
            return sum((term.coef * term.mean() for term in terms.values()), jnp.float32(0)), left.buffers

        gradients, buffers = jax.grad(loss, has_aux=True)(jax.lax.stop_gradient(models.params["student"]))
        return dataclasses.replace(models.virtual("student", gradients), buffers=buffers).averaged()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPL(Recipe):
    """Meta Pseudo Labels: student ``CE(y^, q_strong)``; teacher ``CE + uda_weight * UDA + (h - h_mean) * CE(y^, p_strong)``.

    y^ is drawn from the teacher's answer p_strong to the strong view. ``h = L(theta) - L(theta')``, the student's loss on the labelled
    rows before and after its very step on y^: the teacher learns to repeat labels that made the student better, and to take back
    the others. h_mean is the moving average of h. ``UDA = mean [max p' >= uda_threshold] CE(p', p_strong)``, p' the answer to the weak
    view at ``uda_temperature``. Both networks train together (``Run.teacher`` is a config or a Model), and each has its optimizer
    (``Run.optimizer={"student": …, "teacher": …}``).

    The student never sees a label but through its teacher, so the paper fine-tunes it on them in the end:
    ``two_stages("student", Run(recipe=Supervised(), …), MPL(), steps=…, teacher=…)``.

    Code versus paper: the authors' TensorFlow code writes h with the opposite sign, and takes the teacher's whole distribution for
    y^, whose feedback term has no gradient at all; here as the derivation has it.

    Args:
        uda_weight: number or schedule; the code's grows over the first 10000 steps, by default all there are.
        uda_temperature, uda_threshold: the code's defaults.
        rate: of the moving average.
        label_smoothing: of the teacher's labels and the student's pseudo-labels.
    """

    uda_weight: float | Schedule = Linear(0.0, 1.0)
    uda_temperature: float = 0.75
    uda_threshold: float = 0.6
    rate: float = 0.01
    label_smoothing: float = 0.0

    citation: ClassVar[str] = "Pham et al., Meta Pseudo Labels, CVPR 2021, arXiv:2003.10580"
    family: ClassVar[str] = "self-training"
    requires: ClassVar[str] = "a teacher that trains too; an unlabelled stream with a strong view"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    @property
    def couples_batch(self) -> bool:
        return True

    @property
    def updates(self):
        return (Update(groups=("student", "teacher")),)

    def init(self, key, ctx):
        return Vars(memory={"improvement": jnp.float32(0)})

    def forward(self, models, batch, key):
        rows = view(self, batch, "unlabelled", STREAM)
        strong = view(self, rows, "strong", STRONG)
        keys = jax.random.split(key, 6)
        theirs = {}
        for name, given, own in (("labelled", batch, keys[0]), ("weak", rows, keys[1]), ("strong", strong, keys[2])):
            theirs[name], models = models.apply("teacher", given, train=True, key=own)
        drawn = jax.random.categorical(keys[3], jax.lax.stop_gradient(theirs["strong"].logits.astype(jnp.float32)))

        def imitation(own):
            answer, _ = models.with_params(student=own).student(strong, key=keys[4])
            return self._pseudo(answer, drawn, strong["weight"]).mean()

        ahead = models.virtual("student", jax.grad(imitation)(jax.lax.stop_gradient(models.params["student"])))
        # in the same mode and with the same draws: the difference is the step's alone
        before, after = (task(at.student(batch, key=keys[5])[0], batch).mean() for at in (models, ahead))
        student, models = models.student(strong, key=keys[4])
        improvement = jax.lax.stop_gradient(before - after)
        return {"strong": student, "drawn": drawn, "improvement": improvement}, theirs, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        weight, strong = batch["unlabelled"]["weight"], teacher["strong"].logits
        target = jax.nn.softmax(jax.lax.stop_gradient(teacher["weak"].logits.astype(jnp.float32)) / self.uda_temperature)
        uda = jnp.where(target.max(-1) >= self.uda_threshold, losses.cross_entropy(strong, target), 0)
        improvement = student["improvement"]
        feedback = improvement - self._followed(vars.memory["improvement"], improvement)
        return {
            "task": task(teacher["labelled"], batch, label_smoothing=self.label_smoothing),
            "uda": Term(uda, weight, schedules.at(self.uda_weight, clock)),
            "feedback": Term(losses.cross_entropy(strong, student["drawn"]), weight, feedback),
            "pseudo": self._pseudo(student["strong"], student["drawn"], weight),
            "improvement": Term(jnp.full(weight.shape, improvement), weight, 0.0),  # to be remembered, and seen
        }

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return {"improvement": self._followed(memory["improvement"], terms["improvement"])}

    def _pseudo(self, student: Outputs, drawn: Array, weight: Array) -> Term:
        return Term(losses.cross_entropy(student.logits, drawn, label_smoothing=self.label_smoothing), weight)

    def _followed(self, mean: Array, improvement: Array) -> Array:
        return mean + self.rate * (improvement - mean)
