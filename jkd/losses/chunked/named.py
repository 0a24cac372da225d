"""The losses of a mix by their own names, one value for each token.

``name(student_hidden, student_head, teacher_hidden, teacher_head, *, …) -> [...]``: hidden ``[..., dim]``, heads ``[dim, vocab]``
or `Head` (bias, soft-cap, padded columns), each side with a dim of its own.
``weights`` ``[...]`` says what a token will weigh in the sum
that is differentiated, which saves a pass (see `per_token`); ``schedule`` overrides the cost model (`jkd.losses.chunked.plan`).
Values and gradients are those of the twin in `jkd.losses` on whole logits. For the weighted sum itself, and for several losses in one
pass, see `weighted_sum`.
"""

from __future__ import annotations

from typing import Any

from jkd.losses.chunked.mixes import per_token
from jkd.losses.chunked.parts import JS, AlphaBeta, CrossEntropy, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL


def forward_kl(student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any, **options: Any) -> Any:
    """``T² KL(teacher || student)``, nats; options ``temperature=1.0, weights=None, schedule=None``. See `jkd.losses.forward_kl`."""
    return per_token(ForwardKL(), student_hidden, student_head, teacher_hidden, teacher_head, **options)


def reverse_kl(student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any, **options: Any) -> Any:
    """``T² KL(student || teacher)``, nats; options as in `forward_kl`. See `jkd.losses.reverse_kl`."""
    return per_token(ReverseKL(), student_hidden, student_head, teacher_hidden, teacher_head, **options)


def js(
    student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any, *, beta: Any = 0.5, **options: Any
) -> Any:
    """Generalised Jensen-Shannon divergence, nats; ``beta`` 0 is `forward_kl`, 1 `reverse_kl`. See `jkd.losses.js`."""
    return per_token(JS(beta), student_hidden, student_head, teacher_hidden, teacher_head, **options)


def skew_forward_kl(
    student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any, *, lam: Any = 0.1, **options: Any
) -> Any:
    """``T² KL(teacher || lam teacher + (1 - lam) student)``, nats. See `jkd.losses.skew_forward_kl`."""
    return per_token(SkewForwardKL(lam), student_hidden, student_head, teacher_hidden, teacher_head, **options)


def skew_reverse_kl(
    student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any, *, lam: Any = 0.1, **options: Any
) -> Any:
    """``T² KL(student || lam student + (1 - lam) teacher)``, nats. See `jkd.losses.skew_reverse_kl`."""
    return per_token(SkewReverseKL(lam), student_hidden, student_head, teacher_hidden, teacher_head, **options)


def alpha_beta(
    student_hidden: Any,
    student_head: Any,
    teacher_hidden: Any,
    teacher_head: Any,
    *,
    alpha: Any = 0.5,
    beta: Any = 0.5,
    **options: Any,
) -> Any:
    """The alpha-beta divergence of ABKD. See `jkd.losses.alpha_beta`."""
    return per_token(AlphaBeta(alpha, beta), student_hidden, student_head, teacher_hidden, teacher_head, **options)


def cross_entropy(student_hidden: Any, student_head: Any, labels: Any, **options: Any) -> Any:
    """``-log softmax(student)[label]``, nats; options ``weights=None, schedule=None``. See `jkd.losses.cross_entropy`."""
    return per_token(CrossEntropy(), student_hidden, student_head, labels=labels, **options)
