"""Losses that compare the shape of feature maps ``[..., height, width, channels]`` rather than their values.

Where height or width differ, the larger map is averaged down to the smaller. ``where`` ``[..., height, width]``, of the smaller
map, drops positions.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jkd.losses._common import masked_mean, normalize, promote, squared, tempered
from jkd.losses._maps import (
    SPACE,
    adaptive_average_pool,
    check_channels,
    check_maps,
    einsum,
    gram,
    keep_positions,
    map_pair,
    match,
)
from jkd.losses._typing import Array, Bool, Float, Number, Real

ENTRIES = (-3, -2, -1)


def _attention(features, p):
    """``[..., height, width]``: mean over channels of |x|^p, of length 1 over the positions."""
    powers = features**p if p % 2 == 0 else jnp.abs(features) ** p
    return normalize(jnp.mean(powers, axis=-1), (-2, -1))


def attention_transfer(
    student_features: Real[Array, "*batch student_height student_width student_channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width teacher_channels"],
    *,
    p: Number = 2,
    where: Bool[Array, "*batch height width"] | Real[Array, "*batch height width"] | None = None,
) -> Float[Array, "*batch"]:
    """``mean_i (a_i - b_i)²``, a = A / |A| with A_i = mean_c |s_ic|^p at position i, and b likewise of the teacher.

    Args:
        student_features: ``[..., height, width, channels]``.
        teacher_features: ``[..., height, width, channels]``; all three sizes may differ.
        p: the power, at least 1. The paper uses 2.
        where: ``[..., height, width]`` of the smaller map, True = counted.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [AT] Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural
        Networks via Attention Transfer", ICLR 2017, arXiv:1612.03928, the activation-based attention transfer, equation 2.

    Code versus paper:
        The paper takes the norm of a - b, summed over positions; the authors' code and mdistiller the mean of its squares, as
        here, with weight 1000, summed over stages. The teacher is detached.

    Example:
        >>> student, teacher = jnp.array([1.0, 0.0]), jnp.array([0.0, 5.0])
        >>> attention_transfer(student.reshape(1, 2, 1), teacher.reshape(1, 2, 1)).item()
        1.0
    """
    if p < 1:
        raise ValueError(f"p must be at least 1, got {p}")
    student, teacher = map_pair(same_channels=False, student_features=student_features, teacher_features=teacher_features)
    _, student, teacher = keep_positions(where, student, teacher)
    return masked_mean(jnp.square(_attention(student, p) - _attention(teacher, p)), where, (-2, -1))


def factor_transfer(
    student_features: Real[Array, "*batch student_height student_width student_channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width teacher_channels"],
    *,
    where: Bool[Array, "*batch height width"] | Real[Array, "*batch height width"] | None = None,
) -> Float[Array, "*batch"]:
    """``mean_i |a_i - b_i|``, a = A / |A| with A_i = mean_c s_ic² at position i, and b likewise of the teacher.

    Args:
        student_features: ``[..., height, width, channels]``, the translator's factors.
        teacher_features: ``[..., height, width, channels]``, the paraphraser's factors; all three sizes may differ.
        where: ``[..., height, width]`` of the smaller map, True = counted.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [FT] Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018,
        arXiv:1802.04977, the factor transfer loss.

    Code versus paper:
        The paper normalises the whole factor; RepDistiller first averages squares over its channels, as here, with weight 200.
        The teacher's paraphraser (half the channels) is trained to reconstruct for 30 epochs before, then detached.

    Example:
        >>> student, teacher = jnp.array([1.0, 0.0]), jnp.array([0.0, 5.0])
        >>> factor_transfer(student.reshape(1, 2, 1), teacher.reshape(1, 2, 1)).item()
        1.0
    """
    student, teacher = map_pair(same_channels=False, student_features=student_features, teacher_features=teacher_features)
    _, student, teacher = keep_positions(where, student, teacher)
    return masked_mean(jnp.abs(_attention(student, 2) - _attention(teacher, 2)), where, (-2, -1))


def _flat(features):
    """``[..., positions, channels]``."""
    return features.reshape(*features.shape[:-3], -1, features.shape[-1])


def neuron_selectivity(
    student_features: Real[Array, "*batch student_height student_width student_channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width teacher_channels"],
    *,
    where: Bool[Array, "*batch height width"] | Real[Array, "*batch height width"] | None = None,
) -> Float[Array, "*batch"]:
    """``mean_cd <t_c, t_d>² + mean_cd <s_c, s_d>² - 2 mean_cd <s_c, t_d>²``, s_c the map of channel c divided by its length.

    The squared maximum mean discrepancy between the two sets of channels, under the kernel ``<a, b>²``.

    Args:
        student_features: ``[..., height, width, channels]``.
        teacher_features: ``[..., height, width, channels]``; all three sizes may differ.
        where: ``[..., height, width]`` of the smaller map, True = counted.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [NST] Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv:1707.01219, the
        squared MMD with the polynomial kernel (d = 2, c = 0).

    Code versus paper:
        As the code (mdistiller), with weight 50; the teacher's term is kept in the value, and the teacher detached. Maps with
        fewer positions than channels take the equal form ``|mean_c s_c s_c' - mean_d t_d t_d'|²``, which needs positions²
        rather than channels² numbers.

    Example:
        >>> student, teacher = jnp.array([1.0, 0.0]), jnp.array([0.0, 5.0])
        >>> neuron_selectivity(student.reshape(1, 2, 1), teacher.reshape(1, 2, 1)).item()
        2.0
    """
    student, teacher = map_pair(same_channels=False, student_features=student_features, teacher_features=teacher_features)
    _, student, teacher = keep_positions(where, student, teacher)
    student, teacher = (normalize(_flat(x), -2) for x in (student, teacher))
    positions, channels = student.shape[-2], (student.shape[-1], teacher.shape[-1])
    if positions <= max(channels):
        student_moment, teacher_moment = (gram(x) / x.shape[-1] for x in (student, teacher))
        return jnp.sum(jnp.square(student_moment - teacher_moment), axis=(-2, -1))

    def similarity(a, b):
        return jnp.mean(jnp.square(einsum("...nc,...nd->...cd", a, b)), axis=(-2, -1))

    return similarity(teacher, teacher) + similarity(student, student) - 2 * similarity(student, teacher)


def channel_wise(
    student_features: Real[Array, "*batch student_height student_width channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width channels"],
    *,
    temperature: Number | Real[Array, ""] = 4.0,
    where: Bool[Array, "*batch height width"] | Real[Array, "*batch height width"] | None = None,
) -> Float[Array, "*batch"]:
    """``T² mean_c sum_i p_ci log(p_ci / q_ci)``, p_c the softmax over positions i of the teacher's channel c / T.

    Args:
        student_features: ``[..., height, width, channels]``, features or logit maps.
        teacher_features: ``[..., height, width, channels]``; height and width may differ.
        temperature: T. The paper uses 4.
        where: ``[..., height, width]`` of the smaller map, True = counted (labelled pixels).

    Returns:
        ``[...]`` in nats, one value for each example.

    Source:
        [CWD] Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv:2011.13256, the
        channel-wise softmax over positions and its KL.

    Code versus paper:
        As mmrazor's (sum over channels and batch, divided by both), whose default is T = 1. Weights: 3 for logit maps, 50 for
        features. The teacher is detached.

    Example:
        >>> student, teacher = jnp.zeros((2, 2, 1)), jnp.array([1e4, 0.0, 0.0, 0.0]).reshape(2, 2, 1)
        >>> round(channel_wise(student, teacher, temperature=1.0).item(), 4)  # log 4
        1.3863
    """
    student, teacher = map_pair(student_features=student_features, teacher_features=teacher_features)
    kept, student, teacher = keep_positions(where, student, teacher)
    if kept is not None:
        # A softmax over nothing is undefined: an example without a position keeps its (zeroed) map, and gives 0.
        some = kept | ~jnp.any(kept, axis=SPACE, keepdims=True)
        student, teacher = (jnp.where(some, x, -jnp.inf) for x in (student, teacher))
    log_q, log_p = (jax.nn.log_softmax(tempered(x, temperature), axis=SPACE) for x in (student, teacher))
    if kept is not None:
        log_q, log_p = (jnp.where(kept, x, 0) for x in (log_q, log_p))
    terms = jnp.exp(log_p) * (log_p - log_q)
    return jnp.mean(jnp.sum(terms, axis=SPACE), axis=-1) * squared(temperature)


def class_attention(
    student_maps: Real[Array, "*batch student_height student_width classes"],
    teacher_maps: Real[Array, "*batch teacher_height teacher_width classes"],
    *,
    size: int = 2,
) -> Float[Array, "*batch"]:
    """``mean_ci (u_ci - v_ci)²``, u_c the student's map of class c, averaged down to size x size and divided by its length.

    Args:
        student_maps: ``[..., height, width, classes]``: class activation maps, whose mean over positions is the logits.
        teacher_maps: ``[..., height, width, classes]``; height and width may differ.
        size: side of the compared maps. The paper uses 2.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [CAT-KD] Guo et al., "Class Attention Transfer Based Knowledge Distillation", CVPR 2023, arXiv:2304.12777, the class
        attention transfer loss.

    Code versus paper:
        As the code, with weight 400 beside the cross-entropy (50 to 300 in CAT, which has no labels). The teacher is detached.

    Example:
        >>> student, teacher = jnp.zeros((2, 2, 1)), jnp.array([3.0, 0.0, 0.0, 0.0]).reshape(2, 2, 1)
        >>> class_attention(student, teacher).item()
        0.25
    """
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    check_maps(student_maps=student_maps, teacher_maps=teacher_maps)
    maps = promote(student_maps, teacher_maps)
    student, teacher = (normalize(adaptive_average_pool(x, size, size), SPACE) for x in maps)
    return jnp.mean(jnp.square(student - teacher), axis=ENTRIES)


def fsp(
    student_features: Real[Array, "*batch student_height student_width channels"],
    student_features_next: Real[Array, "*batch student_next_height student_next_width next_channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width channels"],
    teacher_features_next: Real[Array, "*batch teacher_next_height teacher_next_width next_channels"],
) -> Float[Array, "*batch"]:
    """``mean_cd (G_cd - H_cd)²``, G = the mean over positions of the product of channel c and the next layer's channel d.

    Args:
        student_features: ``[..., height, width, channels]``, one end of a part of the network.
        student_features_next: ``[..., height, width, next_channels]``, its other end.
        teacher_features: the same part of the teacher; height and width are its own, channels are the student's.
        teacher_features_next: its other end.

    Returns:
        ``[...]``, one value for each example. Memory: the two matrices of channels x next channels, many times the inputs where
        maps have fewer positions than channels.

    Source:
        [FSP] Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        CVPR 2017, the FSP matrix and its squared difference.

    Code versus paper:
        RepDistiller takes the mean over the two channel axes, as here (the paper sums), with weight 50, in a first stage before
        the cross-entropy. The teacher is detached.

    Example:
        >>> one, two = jnp.ones((2, 2, 3)), jnp.full((2, 2, 4), 2.0)
        >>> fsp(one, two, one, jnp.ones((2, 2, 4))).item()
        1.0
    """
    ends: dict[str, Any] = {
        "student_features": student_features,
        "student_features_next": student_features_next,
        "teacher_features": teacher_features,
        "teacher_features_next": teacher_features_next,
    }
    check_maps(same_channels=False, **ends)
    check_channels(student_features=student_features, teacher_features=teacher_features)
    check_channels(student_features_next=student_features_next, teacher_features_next=teacher_features_next)
    student, student_next, teacher, teacher_next = promote(*ends.values())

    def flow(first, second):
        first, second = (_flat(x) for x in match(first, second))
        return einsum("...nc,...nd->...cd", first, second) / first.shape[-2]

    return jnp.mean(jnp.square(flow(student, student_next) - flow(teacher, teacher_next)), axis=(-2, -1))
