"""Losses against a teacher of which only some classes were kept, or whose vocabulary is another one.

``teacher_ids`` ``[..., k]`` are class indices and ``teacher_log_probs`` ``[..., k]`` the teacher's log-probabilities of them: at
temperature 1 for top-k losses, which divide them by T, and at T for `sampled_forward_kl`. An entry of -inf (or of weight 0) is
padding, whatever its id.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    check_nonempty,
    check_numeric,
    check_rank,
    check_same_shape,
    describe,
    indices,
    kl,
    log_softmax,
    log_softmax_of,
    masked_logsumexp,
    promote,
    squared,
    tempered,
)
from jkd.losses._typing import Array, Float, Int, PerPosition, Real

Tail = Literal["zero", "renormalise", "ghost"]


def _check_ids(student_logits, teacher_ids, **others):
    check_rank(1, "[..., vocab]", student_logits=student_logits)
    check_nonempty(-1, "vocab", student_logits=student_logits)
    check_numeric(teacher_ids=teacher_ids, **others)
    if not jnp.issubdtype(teacher_ids.dtype, jnp.integer):
        raise TypeError(f"teacher_ids must be integers, got {describe(teacher_ids)}")
    if np.shape(teacher_ids)[:-1] != np.shape(student_logits)[:-1] or np.ndim(teacher_ids) != np.ndim(student_logits):
        raise ValueError(
            f"teacher_ids must be [..., k] with the leading shape of student_logits {describe(student_logits)}, "
            f"got {describe(teacher_ids)}"
        )
    check_same_shape(teacher_ids=teacher_ids, **others)


def _topk(student_logits, teacher_ids, teacher_log_probs, teacher_leftover, tail, temperature, *, least=0.0):
    """Log-probabilities of student and teacher on the kept classes, and for ``ghost`` on the rest as one more class.

    ``least`` stands for a leftover that is not above 0 where the student has classes outside.
    """
    _check_ids(student_logits, teacher_ids, teacher_log_probs=teacher_log_probs)
    if tail not in ("zero", "renormalise", "ghost"):
        raise ValueError(f"tail must be 'zero', 'renormalise' or 'ghost', got {tail!r}")
    student, log_p = promote(student_logits, teacher_log_probs)
    student, log_p = tempered(student, temperature), tempered(log_p, temperature)
    teacher_ids = indices(teacher_ids)
    real = log_p > -jnp.inf
    chosen = jnp.take_along_axis(student, teacher_ids, axis=-1, mode="clip")
    if tail == "ghost":
        if teacher_leftover is None:
            raise ValueError("teacher_leftover (the mass that was not kept) is needed by tail='ghost'")
        if np.shape(teacher_leftover) != np.shape(student_logits)[:-1]:
            raise ValueError(
                f"teacher_leftover must have the shape of student_logits {describe(student_logits)} without its last axis, "
                f"got {describe(teacher_leftover)}"
            )
        # The student's own rest is summed over the classes that were not kept: 1 - sum of the kept would cancel.
        vocab = student.shape[-1]
        outside = jnp.put_along_axis(
            jnp.ones(student.shape, bool), jnp.where(real, teacher_ids, vocab), False, axis=-1, inplace=False, mode="drop"
        )
        rest = masked_logsumexp(student, outside)[..., None]
        leftover = jnp.asarray(teacher_leftover, log_p.dtype)[..., None]
        leftover = jnp.where((leftover <= 0) & (rest > -jnp.inf), least, leftover)
        some = leftover > 0
        ghost = tempered(jnp.where(some, jnp.log(jnp.where(some, leftover, 1)), -jnp.inf), temperature)
        log_p = jnp.concatenate([log_p, ghost], axis=-1)
        log_q = log_softmax(jnp.concatenate([jnp.where(real, chosen, -jnp.inf), rest], axis=-1))
    elif tail == "renormalise":
        log_q = log_softmax(jnp.where(real, chosen, -jnp.inf))
    else:
        everything = masked_logsumexp(student, jnp.ones(student.shape, bool))
        log_q = chosen - everything[..., None]
    return log_q, log_softmax(log_p)


def topk_forward_kl(
    student_logits: Real[Array, "*batch vocab"],
    teacher_ids: Int[Array, "*batch k"],
    teacher_log_probs: Real[Array, "*batch k"],
    teacher_leftover: Real[Array, "*batch"] | None = None,
    *,
    tail: Tail = "ghost",
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² sum_(c kept) p_c (log p_c - log q_c)``, and with a ghost ``+ T² p_rest (log p_rest - log q_rest)``.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_ids: int ``[..., k]``, without repeats.
        teacher_log_probs: ``[..., k]``.
        teacher_leftover: ``[...]``, the probability of all other classes together; only ``ghost`` reads it.
        tail: ``"ghost"``: the other classes are one class on both sides; at most the full `forward_kl`, and 0 only where the
            kept probabilities agree. ``"zero"``: the teacher's kept classes are scaled up to 1, so the student is pushed to
            p / sum(p), more certain than the teacher. ``"renormalise"``: the student's too, so its other classes are free.
        temperature: T. The kept log-probabilities are divided by it, exactly for the two others; for ``ghost`` the rest becomes
            leftover^(1 / T), an approximation (the rest is not one class) that is exact at T = 1.

    Returns:
        ``[...]`` in nats.

    Source:
        [top-k KD] the policies of DistillKit (``distillkit/lossfuncs/common.py`` and ``kl.py``); how ``zero`` biases the
        student: Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025,
        arXiv:2503.16870.

    Code versus paper:
        DistillKit clamps both rests to [1e-8, 1 - 1e-8]; here they are exact, and a leftover of 0 has no part in the sum.

    Example:
        >>> log_p = jnp.log(jnp.array([0.5, 0.3]))
        >>> print(f"{topk_forward_kl(jnp.zeros(4), jnp.array([2, 0]), log_p, jnp.array(0.2)):.4f}")
        0.2180
    """
    log_q, log_p = _topk(student_logits, teacher_ids, teacher_log_probs, teacher_leftover, tail, temperature)
    return kl(log_p, log_q) * squared(temperature)


def topk_reverse_kl(
    student_logits: Real[Array, "*batch vocab"],
    teacher_ids: Int[Array, "*batch k"],
    teacher_log_probs: Real[Array, "*batch k"],
    teacher_leftover: Real[Array, "*batch"] | None = None,
    *,
    tail: Tail = "ghost",
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² sum_(c kept) q_c (log q_c - log p_c)``, and with a ghost ``+ T² q_rest (log q_rest - log p_rest)``.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_ids: int ``[..., k]``, without repeats.
        teacher_log_probs: ``[..., k]``.
        teacher_leftover: ``[...]``, as in `topk_forward_kl`. Where it is not above 0 (a float32 sum of the kept may reach 1) it
            counts as 1e-8, DistillKit's least: leaving the rest out would reward a student for moving its mass there. Where all
            classes are kept there is no rest.
        tail: ``"ghost"`` or ``"renormalise"``, as in `topk_forward_kl`. ``"zero"`` is refused: the student's mass outside would
            cost infinitely much, and leaving it out rewards a student for moving all its mass there.
        temperature: as in `topk_forward_kl`.

    Returns:
        ``[...]`` in nats.

    Source:
        [top-k RKL] as `topk_forward_kl`, with the arguments of the divergence swapped.

    Code versus paper:
        DistillKit clamps both rests to [1e-8, 1 - 1e-8]; here they are exact, but for a leftover of 0.

    Example:
        >>> log_p = jnp.log(jnp.array([0.5, 0.3]))
        >>> print(f"{topk_reverse_kl(jnp.zeros(4), jnp.array([2, 0]), log_p, jnp.array(0.2)):.4f}")
        0.2393
    """
    if tail == "zero":
        raise ValueError("tail='zero' makes the reverse KL infinite; use 'ghost' or 'renormalise'")
    log_q, log_p = _topk(student_logits, teacher_ids, teacher_log_probs, teacher_leftover, tail, temperature, least=1e-8)
    return kl(log_q, log_p) * squared(temperature)


def sampled_forward_kl(
    student_logits: Real[Array, "*batch vocab"],
    teacher_ids: Int[Array, "*batch k"],
    teacher_weights: Real[Array, "*batch k"],
    teacher_log_probs: Real[Array, "*batch k"] | None = None,
    *,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² sum_i w_i (log p_i - log q_i)`` over classes drawn from the teacher: unbiased for `forward_kl` and its gradient.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_ids: int ``[..., k]``, drawn with replacement from p = softmax(z / T) (repeats allowed, or merged).
        teacher_weights: ``[..., k]``. N draws from p: how often each was drawn / N. Draws from another distribution r, such as
            the teacher's own at temperature 1: the same times p / r with p at T, and not normalised to sum 1 (that would bias
            it). 0 is padding.
        teacher_log_probs: ``[..., k]``, log p of the ids at the same T: those at temperature 1 bias the value, and T cannot be
            changed afterwards, for its normaliser needs all classes. None leaves the teacher's part out, which is then
            `soft_cross_entropy`, with the same gradient.
        temperature: T, of p and of the student's q.

    Returns:
        ``[...]`` in nats; a single estimate may be negative.

    Source:
        [RS-KD] Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025,
        arXiv:2503.16870, random sampling knowledge distillation. About 50 draws are about 12 different ids.

    Code versus paper:
        No code was published when this was written: its repository held none.

    Example:
        >>> ids, weights = jnp.array([0, 1]), jnp.array([0.5, 0.5])
        >>> print(f"{sampled_forward_kl(jnp.zeros(4), ids, weights, jnp.log(weights)):.4f}")
        0.6931
    """
    others = {"teacher_weights": teacher_weights}
    if teacher_log_probs is not None:
        others["teacher_log_probs"] = teacher_log_probs
    _check_ids(student_logits, teacher_ids, **others)
    student, weights = promote(student_logits, teacher_weights)
    log_q = log_softmax_of(tempered(student, temperature), teacher_ids)
    used = (weights != 0) & (log_q > -jnp.inf)
    terms = -jnp.where(used, log_q, 0)
    if teacher_log_probs is not None:
        terms += jnp.where(used, jnp.asarray(teacher_log_probs, log_q.dtype), 0)
    return jnp.sum(jnp.where(used, weights, 0) * terms, axis=-1) * squared(temperature)


def uld(
    student_logits: Real[Array, "*batch vocab"],
    teacher_logits: Real[Array, "*batch teacher_vocab"],
    *,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``sum_i |q_(i) - p_(i)|`` over the falling probabilities, the shorter list filled up with 0: vocabularies may differ.

    Args:
        student_logits: ``[..., vocab]``.
        teacher_logits: ``[..., teacher_vocab]``, positions aligned with the student's.
        temperature: T. No T²: the value is a distance between probabilities.

    Returns:
        ``[...]``, between 0 and 2. It is the Wasserstein-1 distance for a cost of 1 between any two tokens, up to its factor.

    Source:
        [ULD] Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", TMLR 2025,
        arXiv:2402.12030, the Wasserstein distance under a uniform cost.

    Code versus paper:
        As the codes of DSKD and of TRL's GOLD, which align the starts of the two answers and compare positions by their index up
        to the shorter one's end.

    Example:
        >>> print(f"{uld(jnp.log(jnp.array([0.2, 0.8])), jnp.log(jnp.array([0.5, 0.3, 0.2]))):.4f}")
        0.6000
    """
    arrays = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    check_rank(1, "[..., vocab]", **arrays)
    check_nonempty(-1, "vocab", **arrays)
    if np.shape(student_logits)[:-1] != np.shape(teacher_logits)[:-1]:
        raise ValueError(
            f"teacher_logits must have the leading shape of student_logits {describe(student_logits)}, "
            f"got {describe(teacher_logits)}"
        )
    q, p = (jnp.exp(jnp.sort(log_softmax(z, temperature), descending=True)) for z in promote(student_logits, teacher_logits))
    shared = min(q.shape[-1], p.shape[-1])
    beyond = jnp.sum(q[..., shared:], axis=-1) + jnp.sum(p[..., shared:], axis=-1)
    return jnp.sum(jnp.abs(q[..., :shared] - p[..., :shared]), axis=-1) + beyond
