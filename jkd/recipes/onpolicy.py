"""Language models that learn from their teacher token by token, on texts that were written, or that they say themselves."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules, targets, tokens
from jkd.errors import InputError
from jkd.losses.chunked.parts import JS, AlphaBeta, CrossEntropy, Each, ForwardKL, Part, SkewReverseKL
from jkd.models.generate import Sampling
from jkd.recipe import Recipe, Vars
from jkd.recipes.bytoken import by_part, by_token, relative
from jkd.recipes.rollouts import Rollout, with_masks
from jkd.schedules import Clock, Schedule
from jkd.types import Array, Batch, Term

Evidence = Literal["golden", "formula", "mechanism"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ByToken(Recipe):
    """``weight * D(teacher, student) + task_weight * CE`` over the counted tokens; subclasses say D.

    Args:
        weight: of the teacher's term; number or schedule.
        task_weight: of the next token's cross-entropy, on rows that the data wrote; 0 leaves it out.
    """

    weight: float | Schedule = 1.0
    task_weight: float = 0.0

    family: ClassVar[str] = "language"

    def part(self, vars: Vars, clock: Clock) -> Part:
        """The divergence at this point of the run."""
        raise NotImplementedError

    def softness(self, clock: Clock) -> Any:
        """The temperature of both sides; its square is inside the loss."""
        return 1.0

    def terms(self, vars, student, teacher, batch, *, clock, key):
        labels, weight = tokens.next_tokens(batch)
        coef, temperature = schedules.at(self.weight, clock), self.softness(clock)
        mix: list[tuple[Any, Part]] = [(coef, self.part(vars, clock))]
        if not self.task_weight:
            (kd,) = by_part(mix, student, teacher, temperature=temperature, weights=weight)
            return {"kd": Term(kd, weight, coef)}
        written = weight * (1 - batch["own"][:, None]) if "own" in batch else weight
        mix.append((self.task_weight * relative(written, weight), CrossEntropy()))
        kd, task = by_part(mix, student, teacher, labels=labels, temperature=temperature, weights=weight)
        return {"kd": Term(kd, weight, coef), "task": Term(task, written, self.task_weight)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Recipe):
    """The text alone: cross-entropy of the next token. The control of every comparison of language models."""

    citation: ClassVar[str] = "cross-entropy of the next token (the control)"
    family: ClassVar[str] = "baseline"
    needs_teacher: ClassVar[bool] = False
    evidence: ClassVar[Evidence] = "formula"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        labels, weight = tokens.next_tokens(batch)
        return {"task": Term(by_token(CrossEntropy(), student, labels=labels, weights=weight), weight)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenKD(_ByToken):
    """Word-level KD: the teacher's distribution of every next token, ``weight * T² * D + task_weight * CE``.

    Args:
        divergence: KL(teacher || student) by default; any part of ``losses.chunked``.
        temperature: T of both softmaxes; number or schedule.
    """

    divergence: Part = ForwardKL()
    temperature: float | Schedule = 1.0

    citation: ClassVar[str] = "Kim and Rush, Sequence-Level Knowledge Distillation, EMNLP 2016, word-level"
    evidence: ClassVar[Evidence] = "formula"

    def part(self, vars, clock):
        return self.divergence

    def softness(self, clock):
        return schedules.at(self.temperature, clock)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AKL(_ByToken):
    """Adaptive KL: ``(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t)`` for each token, g the gaps in the teacher's head and tail.

    Args:
        mu: the head is the teacher's likeliest tokens up to this probability together; 0.5 in the paper.
    """

    mu: float = 0.5

    citation: ClassVar[str] = (
        "Wu et al., Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models, COLING 2025"
    )
    evidence: ClassVar[Evidence] = "golden"

    def part(self, vars, clock):
        return Each(_adaptive, (jnp.float32(self.mu),))


def _adaptive(student: Array, teacher: Array, mu: Array) -> Any:
    return losses.adaptive_kl(student, teacher, mu=mu.reshape(-1)[0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class ABKD(_ByToken):
    """The alpha-beta divergence of teacher and student; forward KL at (1, 0), reverse KL at (0, 1), squared Hellinger between.

    Args:
        alpha, beta: 0.5 both by default, as in the authors' code; (0.2, 0.7) is their choice for instructions.
    """

    alpha: float = 0.5
    beta: float = 0.5

    citation: ClassVar[str] = (
        "Wang et al., ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via alpha-beta-Divergence, "
        "ICML 2025"
    )
    evidence: ClassVar[Evidence] = "golden"

    def part(self, vars, clock):
        return AlphaBeta(self.alpha, self.beta)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TAID(_ByToken):
    """A target that moves from the student to the teacher, ``softmax((1 - t) z_s + t z_T)``, faster while the loss falls.

    After each step ``m <- 0.99 m + 0.01 (last - loss) / last`` and ``t <- max(line, t + rate * sigmoid(m) (1 - t))``, never above
    1; line rises evenly from ``start`` to 1 over the run. The loss is the soft cross-entropy, as in the authors' code.

    Args:
        start: t at the start; 0.4 in the paper.
        rate: 5e-4 in the paper.
        momentum: 0.99 in the paper.
    """

    start: float = 0.4
    rate: float = 5e-4
    momentum: float = 0.99

    citation: ClassVar[str] = (
        "Shing et al., TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language Models, "
        "ICLR 2025"
    )
    evidence: ClassVar[Evidence] = "formula"

    def __post_init__(self):
        if not 0 <= self.start <= 1:
            raise InputError(f"TAID.start = {self.start}: must be from 0 to 1")

    def init(self, key, ctx):
        return Vars(memory={"t": jnp.float32(self.start), "momentum": jnp.float32(0), "loss": jnp.float32(jnp.nan)})

    def part(self, vars, clock):
        return Each(_interpolated, (vars.memory["t"],))

    def remember(self, memory, observed, batch, *, terms, clock, key):
        last, loss = memory["loss"], terms["kd"]
        change = jnp.where(jnp.isnan(last), 0, (last - loss) / (last + 1e-15))
        momentum = self.momentum * memory["momentum"] + (1 - self.momentum) * change
        line = self.start + (1 - self.start) * (clock.step + 1) / clock.steps
        faster = memory["t"] + self.rate * jax.nn.sigmoid(momentum) * (1 - memory["t"])
        # the first step only shows how large the loss is
        moved = jnp.minimum(1, jnp.maximum(line, jnp.where(jnp.isnan(last), memory["t"], faster)))
        return {"t": moved.astype(jnp.float32), "momentum": momentum.astype(jnp.float32), "loss": loss.astype(jnp.float32)}


def _interpolated(student: Array, teacher: Array, t: Array) -> Any:
    return losses.soft_cross_entropy(student, targets.interpolate(student, teacher, t=t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class GKD(_ByToken):
    """Generalised KD: with chance ``share`` a batch's responses are the student's own of this moment, and the teacher judges them.

    No gradient passes through the sampling.

    Args:
        share: of batches that the student says; number or schedule. 0 is plain KD, 1 purely on-policy; 0.5 in TRL.
        rollout: how it says them.
        divergence: between teacher and student; the generalised Jensen-Shannon one with beta 0.5 by default. Any part of
            ``losses.chunked`` (`ABKD` and `AKL` on-policy: ``AlphaBeta(…)``, ``Each(losses.adaptive_kl)``).
    """

    share: float | Schedule = 0.5
    rollout: Rollout = Rollout(sampling=Sampling(temperature=0.9))
    divergence: Part = JS(0.5)

    citation: ClassVar[str] = "Agarwal et al., On-Policy Distillation of Language Models, ICLR 2024"
    requires: ClassVar[str] = "a student that generates"
    evidence: ClassVar[Evidence] = "formula"

    def part(self, vars, clock):
        return self.divergence

    def prepare(self, models, batch, key):
        chance = schedules.at(self.share, models.clock)
        return sometimes(chance, key, lambda batch: self.rollout.say(models, batch, {"student": 1.0}), with_masks(batch))


def sometimes(chance: Any, key: Array, change: Any, batch: Batch) -> Batch:
    """``change(batch)`` with this chance, else the batch; where the chance is a known 0 or 1 nothing is drawn."""
    if isinstance(chance, (int, float)) and chance in (0, 1):
        return change(batch) if chance else batch
    return jax.lax.cond(jax.random.uniform(key) < chance, change, lambda batch: batch, batch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeqKD(Recipe):
    """Sequence-level KD: the student learns what its teacher says, as if it were data.

    The paper decodes by beam search; here responses are drawn (``Sampling(temperature=0)`` takes the likeliest token each time).

    Args:
        rollout: how the teacher says them. They need nothing of the student, so they are made while the step before runs.
    """

    rollout: Rollout = Rollout()

    citation: ClassVar[str] = "Kim and Rush, Sequence-Level Knowledge Distillation, EMNLP 2016"
    family: ClassVar[str] = "language"
    requires: ClassVar[str] = "a teacher that generates"
    evidence: ClassVar[Evidence] = "mechanism"

    def prepare(self, models, batch, key):
        return self.rollout.say(models, with_masks(batch), {"teacher": 1.0})

    def forward(self, models, batch, key):
        student, models = models.student(batch, key=key)
        return student, None, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        labels, weight = tokens.next_tokens(batch)
        return {"said": Term(by_token(CrossEntropy(), student, labels=labels, weights=weight), weight)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistiLLM(_ByToken):
    """A skewed divergence, and as much of the student's own text as it needs, said once and learned from several times.

    With the threshold φ and r drawn anew for each batch: r < φ (1 - step / steps), or r < φ while the buffer is not full: the
    student says the responses, and they enter the buffer; else r < φ: rows drawn from the buffer; else the data's own. φ starts
    at 0 and grows by ``rise`` where the loss has become worse by ``margin``. The paper asks its validation loss; here it is the
    mean teacher's term on the data's own rows since the last look.

    Args:
        divergence: `SkewReverseKL` or `SkewForwardKL` of ``losses.chunked``, 0.1 in the paper.
        rollout: how the student says its responses.
        capacity: rows of the buffer; 1000 in the paper.
        look_every: steps between looks at the loss.
        margin, rise: 0.1 both in the authors' code.
        threshold: φ at the start; 0 in their code.
    """

    divergence: Part = SkewReverseKL(0.1)
    rollout: Rollout = Rollout()
    capacity: int = 1000
    look_every: int = 100
    margin: float = 0.1
    rise: float = 0.1
    threshold: float = 0.0

    citation: ClassVar[str] = "Ko et al., DistiLLM: Towards Streamlined Distillation for Large Language Models, ICML 2024"
    requires: ClassVar[str] = "a student that generates"
    evidence: ClassVar[Evidence] = "formula"

    def part(self, vars, clock):
        return self.divergence

    def init(self, key, ctx):
        batch = jax.eval_shape(with_masks, ctx.batch)
        rows = {name: jnp.zeros((self.capacity, *batch[name].shape[1:]), batch[name].dtype) for name in _held(batch)}
        if self.capacity < batch["tokens"].shape[0]:
            raise InputError(
                f"DistiLLM.capacity = {self.capacity}: must hold at least a batch ({batch['tokens'].shape[0]} rows)"
            )
        look = {"sum": jnp.float32(0), "count": jnp.float32(0), "loss": jnp.float32(jnp.nan)}
        return Vars(memory={"rows": rows, "written": jnp.int32(0), "threshold": jnp.float32(self.threshold), "look": look})

    def prepare(self, models, batch, key):
        batch, memory = with_masks(batch), models.memory
        key_chance, key_rows = jax.random.split(key)
        chance, threshold = jax.random.uniform(key_chance), memory["threshold"]
        progress = jnp.asarray(models.clock.step, jnp.float32) / models.clock.steps
        says = (chance < threshold * (1 - progress)) | ((chance < threshold) & (memory["written"] < self.capacity))

        def remembered(batch: Batch) -> Batch:
            place = jax.random.randint(key_rows, batch["own"].shape, 0, jnp.minimum(memory["written"], self.capacity))
            old = {name: memory["rows"][name][place] for name in _held(batch)}
            return {**batch, **old, "own": jnp.ones_like(batch["own"]), "new": jnp.zeros_like(batch["own"])}

        def said(batch: Batch) -> Batch:
            return self.rollout.say(models, {**batch, "new": jnp.ones_like(batch["own"])}, {"student": 1.0})

        def data(batch: Batch) -> Batch:
            return {**batch, "new": jnp.zeros_like(batch["own"])}

        which = jnp.where(says, 0, jnp.where(chance < threshold, 1, 2))
        return jax.lax.switch(which, (said, remembered, data), batch)

    def remember(self, memory, observed, batch, *, terms, clock, key):
        new = (batch["new"] > 0) & (batch["weight"] > 0)
        place = (memory["written"] + jnp.cumsum(new) - 1) % self.capacity
        place = jnp.where(new, place, self.capacity)  # out of range: dropped
        rows = {name: held.at[place].set(batch[name], mode="drop") for name, held in memory["rows"].items()}
        own = batch["own"].max()
        look, due = memory["look"], (clock.step + 1) % self.look_every == 0
        total, count = look["sum"] + (1 - own) * terms["kd"], look["count"] + (1 - own)
        mean = total / jnp.maximum(count, 1)
        due &= count > 0
        worse = due & (mean >= look["loss"] + self.margin)
        known = jnp.where(worse | (due & jnp.isnan(look["loss"])), mean, look["loss"])
        threshold = jnp.where(worse, jnp.minimum(memory["threshold"] + self.rise, 1), memory["threshold"])
        look = {"sum": jnp.where(due, 0, total), "count": jnp.where(due, 0, count), "loss": known}
        return {
            "rows": rows,
            "written": memory["written"] + new.sum(dtype=jnp.int32),
            "threshold": threshold.astype(jnp.float32),
            "look": jax.tree.map(lambda leaf: leaf.astype(jnp.float32), look),
        }


def _held(batch: Batch) -> tuple[str, ...]:
    """The keys of a row that a buffer keeps."""
    return tuple(name for name in ("tokens", "mask", "loss_mask", "segment", "position") if name in batch)
