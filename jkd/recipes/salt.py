"""A small teacher early, then none: how a small language model helps a larger one to begin."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jkd import schedules, sharding, sparse, tokens
from jkd.errors import InputError
from jkd.losses.chunked.parts import CrossEntropy, Each
from jkd.losses.divergences import soft_cross_entropy
from jkd.recipe import Recipe, Update
from jkd.recipes.bytoken import by_part, by_token
from jkd.schedules import Clock, Schedule
from jkd.types import Array, Batch, Model, Term

if TYPE_CHECKING:
    from jkd.data import Data


@dataclasses.dataclass(frozen=True, kw_only=True)
class SALT(Recipe):
    """``(1 - w) CE + w * CE(softmax(z_t / rho), softmax(z_s))`` up to a point of the run, then the next token's CE alone.

    From there on neither the teacher nor its term is computed: two updates take turns. With ``until=1`` the teacher stays (the
    paper's RKD, which ends worse). SALT_DS trains the first stage on rows that the small model finds hard but learnable: `learnable`
    scores them, ``data.subset`` takes them, and the stages are two runs (`two_stages`, the first with ``until=1``).

    The paper's constants; its text was at hand in notes only, so the mechanism is what tests hold.

    Args:
        weight: w of the first stage, 0..1; a number, or a schedule (the linear decay of a variant).
        until: where the first stage ends, a fraction of the run; 36,000 of 208,000 steps in the paper.
        sharpness: rho, the temperature of the teacher alone; 0.25 in the paper. No square: the student's is 1.

    Raises:
        InputError: ``until`` outside 0..1, a ``sharpness`` that is not positive.
    """

    weight: float | Schedule = 0.667
    until: float = 36 / 208
    sharpness: float = 0.25

    citation: ClassVar[str] = (
        "Rawat et al., A Little Help Goes a Long Way: Efficient LLM Training by Leveraging Small LMs, 2024, arXiv:2410.18779"
    )
    family: ClassVar[str] = "language"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "mechanism"

    def __post_init__(self):
        if not 0 <= self.until <= 1:
            raise InputError(f"SALT.until = {self.until}: give a fraction of the run, 0 to 1")
        if not self.sharpness > 0:
            raise InputError(f"SALT.sharpness = {self.sharpness}: must be more than 0")

    @property
    def updates(self):
        def helped(memory: Any, clock: Clock) -> Array:
            return jnp.asarray(clock.step) < round(self.until * clock.steps)

        def alone(memory: Any, clock: Clock) -> Array:
            return ~helped(memory, clock)

        return (
            Update(when=helped),
            Update(when=alone, forward=self._forward_alone, terms=self._terms_alone, name="alone"),
        )

    def terms(self, vars, student, teacher, batch, *, clock, key):
        labels, weight = tokens.next_tokens(batch)
        w = schedules.at(self.weight, clock)
        mix = [(w, Each(_Sharpened(self.sharpness))), (1 - w, CrossEntropy())]
        kd, task = by_part(mix, student, teacher, labels=labels, weights=weight)
        return {"kd": Term(kd, weight, w), "task": Term(task, weight, 1 - w)}

    def _forward_alone(self, models, batch, key):
        student, models = models.student(batch, key=key)
        return student, None, models

    def _terms_alone(self, vars, student, teacher, batch, *, clock, key):
        labels, weight = tokens.next_tokens(batch)
        return {"task": Term(by_token(CrossEntropy(), student, labels=labels, weights=weight), weight)}


@dataclasses.dataclass(frozen=True)
class _Sharpened:
    """The soft cross-entropy of a teacher at a temperature of its own."""

    rho: float

    def __call__(self, student: Array, teacher: Array) -> Any:
        return soft_cross_entropy(student, teacher.astype(jnp.float32) / self.rho)


def learnable(model: Model, data: Data, *, k: int = 10, batch_size: int = 32) -> np.ndarray:
    """A score of every training row for SALT_DS: the median, over its counted tokens, of the loss that the small model has on them,
    counting 0 where the right token is not among its k likeliest (too hard to learn from).

    The rows with the highest scores are the ones to begin with: ``data.subset(text, np.argsort(-scores)[:count])``, of each pool by
    itself where the set is read in pools.

    Args:
        model: the small language model, with weights (an early checkpoint in the paper).
        data: text; its training rows as they are, without augmentation.
        k: 10 by default; the paper's value is not known here.
        batch_size: rows at a time.

    Returns:
        float32 ``[train_size]``; 0 for a row without a counted token.
    """

    mesh = sharding.mesh_of(model.params)
    if mesh is not None:
        batch_size = -(-batch_size // mesh.size) * mesh.size

    def score(params: Any, buffers: Any, batch: Batch) -> Array:
        batch = batch if mesh is None else sharding.constrain_batch(batch, mesh)
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            outputs, _ = model.apply(params, buffers, batch)
        labels, weight = tokens.next_tokens(batch)
        found = sparse.by_position(lambda logits, label: _loss_if_learnable(logits, label, k), outputs, labels)
        counted = weight > 0
        ordered = jnp.sort(jnp.where(counted, found, jnp.inf), axis=1)
        middle = jnp.maximum(counted.sum(1) - 1, 0) // 2
        median = jnp.take_along_axis(ordered, middle[:, None], axis=1)[:, 0]
        return jnp.where(counted.any(1), median, 0)

    scores, run = [], jax.jit(score)
    size = data.train_size
    for start in range(0, size, batch_size):
        chosen = np.minimum(
            np.arange(start, start + batch_size), size - 1
        )  # the last batch repeats a row: one shape, one program
        records = data.train.records(chosen.tolist())
        batch = {name: np.stack([record[name] for record in records]) for name in records[0]}
        scores.append(np.asarray(run(model.params, model.buffers, batch), np.float32))
    return np.concatenate(scores)[:size]


def _loss_if_learnable(logits: Array, label: Array, k: int) -> Array:
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    mine = jnp.take_along_axis(log_probs, label[..., None], axis=-1)
    rank = (log_probs > mine).sum(-1)
    return jnp.where(rank < k, -mine[..., 0], 0)
