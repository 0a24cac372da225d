"""Losses that treat the label's class apart from the others, or compare rows and columns of the probability matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jkd.losses._common import (
    at_label,
    check_classes,
    check_labels,
    is_label,
    kl,
    log_softmax,
    promote,
)
from jkd.losses._typing import Array, Float, Int, PerPosition, Real, Scalar


def _without_label(logits, labels, temperature):
    """Log-probabilities among the classes that are not the label; -inf at the label."""
    return log_softmax(jnp.where(is_label(labels, logits.shape[-1]), -jnp.inf, logits), temperature)


def dkd(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    temperature: PerPosition = 4.0,
) -> Float[Array, "*batch"]:
    """``T² (alpha KL(b_t || b_s) + beta KL(p^ || q^))``, b = (p_y, 1 - p_y) and p^, q^ renormalised without the label y.

    With alpha = 1 and beta = 1 - p_y this is `forward_kl`, exactly.

    Args:
        student_logits: ``[..., classes]``, at least two classes.
        teacher_logits: ``[..., classes]``.
        labels: int ``[...]``.
        alpha: weight of the target part (TCKD). The paper uses 1.
        beta: weight of the rest (NCKD), a scalar. The paper uses 8 for ResNet32x4 to 8x4, 2 for 56 to 20, 6 for VGG13 to VGG8,
            0.5 on ImageNet.
        temperature: T. 4 on CIFAR, 1 on ImageNet.

    Returns:
        ``[...]`` in nats.

    Source:
        [DKD] Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679, equation 7.

    Code versus paper:
        The code removes the label by subtracting 1000 from its logit / T, which leaves a trace where logits differ by more than
        that; here it is removed exactly. It also multiplies the whole term by min(epoch / 20, 1).

    Example:
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([3.0, 0.0, 1.0])
        >>> dkd(student, teacher, jnp.array(0), alpha=1.0, beta=8.0, temperature=4.0).round(4).item()
        1.0193
    """
    check_classes(student_logits, teacher_logits)
    check_labels(labels, student_logits)
    student, teacher = promote(student_logits, teacher_logits)
    target = is_label(labels, student.shape[-1])
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    rest_q = jnp.where(target, -jnp.inf, log_q)
    rest_p = jnp.where(target, -jnp.inf, log_p)
    log_rest_q = jax.nn.logsumexp(rest_q, axis=-1, keepdims=True)
    log_rest_p = jax.nn.logsumexp(rest_p, axis=-1, keepdims=True)
    tckd = kl(
        jnp.concatenate([at_label(log_p, labels)[..., None], log_rest_p], axis=-1),
        jnp.concatenate([at_label(log_q, labels)[..., None], log_rest_q], axis=-1),
    )
    nckd = kl(_without_label(teacher, labels, temperature), _without_label(student, labels, temperature))
    return (alpha * tckd + beta * nckd) * (temperature * temperature)
