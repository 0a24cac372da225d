"""Divergences between two logit vectors, one value for each position.

p is the teacher's softmax and q the student's, both of logits / temperature; sums run over the classes (last axis).
``temperature`` is a scalar or one value for each position, so it may be learned (CTKD) or depend on the token.

A class that both sides mask with -inf (a padded vocabulary) is not there. One that only one side masks is left out of the sums of
logarithms, which it would make infinite (cross-entropy, forward and reverse KL, `jeffreys`); where a probability of 0 has a finite
value it counts as that (`js`, skews, `total_variation`). A position of masked classes only is 0.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    check_classes,
    check_labels,
    check_nonempty,
    check_rank,
    check_same_shape,
    cross_entropy_of_logits,
    cross_entropy_with,
    kl,
    kl_of_logits,
    kl_to_mixture,
    log_ratio,
    log_softmax,
    log_softmax_at,
    masked_mean,
    promote,
    softmax,
    squared,
    tempered,
)
from jkd.losses._typing import Array, Float, Int, PerPosition, Real, Scalar


def cross_entropy(
    student_logits: Real[Array, "*batch classes"],
    labels: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    label_smoothing: Scalar = 0.0,
) -> Float[Array, "*batch"]:
    """``- sum_c y_c log q_c``, y = (1 - eps) onehot(label) + eps / C.

    Args:
        student_logits: ``[..., classes]``.
        labels: int ``[...]``, or a distribution ``[..., classes]`` (what mixup gives). An integer out of range is not an error
            under jit: it reads the nearest class.
        label_smoothing: eps. 0 is no smoothing; 0.1 is Szegedy et al. C counts the classes that are not at -inf.

    Returns:
        ``[...]`` in nats.

    Source:
        [CE, LS] Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016, arXiv:1512.00567,
        label-smoothing regularisation.

    Example:
        >>> print(f"{cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3])).mean():.4f}")
        1.3863
    """
    check_rank(1, "[..., classes]", student_logits=student_logits)
    check_nonempty(-1, "classes", student_logits=student_logits)
    soft = (
        np.ndim(labels) == np.ndim(student_logits) and hasattr(labels, "dtype") and jnp.issubdtype(labels.dtype, jnp.floating)
    )
    if soft:
        check_same_shape(student_logits=student_logits, labels=labels)
        logits, target = promote(student_logits, labels)
    else:
        check_labels(labels, student_logits)
        (logits,) = promote(student_logits)
    value = cross_entropy_with(target, logits) if soft else -log_softmax_at(logits, labels)
    if isinstance(label_smoothing, (int, float)) and label_smoothing == 0:
        return value
    uniform = -masked_mean(log_softmax(logits), logits > -jnp.inf, axis=-1)
    return (1 - label_smoothing) * value + label_smoothing * uniform


def _tempered_pair(student_logits, teacher_logits, temperature):
    """Checked logits / T of student and teacher."""
    check_classes(student_logits, teacher_logits)
    return tuple(tempered(logits, temperature) for logits in promote(student_logits, teacher_logits))


def _pair(student_logits, teacher_logits, temperature):
    """Checked log-probabilities (log q of the student, log p of the teacher)."""
    return tuple(log_softmax(logits) for logits in _tempered_pair(student_logits, teacher_logits, temperature))


def soft_cross_entropy(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``- T² sum_c p_c log q_c``: `forward_kl` plus the teacher's entropy, so the same gradient for the student.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        temperature: T.

    Returns:
        ``[...]`` in nats.

    Source:
        [KD, soft CE] Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, the soft
        targets' cross-entropy.

    Code versus paper:
        DistiLLM calls this, without T², forward KL: ``coef = 1 / T²``. TinyBERT leaves T² out too and averages over the batch
        and the classes: ``coef = 1 / (C T²)``.

    Example:
        >>> print(f"{soft_cross_entropy(jnp.zeros(4), jnp.zeros(4)):.4f}")
        1.3863
    """
    student, teacher = _tempered_pair(student_logits, teacher_logits, temperature)
    return cross_entropy_of_logits(teacher, student) * squared(temperature)


def forward_kl(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² sum_c p_c (log p_c - log q_c)``, KL(teacher || student): covers every mode of the teacher.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        temperature: T. Hinton et al. use 1 to 20; 4 is usual on CIFAR, 1 on ImageNet.

    Returns:
        ``[...]`` in nats.

    Source:
        [KD] Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, the soft targets at
        temperature T and the factor T².

    Code versus paper:
        DeiT and PromptKD divide by the number of classes as well (PyTorch's ``mean``): ``coef = 1 / C``. PKD-BERT does too.
        TRL and DistiLLM leave T² out: ``coef = 1 / T²``. TinyBERT's code has no KL: see `soft_cross_entropy`.

    Example:
        >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.25]))
        >>> print(f"{forward_kl(jnp.zeros(3), teacher):.4f}")
        0.0589
    """
    student, teacher = _tempered_pair(student_logits, teacher_logits, temperature)
    return kl_of_logits(teacher, student) * squared(temperature)


def reverse_kl(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² sum_c q_c (log q_c - log p_c)``, KL(student || teacher): stays on the modes that the student can hold.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        temperature: T.

    Returns:
        ``[...]`` in nats.

    Source:
        [RKL] Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, arXiv:2306.08543, the reverse KL
        objective.

    Code versus paper:
        TRL and DistiLLM leave T² out: ``coef = 1 / T²``.

    Example:
        >>> teacher = jnp.log(jnp.array([0.5, 0.25, 0.25]))
        >>> print(f"{reverse_kl(jnp.zeros(3), teacher):.4f}")
        0.0566
    """
    student, teacher = _tempered_pair(student_logits, teacher_logits, temperature)
    return kl_of_logits(student, teacher) * squared(temperature)


def jeffreys(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² / 2 sum_c (p_c - q_c)(log p_c - log q_c)``, the mean of forward and reverse KL.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        temperature: T.

    Returns:
        ``[...]`` in nats.

    Source:
        [SSLD] Cui et al., "Beyond Self-Supervision: A Simple Yet Effective Network Distillation Alternative to Improve
        Backbones", 2021, arXiv:2103.05959, the soft-label loss of SSLD.

    Code versus paper:
        The paper writes the Jensen-Shannon divergence (`js` with ``beta=0.5``); PaddleClas, the authors' code, computes this.

    Example:
        >>> print(f"{jeffreys(jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])):.4f}")
        0.4621
    """
    log_q, log_p = _pair(student_logits, teacher_logits, temperature)
    return 0.5 * jnp.sum((jnp.exp(log_p) - jnp.exp(log_q)) * log_ratio(log_p, log_q), axis=-1) * squared(temperature)


def js(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    beta: Scalar = 0.5,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² (beta KL(p || m) + (1 - beta) KL(q || m))``, m = beta p + (1 - beta) q: at most log 2 for beta = 1/2.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        beta: 0 gives `forward_kl` and 1 gives `reverse_kl`, as in TRL (the formula itself goes to 0 at both ends). GKD and TRL
            use 0.5, DistiLLM's ``js_distance`` with its lam = 0.9 is beta = 0.1.
        temperature: T.

    Returns:
        ``[...]`` in nats.

    Source:
        [GKD, generalised JSD] Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", ICLR 2024, arXiv:2306.13649, equation 1.

    Code versus paper:
        TRL and DistiLLM leave T² out: ``coef = 1 / T²``.

    Example:
        >>> print(f"{js(jnp.array([0.0, 200.0]), jnp.array([200.0, 0.0])):.4f}")
        0.6931
    """
    log_q, log_p = _pair(student_logits, teacher_logits, temperature)
    if isinstance(beta, (int, float)) and beta in (0, 1):
        return (kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)) * squared(temperature)
    value = beta * kl_to_mixture(log_p, beta, log_q) + (1 - beta) * kl_to_mixture(log_q, 1 - beta, log_p)
    if not isinstance(beta, (int, float)):  # a schedule's value: the ends are only known when it runs
        value = jnp.where(beta == 0, kl(log_p, log_q), jnp.where(beta == 1, kl(log_q, log_p), value))
    return value * squared(temperature)


def skew_forward_kl(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    lam: Scalar = 0.1,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² KL(p || lam p + (1 - lam) q)``, at most T² log(1 / lam).

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        lam: share of the teacher in the mixture; 0 is `forward_kl`. DistiLLM uses 0.1.
        temperature: T.

    Returns:
        ``[...]`` in nats.

    Source:
        [SKL] Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024, arXiv:2402.03898,
        the skew KL and skew reverse KL.

    Code versus paper:
        The code leaves out the constant - H(p), so the number that it prints is not a divergence; the gradient is the same. It
        leaves T² out too: ``coef = 1 / T²``.

    Example:
        >>> print(f"{skew_forward_kl(jnp.array([0.0, 200.0]), jnp.array([200.0, 0.0]), lam=0.1):.4f}")
        2.3026
    """
    log_q, log_p = _pair(student_logits, teacher_logits, temperature)
    return kl_to_mixture(log_p, lam, log_q) * squared(temperature)


def skew_reverse_kl(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    lam: Scalar = 0.1,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² KL(q || (1 - lam) p + lam q)``, at most T² log(1 / lam); the gradient also passes through q in the mixture.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        lam: share of the student in the mixture; 0 is `reverse_kl`. DistiLLM uses 0.1.
        temperature: T.

    Returns:
        ``[...]`` in nats.

    Source:
        [SRKL] Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024, arXiv:2402.03898,
        the skew KL and skew reverse KL.

    Code versus paper:
        TRL and DistiLLM leave T² out: ``coef = 1 / T²``.

    Example:
        >>> print(f"{skew_reverse_kl(jnp.array([0.0, 200.0]), jnp.array([200.0, 0.0]), lam=0.1):.4f}")
        2.3026
    """
    log_q, log_p = _pair(student_logits, teacher_logits, temperature)
    return kl_to_mixture(log_q, lam, log_p) * squared(temperature)


def total_variation(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``1/2 sum_c |p_c - q_c|``, between 0 and 1.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        temperature: T. No T² here: the value is a distance between probabilities, not a divergence with a 1/T² gradient.

    Returns:
        ``[...]``, no unit.

    Source:
        [TVD] Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", ACL 2023, arXiv:2307.15190, the
        total variation distance.

    Code versus paper:
        DistiLLM's code has no temperature (T = 1).

    Example:
        >>> print(f"{total_variation(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2]))):.4f}")
        0.3000
    """
    check_classes(student_logits, teacher_logits)
    q, p = (softmax(z, temperature) for z in promote(student_logits, teacher_logits))
    return 0.5 * jnp.sum(jnp.abs(p - q), axis=-1)
