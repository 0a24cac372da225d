"""Losses that carry a teacher's ranking over: of classes (PLD), of documents for a query, of labels among very many.

A class, candidate or label whose score is -inf is not there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    check_classes,
    check_labels,
    check_nonempty,
    check_numeric,
    check_rank,
    check_same_shape,
    check_where,
    describe,
    is_label,
    kl_of_logits,
    log_softmax,
    masked_logsumexp,
    promote,
    softplus,
    tempered,
)
from jkd.losses._typing import Array, Bool, Float, Int, PerPosition, Real, Scalar


def pld(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    teacher_temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``sum_k p_o(k) (log sum_(j >= k) exp z_s,o(j) - z_s,o(k))``, o = the label, then the classes by falling teacher logit.

    A weighted Plackett-Luce likelihood of the teacher's ranking; convex in the student's logits. A teacher certain of the label
    makes it the cross-entropy.

    Args:
        student_logits: ``[..., classes]``.
        teacher_logits: ``[..., classes]``. Equal logits keep the order of the classes.
        labels: int ``[...]``.
        teacher_temperature: of the weights p = softmax(z_t / T). The paper uses 1. No T² (the student has no temperature).

    Returns:
        ``[...]`` in nats. It takes the place of both cross-entropy and distillation.

    Source:
        [PLD] Bassam, Zhu, Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", NeurIPS 2025, arXiv:2506.12542, the
        weighted Plackett-Luce loss of the teacher-optimal ranking.

    Code versus paper:
        No code was published. The label's weight is the teacher's own probability of it.

    Example:
        >>> print(f"{pld(jnp.zeros(3), jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.array(0)):.4f}")
        0.7226
    """
    check_classes(student_logits, teacher_logits)
    check_labels(labels, student_logits)
    student, teacher = promote(student_logits, teacher_logits)
    log_p = log_softmax(teacher, teacher_temperature)
    key = jnp.where(is_label(labels, teacher.shape[-1]), -jnp.inf, -teacher)
    _, student, log_p = jax.lax.sort([key, student, jnp.asarray(log_p)], dimension=-1, num_keys=1, is_stable=True)
    # The gradient of a cumulative sum that holds nothing but -inf is undefined; the lowest float adds as little.
    low = jnp.maximum(student, jnp.finfo(student.dtype).min)
    remaining = jax.lax.cumlogsumexp(low, axis=student.ndim - 1, reverse=True)
    return jnp.sum(jnp.exp(log_p) * jnp.where(student > -jnp.inf, remaining - low, 0), axis=-1)


def margin_mse(
    student_positive: Real[Array, "*batch"],
    student_negative: Real[Array, "*batch"],
    teacher_positive: Real[Array, "*batch"],
    teacher_negative: Real[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """``((s+ - s-) - (t+ - t-))²``: margins, so that the two models' scores may have any offset.

    Args:
        student_positive: ``[...]``, score of the relevant document for each query.
        student_negative: ``[...]``, score of the other document.
        teacher_positive: ``[...]``; the paper takes the mean score of an ensemble.
        teacher_negative: ``[...]``.

    Returns:
        ``[...]``, squared scores.

    Source:
        [Margin-MSE] Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
        Distillation", 2020, arXiv:2010.02666, the Margin-MSE loss.

    Example:
        >>> margin_mse(jnp.array([3.0]), jnp.array([1.0]), jnp.array([10.0]), jnp.array([9.0])).tolist()
        [1.0]
    """
    scores = {
        "student_positive": student_positive,
        "student_negative": student_negative,
        "teacher_positive": teacher_positive,
        "teacher_negative": teacher_negative,
    }
    check_numeric(**scores)
    check_same_shape(**scores)
    s_positive, s_negative, t_positive, t_negative = promote(*scores.values())
    return ((s_positive - s_negative) - (t_positive - t_negative)) ** 2


def listwise_kl(
    student_scores: Real[Array, "*batch candidates"],
    teacher_scores: Real[Array, "*batch candidates"],
    *,
    temperature: Scalar = 0.02,
    teacher_temperature: Scalar | None = None,
    where: Bool[Array, "*batch candidates"] | Real[Array, "*batch candidates"] | None = None,
) -> Float[Array, "*batch"]:
    """``sum_j p_j (log p_j - log q_j)``, p = softmax(t / T_t) and q = softmax(s / T) over one query's candidates.

    Args:
        student_scores: ``[..., candidates]``, e.g. cosines of the query with the positive and the hard negatives.
        teacher_scores: ``[..., candidates]``, e.g. a reranker's relevance.
        temperature: T. UniME-V2 trains with 0.02. No T²: it is the scale of the scores, not a softening of both.
        teacher_temperature: T_t; None takes T.
        where: ``[..., candidates]``, which candidates there are (false negatives left out); a row with none gives 0.

    Returns:
        ``[...]`` in nats.

    Source:
        [listwise KD] Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007, with KL in place
        of cross-entropy; for embeddings in Gu et al., "UniME-V2: MLLM-as-a-Judge for Universal Multimodal Embedding Learning",
        AAAI 2026, arXiv:2510.13515.

    Code versus paper:
        UniME-V2 averages this and the same with the arguments swapped (`jeffreys`), with 1e-8 inside the logarithms.

    Example:
        >>> print(f"{listwise_kl(jnp.array([0.9, 0.1]), jnp.array([0.1, 0.9]), temperature=1.0):.4f}")
        0.3040
    """
    names = {"student": "student_scores", "teacher": "teacher_scores"}
    check_classes(student_scores, teacher_scores, axis="candidates", **names)
    student, teacher = promote(student_scores, teacher_scores)
    if where is not None:
        check_where(where, np.shape(student_scores), meaning="[..., candidates]")
        student, teacher = (jnp.where(jnp.asarray(where) != 0, scores, -jnp.inf) for scores in (student, teacher))
    student = tempered(student, temperature)
    teacher = tempered(teacher, temperature if teacher_temperature is None else teacher_temperature)
    return kl_of_logits(teacher, student)


def _checked_positives(student_scores, positives):
    check_rank(1, "[..., labels]", student_scores=student_scores)
    check_nonempty(-1, "labels", student_scores=student_scores)
    check_where(positives, np.shape(student_scores), name="positives", meaning="[..., labels]")
    (scores,) = promote(student_scores)
    keep = (jnp.asarray(positives) != 0) & (scores > -jnp.inf)
    count = jnp.sum(keep, axis=-1).astype(scores.dtype)
    return scores, keep, jnp.maximum(count, 1)


def decoupled_softmax(
    student_scores: Real[Array, "*batch labels"],
    positives: Bool[Array, "*batch labels"] | Real[Array, "*batch labels"],
    *,
    temperature: Scalar = 0.05,
) -> Float[Array, "*batch"]:
    """``mean over positives p of log(1 + sum_(negatives n) exp((s_n - s_p) / T))``: positives do not compete with each other.

    Args:
        student_scores: ``[..., labels]``, cosines of a query with every label.
        positives: ``[..., labels]``, which labels are right (boolean or 0/1).
        temperature: T. The paper uses 0.05.

    Returns:
        ``[...]`` in nats; 0 for a row without positives.

    Source:
        [DEXML] Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification", ICLR 2024, arXiv:2310.10636, the decoupled
        softmax loss.

    Code versus paper:
        The code samples one positive of each row by default; the mean over them here is what that estimates.

    Example:
        >>> print(f"{decoupled_softmax(jnp.zeros(4), jnp.array([True, True, False, False]), temperature=1.0):.4f}")
        1.0986
    """
    scores, keep, count = _checked_positives(student_scores, positives)
    scores = tempered(scores, temperature)
    negatives = masked_logsumexp(scores, ~keep)[..., None]
    some = negatives > -jnp.inf
    terms = jnp.where(keep & some, softplus(jnp.where(some, negatives, 0) - scores), 0)
    return jnp.sum(terms, axis=-1) / count


def _threshold(scores: jax.Array, k: float) -> jax.Array:
    """t with ``sum_c sigmoid(scores_c + t) = k``, by bisection between the two values that equal scores would give."""
    real = scores > -jnp.inf
    others = jnp.maximum(jnp.sum(real, axis=-1).astype(scores.dtype) - k, 1e-3)  # no t selects k of k: the bounds stay finite
    equal = jnp.log(k / others)
    some = jnp.any(real, axis=-1)  # in a row of -inf only any t will do
    largest, smallest = jnp.max(scores, axis=-1), jnp.min(jnp.where(real, scores, jnp.inf), axis=-1)
    bounds = equal - jnp.where(some, largest, 0), equal - jnp.where(some, smallest, 0)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        short = jnp.sum(jax.nn.sigmoid(scores + middle[..., None]), axis=-1) < k
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    # One halving for each bit of the answer.
    low, high = jax.lax.fori_loop(0, jnp.finfo(scores.dtype).nmant + 8, halve, bounds)
    return (low + high) / 2


def soft_top_k(
    student_scores: Real[Array, "*batch labels"],
    positives: Bool[Array, "*batch labels"] | Real[Array, "*batch labels"],
    *,
    k: int = 5,
    alpha: Scalar = 2.0,
    temperature: Scalar = 0.05,
) -> Float[Array, "*batch"]:
    """``- mean over positives p of log sigmoid(alpha (s_p / T + t))``, t such that ``sum_c sigmoid(alpha (s_c / T + t)) = k``.

    Args:
        student_scores: ``[..., labels]``, cosines of a query with every label; more than k labels.
        positives: ``[..., labels]``, which labels are right (boolean or 0/1).
        k: how many labels the soft selection holds. The paper uses 5.
        alpha: its sharpness. The paper uses 2.
        temperature: T. The paper uses 0.05.

    Returns:
        ``[...]`` in nats; 0 for a row without positives. The gradient passes through t (by implicit differentiation).

    Source:
        [DEXML, soft top-k] Gupta et al., "Dual-Encoders for Extreme Multi-Label Classification", ICLR 2024, arXiv:2310.10636,
        the soft top-k loss.

    Example:
        >>> print(f"{soft_top_k(jnp.zeros(4), jnp.array([True, False, False, False]), k=2):.4f}")
        0.6931
    """
    scores, keep, count = _checked_positives(student_scores, positives)
    if not 0 < k < scores.shape[-1]:
        raise ValueError(
            f"k must lie between 0 and the number of labels, got {k} for student_scores {describe(student_scores)}"
        )
    scores = tempered(scores, temperature / alpha)
    fixed = jax.lax.stop_gradient(scores)
    t = _threshold(fixed, float(k))[..., None]
    # A step of Newton's method from the solution: it moves nothing, and its gradient is that of the constraint.
    slope = jax.nn.sigmoid(fixed + t) * jax.nn.sigmoid(-fixed - t)
    total = jnp.sum(slope, axis=-1, keepdims=True)
    moved = jnp.sum(slope * jnp.where(fixed > -jnp.inf, scores - fixed, 0), axis=-1, keepdims=True)
    chosen = scores + t - moved / jnp.where(total > 0, total, 1)
    return jnp.sum(jnp.where(keep, softplus(-chosen), 0), axis=-1) / count  # - log sigmoid x = softplus(-x)
