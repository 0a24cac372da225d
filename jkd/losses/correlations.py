"""Losses that compare the ``[batch, classes]`` probability matrices by their rows, their columns or their Gram matrices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jkd.losses._common import check_classes, check_exact_rank, check_where, masked_mean, norm, promote, softmax, squared
from jkd.losses._maps import einsum, gram
from jkd.losses._typing import Array, Bool, Float, Real, Scalar


def _probabilities(student_logits, teacher_logits, temperature, where):
    """The two probability matrices, with rows of zeros where ``where`` is off, and the weights ``[batch, 1]``."""
    check_exact_rank(2, "[batch, classes]", student_logits=student_logits, teacher_logits=teacher_logits)
    check_classes(student_logits, teacher_logits)
    logits = promote(student_logits, teacher_logits)
    if where is None:
        return *(softmax(z, temperature) for z in logits), None
    check_where(where, np.shape(student_logits)[:1], meaning="[batch]")
    weight = jnp.asarray(where).astype(logits[0].dtype)[:, None]
    # What is dropped may be nan: it is replaced before the softmax, so that its gradient is 0 too.
    return *(softmax(jnp.where(weight != 0, z, 0), temperature) * weight for z in logits), weight


def _pearson(x, y, weight, axis):
    """Correlation along ``axis``, its denominator as the code has it: |x| |y| + 1e-8."""
    x = x - masked_mean(x, weight, axis, keepdims=True)
    y = y - masked_mean(y, weight, axis, keepdims=True)
    if weight is not None:
        x, y = x * weight, y * weight
    return jnp.sum(x * y, axis=axis) / (norm(x, axis) * norm(y, axis) + 1e-8)


def dist(
    student_logits: Real[Array, "batch classes"],
    teacher_logits: Real[Array, "batch classes"],
    *,
    beta: Scalar = 1.0,
    gamma: Scalar = 1.0,
    temperature: Scalar = 4.0,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``T² (beta (1 - r(q_b, p_b)) + gamma (1 - mean_c r(q_:c, p_:c)))``, r Pearson's correlation of rows and of columns.

    Args:
        student_logits, teacher_logits: ``[batch, classes]``.
        beta: weight of the rows (inter-class). The paper uses 1.
        gamma: weight of the columns (intra-class), one number for the batch that every example repeats. The paper uses 1.
        temperature: T. 4 on CIFAR, 1 on ImageNet.
        where: ``[batch]``, which examples count.

    Returns:
        ``[batch]``, no unit. The paper's loss is cross-entropy plus 2 times this.

    Source:
        [DIST] Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv:2205.10536, the inter-class
        and intra-class relations.

    Code versus paper:
        As the code: the product of the lengths is taken with 1e-8 added, and T² multiplies both parts.

    Example:
        >>> logits = jnp.array([[1.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
        >>> print(f"{dist(2 * logits, logits, temperature=1.0).mean():.4f}")
        0.0059
    """
    q, p, weight = _probabilities(student_logits, teacher_logits, temperature, where)
    rows = 1 - _pearson(q, p, None, 1)
    columns = 1 - jnp.mean(_pearson(q, p, weight, 0))
    return (beta * rows + gamma * columns) * squared(temperature)


def class_correlation(
    student_logits: Real[Array, "batch classes"],
    teacher_logits: Real[Array, "batch classes"],
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``1 / C |Q^T Q - P^T P|²`` (Frobenius), Q and P the ``[batch, classes]`` probabilities; the same for every example.

    Args:
        student_logits, teacher_logits: ``[batch, classes]``.
        temperature: T. The paper adds the values at 2, 3, 4, 5 and 6. The value has no factor T².
        where: ``[batch]``, which examples count.

    Returns:
        ``[batch]``, no unit; one number, repeated.

    Source:
        [MLLD, CC] Jin et al., "Multi-Level Logit Distillation", CVPR 2023, the class-level alignment.

    Code versus paper:
        The code means to mask classes but multiplies the number by the mask's mean; there is no mask here.

    Example:
        >>> print(f"{class_correlation(jnp.array([[9.0, -9.0]]), jnp.array([[-9.0, 9.0]]), temperature=1.0).mean():.4f}")
        1.0000
    """
    q, p, _ = _probabilities(student_logits, teacher_logits, temperature, where)
    batch, classes = q.shape
    difference, total = q - p, q + p
    if batch < classes:
        # Q^T Q - P^T P = (D^T S + S^T D) / 2 with D = Q - P, S = Q + P: its norm needs batch x batch products only, and, unlike
        # |Q Q^T|² - 2 |Q P^T|² + |P P^T|², is small term by term where the student is close to the teacher.
        mixed = einsum("id,jd->ij", total, difference)
        squared = jnp.sum(gram(difference) * gram(total)) + jnp.sum(mixed * mixed.T)
        value = squared / 2
    else:
        value = jnp.sum((gram(q.T) - gram(p.T)) ** 2)
    return jnp.broadcast_to(value / classes, (batch,))


def batch_correlation(
    student_logits: Real[Array, "batch classes"],
    teacher_logits: Real[Array, "batch classes"],
    *,
    temperature: Scalar = 4.0,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``sum_b' (q_b . q_b' - p_b . p_b')²``, how alike the student finds two examples against how alike the teacher does.

    Args:
        student_logits, teacher_logits: ``[batch, classes]``.
        temperature: T. The paper adds the values at 2, 3, 4, 5 and 6. The value has no factor T².
        where: ``[batch]``, which examples are compared with.

    Returns:
        ``[batch]``, no unit.

    Source:
        [MLLD, BC] Jin et al., "Multi-Level Logit Distillation", CVPR 2023, the batch-level alignment.

    Code versus paper:
        The code means to leave out examples by confidence but multiplies the batch's one number by that mask's mean, about 1/2;
        there is no such mask here, and ``where`` drops examples.

    Example:
        >>> print(f"{batch_correlation(jnp.array([[9.0, -9.0]]), jnp.zeros((1, 2)), temperature=1.0).mean():.4f}")
        0.2500
    """
    q, p, _ = _probabilities(student_logits, teacher_logits, temperature, where)
    return jnp.sum((gram(q) - gram(p)) ** 2, axis=1)
