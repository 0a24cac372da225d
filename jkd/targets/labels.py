"""Labels made of a teacher: the codecs of stored soft labels, targets that mix in the true label, and subclasses.

Each returns log-probabilities ``[..., classes]``, which any loss takes as ``teacher_logits``; a probability of 0 is -inf.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    check_labels,
    check_nonempty,
    check_rank,
    describe,
    is_label,
    log_mix,
    log_softmax,
    promote,
)
from jkd.losses._typing import Array, Float, Int, Real, Scalar
from jkd.targets.teachers import check_logits


def _safe_log(p):
    positive = p > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, p, 1)), -jnp.inf)


def _top(teacher_logits, k):
    """Log-probabilities, and which classes are the k largest (ties: the first)."""
    check_logits(teacher_logits)
    classes = np.shape(teacher_logits)[-1]
    if not 1 <= k <= classes:
        raise ValueError(
            f"k must lie between 1 and the number of classes, got {k} for teacher_logits {describe(teacher_logits)}"
        )
    (logits,) = promote(teacher_logits)
    _, ids = jax.lax.top_k(logits, k)
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), ids, True, axis=-1, inplace=False)
    return log_softmax(logits), kept


def hard(teacher_logits: Real[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """``log onehot(argmax z)``: only the teacher's first choice is stored.

    Args:
        teacher_logits: ``[..., classes]``.

    Returns:
        ``[..., classes]`` log-probabilities: 0 at the first choice, -inf elsewhere.

    Source:
        [FKD, hard] Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, arXiv:2112.01528,
        hardened labels.

    Example:
        >>> print(hard(jnp.array([1.0, 3.0])))
        [-inf   0.]
    """
    log_p, kept = _top(teacher_logits, 1)
    return jnp.where(kept, jnp.zeros_like(log_p), -jnp.inf)


def smoothed(teacher_logits: Real[Array, "*batch classes"]) -> Float[Array, "*batch classes"]:
    """``log p_1`` at the first choice, ``log((1 - p_1) / (C - 1))`` elsewhere: the first choice and its probability are stored.

    Args:
        teacher_logits: ``[..., classes]``.

    Returns:
        ``[..., classes]`` log-probabilities.

    Source:
        [FKD, label smoothing] Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022,
        arXiv:2112.01528, smoothed labels.

    Example:
        >>> print(np.exp(smoothed(jnp.log(jnp.array([0.1, 0.6, 0.3])))).round(2))
        [0.2 0.6 0.2]
    """
    return marginal(teacher_logits, k=1)


def marginal(teacher_logits: Real[Array, "*batch classes"], *, k: int = 5) -> Float[Array, "*batch classes"]:
    """``log p_c`` for the k largest, ``log((1 - their sum) / (C - k))`` elsewhere: ids and probabilities of k are stored.

    Args:
        teacher_logits: ``[..., classes]``.
        k: the paper stores 5 (or 10).

    Returns:
        ``[..., classes]`` log-probabilities.

    Source:
        [FKD, MS] Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, arXiv:2112.01528,
        marginal smoothing with top-k.

    Example:
        >>> print(np.exp(marginal(jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1])), k=2)).round(2))
        [0.4  0.3  0.15 0.15]
    """
    log_p, kept = _top(teacher_logits, k)
    # The rest is summed over the other classes: 1 - the sum of the kept would cancel for a certain teacher.
    rest = jnp.sum(jnp.where(kept, 0, jnp.exp(log_p)), axis=-1, keepdims=True)
    return jnp.where(kept, log_p, _safe_log(rest / max(log_p.shape[-1] - k, 1)))


def renormalised(teacher_logits: Real[Array, "*batch classes"], *, k: int = 5) -> Float[Array, "*batch classes"]:
    """``log(p_c / sum of the k largest)`` for the k largest, -inf elsewhere: ids and probabilities of k are stored.

    Args:
        teacher_logits: ``[..., classes]``.
        k: the paper stores 5 (or 10).

    Returns:
        ``[..., classes]`` log-probabilities.

    Source:
        [FKD, MR] Shen, Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022, arXiv:2112.01528,
        marginal re-norm with top-k.

    Example:
        >>> print(np.exp(renormalised(jnp.log(jnp.array([0.4, 0.2, 0.2, 0.2])), k=1)).round(2))
        [1. 0. 0. 0.]
    """
    log_p, kept = _top(teacher_logits, k)
    return log_softmax(jnp.where(kept, log_p, -jnp.inf))


def progressive(
    teacher_logits: Real[Array, "*batch classes"], labels: Int[Array, "*batch"], *, alpha: Scalar
) -> Float[Array, "*batch classes"]:
    """``log((1 - alpha) onehot(label) + alpha p)``: the label, more and more replaced by the student's own last prediction.

    Args:
        teacher_logits: ``[..., classes]``, the same student's on this example one epoch ago.
        labels: int ``[...]``.
        alpha: the paper uses 0.8 (epoch + 1) / epochs.

    Returns:
        ``[..., classes]`` log-probabilities, for `losses.soft_cross_entropy`.

    Source:
        [PS-KD] Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021, arXiv:2006.12000,
        the softened targets and the growth of alpha.

    Example:
        >>> print(np.exp(progressive(jnp.zeros(2), jnp.array(1), alpha=0.5)).round(2))
        [0.25 0.75]
    """
    check_logits(teacher_logits)
    check_labels(labels, teacher_logits, logits_name="teacher_logits")
    (logits,) = promote(teacher_logits)
    one_hot = jnp.where(is_label(labels, logits.shape[-1]), jnp.zeros_like(logits), -jnp.inf)
    return log_mix(alpha, log_softmax(logits), one_hot)


def lelp_split(
    teacher_logits: Real[Array, "*batch classes"], subclass_logits: Real[Array, "*batch classes subclasses"]
) -> Float[Array, "*batch outputs"]:
    """``log p_c + log softmax_s(a_c,s)``: every class split into subclasses, its probability shared out among them.

    Args:
        teacher_logits: ``[..., classes]``.
        subclass_logits: ``[..., classes, subclasses]``. In the paper plus and minus the teacher's embedding along the main
            directions in which the class's own embeddings vary (outside the span of the teacher's last layer), divided by a
            temperature.

    Returns:
        ``[..., classes * subclasses]`` log-probabilities, class by class; the student has that many outputs.

    Source:
        [LELP] Loo et al., "Linear Projections of Teacher Embeddings for Few-Class Distillation", 2024, arXiv:2409.20449, the
        pseudo-subclasses.

    Code versus paper:
        No code was published.

    Example:
        >>> print(np.exp(lelp_split(jnp.zeros(2), jnp.zeros((2, 2)))).round(2))
        [0.25 0.25 0.25 0.25]
    """
    check_logits(teacher_logits)
    check_rank(2, "[..., classes, subclasses]", subclass_logits=subclass_logits)
    check_nonempty(-1, "subclasses", subclass_logits=subclass_logits)
    if np.shape(subclass_logits)[:-1] != np.shape(teacher_logits):
        raise ValueError(
            f"subclass_logits must be [..., classes, subclasses] for teacher_logits {describe(teacher_logits)}, "
            f"got {describe(subclass_logits)}"
        )
    logits, subclasses = promote(teacher_logits, subclass_logits)
    joint = log_softmax(logits)[..., None] + log_softmax(subclasses)
    return joint.reshape((*logits.shape[:-1], -1))


def lelp_merge(student_logits: Real[Array, "*batch outputs"], *, subclasses: int) -> Float[Array, "*batch classes"]:
    """``log sum_s exp z_c,s``: the student's classes again, whose softmax is the sum over the subclasses' softmax.

    Args:
        student_logits: ``[..., classes * subclasses]``, as `lelp_split` orders them.
        subclasses: how many each class has. The paper tries 5 to 10.

    Returns:
        ``[..., classes]`` logits.

    Source:
        [LELP] Loo et al., "Linear Projections of Teacher Embeddings for Few-Class Distillation", 2024, arXiv:2409.20449, the
        pseudo-subclasses.

    Example:
        >>> print(lelp_merge(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), subclasses=2).shape)
        (2,)
    """
    check_rank(1, "[..., classes * subclasses]", student_logits=student_logits)
    check_nonempty(-1, "classes * subclasses", student_logits=student_logits)
    outputs = np.shape(student_logits)[-1]
    if subclasses < 1 or outputs % subclasses:
        raise ValueError(f"subclasses must divide the last axis of student_logits {describe(student_logits)}, got {subclasses}")
    (logits,) = promote(student_logits)
    return jax.nn.logsumexp(logits.reshape((*logits.shape[:-1], outputs // subclasses, subclasses)), axis=-1)
