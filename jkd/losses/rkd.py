"""Relational knowledge distillation: distances between pairs of examples, angles between triples.

Embeddings are ``[batch, ...]``, trailing axes are flattened. ``where`` ``[batch]`` drops examples: kept rows get the values that
they would get without the others, and dropped rows get 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jkd.losses._common import normalize
from jkd.losses._maps import gram
from jkd.losses._rows import centred, count, rows
from jkd.losses._typing import Array, Bool, Float, Real


def _smooth_l1(x):
    """PyTorch's, with the bend at 1."""
    size = jnp.abs(x)
    return jnp.where(size < 1, x * x / 2, size - 0.5)


def rkd_distance(
    student_embeddings: Real[Array, " batch *student"],
    teacher_embeddings: Real[Array, " batch *teacher"],
    *,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``mean_j huber(|s_i - s_j| / m_s - |t_i - t_j| / m_t)``, m the mean distance between two examples.

    Args:
        student_embeddings, teacher_embeddings: ``[batch, ...]``.
        where: ``[batch]``, True = counted.

    Returns:
        ``[batch]``, one value for each anchor i.

    Source:
        [RKD-D] Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068, the distance-wise loss,
        equations 5 to 8.

    Code versus paper:
        As the code: the mean is over all B² pairs (i = j gives 0) with weight 25, beside 50 for `rkd_angle`, and squared distances
        are at least 1e-12 (so equal examples are 1e-6 apart). The teacher is detached.

    Example:
        >>> points = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> rkd_distance(points, 5 * points + 3).round(4).tolist()
        [0.0, 0.0, 0.0]
    """
    kept, student, teacher = rows(where, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    own = jnp.eye(kept.shape[0], dtype=bool)
    pair = jnp.where(own, 0, kept[:, None] * kept[None, :])

    def distances(x):
        # Distances do not depend on the origin, and products of centred rows lose the least to rounding.
        products = gram(centred(x, kept))
        length = jnp.sum(jnp.where(own, products, 0), axis=1)
        squared = length[:, None] + length[None, :] - 2 * products
        distance = jnp.sqrt(jnp.where(squared > 1e-12, squared, 1e-12)) * pair
        mean = jnp.sum(distance) / jnp.maximum(jnp.sum(pair), 1)
        return distance / jnp.where(mean > 0, mean, 1)

    return jnp.sum(_smooth_l1(distances(student) - distances(teacher)), axis=1) / count(kept)


def _group(batch: int, limit: int = 8) -> int:
    """The largest divisor of the batch up to ``limit``: so many anchors are worked on at once."""
    return max(size for size in range(1, limit + 1) if batch % size == 0)


def rkd_angle(
    student_embeddings: Real[Array, " batch *student"],
    teacher_embeddings: Real[Array, " batch *teacher"],
    *,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``mean_jk huber(cos(s_j - s_i, s_k - s_i) - cos(t_j - t_i, t_k - t_i))``: angles at example i.

    The B³ angles are walked a few anchors at a time and walked again for the gradient, so memory is of order B² (and B x dim).

    Args:
        student_embeddings, teacher_embeddings: ``[batch, ...]``.
        where: ``[batch]``, True = counted.

    Returns:
        ``[batch]``, one value for each anchor i.

    Source:
        [RKD-A] Park et al., "Relational Knowledge Distillation", CVPR 2019, arXiv:1904.05068, the angle-wise loss of the
        cosines of equation 9.

    Code versus paper:
        As the code: the mean is over all B³ triples (0 where two of them agree), with weight 50. The teacher is detached.

    Example:
        >>> points = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> rkd_angle(points, 5 * points + 3).round(4).tolist()
        [0.0, 0.0, 0.0]
    """
    kept, student, teacher = rows(where, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    batch = kept.shape[0]

    def cosines(x, anchors):
        unit = normalize(x[None, :, :] - anchors[:, None, :]) * kept[None, :, None]
        return gram(unit)

    @jax.checkpoint
    def values(anchors):
        difference = cosines(student, anchors[0]) - cosines(teacher, anchors[1])
        return jnp.sum(_smooth_l1(difference), axis=(1, 2))

    # Strided groups: with a batch that is sharded over devices, every group then has anchors on all of them.
    group = _group(batch)
    split = [x.reshape(group, batch // group, -1).swapaxes(0, 1) for x in (student, teacher)]
    total = jax.lax.map(values, tuple(split)).swapaxes(0, 1).reshape(batch)
    return total / jnp.square(count(kept)) * kept
