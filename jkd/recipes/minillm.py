"""Distillation as a game: the student is rewarded for what its teacher finds likely."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import tokens
from jkd.errors import InputError
from jkd.losses.chunked.parts import CrossEntropy, ReverseKL
from jkd.recipe import Recipe
from jkd.recipes.bytoken import by_token
from jkd.recipes.rollouts import Rollout, with_masks
from jkd.types import Array, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniLLM(Recipe):
    """KL(q || p) of whole responses by policy gradient, its one-step part exact (eq. of section 2.2 of the paper).

    Responses are drawn from ``(1 - teacher_share) q + teacher_share p`` and weighed by ``w = q / mixture``, token by token. The
    reward of a token is ``log p - log q``, over ``scale`` and within ``±clip``; a token is blamed for the mean reward of those
    after it, discounted. Terms: ``long``: ``- w A log q``; ``single``: ``w KL(q || p)`` at each prefix, all tokens exactly;
    ``language``: the cross-entropy of the data's own response. The authors make several PPO steps with each batch of responses;
    here each step says its own, so their ratio is 1 and its clipping nothing.

    Args:
        rollout: how responses are drawn.
        teacher_share: 0.2 in the paper.
        discount: 0.95 in the authors' code; 1 in the paper's formula.
        normalise: divide by how many tokens follow (the paper's length normalisation).
        whiten: A has mean 0 and variance 1 over the batch, as in the authors' code. It compares examples.
        scale, clip: 0.5 and 100 in the authors' code.
        language_weight: of the third term; 0 leaves it out, and its pass through the student too.
    """

    rollout: Rollout = Rollout()
    teacher_share: float = 0.2
    discount: float = 0.95
    normalise: bool = True
    whiten: bool = True
    scale: float = 0.5
    clip: float = 100.0
    language_weight: float = 1.0

    citation: ClassVar[str] = "Gu et al., MiniLLM: Knowledge Distillation of Large Language Models, ICLR 2024"
    family: ClassVar[str] = "language"
    requires: ClassVar[str] = "a student that generates"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def __post_init__(self):
        if not 0 <= self.teacher_share < 1:
            raise InputError(f"MiniLLM.teacher_share = {self.teacher_share}: must be from 0 to below 1")
        if (self.rollout.sampling.temperature, self.rollout.sampling.top_p) != (1, 1):
            raise InputError("MiniLLM.rollout: its weights are of tokens drawn at temperature 1 and top_p 1")

    @property
    def couples_batch(self) -> bool:
        return self.whiten

    def prepare(self, models, batch, key):
        batch = with_masks(batch)
        shares = {"student": 1 - self.teacher_share, "teacher": self.teacher_share}
        said = self.rollout.say(models, batch, {name: share for name, share in shares.items() if share})
        if not self.language_weight:
            return said
        wanted = ("tokens", "mask", "loss_mask", "segment", "position", "weight", "index")
        return said | {"written": {name: batch[name] for name in wanted if name in batch}}

    def forward(self, models, batch, key):
        student, teacher, models = super().forward(models, batch, key)
        written = None
        if self.language_weight:
            written, models = models.student(batch["written"], key=jax.random.fold_in(key, 1))
        return (student, written), teacher, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        student, written = student
        labels, weight = tokens.next_tokens(batch)
        log_q = -by_token(CrossEntropy(), student, labels=labels)
        log_p = -by_token(CrossEntropy(), teacher, labels=labels)
        ratio, advantage = self.judged(log_q, log_p, weight)
        terms = {
            "long": Term(-ratio * advantage * log_q, weight),
            "single": Term(ratio * by_token(ReverseKL(), student, teacher), weight),
        }
        if written is not None:
            labels, weight = tokens.next_tokens(batch["written"])
            terms["language"] = Term(
                by_token(CrossEntropy(), written, labels=labels, weights=weight), weight, self.language_weight
            )
        return terms

    def judged(self, log_q: Array, log_p: Array, weight: Array) -> tuple[Array, Array]:
        """Importance weights and advantages ``[batch, time]`` of tokens with these log-probabilities; no gradient passes."""
        log_q, log_p = jax.lax.stop_gradient((log_q, log_p))
        said = (weight > 0).astype(jnp.float32)
        mixture = jnp.logaddexp(jnp.log1p(-self.teacher_share) + log_q, jnp.log(jnp.float32(self.teacher_share)) + log_p)
        ratio = jnp.exp(log_q - mixture)
        reward = jnp.clip((log_p - log_q) / self.scale, -self.clip, self.clip) * said

        def before(later: tuple[Array, Array], now: tuple[Array, Array]):
            total, count = later
            reward, said = now
            return (reward + self.discount * total, said + self.discount * count), later

        start = (jnp.zeros(len(reward)), jnp.zeros(len(reward)))
        _, (total, count) = jax.lax.scan(before, start, (reward.T, said.T), reverse=True)
        advantage = total.T / jnp.maximum(count.T, 1) if self.normalise else total.T
        if self.whiten:
            mean = (advantage * weight).sum() / jnp.maximum(weight.sum(), 1e-6)
            variance = (jnp.square(advantage - mean) * weight).sum() / jnp.maximum(weight.sum(), 1e-6)
            advantage = (advantage - mean) * jax.lax.rsqrt(variance + 1e-8)
        return ratio, advantage * said
