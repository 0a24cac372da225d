"""A teacher's logits changed, or several teachers' made one. Logits in, logits out: log-probabilities are logits too."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    check_classes,
    check_nonempty,
    check_rank,
    describe,
    log_mix,
    log_softmax,
    normalize,
    per_class,
    promote,
)
from jkd.losses._maps import einsum
from jkd.losses._typing import Array, Float, Key, PerPosition, Real, Scalar


def check_logits(teacher_logits) -> None:
    """``[..., classes]`` real numbers with at least one class."""
    check_rank(1, "[..., classes]", teacher_logits=teacher_logits)
    check_nonempty(-1, "classes", teacher_logits=teacher_logits)


def standardize(logits: Real[Array, "*batch classes"], *, eps: float = 1e-7) -> Float[Array, "*batch classes"]:
    """``(z - mean(z)) / (std(z) + eps)`` over the classes: the student need not match the teacher's scale. For both sides.

    Args:
        logits: ``[..., classes]``, student's or teacher's; at least two classes.
        eps: added to the standard deviation (the unbiased one, dividing by C - 1, as in the authors' code).

    Returns:
        ``[..., classes]``; all equal logits give 0. The paper goes on with `losses.forward_kl` at T = 2 and coef 9.

    Source:
        [LS-KD, Z-score] Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv:2403.01427, Z-score
        standardisation.

    Example:
        >>> print(standardize(jnp.array([1.0, 2.0, 3.0])))
        [-0.9999999  0.         0.9999999]
    """
    check_rank(1, "[..., classes]", logits=logits)
    if np.shape(logits)[-1] < 2:
        raise ValueError(f"logits must have at least 2 classes (last axis), got {describe(logits)}")
    (z,) = promote(logits)
    z = z - jnp.mean(z, axis=-1, keepdims=True)
    variance = jnp.sum(z * z, axis=-1, keepdims=True) / (z.shape[-1] - 1)
    positive = variance > 0
    deviation = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 1)
    # Equal logits: z is 0 whatever it is divided by; 1 instead of eps keeps the gradient from growing to 1 / eps.
    return z / (deviation + eps)


def smooth(teacher_logits: Real[Array, "*batch classes"], *, epsilon: Scalar = 0.1) -> Float[Array, "*batch classes"]:
    """``log((1 - eps) p + eps / C)``: a share of the teacher's probability spread evenly.

    Args:
        teacher_logits: ``[..., classes]``.
        epsilon: eps; 0.1 as in label smoothing.

    Returns:
        ``[..., classes]`` log-probabilities.

    Source:
        [LS] Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, arXiv:1512.00567,
        label-smoothing regularisation with p in the label's place.

    Example:
        >>> print(np.exp(smooth(jnp.log(jnp.array([1.0, 0.0])))).round(2))
        [0.95 0.05]
    """
    check_logits(teacher_logits)
    (logits,) = promote(teacher_logits)
    uniform = jnp.full(logits.shape, -np.log(logits.shape[-1]), logits.dtype)
    return log_mix(epsilon, uniform, log_softmax(logits))


def sharpen(teacher_logits: Real[Array, "*batch classes"], *, temperature: PerPosition = 0.5) -> Float[Array, "*batch classes"]:
    """``log(p^(1/T) / sum p^(1/T))``: more certain for T < 1, less for T > 1. Only the teacher's side, so without T².

    Args:
        teacher_logits: ``[..., classes]``.
        temperature: T. MixMatch uses 0.5; SALT's 0.25.

    Returns:
        ``[..., classes]`` log-probabilities.

    Source:
        [sharpening] Berthelot et al., "MixMatch: A Holistic Approach to Semi-Supervised Learning", NeurIPS 2019,
        arXiv:1905.02249, the sharpening function.

    Example:
        >>> print(np.exp(sharpen(jnp.log(jnp.array([0.75, 0.25])))).round(2))
        [0.9 0.1]
    """
    check_logits(teacher_logits)
    (logits,) = promote(teacher_logits)
    return log_softmax(logits, temperature)


def _check_teachers(teacher_logits, weights) -> None:
    check_rank(2, "[teachers, ..., classes]", teacher_logits=teacher_logits)
    check_nonempty(-1, "classes", teacher_logits=teacher_logits)
    check_nonempty(0, "teachers", teacher_logits=teacher_logits)
    if weights is not None and np.shape(weights) != np.shape(teacher_logits)[:1]:
        raise ValueError(f"weights must be [teachers] for teacher_logits {describe(teacher_logits)}, got {describe(weights)}")


def _weighted(weight, logits):
    """``weight * logits``; a class at -inf stays there, and is nothing at weight 0 (not 0 * -inf = nan)."""
    kept = logits != -jnp.inf
    return jnp.where(kept, weight * jnp.where(kept, logits, 0), jnp.where(weight == 0, 0, -jnp.inf))


def mean_probabilities(
    teacher_logits: Real[Array, "teachers *batch classes"],
    *,
    weights: Real[Array, " teachers"] | None = None,
    temperature: Scalar = 1.0,
) -> Float[Array, "*batch classes"]:
    """``T log sum_k w_k softmax(z_k / T)``: whose softmax at T is the mean of the teachers' softmaxes at T.

    Args:
        teacher_logits: ``[teachers, ..., classes]``.
        weights: ``[teachers]``, scaled to sum 1; None is equal.
        temperature: T, the one that the loss will use.

    Returns:
        ``[..., classes]`` logits.

    Source:
        [MEAL V2] Shen, Savvides, "MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks", 2020,
        arXiv:2009.08453, the average of the teachers' softmax predictions.

    Example:
        >>> two = jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
        >>> print(np.exp(mean_probabilities(two)).round(2))
        [0.7 0.3]
    """
    _check_teachers(teacher_logits, weights)
    (logits,) = promote(teacher_logits)
    shares = jnp.ones(logits.shape[0], logits.dtype) if weights is None else jnp.asarray(weights, logits.dtype)
    shares = (shares / jnp.sum(shares)).reshape((-1,) + (1,) * (logits.ndim - 1))
    log_p = log_softmax(logits, temperature)
    top = jax.lax.stop_gradient(jnp.max(log_p, axis=0, keepdims=True))
    top = jnp.where(top > -jnp.inf, top, 0)
    total = jnp.sum(shares * jnp.exp(log_p - top), axis=0)
    some = total > 0
    # T inside: -inf times the gradient 0 of a class that no teacher has would be nan.
    return jnp.where(some, temperature * (jnp.log(jnp.where(some, total, 1)) + top[0]), -jnp.inf)


def mean_logits(
    teacher_logits: Real[Array, "teachers *batch classes"], *, weights: Real[Array, " teachers"] | None = None
) -> Float[Array, "*batch classes"]:
    """``sum_k w_k z_k``: the teachers' geometric mean, less swayed by one certain teacher than `mean_probabilities`.

    Args:
        teacher_logits: ``[teachers, ..., classes]``.
        weights: ``[teachers]``, scaled to sum 1; None is equal. CV-DD takes softmax(accuracy / 10) of the teachers.

    Returns:
        ``[..., classes]`` logits.

    Source:
        [CV-DD] Cui et al., "Dataset Distillation via Committee Voting", 2025, arXiv:2501.07575, the voted soft labels.

    Example:
        >>> print(mean_logits(jnp.array([[0.0, 2.0], [1.0, 0.0]])))
        [0.5 1. ]
    """
    _check_teachers(teacher_logits, weights)
    (logits,) = promote(teacher_logits)
    if weights is None:
        return jnp.mean(logits, axis=0)
    shares = jnp.asarray(weights, logits.dtype)
    shares = (shares / jnp.sum(shares)).reshape((-1,) + (1,) * (logits.ndim - 1))
    return jnp.sum(_weighted(shares, logits), axis=0)


def noise(
    teacher_logits: Real[Array, "*batch classes"], key: Key[Array, ""] | Real[Array, "2"], *, scale: PerPosition = 1.0
) -> Float[Array, "*batch classes"]:
    """``z + scale e``, e normal with variance 1: what a student can read out of the logits is bounded.

    Args:
        teacher_logits: ``[..., classes]``.
        key: a JAX random key.
        scale: a scalar, or one for each position (larger for private tokens).

    Returns:
        ``[..., classes]`` logits.

    Source:
        [Sau] Sau, Balasubramanian, "Deep Model Compression: Distilling Knowledge from Noisy Teachers", 2016, arXiv:1610.09650;
        per token as in Swing Distillation (Li et al., 2022, arXiv:2212.08349).

    Code versus paper:
        Sau scales the logits by 1 + e for some of the examples; here noise is added. Swing's exact schedule is unpublished.

    Example:
        >>> print(noise(jnp.array([1.0, 2.0]), jax.random.key(0), scale=0.0))
        [1. 2.]
    """
    check_logits(teacher_logits)
    (logits,) = promote(teacher_logits)
    return logits + per_class(scale) * jax.random.normal(key, logits.shape, logits.dtype)


def interpolate(
    student_logits: Real[Array, "*batch classes"], teacher_logits: Real[Array, "*batch classes"], *, t: PerPosition
) -> Float[Array, "*batch classes"]:
    """``(1 - t) z_s + t z_t``: a teacher that moves from the student (t = 0) to the teacher (t = 1).

    Args:
        student_logits: ``[..., classes]``; no gradient passes through them (the target is a target).
        teacher_logits: ``[..., classes]``.
        t: between 0 and 1. The paper starts at 0.4 and lets t rise faster while the loss falls.

    Returns:
        ``[..., classes]`` logits, for `losses.forward_kl` or `losses.soft_cross_entropy`.

    Source:
        [TAID] Shing et al., "TAID: Temporally Adaptive Interpolated Distillation for Efficient Knowledge Transfer in Language
        Models", ICLR 2025, arXiv:2501.16937, the interpolation of logits.

    Example:
        >>> print(interpolate(jnp.array([0.0, 1.0]), jnp.array([2.0, 1.0]), t=0.25))
        [0.5 1. ]
    """
    check_classes(student_logits, teacher_logits)
    student, teacher = promote(jax.lax.stop_gradient(student_logits), teacher_logits)
    share = per_class(t)
    return _weighted(1 - share, student) + _weighted(share, teacher)


def prototype(
    teacher_features: Real[Array, "*batch dim"],
    prototypes: Real[Array, "classes dim"],
    *,
    scale: Scalar = 10.0,
    background: float | None = 0.0,
) -> Float[Array, "*batch outputs"]:
    """``scale cos(f, P_c)`` for each class, and ``background`` as one more class.

    Args:
        teacher_features: ``[..., dim]``.
        prototypes: ``[classes, dim]``, a mean feature for each class.
        scale: the inverse temperature. The paper uses 10.
        background: the last class's logit; the paper appends 0. None appends no class.

    Returns:
        ``[..., classes + 1]`` logits (``[..., classes]`` without background). A feature of 0 gives equal logits.

    Source:
        [PS-TTL] Gao et al., "PS-TTL: Prototype-based Soft-labels and Test-Time Learning for Few-shot Object Detection", ACM MM
        2024, arXiv:2408.05674, the prototype-based soft labels.

    Example:
        >>> print(prototype(jnp.array([2.0, 0.0]), jnp.eye(2)))
        [10.  0.  0.]
    """
    check_rank(1, "[..., dim]", teacher_features=teacher_features)
    check_rank(2, "[classes, dim]", prototypes=prototypes)
    if np.ndim(prototypes) != 2 or np.shape(prototypes)[1] != np.shape(teacher_features)[-1]:
        raise ValueError(
            f"prototypes must be [classes, dim] with the dim of teacher_features {describe(teacher_features)}, "
            f"got {describe(prototypes)}"
        )
    features, means = promote(teacher_features, prototypes)
    logits = scale * einsum("...d,cd->...c", normalize(features), normalize(means))
    if background is None:
        return logits
    return jnp.concatenate([logits, jnp.full((*logits.shape[:-1], 1), background, logits.dtype)], axis=-1)
