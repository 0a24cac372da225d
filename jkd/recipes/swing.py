"""Distillation that hands on less of what is private."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules, tokens
from jkd.errors import InputError
from jkd.losses.chunked.parts import CrossEntropy, Each, Part
from jkd.recipe import Recipe, Vars
from jkd.recipes.bytoken import by_part, relative
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwingKD(Recipe):
    """``weight * T_i² KL(softmax((z_t + n_i) / T_i) || softmax(z_s / T_i)) + task_weight * CE``, T and n growing with privacy.

    ``batch["privacy"]`` ``[batch, time]`` says of each token how private it is, r in 0..1 (a recogniser's probability, or 0 and 1).
    Where the token to be predicted has r, ``T_i = temperature + swing * r`` and n is Gaussian with deviation ``noise * r`` for each
    entry of the vocabulary. The noise of a token is drawn once for the run, from its example's ``index``: drawn anew in every epoch it
    would average out, and the student would learn what it hides. Of the labels' cross-entropy private tokens are left out by
    ``1 - r``.

    No code was found and the paper's exact functions are not known here: this is the mechanism, temperature and noise by privacy.

    Args:
        temperature: T of what is not private; number or schedule.
        swing: how much higher T is where r is 1; number or schedule.
        noise: deviation of the noise on the teacher's logits where r is 1.
        weight: of the teacher's term; number or schedule.
        task_weight: of the next token's cross-entropy; 0 leaves it out.
    """

    temperature: float | Schedule = 1.0
    swing: float | Schedule = 4.0
    noise: float = 4.0
    weight: float | Schedule = 1.0
    task_weight: float = 0.0

    citation: ClassVar[str] = (
        "Li et al., Swing Distillation: A Privacy-Preserving Knowledge Distillation Framework, 2022, arXiv:2212.08349"
    )
    family: ClassVar[str] = "language"
    requires: ClassVar[str] = 'how private each token is (batch["privacy"])'
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "mechanism"

    def init(self, key, ctx):
        return Vars(memory={"noise": jax.random.key_data(jax.random.fold_in(key, 0))})

    def terms(self, vars, student, teacher, batch, *, clock, key):
        for name in ("privacy", "index"):
            if name not in batch:
                raise InputError(f"SwingKD reads batch[{name!r}]; this batch has {sorted(batch)}")
        labels, weight = tokens.next_tokens(batch)
        privacy = tokens.following(batch["privacy"]).astype(jnp.float32)
        temperature = schedules.at(self.temperature, clock) + schedules.at(self.swing, clock) * privacy
        hidden = Each(_hidden, (temperature, self.noise * privacy, _seeds(vars.memory["noise"], batch)))
        coef = schedules.at(self.weight, clock)
        public = weight * (1 - privacy)
        mix: list[tuple[Any, Part]] = [(coef, hidden)]
        mix += [(self.task_weight * relative(public, weight), CrossEntropy())] if self.task_weight else []
        kd, *task = by_part(mix, student, teacher, labels=labels, weights=weight)
        terms = {"kd": Term(kd, weight, coef)}
        return terms | ({"task": Term(task[0], public, self.task_weight)} if task else {})


def _seeds(noise: Array, batch: Batch) -> Array:
    """uint32 ``[batch, time]``: what the noise of each token is drawn from, the same at every step."""
    key, time = jax.random.wrap_key_data(noise), batch["tokens"].shape[1]
    return jax.vmap(lambda index: jax.random.bits(jax.random.fold_in(key, index), (time,)))(batch["index"])


def _hidden(student: Array, teacher: Array, temperature: Array, scale: Array, seed: Array) -> Any:
    """The divergence from a teacher with noise, of logits ``[..., vocab]`` and numbers ``[...]``; blocks of tokens draw their own."""

    def drawn(seed: Array) -> Array:
        return jax.random.normal(jax.random.key(seed), teacher.shape[-1:])

    noise = jax.vmap(drawn)(seed.reshape(-1)).reshape(teacher.shape)
    return losses.forward_kl(student, teacher.astype(jnp.float32) + scale[..., None] * noise, temperature=temperature)
