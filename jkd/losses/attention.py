"""Losses on the attention of transformers: scores, the relations of values, and the self-relations of queries, keys and values.

Scores are taken before the softmax, ``[..., heads, queries, keys]``; log-probabilities are scores too. ``mask`` ``[..., tokens]``
(1 = real token, as in a batch) drops padding as keys and as queries: an example's value is the mean over its real tokens, and
the same as without the padding. An example without a real token gives 0. ``segment`` ``[..., tokens]`` (one number for each document
of a packed row, as in a batch) leaves the tokens of other documents out of every row of scores: a packed example's value is the mean
over its tokens of what they give in rows of their own.

The relations of one head at a time are held, and computed again for the gradient: a relation has tokens² entries for each of up
to 64 heads, many times its inputs.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    check_nonempty,
    check_numeric,
    check_rank,
    check_same_shape,
    check_where,
    describe,
    masked_mean,
    promote,
)
from jkd.losses._maps import gram
from jkd.losses._typing import Array, Bool, Float, Int, Real


def _token_mask(mask, shape):
    """``[..., tokens]`` boolean, or None."""
    if mask is None:
        return None
    check_where(mask, shape, meaning="[..., tokens]", name="mask")
    return jnp.asarray(mask) != 0


def _pairs(real, segment, shape):
    """``[..., queries or 1, keys]`` boolean: the keys that each query is compared over; None where these are all."""
    if segment is None:
        return None if real is None else real[..., None, :]
    check_numeric(segment=segment)
    if np.shape(segment) != tuple(shape):
        raise ValueError(f"segment must be [..., tokens] = {list(shape)}, got {describe(segment)}")
    same = segment[..., :, None] == segment[..., None, :]
    return same if real is None else same & real[..., None, :]


def _real_tokens(x, real):
    """``[..., heads, tokens, dim]`` with 0 in padded tokens, whose contents may be nan: no product of them has a gradient."""
    return x if real is None else jnp.where(real[..., None, :, None], x, 0)


def _mean_over_queries(values, mask):
    """``[..., queries]`` to ``[...]``, over real tokens."""
    return masked_mean(values, mask, -1)


def _shifted(scores):
    """Scores less the row's largest (0 in a row of -inf only), and the sum of their exponentials."""
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))  # softmax does not see a shift
    shifted = scores - jnp.where(largest > -jnp.inf, largest, 0)
    return shifted, jnp.sum(jnp.exp(shifted), axis=-1)


def _row_kl(student_scores, teacher_scores, pairs):
    """``KL(teacher row || student row)`` for each query, over the keys that `_pairs` gives it; 0 for a row without a key.

    Written as ``sum p (t - s) - log sum exp t + log sum exp s``, which holds one array fewer than two log-softmaxes do.
    """
    if pairs is not None:
        student_scores, teacher_scores = (jnp.where(pairs, x, -jnp.inf) for x in (student_scores, teacher_scores))
    (student, student_sum), (teacher, teacher_sum) = _shifted(student_scores), _shifted(teacher_scores)
    difference = teacher - student
    difference = jnp.where(jnp.abs(difference) < jnp.inf, difference, 0)
    safe_sums = [jnp.where(total > 0, total, 1) for total in (student_sum, teacher_sum)]
    p = jnp.exp(teacher) / safe_sums[1][..., None]
    return jnp.sum(p * difference, axis=-1) + jnp.log(safe_sums[0]) - jnp.log(safe_sums[1])


def _mean_over_heads(per_head, *arrays):
    """Mean of ``per_head`` over axis -3 (heads), one at a time; the backward pass computes a head again."""
    heads = tuple(jnp.moveaxis(x, -3, 0) for x in arrays)
    return jnp.mean(jax.lax.map(lambda head: jax.checkpoint(per_head)(*head), heads), axis=0)


def _check_scores(**scores):
    check_rank(3, "[..., heads, queries, keys]", **scores)
    check_nonempty(-1, "keys", **scores)
    check_nonempty(-2, "queries", **scores)
    check_nonempty(-3, "heads", **scores)
    check_same_shape(**scores)


def _check_square(given, **scores):
    (name, array), *_ = scores.items()
    if any(x is not None for x in given) and np.shape(array)[-1] != np.shape(array)[-2]:
        raise ValueError(
            f"{name} must have as many queries as keys (axes -2 and -1) where mask or segment is given, got {describe(array)}"
        )


def attention_scores_mse(
    student_scores: Real[Array, "*batch heads queries keys"],
    teacher_scores: Real[Array, "*batch heads queries keys"],
    *,
    threshold: float = -100.0,
    mask: Bool[Array, "*batch tokens"] | Real[Array, "*batch tokens"] | None = None,
    segment: Int[Array, "*batch tokens"] | None = None,
) -> Float[Array, "*batch"]:
    """``mean_hij (s_hij - t_hij)²`` of attention scores before the softmax; scores up to ``threshold`` (masked keys) count as 0.

    Args:
        student_scores: ``[..., heads, queries, keys]``.
        teacher_scores: the same shape.
        threshold: a score not above it is a mask and becomes 0 on its side. -100 in the code.
        mask: ``[..., tokens]``, 1 = real. None: every entry counts, as in the code.
        segment: int ``[..., tokens]``; only pairs of tokens where it is equal count. None: all do.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [TinyBERT, attention] Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", EMNLP Findings 2020,
        arXiv:1909.10351, the attention based distillation.

    Code versus paper:
        As the code: mean over heads, queries and keys (padding too), summed over layers with weight 1; student layer i learns
        from teacher layer i L_t / L_s. The teacher is detached.

    Example:
        >>> student = jnp.array([[1.0, -1e4], [0.0, 0.0]])
        >>> attention_scores_mse(student[None], jnp.array([[[3.0, -1e4], [0.0, 0.0]]])).item()
        1.0
    """
    _check_scores(student_scores=student_scores, teacher_scores=teacher_scores)
    _check_square((mask, segment), student_scores=student_scores)
    student, teacher = (jnp.where(x > threshold, x, 0) for x in promote(student_scores, teacher_scores))
    squares = jnp.square(student - teacher)
    shape = (*squares.shape[:-3], squares.shape[-1])
    real = _token_mask(mask, shape)
    pairs = _pairs(real, segment, shape)
    if pairs is None:
        return jnp.mean(squares, axis=(-3, -2, -1))
    counted = pairs if real is None else pairs & real[..., :, None]
    return masked_mean(squares, counted[..., None, :, :], (-3, -2, -1))


def attention_kl(
    student_scores: Real[Array, "*batch heads queries keys"],
    teacher_scores: Real[Array, "*batch heads queries keys"],
    *,
    mask: Bool[Array, "*batch tokens"] | Real[Array, "*batch tokens"] | None = None,
    segment: Int[Array, "*batch tokens"] | None = None,
) -> Float[Array, "*batch"]:
    """``mean_hi sum_j a_hij log(a_hij / b_hij)``, a and b the softmax over keys of the teacher's and the student's scores.

    Args:
        student_scores: ``[..., heads, queries, keys]`` before the softmax, after the division by sqrt(head size). Keys at -inf on
            both sides (a causal mask) contribute nothing.
        teacher_scores: the same shape: the number of heads must agree.
        mask: ``[..., tokens]``, 1 = real.
        segment: int ``[..., tokens]``; tokens are compared only where it is equal. None: a row is one document.

    Returns:
        ``[...]`` in nats, one value for each example.

    Source:
        [MiniLM, attention] Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained
        Transformers", NeurIPS 2020, arXiv:2002.10957, the self-attention distribution transfer.

    Code versus paper:
        No official code; the paper's 1 / (A_h |x|) is the mean over heads and tokens. The last layer of both, added to
        `value_relation_kl` with weight 1. The teacher is detached.

    Example:
        >>> student, teacher = jnp.zeros((1, 2, 2)), jnp.array([[[0.0, -1e4], [0.0, 0.0]]])
        >>> round(attention_kl(student, teacher).item(), 4)  # log(2) / 2
        0.3466
    """
    _check_scores(student_scores=student_scores, teacher_scores=teacher_scores)
    _check_square((mask, segment), student_scores=student_scores)
    student, teacher = promote(student_scores, teacher_scores)
    shape = (*student.shape[:-3], student.shape[-1])
    real = _token_mask(mask, shape)
    pairs = _pairs(real, segment, shape)
    student, teacher = _real_tokens(student, real), _real_tokens(teacher, real)
    rows = jnp.mean(_row_kl(student, teacher, None if pairs is None else pairs[..., None, :, :]), axis=-2)
    return _mean_over_queries(rows, real)


def _relation_kl(student, teacher, mask, segment):
    """Mean over heads and tokens of the KL between softmax(x xᵀ / sqrt(d)); both ``[..., heads, tokens, d]`` with a d each."""
    shape = (*student.shape[:-3], student.shape[-2])
    real = _token_mask(mask, shape)
    pairs = _pairs(real, segment, shape)

    def scores(x):
        return gram(x) / math.sqrt(x.shape[-1])

    def one_head(student, teacher):
        return _row_kl(scores(student), scores(teacher), pairs)

    return _mean_over_queries(_mean_over_heads(one_head, _real_tokens(student, real), _real_tokens(teacher, real)), real)


def value_relation_kl(
    student_values: Real[Array, "*batch heads tokens student_dim"],
    teacher_values: Real[Array, "*batch heads tokens teacher_dim"],
    *,
    mask: Bool[Array, "*batch tokens"] | Real[Array, "*batch tokens"] | None = None,
    segment: Int[Array, "*batch tokens"] | None = None,
) -> Float[Array, "*batch"]:
    """``mean_hi KL(R_hi || S_hi)``, R the rows of softmax(v vᵀ / sqrt(d)) of the teacher's values and S the student's.

    Args:
        student_values: ``[..., heads, tokens, dim]``.
        teacher_values: ``[..., heads, tokens, dim]``: as many heads, a ``dim`` of its own.
        mask: ``[..., tokens]``, 1 = real.
        segment: int ``[..., tokens]``; tokens are compared only where it is equal. None: a row is one document.

    Returns:
        ``[...]`` in nats, one value for each example.

    Source:
        [MiniLM, value relation] Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of
        Pre-Trained Transformers", NeurIPS 2020, arXiv:2002.10957, the self-attention value-relation transfer.

    Code versus paper:
        No official code; the paper's 1 / (A_h |x|) is the mean over heads and tokens. Weight 1. The teacher is detached.

    Example:
        >>> values = jnp.arange(6.0).reshape(1, 3, 2)
        >>> bool(abs(value_relation_kl(values, values[..., ::-1])) < 1e-5)  # a rotation of a head's values keeps its relations
        True
    """
    values = {"student_values": student_values, "teacher_values": teacher_values}
    check_rank(3, "[..., heads, tokens, dim]", **values)
    for axis, meaning in ((-1, "dim"), (-2, "tokens"), (-3, "heads")):
        check_nonempty(axis, meaning, **values)
    if np.shape(student_values)[:-1] != np.shape(teacher_values)[:-1]:
        raise ValueError(
            f"teacher_values must have the batch, heads and tokens (all axes but the last) of student_values "
            f"{describe(student_values)}, got {describe(teacher_values)}"
        )
    student, teacher = promote(student_values, teacher_values)
    return _relation_kl(student, teacher, mask, segment)


def self_relation_kl(
    student_vectors: Real[Array, "*batch tokens student_dim"],
    teacher_vectors: Real[Array, "*batch tokens teacher_dim"],
    *,
    heads: int,
    mask: Bool[Array, "*batch tokens"] | Real[Array, "*batch tokens"] | None = None,
    segment: Int[Array, "*batch tokens"] | None = None,
) -> Float[Array, "*batch"]:
    """``mean_hi KL(R_hi || S_hi)``, R the rows of softmax(x xᵀ / sqrt(d)) with the teacher's vectors cut into ``heads`` parts.

    Args:
        student_vectors: ``[..., tokens, dim]``: the queries, keys or values of one layer, all heads side by side.
        teacher_vectors: ``[..., tokens, dim]``, a ``dim`` of its own.
        heads: number of relation heads; it must divide both dims, and need not be the number of attention heads. 48 for base
            and 64 for large teachers in the paper.
        mask: ``[..., tokens]``, 1 = real.
        segment: int ``[..., tokens]``; tokens are compared only where it is equal. None: a row is one document.

    Returns:
        ``[...]`` in nats, one value for each example.

    Source:
        [MiniLMv2] Wang et al., "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained
        Transformers", ACL Findings 2021, arXiv:2012.15828, the multi-head self-attention relations.

    Code versus paper:
        As minilmv2.bb: the mean over an example's real tokens, then over the batch. Queries, keys and values are three calls of
        weight 1/3. The teacher's layer is the last for base models, 21 of 24 for BERT-large. The teacher is detached.

    Example:
        >>> vectors = jnp.arange(12.0).reshape(3, 4)
        >>> bool(abs(self_relation_kl(vectors, vectors, heads=2)) < 1e-5)
        True
    """
    vectors = {"student_vectors": student_vectors, "teacher_vectors": teacher_vectors}
    check_rank(2, "[..., tokens, dim]", **vectors)
    for axis, meaning in ((-1, "dim"), (-2, "tokens")):
        check_nonempty(axis, meaning, **vectors)
    if np.shape(student_vectors)[:-1] != np.shape(teacher_vectors)[:-1]:
        raise ValueError(
            f"teacher_vectors must have the batch and tokens (all axes but the last) of student_vectors "
            f"{describe(student_vectors)}, got {describe(teacher_vectors)}"
        )
    for name, array in vectors.items():
        if heads < 1 or np.shape(array)[-1] % heads:
            raise ValueError(f"heads must divide the last axis of {name} {describe(array)}, got {heads}")

    def split(x):
        return jnp.swapaxes(x.reshape(*x.shape[:-1], heads, -1), -3, -2)

    student, teacher = promote(student_vectors, teacher_vectors)
    return _relation_kl(split(student), split(teacher), mask, segment)
