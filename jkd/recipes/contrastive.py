"""Methods that tell an example's own pair from others."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Bank, Recipe, Vars, label_weight
from jkd.recipes.features import tap_shapes
from jkd.recipes.logits import hard_labels, with_task
from jkd.recipes.relations import embeddings, embeddings_init
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Term, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class CRD(Recipe):
    """Contrastive representation distillation: ``CE + weight * NCE`` in both directions.

    Each side's embedding (a linear map to ``dim``, both trained) must tell the other side's memory of the same example from the
    memories of ``negatives`` examples of other classes, drawn anew for each example and step. Memories start at random and follow
    with ``momentum``, after the loss; the two normalising constants are set by the first batch. An example's class is known from the
    first time that it is seen with its label: until then negatives of its class pass, which the authors' loader excludes.

    CRD+KD of the paper is ``Combine(recipes=(CRD(…), KD(weight=1.0, task_weight=0.0)))``.

    Args:
        student_taps, teacher_taps: one on each side, the pooled features.
        weight: of the contrast; number or schedule.
        task_weight: of the labels' term; 0 leaves it out.
        negatives: K.
        dim: of the embeddings.
        temperature: of the cosines.
        momentum: of the memory.
        redraws: how often a negative of the own class is drawn again; with C classes ``C^-(1+redraws)`` of them stay.
    """

    weight: float | Schedule = 0.8
    task_weight: float = 1.0
    negatives: int = 16384
    dim: int = 128
    temperature: float = 0.07
    momentum: float = 0.5
    redraws: int = 2

    citation: ClassVar[str] = "Tian, Krishnan & Isola, Contrastive Representation Distillation, ICLR 2020, arXiv:1910.10699"
    family: ClassVar[str] = "contrastive"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def __post_init__(self):
        if len(self.student_taps) != 1 or len(self.teacher_taps) != 1:
            raise InputError(
                f"CRD: student_taps = {self.student_taps}, teacher_taps = {self.teacher_taps}: give one on each side"
            )

    @property
    def couples_batch(self) -> bool:
        return True  # the first batch as a whole sets the normalising constants

    def init(self, key, ctx):
        first, second, third, fourth = jax.random.split(key, 4)
        bound = (3 / self.dim) ** 0.5
        shape = (ctx.bank_rows, self.dim)
        memory = {
            "student": Bank(jax.random.uniform(first, shape, minval=-bound, maxval=bound)),
            "teacher": Bank(jax.random.uniform(second, shape, minval=-bound, maxval=bound)),
            "student_scale": jnp.float32(-1),
            "teacher_scale": jnp.float32(-1),
            "label": jnp.full(ctx.train_size, -1, jnp.int32),
            "key": jax.random.key_data(third),
        }
        return Vars(params={"projector": embeddings_init(fourth, *tap_shapes(self, ctx)[0], self.dim)}, memory=memory)

    def terms(self, vars, student, teacher, batch, *, clock, key):
        values, _ = self._contrast(vars.memory, self.observe(vars, student, teacher, batch), batch)
        crd = Term(values, batch["weight"], schedules.at(self.weight, clock))
        return with_task(self.task_weight, student, batch) | {"crd": crd}

    def observe(self, vars, student, teacher, batch):
        taps = student.taps[self.student_taps[0]], teacher.taps[self.teacher_taps[0]]
        mine, theirs = embeddings(vars.params["projector"], *taps)
        return {"student": mine, "teacher": theirs}

    def remember(self, memory, observed, batch, *, terms, clock, key):
        _, written = self._contrast(memory, observed, batch)
        rows = {side: Bank(memory[side].rows.at[: len(memory["label"])].set(written[side])) for side in ("student", "teacher")}
        scales = {name: written[name] for name in ("student_scale", "teacher_scale")}
        label = memory["label"]
        if "label" in batch:
            known = jnp.where(label_weight(batch) > 0, batch["index"], len(label))
            label = label.at[known].set(hard_labels(batch).astype(jnp.int32), mode="drop")
        following = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(memory["key"]), 0))
        return {**memory, **rows, **scales, "label": label, "key": following}

    def _contrast(self, memory: Tree, embedded: Tree, batch: Batch) -> tuple[Array, Tree]:
        """Values of the batch and the memory after it."""
        count = len(memory["label"])  # the banks have a few rows more, so that they split evenly
        held = {side: memory[side].rows[:count] for side in ("student", "teacher")}
        held |= {name: memory[name] for name in ("student_scale", "teacher_scale")}
        values, written = losses.crd(
            embedded["student"],
            embedded["teacher"],
            batch["index"],
            self._negatives(memory, batch["index"]),
            held,
            temperature=self.temperature,
            momentum=self.momentum,
            where=batch["weight"] > 0,
        )
        return jnp.asarray(values), written

    def _negatives(self, memory: Tree, index: Array) -> Array:
        """``[batch, negatives]``: other examples' rows, not of the own class as far as classes are known.

        They depend on the example and on the memory's key, hence are the same wherever and however often they are drawn in a step.
        """
        key, label = jax.random.wrap_key_data(memory["key"]), memory["label"]

        def draw(index: Array) -> Array:
            keys = jax.random.split(jax.random.fold_in(key, index + 1), 1 + self.redraws)
            # any row but the own
            found = [(index + jax.random.randint(one, (self.negatives,), 1, len(label))) % len(label) for one in keys]
            chosen = found[0]
            for other in found[1:]:
                clash = (label[chosen] == label[index]) & (label[index] >= 0)
                chosen = jnp.where(clash, other, chosen)
            return chosen

        return jax.vmap(draw)(index)
