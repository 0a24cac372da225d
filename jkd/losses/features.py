"""Losses that bring a student's features to the teacher's values: channels last, compared entry by entry.

Channels must agree: where a paper has a projector (a 1x1 convolution, a linear map), the recipe owns it. Where two maps differ
in height or width, the larger is averaged down to the smaller (adaptive average pooling).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    check_exact_rank,
    check_nonempty,
    check_rank,
    check_same_shape,
    check_where,
    masked_mean,
    normalize,
    promote,
    safe_sqrt,
    where_like,
)
from jkd.losses._maps import adaptive_average_pool, check_channels, check_vectors, map_pair, match, per_channel, vector_pair
from jkd.losses._typing import Array, Bool, Float, Real


def mse(
    student_features: Real[Array, "*student channels"],
    teacher_features: Real[Array, "*teacher channels"],
) -> Float[Array, "..."]:
    """``mean_c (s_c - t_c)²`` at each position.

    Args:
        student_features: ``[..., channels]``, after the projector where there is one.
        teacher_features: the same shape; or both are ``[..., height, width, channels]`` of different height and width.

    Returns:
        ``[...]``, of the smaller map where sizes differ.

    Source:
        [FitNet, hint] Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv:1412.6550, the hint loss.

    Code versus paper:
        The paper sums and halves; RepDistiller and mdistiller take the mean over all entries, as here, with weight 100. The
        paper trains on hints first and distils logits after; those codes do both at once. The teacher is detached.

    Example:
        >>> mse(jnp.array([[1.0, 2.0], [0.0, 0.0]]), jnp.zeros((2, 2))).tolist()
        [2.5, 0.0]
    """
    student, teacher = vector_pair(student_features=student_features, teacher_features=teacher_features)
    return jnp.mean(jnp.square(student - teacher), axis=-1)


def cosine_distance(
    student_features: Real[Array, "*student channels"],
    teacher_features: Real[Array, "*teacher channels"],
) -> Float[Array, "..."]:
    """``1 - <s, t> / (|s| |t|)`` at each position; 1 where one of them is zero.

    Args:
        student_features: ``[..., channels]``.
        teacher_features: the same shape; or both are ``[..., height, width, channels]`` of different height and width.

    Returns:
        ``[...]`` in 0..2.

    Source:
        [cosine] Sanh et al., "DistilBERT, a distilled version of BERT", 2019, arXiv:1910.01108, the cosine embedding loss
        between the last hidden states.

    Code versus paper:
        DistilBERT's code uses weight 1 beside 5 for the soft targets and 2 for the masked-language loss, on tokens that are no
        padding. VL2V-ADiP writes ``-cos``: the same gradient. The teacher is detached.

    Example:
        >>> cosine_distance(jnp.array([[2.0, 0.0], [0.0, 1.0]]), jnp.array([[5.0, 0.0], [3.0, 0.0]])).tolist()
        [0.0, 1.0]
    """
    student, teacher = vector_pair(student_features=student_features, teacher_features=teacher_features)
    return 1 - jnp.sum(normalize(student) * normalize(teacher), axis=-1)


def _standardized(x, where):
    """Each channel with mean 0 and (unbiased) variance 1 over all leading axes; a constant channel is 0."""
    axes = tuple(range(x.ndim - 1))
    centred = x - masked_mean(x, where, axes, keepdims=True)
    if where is None:
        count = np.prod(x.shape[:-1])
    else:
        centred = jnp.where(where != 0, centred, 0)
        count = jnp.sum(where)
    std = safe_sqrt(jnp.sum(jnp.square(centred), axis=axes, keepdims=True) / jnp.maximum(count - 1, 1))
    # A dead channel has no direction: its gradient stays of order 1 (the code's is 1e6).
    return centred / jnp.where(std > 0, std + 1e-6, 1)


def pearson_distance(
    student_features: Real[Array, "*student channels"],
    teacher_features: Real[Array, "*teacher channels"],
    *,
    where: Bool[Array, "..."] | Real[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """``mean_c (zs_c - zt_c)² / 2``, z = (x - mean) / (std + 1e-6) of each channel over batch and positions: 1 - correlation.

    Args:
        student_features: ``[..., channels]``; all leading axes are one population.
        teacher_features: the same shape; or both are ``[..., height, width, channels]`` of different height and width.
        where: ``[...]`` or fewer leading axes (``[batch]``), True = counted. What is dropped gives 0.

    Returns:
        ``[...]``; its mean is 1 - r, averaged over channels, times (n - 1) / n.

    Source:
        [PKD] Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
        NeurIPS 2022, arXiv:2207.02039, the MSE of normalised features.

    Code versus paper:
        mmrazor resizes bilinearly to the teacher's size; here the larger map is averaged. Its weight is 6 between two-stage
        detectors and 10 between one-stage ones. The standard deviation is the unbiased one. The teacher is detached.

    Example:
        >>> student = jnp.array([[1.0], [2.0], [3.0]])
        >>> pearson_distance(student, 10 * student + 7).round(4).tolist()
        [0.0, 0.0, 0.0]
        >>> pearson_distance(student, -student).round(4).tolist()
        [2.0, 0.0, 2.0]
    """
    student, teacher = vector_pair(student_features=student_features, teacher_features=teacher_features)
    check_rank(2, "[..., channels] with a leading axis", student_features=student)
    if where is None:
        return jnp.mean(jnp.square(_standardized(student, None) - _standardized(teacher, None)), axis=-1) / 2
    check_where(where, student.shape[: np.ndim(where)], meaning="the leading axes of the (smaller) features")
    kept = jnp.broadcast_to(where_like(where, student), (*student.shape[:-1], 1))
    return jnp.mean(jnp.square(_standardized(student, kept) - _standardized(teacher, kept)), axis=-1) / 2


def hierarchical_context(
    student_features: Real[Array, "*batch student_height student_width channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width channels"],
    *,
    levels: tuple[int, ...] = (4, 2, 1),
) -> Float[Array, "*batch"]:
    """``(MSE + sum_k 2^-k MSE(pool_l(s), pool_l(t))) / sum_k 2^-k``, over average pools to l x l for the levels l < height.

    Args:
        student_features: ``[..., height, width, channels]``.
        teacher_features: ``[..., height, width, channels]``; height and width may differ.
        levels: sides of the pooled maps, from large to small. Those not smaller than the map's height are left out, and k
            counts those that stay.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [HCL, ReviewKD] Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044, the hierarchical
        context loss.

    Code versus paper:
        As the code, which looks at the height alone: over a narrower map the cells of a pool overlap. It sums over stages, with
        weight 5 for ResNet32x4 to 8x4 (0.6 to 8 elsewhere) and a warm-up over 20 epochs. The teacher is detached.

    Example:
        >>> student, teacher = jnp.zeros((1, 2, 2, 1)), jnp.array([1.0, -1.0, 1.0, -1.0]).reshape(1, 2, 2, 1)
        >>> hierarchical_context(3 * student, 3 * teacher).tolist()  # 9 at full size, 0 (weight 1/2) for the mean
        [6.0]
    """
    student, teacher = map_pair(student_features=student_features, teacher_features=teacher_features)
    difference = student - teacher  # pooling is linear, so it is the difference that is pooled
    axes = (-3, -2, -1)
    total, weight, sum_of_weights = jnp.mean(jnp.square(difference), axis=axes), 1.0, 1.0
    for level in levels:
        if level < difference.shape[-3]:
            weight /= 2
            total += weight * jnp.mean(jnp.square(adaptive_average_pool(difference, level, level)), axis=axes)
            sum_of_weights += weight
    return total / sum_of_weights


def variational_information(
    predicted_mean: Real[Array, "*student channels"],
    teacher_features: Real[Array, "*teacher channels"],
    log_scale: Real[Array, " channels"],
    *,
    eps: float = 1e-5,
) -> Float[Array, "..."]:
    """``mean_c ((mu_c - t_c)² / v_c + log v_c) / 2``, v = softplus(log_scale) + eps: -log of a Gaussian, less log(2 pi) / 2.

    Args:
        predicted_mean: ``[..., channels]``, mu: the teacher's features as a regressor on the student's predicts them.
        teacher_features: the same shape; or both are ``[..., height, width, channels]`` of different height and width.
        log_scale: ``[channels]``, trained along. ``log(exp(5 - eps) - 1)`` starts at the code's variance of 5.
        eps: the smallest variance.

    Returns:
        ``[...]`` in nats; may be negative.

    Source:
        [VID] Ahn et al., "Variational Information Distillation for Knowledge Transfer", CVPR 2019, arXiv:1904.05835, the
        Gaussian variational distribution.

    Code versus paper:
        RepDistiller's mean over all entries, as here; the paper sums over entries. mdistiller does not train log_scale, by
        mistake. The teacher is detached; the regressor and log_scale are trained.

    Example:
        >>> log_scale = jnp.log(jnp.exp(jnp.ones(2)) - 1)  # variance 1
        >>> variational_information(jnp.zeros(2), jnp.array([1.0, 3.0]), log_scale).round(3).item()
        2.5
    """
    check_exact_rank(1, "[channels]", log_scale=log_scale)
    resized = check_vectors(predicted_mean=predicted_mean, teacher_features=teacher_features)
    check_channels(predicted_mean=predicted_mean, log_scale=log_scale)
    mean, teacher, log_scale = promote(predicted_mean, teacher_features, log_scale)
    if resized:
        mean, teacher = match(mean, teacher)
    variance = per_channel(jax.nn.softplus(log_scale) + eps, mean)
    return jnp.mean(jnp.square(mean - teacher) / variance + jnp.log(variance), axis=-1) / 2


def masked_generative(
    generated_features: Real[Array, "batch *positions channels"],
    teacher_features: Real[Array, "batch *positions channels"],
    *,
    mask: Bool[Array, " batch *positions"] | Real[Array, " batch *positions"] | None = None,
) -> Float[Array, " batch"]:
    """``sum (g - t)²`` over channels and positions, g generated from the student's features with a part of them hidden.

    Args:
        generated_features: ``[batch, ..., channels]``, the generator's output (two 3x3 convolutions in the paper).
        teacher_features: the same shape.
        mask: ``[batch, ...]``, 1 = counted. None counts every position (MGD); ViTKD counts the hidden ones.

    Returns:
        ``[batch]``, a sum for each example.

    Source:
        [MGD] Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv:2205.01529, the distillation loss of generated
        features.

    Code versus paper:
        As the code: sum, divided by the batch alone, so weights are small: 7e-5 for classification (15% of channels hidden),
        2e-5 for detection (65% of positions hidden). ViTKD (arXiv:2209.02432) divides by the hidden share too. The teacher is
        detached.

    Example:
        >>> generated, teacher = jnp.zeros((2, 3, 2)), jnp.ones((2, 3, 2))
        >>> masked_generative(generated, teacher).tolist()
        [6.0, 6.0]
        >>> masked_generative(generated, teacher, mask=jnp.array([[1, 0, 0], [1, 1, 0]])).tolist()
        [2.0, 4.0]
    """
    features = {"generated_features": generated_features, "teacher_features": teacher_features}
    check_rank(2, "[batch, ..., channels]", **features)
    check_nonempty(-1, "channels", **features)
    check_channels(**features)
    check_same_shape(**features)
    generated, teacher = promote(*features.values())
    squares = jnp.square(generated - teacher)
    if mask is not None:
        check_where(mask, squares.shape[:-1], meaning="[batch, ...] (the features without channels)", name="mask")
        kept = where_like(mask, squares)
        squares = jnp.where(kept != 0, squares, 0) * kept
    return jnp.sum(squares, axis=tuple(range(1, squares.ndim)))
