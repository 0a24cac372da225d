"""Losses on features before the activation: which side of zero a neuron is on, and how far.

Maps are ``[..., height, width, channels]``; where height or width differ, the larger map is averaged down to the smaller.
"""

from __future__ import annotations

import jax.numpy as jnp

from jkd.losses._common import check_exact_rank, promote
from jkd.losses._maps import check_channels, check_maps, map_pair, match, per_channel
from jkd.losses._typing import Array, Float, Real, Scalar


def activation_boundary(
    student_features: Real[Array, "*batch student_height student_width channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width channels"],
    *,
    margin: Scalar = 1.0,
) -> Float[Array, "*batch"]:
    """``sum (s + m)² [s > -m, t <= 0] + (s - m)² [s <= m, t > 0]`` over positions and channels.

    Args:
        student_features: ``[..., height, width, channels]`` before the activation.
        teacher_features: ``[..., height, width, channels]`` before the activation; height and width may differ.
        margin: m. The paper uses 1.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [AB] Heo et al., "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI 2019,
        arXiv:1811.03233, the alternative loss with a margin that stands in for the sign of activations.

    Code versus paper:
        RepDistiller sums over the batch too and then divides by it and by 1000 / 3, with weight 2^(i-n+1) for stage i of n, and
        trains on it for 30 epochs before the cross-entropy. The teacher is detached.

    Example:
        >>> student, teacher = jnp.array([0.5, 0.5, 2.0]), jnp.array([1.0, -1.0, 1.0])
        >>> activation_boundary(student.reshape(1, 1, 3), teacher.reshape(1, 1, 3)).item()
        2.5
    """
    student, teacher = map_pair(student_features=student_features, teacher_features=teacher_features)
    target = jnp.where(teacher > 0, margin, -margin)
    wrong = jnp.where(teacher > 0, student <= margin, student > -margin)
    return jnp.sum(jnp.square(jnp.where(wrong, student - target, 0)), axis=(-3, -2, -1))


def overhaul(
    student_features: Real[Array, "*batch student_height student_width channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width channels"],
    margin: Real[Array, " channels"],
) -> Float[Array, "*batch"]:
    """``sum (s - max(t, m))² [s > max(t, m) or t > 0]`` over positions and channels: a partial L2 to the margin ReLU.

    Args:
        student_features: ``[..., height, width, channels]`` before the activation, after the connector.
        teacher_features: ``[..., height, width, channels]`` before the activation; height and width may differ.
        margin: ``[channels]``, negative: E[x | x < 0] of each channel, from the teacher's BatchNorm (scale g, shift b):
            ``b - |g| pdf(b / |g|) / cdf(-b / |g|)``, and ``-3 |g|`` where that cdf is at most 0.001.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [OFD] Heo et al., "A Comprehensive Overhaul of Feature Distillation", ICCV 2019, arXiv:1904.01866, the margin ReLU and
        the partial L2 distance.

    Code versus paper:
        As the code (mdistiller): sum over the map, mean over the batch, stage i of n weighted 2^(i-n+1), the whole by 0.001.
        The teacher and the margin are detached.

    Example:
        >>> student, teacher = jnp.array([1.0, -3.0, 0.0]), jnp.array([2.0, -2.0, -2.0])
        >>> overhaul(student.reshape(1, 1, 3), teacher.reshape(1, 1, 3), jnp.array([-1.0, -1.0, -1.0])).item()
        2.0
    """
    check_exact_rank(1, "[channels]", margin=margin)
    check_maps(student_features=student_features, teacher_features=teacher_features)
    check_channels(student_features=student_features, margin=margin)
    student, teacher, margin = promote(student_features, teacher_features, margin)
    student, teacher = match(student, teacher)
    target = jnp.maximum(teacher, per_channel(margin, teacher))
    difference = student - target
    # Below the target only positive ones count. Written so, XLA needs no memory beside the inputs.
    return jnp.sum(jnp.square(jnp.where(target > 0, difference, jnp.maximum(difference, 0))), axis=(-3, -2, -1))
