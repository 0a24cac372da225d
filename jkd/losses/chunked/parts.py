"""What a mix is made of: divergences that are sums over the vocabulary, so that blocks of it may be summed one after the other.

A part says what one class adds to the value, and what that is for the gradient. Its full-logit twin is in ``jkd.losses``; the two
are held to each other by the tests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp

from jkd.losses.divergences import cross_entropy, forward_kl, js, reverse_kl, skew_forward_kl, skew_reverse_kl
from jkd.losses.logits import alpha_beta


@dataclasses.dataclass(frozen=True)
class Classes:
    """Some classes of some positions, every array ``[rows, …]``; padding has p = q = 0 and a finite logarithm.

    Args:
        log_p, p: the teacher's log-probabilities and probabilities; None where no part reads a teacher.
        log_q, q: the student's.
        hit: whether a class is the label; None without labels.
        kept: False for padding; None where there is none.
    """

    log_q: Any
    q: Any
    log_p: Any = None
    p: Any = None
    hit: Any = None
    kept: Any = None


Summand = tuple[Any, Any, Any]
"""``(value, by_student, by_teacher)``: what a class adds to the value, and the value's slope by that class's log q and log p."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One loss of a mix. Subclasses are frozen dataclasses whose fields are Python numbers or scalars that may be traced.

    A part defines `summand`; or, where the loss is no sum over classes, it is an `Each`.
    """

    reads: ClassVar[tuple[str, ...]] = ("teacher",)
    """What it needs beside the student: ``teacher``, ``labels``."""
    tempered: ClassVar[bool] = True
    """Whether the mix's temperature, and its square, are its own."""

    def summand(self, c: Classes) -> Summand:
        raise NotImplementedError

    def online(self, m: dict[str, Any]) -> Summand:
        """``(value, sum of by_student, sum of by_teacher)`` from what one sweep gathers, where that is enough.

        ``m`` has ``expected_p`` and ``expected_q``, the means of ``log p - log q`` under either side, and ``at_label``, log q there.
        """
        raise NotImplementedError

    def simplest(self) -> Part:
        """The same part under its simplest name."""
        return self

    def traced(self) -> dict[str, Any]:
        """Those of its fields that are arrays."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in found.items() if hasattr(value, "dtype")}

    def without(self, fields: dict[str, Any]) -> Part:
        """The part, hashable: without these fields."""
        return dataclasses.replace(self, **dict.fromkeys(fields))

    def full(self, student_logits: Any, teacher_logits: Any, labels: Any, temperature: Any) -> Any:
        """The same of whole logits."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ForwardKL(Part):
    """`losses.forward_kl`: ``sum_c p_c (log p_c - log q_c)``."""

    def summand(self, c: Classes) -> Summand:
        ratio = c.log_p - c.log_q
        return c.p * ratio, -c.p, c.p * (ratio + 1)

    def online(self, m: dict[str, Any]) -> Summand:
        value = m["expected_p"]
        return value, -jnp.ones_like(value), value + 1

    def full(self, student_logits, teacher_logits, labels, temperature):
        return forward_kl(student_logits, teacher_logits, temperature=temperature)


@dataclasses.dataclass(frozen=True)
class ReverseKL(Part):
    """`losses.reverse_kl`: ``sum_c q_c (log q_c - log p_c)``."""

    def summand(self, c: Classes) -> Summand:
        ratio = c.log_q - c.log_p
        return c.q * ratio, c.q * (ratio + 1), -c.q

    def online(self, m: dict[str, Any]) -> Summand:
        value = -m["expected_q"]
        return value, value + 1, -jnp.ones_like(value)

    def full(self, student_logits, teacher_logits, labels, temperature):
        return reverse_kl(student_logits, teacher_logits, temperature=temperature)


def _limits(number: Any, found: Summand, ends: dict[Any, Part], c: Classes) -> Summand:
    """A formula's limits, chosen at run time; where the number is known `Part.simplest` has chosen."""
    if isinstance(number, (int, float)):
        return found
    for end, part in ends.items():
        limit = part.summand(c)
        found = tuple(jnp.where(number == end, a, b) for a, b in zip(limit, found, strict=True))  # type: ignore[assignment]
    return found


@dataclasses.dataclass(frozen=True)
class JS(Part):
    """`losses.js`: ``beta KL(p || m) + (1 - beta) KL(q || m)``, m = beta p + (1 - beta) q.

    Args:
        beta: 0 is `ForwardKL`, 1 is `ReverseKL`.
    """

    beta: Any = 0.5

    def simplest(self) -> Part:
        ends: dict[Any, Part] = {0: ForwardKL(), 1: ReverseKL()}
        return ends.get(self.beta, self) if isinstance(self.beta, (int, float)) else self

    def summand(self, c: Classes) -> Summand:
        # where both sides underflow the logarithm is multiplied by 0
        log_m = jnp.log(self.beta * c.p + (1 - self.beta) * c.q + jnp.finfo(c.p.dtype).tiny)
        # what passes through the mixture cancels: the slopes are the summands themselves
        by_teacher = self.beta * c.p * (c.log_p - log_m)
        by_student = (1 - self.beta) * c.q * (c.log_q - log_m)
        return _limits(self.beta, (by_teacher + by_student, by_student, by_teacher), {0: ForwardKL(), 1: ReverseKL()}, c)

    def full(self, student_logits, teacher_logits, labels, temperature):
        return js(student_logits, teacher_logits, beta=self.beta, temperature=temperature)


@dataclasses.dataclass(frozen=True)
class SkewForwardKL(Part):
    """`losses.skew_forward_kl`: ``KL(p || lam p + (1 - lam) q)``.

    Args:
        lam: share of the teacher in the mixture; 0 is `ForwardKL`.
    """

    lam: Any = 0.1

    def simplest(self) -> Part:
        return ForwardKL() if isinstance(self.lam, (int, float)) and self.lam == 0 else self

    def summand(self, c: Classes) -> Summand:
        mixture = self.lam * c.p + (1 - self.lam) * c.q + jnp.finfo(c.p.dtype).tiny
        value = c.p * (c.log_p - jnp.log(mixture))
        through = c.p * ((1 - self.lam) * c.q / mixture)
        return _limits(self.lam, (value, -through, value + through), {0: ForwardKL()}, c)

    def full(self, student_logits, teacher_logits, labels, temperature):
        return skew_forward_kl(student_logits, teacher_logits, lam=self.lam, temperature=temperature)


@dataclasses.dataclass(frozen=True)
class SkewReverseKL(Part):
    """`losses.skew_reverse_kl`: ``KL(q || (1 - lam) p + lam q)``.

    Args:
        lam: share of the student in the mixture; 0 is `ReverseKL`.
    """

    lam: Any = 0.1

    def simplest(self) -> Part:
        return ReverseKL() if isinstance(self.lam, (int, float)) and self.lam == 0 else self

    def summand(self, c: Classes) -> Summand:
        turned = dataclasses.replace(c, log_p=c.log_q, p=c.q, log_q=c.log_p, q=c.p)
        value, by_teacher, by_student = SkewForwardKL(self.lam).summand(turned)
        return value, by_student, by_teacher

    def full(self, student_logits, teacher_logits, labels, temperature):
        return skew_reverse_kl(student_logits, teacher_logits, lam=self.lam, temperature=temperature)


@dataclasses.dataclass(frozen=True)
class AlphaBeta(Part):
    """`losses.alpha_beta`, with its limits.

    Args:
        alpha, beta: Python numbers: they choose the formula.
    """

    alpha: Any = 0.5
    beta: Any = 0.5

    def summand(self, c: Classes) -> Summand:
        a, b = self.alpha, self.beta
        log_p, log_q = (x if c.kept is None else jnp.where(c.kept, x, 0) for x in (c.log_p, c.log_q))
        ratio = log_q - log_p
        if a == 0 and b == 0:
            found = 0.5 * ratio * ratio, ratio, -ratio
        elif a + b == 0:
            power = jnp.exp(-a * ratio)
            found = (power + a * ratio - 1) / a**2, (1 - power) / a, (power - 1) / a
        elif a == 0:
            student, teacher = jnp.exp(b * log_q), jnp.exp(b * log_p)
            found = (student * (b * ratio - 1) + teacher) / b**2, student * ratio, (teacher - student) / b
        elif b == 0:
            student, teacher = jnp.exp(a * log_q), jnp.exp(a * log_p)
            found = (teacher * (-a * ratio - 1) + student) / a**2, (student - teacher) / a, -teacher * ratio
        else:
            student, teacher = jnp.exp((a + b) * log_q), jnp.exp((a + b) * log_p)
            mixed = jnp.exp(a * log_p + b * log_q)
            value = teacher / (b * (a + b)) + student / (a * (a + b)) - mixed / (a * b)
            found = value, (student - mixed) / a, (teacher - mixed) / b
        return found if c.kept is None else tuple(jnp.where(c.kept, x, 0) for x in found)  # type: ignore[return-value]

    def full(self, student_logits, teacher_logits, labels, temperature):
        return alpha_beta(student_logits, teacher_logits, alpha=self.alpha, beta=self.beta, temperature=temperature)


@dataclasses.dataclass(frozen=True)
class CrossEntropy(Part):
    """`losses.cross_entropy` with integer labels, at temperature 1 whatever the mix's: ``- log q_label``."""

    reads: ClassVar[tuple[str, ...]] = ("labels",)
    tempered: ClassVar[bool] = False

    def summand(self, c: Classes) -> Summand:
        hit = c.hit.astype(c.log_q.dtype)
        return -hit * c.log_q, -hit, jnp.zeros_like(hit)

    def online(self, m: dict[str, Any]) -> Summand:
        value = -m["at_label"]
        return value, -jnp.ones_like(value), jnp.zeros_like(value)

    def full(self, student_logits, teacher_logits, labels, temperature):
        return cross_entropy(student_logits, labels)


@dataclasses.dataclass(frozen=True)
class Each(Part):
    """Any loss of whole logits, block of tokens by block of tokens: ``function(student_logits, [teacher_logits], *rows)``.

    For losses that are no sum over classes (a sort, a top-k, a target made from both sides) and for teachers that come as a few
    numbers a token (a cache). Walks tokens only. Differentiated by JAX.

    Args:
        function: of ``[rows, vocab]`` logits and of ``rows``, to ``[rows]``. A module's function or a frozen dataclass's method
            rather than a new lambda in each call, which would compile again. What is traced goes through ``rows``.
        rows: further arguments: one entry for each token (the leading shape of ``student_hidden``), or a scalar.
        teacher: whether it reads the teacher's logits.
    """

    function: Callable[..., Any]
    rows: tuple[Any, ...] = ()
    teacher: bool = True

    tempered: ClassVar[bool] = False

    def traced(self) -> dict[str, Any]:
        return {}

    def without(self, fields: dict[str, Any]) -> Part:
        return dataclasses.replace(self, rows=())

    @property
    def reads(self):  # type: ignore[override]
        return ("teacher",) if self.teacher else ()

    def full(self, student_logits, teacher_logits, labels, temperature):
        return self.function(student_logits, *((teacher_logits,) if self.teacher else ()), *self.rows)
