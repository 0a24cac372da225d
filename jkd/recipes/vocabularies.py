"""Language models whose teacher has another vocabulary: its view of the same text is ``batch["teacher_tokens"]`` and the like."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules, sparse, tokens
from jkd.errors import InputError
from jkd.losses.chunked.parts import CrossEntropy
from jkd.recipe import Recipe
from jkd.recipes.bytoken import by_token
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Outputs, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class ULD(Recipe):
    """Universal logit distillation: ``task_weight * CE + weight * sum_i |q_(i) - p_(i)|``, probabilities in falling order.

    Which token has which probability is not asked, so the vocabularies may differ. The k-th counted token of a document (of a
    response, where prompts are not counted) is compared with the k-th of the teacher's view of it; what one side has more of is not
    compared. The batch holds that view as ``teacher_tokens`` (and ``teacher_mask``, ``teacher_segment``, ``teacher_position``,
    ``teacher_loss_mask``, as far as the student's have them), which the teacher is run on.

    Args:
        temperature: T of both softmaxes; number or schedule. No T²: the value is a distance between probabilities.
        weight: of the teacher's term; number or schedule.
        task_weight: of the next token's cross-entropy; 0 leaves it out.
    """

    temperature: float | Schedule = 1.0
    weight: float | Schedule = 1.0
    task_weight: float = 1.0

    same_classes: ClassVar[bool] = False
    citation: ClassVar[str] = (
        "Boizard et al., Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs, TMLR 2025"
    )
    family: ClassVar[str] = "language"
    requires: ClassVar[str] = "a teacher of another vocabulary, and the text as its tokenizer cuts it (teacher_tokens)"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        labels, weight = tokens.next_tokens(batch)
        temperature = schedules.at(self.temperature, clock)
        place, there = counterparts(batch)

        def distance(mine: Array, theirs: Array) -> Any:
            return losses.uld(mine, theirs, temperature=temperature)

        values = sparse.by_position(distance, student, _at(teacher, place))
        terms = {"uld": Term(values, weight * there, schedules.at(self.weight, clock))}
        if self.task_weight:
            task = by_token(CrossEntropy(), student, labels=labels, weights=weight)
            terms["task"] = Term(task, weight, self.task_weight)
        return terms


def counterparts(batch: Batch) -> tuple[Array, Array]:
    """Where in the teacher's row each counted place of the student's has its counterpart, and whether it has one.

    Returns:
        ``place`` int32 ``[batch, time]`` into ``teacher_tokens``; ``there`` bool ``[batch, time]``.

    Raises:
        InputError: the batch has no ``teacher_tokens``.
    """
    if "teacher_tokens" not in batch:
        raise InputError(
            f"batch has no 'teacher_tokens' but {sorted(batch)}: with two vocabularies it must hold the teacher's view of the text"
        )
    mine, theirs = _ordinals(batch), _ordinals(tokens.for_teacher(batch))

    def of_row(mine: Array, theirs: Array) -> tuple[Array, Array]:
        order = jnp.argsort(theirs)
        found = jnp.clip(jnp.searchsorted(theirs[order], mine), 0, len(theirs) - 1)
        place = order[found]
        return place.astype(jnp.int32), (theirs[place] == mine) & (mine < _NOWHERE)

    return jax.vmap(of_row)(mine, theirs)


_NOWHERE = 2**31 - 1
_LONGEST = 1 << 16


def _ordinals(batch: Batch) -> Array:
    """int32 ``[batch, time]``: document and number of the counted token that a place predicts, in one; `_NOWHERE` without."""
    if batch["tokens"].shape[1] > _LONGEST:
        raise InputError(
            f"rows of {batch['tokens'].shape[1]} tokens: two vocabularies are aligned in rows of at most {_LONGEST}"
        )
    weight = tokens.next_tokens({**batch, "weight": jnp.ones(batch["tokens"].shape[0])})[1]
    counts = (weight > 0).astype(jnp.int32)
    before = jnp.cumsum(counts, axis=1) - counts
    document = batch["segment"].astype(jnp.int32) if "segment" in batch else jnp.zeros_like(before)
    first = jnp.concatenate([jnp.ones_like(document[:, :1], bool), document[:, 1:] != document[:, :-1]], axis=1)
    ordinal = before - jax.lax.cummax(jnp.where(first, before, 0), axis=1)
    return jnp.where(counts > 0, document * _LONGEST + ordinal, _NOWHERE)


def _at(outputs: Outputs, place: Array) -> Outputs:
    """The answers at these places, ``[batch, time]`` of them for each row; of hidden states where logits follow from them."""

    def take(array: Array) -> Array:
        return jnp.take_along_axis(array, place[:, :, None], axis=1)

    if outputs.hidden is not None and outputs.head is not None:
        return outputs.replace(hidden=take(outputs.hidden), heads=None, taps=None)
    return Outputs(take(outputs.logits))
