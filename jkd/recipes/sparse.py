"""Methods that keep a few classes of the teacher's distribution: online, or from a cache (`jkd.cache`).

An answer that was prepared is ``teacher.heads["topk"]`` (``ids`` ``[..., k]`` in falling order, ``log_probs`` ``[..., k]``,
``leftover`` ``[...]``) or ``teacher.heads["sampled"]`` (``ids`` ``[..., draws]``); of a teacher that answers with logits it is made
in the step. With ``tokens`` in the batch each token's answer is about the token after it, else each example has
one.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules, sparse, tokens
from jkd.errors import InputError
from jkd.losses.sparse import Tail
from jkd.recipe import Recipe, label_weight
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Outputs, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKKD(Recipe):
    """The teacher's likeliest classes: ``task_weight * CE + weight * T² * KL(teacher's k classes and the rest || student's)``.

    Args:
        k: classes kept; of an answer that holds more, the first k.
        tail: what stands for the other classes. ``ghost``: one more class on both sides, whose mass is exact. ``zero``: nothing,
            the kept ones are scaled up to 1, which makes students too certain. ``renormalise``: nothing on both sides.
        temperature: T; number or schedule.
        weight: of the teacher's term; number or schedule.
        task_weight: of the labels' term (the next token, or the class); 0 leaves it out.
    """

    k: int = 64
    tail: Tail = "ghost"
    temperature: float | Schedule = 1.0
    weight: float | Schedule = 1.0
    task_weight: float = 0.0

    citation: ClassVar[str] = "top-k KD with a ghost token for the tail, as in Arcee's DistillKit, 2024-2025"
    family: ClassVar[str] = "sparse"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        temperature = schedules.at(self.temperature, clock)
        answer = _prepared(teacher, "topk") or sparse.by_position(lambda logits: sparse.top_k(logits, self.k), teacher)
        kept = sparse.fewer(answer, self.k)

        def divergence(logits: Array, ids: Array, log_probs: Array, leftover: Array) -> Any:
            return losses.topk_forward_kl(logits, ids, log_probs, leftover, tail=self.tail, temperature=temperature)

        coefs = {"topk": schedules.at(self.weight, clock), "task": self.task_weight}
        return _terms(coefs, divergence, student, (kept["ids"], kept["log_probs"], kept["leftover"]), batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSamplingKD(Recipe):
    """Classes drawn from the teacher: ``task_weight * CE - weight * mean over draws of log q``, unbiased for the whole teacher.

    The expectation of its gradient is that of KL(teacher || student) at temperature 1, however few the draws, where the likeliest
    classes alone are biased.

    Args:
        draws: for each token or example, from the teacher's distribution; of a cache, as many as it holds.
        weight: of the teacher's term; number or schedule.
        task_weight: of the labels' term (the next token, or the class); 0 leaves it out.
    """

    draws: int = 50
    weight: float | Schedule = 1.0
    task_weight: float = 0.0

    citation: ClassVar[str] = "Anshumann et al., Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs, ACL 2025"
    family: ClassVar[str] = "sparse"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def forward(self, models, batch, key):
        student, teacher, models = super().forward(models, batch, key)
        if _prepared(teacher, "sampled") is None:
            # of each example by itself, so that the draws do not depend on how the batch is cut
            shape = (*teacher.logits_shape[1:-1], self.draws)
            uniform = jax.vmap(lambda key: jax.random.uniform(key, shape))(models.keys(batch))
            ids = sparse.by_position(sparse.draw, teacher, uniform)
            teacher = Outputs(heads={"sampled": {"ids": ids}})
        return student, teacher, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        ids = teacher.heads["sampled"]["ids"]

        def divergence(logits: Array, ids: Array) -> Any:
            return losses.sampled_forward_kl(logits, ids, jnp.full(ids.shape, 1 / ids.shape[-1], jnp.float32))

        coefs = {"sampled": schedules.at(self.weight, clock), "task": self.task_weight}
        return _terms(coefs, divergence, student, (ids,), batch)


def _prepared(teacher: Outputs, name: str) -> dict[str, Any] | None:
    """A sparse answer that was prepared; None where the teacher's own logits are at hand."""
    if name in teacher.heads:
        return teacher.heads[name]
    if not teacher.has_logits:
        raise InputError(
            f"the teacher's answers have neither logits nor heads[{name!r}]; there are heads {sorted(teacher.heads)}"
        )
    return None


def _terms(coefs: dict[str, Any], divergence: Any, student: Outputs, kept: tuple[Array, ...], batch: Batch) -> dict[str, Term]:
    """The teacher's term and the labels' one, from one pass over the positions."""
    if "tokens" in batch:
        label, weight = tokens.next_tokens(batch)
        weights = {"task": weight}
    else:
        label, weight = batch["label"], batch["weight"]
        weights = {"task": label_weight(batch)}
    teacher, _ = coefs

    def both(logits: Array, label: Array, *kept: Array) -> dict[str, Array]:
        values = {teacher: divergence(logits, *kept)}
        return values | ({"task": losses.cross_entropy(logits, label)} if coefs["task"] else {})

    values = sparse.by_position(both, student, label, *kept)
    return {name: Term(value, weights.get(name, weight), coefs[name]) for name, value in values.items()}
