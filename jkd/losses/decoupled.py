"""Losses that treat the label's class apart from the others, or the classes as independent yes/no questions.

A class that one side masks with -inf (a padded vocabulary) contributes nothing.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    at_label,
    check_classes,
    check_labels,
    check_where,
    cross_entropy_of,
    cross_entropy_of_logits,
    describe,
    is_label,
    kl,
    log_ratio,
    log_softmax,
    log_softmax_at,
    masked_logsumexp,
    masked_mean,
    promote,
    softplus,
    squared,
    tempered,
)
from jkd.losses._typing import Array, Bool, Float, Int, PerPosition, Real, Scalar
from jkd.losses.divergences import cross_entropy


def _checked(student_logits, teacher_logits, labels, *, teacher="teacher_logits"):
    check_classes(student_logits, teacher_logits, teacher=teacher)
    check_labels(labels, student_logits)
    if np.shape(student_logits)[-1] < 2:
        raise ValueError(f"student_logits must have at least 2 classes (last axis), got {describe(student_logits)}")
    return promote(student_logits, teacher_logits)


def _apart(logits, labels, temperature):
    """The label's logit, the others' log-sum-exp, and the others' log-probabilities (-inf at the label), all at T.

    Removing the label before the softmax, rather than dividing probabilities by 1 - p_y, keeps the others exact where p_y
    rounds to 1.
    """
    scaled = tempered(logits, temperature)
    others = ~is_label(labels, logits.shape[-1])
    rest = masked_logsumexp(scaled, others)
    # Where every other class is masked there is no rest: its log-probabilities are all -inf.
    some = (rest > -jnp.inf)[..., None]
    log_others = jnp.where(others & some, scaled - jnp.where(some, rest[..., None], 0), -jnp.inf)
    return at_label(scaled, labels), rest, log_others


def _label_or_not(label, rest):
    """``[..., 2]`` log-probabilities of the label and of all others together."""
    return log_softmax(jnp.stack([label, rest], axis=-1))


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

    With alpha = 1 and 1 - p_y (at T) in beta's place this is `forward_kl`, exactly.

    Args:
        student_logits: ``[..., classes]``, at least two classes.
        teacher_logits: ``[..., classes]``.
        labels: int ``[...]``.
        alpha: weight of the target part (TCKD). The paper uses 1.
        beta: weight of the rest (NCKD). The paper uses 8 for ResNet32x4 to 8x4, 2 for 56 to 20, 6 for VGG13 to VGG8, 0.5 on
            ImageNet.
        temperature: T. The paper uses 4 on CIFAR and 1 on ImageNet.

    Returns:
        ``[...]`` in nats.

    Source:
        [DKD] Zhao et al., "Decoupled Knowledge Distillation", CVPR 2022, arXiv:2203.08679, the weighted sum of TCKD and NCKD.

    Code versus paper:
        The code removes the label by subtracting 1000 from its logit / T, which leaves a trace where logits differ by more;
        here it is removed exactly. It also multiplies the whole term by min(epoch / 20, 1).

    Example:
        >>> student, teacher = jnp.array([2.0, 1.0, 0.0]), jnp.array([3.0, 0.0, 1.0])
        >>> print(f"{dkd(student, teacher, jnp.array(0), alpha=1.0, beta=8.0, temperature=4.0):.4f}")
        4.1034
    """
    student, teacher = _checked(student_logits, teacher_logits, labels)
    label_q, rest_q, others_q = _apart(student, labels, temperature)
    label_p, rest_p, others_p = _apart(teacher, labels, temperature)
    target = kl(_label_or_not(label_p, rest_p), _label_or_not(label_q, rest_q))
    return (alpha * target + beta * kl(others_p, others_q)) * squared(temperature)


def nkd(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    gamma: Scalar = 1.5,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``- p_y log q_y - gamma T² sum_(c != y) p^_c log q^_c``, p^ and q^ renormalised without the label y (p_y, q_y at T = 1).

    Args:
        student_logits: ``[..., classes]``, at least two classes.
        teacher_logits: ``[..., classes]``.
        labels: int ``[...]``.
        gamma: weight of the rest. The paper uses 1.5 on ImageNet (T = 1) and 3.5 on CIFAR (T = 3), 1.0 for ViT.
        temperature: T, of the rest only.

    Returns:
        ``[...]`` in nats. It is added to a cross-entropy with the labels.

    Source:
        [NKD] Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
        and Customized Soft Labels", ICCV 2023, arXiv:2303.13005, the NKD loss.

    Code versus paper:
        As the code (cls_KD). It detaches p_y and the teacher's rest, which are constants unless the teacher is trained too.

    Example:
        >>> print(f"{nkd(jnp.zeros(3), jnp.zeros(3), jnp.array(0), gamma=1.0):.4f}")
        1.0594
    """
    student, teacher = _checked(student_logits, teacher_logits, labels)
    label_q, label_p = log_softmax_at(student, labels), log_softmax_at(teacher, labels)
    _, _, others_q = _apart(student, labels, temperature)
    _, _, others_p = _apart(teacher, labels, temperature)
    rest = cross_entropy_of(jnp.exp(others_p), others_q)
    return -jnp.exp(label_p) * label_q + gamma * rest * squared(temperature)


def uskd(
    student_logits: Real[Array, "*batch classes"],
    weak_logits: Real[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 0.1,
    mu: Scalar = 0.005,
    where: Bool[Array, "*batch"] | Real[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    """``- alpha t log q_y - beta sum_(c != y) r_c log q^_c - mu sum_c y_c log w_c``, t = q_y² + 1 - mean(q_y²), r_c ~ 1 / rank.

    Self-distillation: the targets t and r (Zipf's law over the classes ordered by the student and a weak head on an earlier
    layer) are made from the student and receive no gradient; y is the label smoothed by 0.1.

    Args:
        student_logits: ``[..., classes]``, at least two classes.
        weak_logits: ``[..., classes]``, of the weak head w, which this loss also trains.
        labels: int ``[...]``.
        alpha: weight of the label's part. The paper uses 1 on ImageNet, 0.1 on CIFAR.
        beta: weight of the rest. The paper uses 0.1.
        mu: weight of the weak head's own loss. The paper uses 0.005 on ImageNet, 0.1 on CIFAR.
        where: ``[...]``, which examples enter the mean of q_y².

    Returns:
        ``[...]`` in nats.

    Source:
        [USKD] Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss
        and Customized Soft Labels", ICCV 2023, arXiv:2303.13005, the USKD loss and its customised target and non-target labels.

    Code versus paper:
        The order of the classes adds w_c / (1 - w_y) and, in the paper, q_c / (1 - q_y). The code has log q in the second
        fraction; so has this.

    Example:
        >>> print(f"{uskd(jnp.zeros((2, 3)), jnp.zeros((2, 3)), jnp.array([0, 1])).mean():.4f}")
        1.1734
    """
    student, weak = _checked(student_logits, weak_logits, labels, teacher="weak_logits")
    if where is not None:
        check_where(where, np.shape(labels), meaning="[...]")
    log_q, log_w = log_softmax(student), log_softmax(weak)
    label_q = at_label(log_q, labels)
    confidence = jax.lax.stop_gradient(jnp.exp(2 * label_q))
    target = confidence + 1 - masked_mean(confidence, where)

    w = jnp.exp(log_w)
    order = w / (1 - at_label(w, labels)[..., None] + 1e-6) + log_q / (1 - label_q[..., None] + 1e-6)
    # The rank of each class is the inverse of the sorting permutation. The label keeps its place in it but has no share; classes
    # at -inf come last and have none either.
    order = jax.lax.stop_gradient(order)
    rank = jnp.argsort(jnp.argsort(-order, axis=-1, stable=True), axis=-1, stable=True) + 1
    _, _, others_q = _apart(student, labels, 1.0)
    share = jnp.where(others_q > -jnp.inf, 1 / rank.astype(student.dtype), 0)
    total = jnp.sum(share, axis=-1, keepdims=True)
    share /= jnp.where(total > 0, total, 1)

    own = cross_entropy(weak, labels, label_smoothing=0.1)
    return -alpha * target * label_q + beta * cross_entropy_of(share, others_q) + mu * own


def wsld(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    temperature: PerPosition = 4.0,
) -> Float[Array, "*batch"]:
    """``- T² w sum_c p_c log q_c``, w = 1 - exp(- CE_s / CE_t): less distillation where the student beats the teacher.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        labels: int ``[...]``; the cross-entropies CE_s and CE_t with them are taken at T = 1, and w receives no gradient.
        temperature: T. 4 on CIFAR (with coef 2.25), 2 on ImageNet (with coef 2.5).

    Returns:
        ``[...]`` in nats.

    Source:
        [WSLD] Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", ICLR
        2021, arXiv:2102.00650, the weighted soft labels.

    Code versus paper:
        As the code (cls_KD): a soft cross-entropy, not a KL, and 1e-7 added to CE_t. It adds CE_s with weight 1.

    Example:
        >>> print(f"{wsld(jnp.zeros(3), jnp.zeros(3), jnp.array(0), temperature=1.0):.4f}")
        0.6945
    """
    check_classes(student_logits, teacher_logits)
    check_labels(labels, student_logits)
    student, teacher = promote(student_logits, teacher_logits)
    of_student, of_teacher = -log_softmax_at(student, labels), -log_softmax_at(teacher, labels)
    weight = jax.lax.stop_gradient(-jnp.expm1(-of_student / (of_teacher + 1e-7)))
    soft = cross_entropy_of_logits(tempered(teacher, temperature), tempered(student, temperature))
    return weight * soft * squared(temperature)


def binary_kl(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    temperature: PerPosition = 2.0,
) -> Float[Array, "*batch"]:
    """``T² sum_c KL(sigmoid(z_t,c / T) || sigmoid(z_s,c / T))``: every class is a yes/no question of its own.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        temperature: T. The paper uses 2.

    Returns:
        ``[...]`` in nats.

    Source:
        [BinaryKL] Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", 2024,
        arXiv:2411.08937, the BinaryKL loss.

    Code versus paper:
        The code adds 1e-8 inside its logarithms; here they are exact.

    Example:
        >>> print(f"{binary_kl(jnp.array([0.0]), jnp.array([2.0]), temperature=1.0):.4f}")
        0.3278
    """
    check_classes(student_logits, teacher_logits)
    student, teacher = promote(student_logits, teacher_logits)
    real = jnp.minimum(student, teacher) > -jnp.inf
    student, teacher = (tempered(jnp.where(real, z, 0), temperature) for z in (student, teacher))
    # With log sigmoid(z) = z - softplus(z) and log sigmoid(-z) = - softplus(z), both halves of each KL together.
    terms = jax.nn.sigmoid(teacher) * (teacher - student) - (softplus(teacher) - softplus(student))
    return jnp.sum(terms, axis=-1) * squared(temperature)


@jax.custom_jvp
def _log_cosh_of_half(x):
    """``log cosh(x / 2)``; as it is written it has no slope at 0, so that is given."""
    return jnp.abs(x) / 2 + jnp.log1p(jnp.exp(-jnp.abs(x))) - math.log(2)


_log_cosh_of_half.defjvps(lambda tangent, answer, x: jnp.tanh(x / 2) / 2 * tangent)


def binary_kl_norm(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    temperature: PerPosition = 2.0,
) -> Float[Array, "*batch"]:
    """``T² sum_c KL(1/2 || sigmoid((z_s,c - z_t,c) / T)) = T² sum_c log cosh((z_s,c - z_t,c) / 2T)``.

    Args:
        student_logits: ``[..., classes]``, of the auxiliary head.
        teacher_logits: ``[..., classes]``.
        temperature: T. The paper uses 2.

    Returns:
        ``[...]`` in nats.

    Source:
        [DHKD, BinaryKL-Norm] Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary
        Head", 2024, arXiv:2411.08937, the BinaryKL-Norm loss.

    Code versus paper:
        The code adds 1e-8 inside its logarithms; here they are exact.

    Example:
        >>> print(f"{binary_kl_norm(jnp.array([0.0]), jnp.array([2.0]), temperature=1.0):.4f}")
        0.4338
    """
    check_classes(student_logits, teacher_logits)
    difference = tempered(log_ratio(*promote(student_logits, teacher_logits)), temperature)
    return jnp.sum(_log_cosh_of_half(difference), axis=-1) * squared(temperature)
