"""Losses that compare how examples (or channels) lie to each other. ``couples_batch``: a value depends on the whole batch.

Embeddings are ``[batch, ...]`` and trailing axes are flattened, so feature maps may be given as they are; student and teacher may
differ in them. ``where`` ``[batch]`` drops examples: the kept rows get the values that they would get without the others, and
dropped rows get 0 (or the scalar that all rows share).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jkd.losses._common import check_rank, describe, norm, normalize, promote, safe_sqrt
from jkd.losses._maps import check_channels, check_maps, einsum, gram
from jkd.losses._rows import centred, count, rows, unit_scale
from jkd.losses._typing import Array, Bool, Float, Real


def similarity_preserving(
    student_embeddings: Real[Array, " batch *student"],
    teacher_embeddings: Real[Array, " batch *teacher"],
    *,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``sum_j (G_ij - H_ij)² / B``, G = s sᵀ with each row divided by its length, and H likewise of the teacher.

    Args:
        student_embeddings: ``[batch, ...]``; the paper uses the last feature map.
        teacher_embeddings: ``[batch, ...]``.
        where: ``[batch]``, True = counted.

    Returns:
        ``[batch]``, one value for each anchor i.

    Source:
        [SP] Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv:1907.09682, the similarity-preserving
        loss of row-normalised Gram matrices.

    Code versus paper:
        As the code (RepDistiller, mdistiller), with weight 3000. There B is the batch of one device; here it is the global one.
        The teacher is detached.

    Example:
        >>> round(similarity_preserving(jnp.eye(2), jnp.ones((2, 3))).mean().item(), 4)  # (2 - sqrt 2) / 2
        0.2929
    """
    kept, student, teacher = rows(where, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)

    def similarities(x):
        return normalize(gram(x))

    return jnp.sum(jnp.square(similarities(student) - similarities(teacher)), axis=1) / count(kept) * kept


def pkt(
    student_embeddings: Real[Array, " batch *student"],
    teacher_embeddings: Real[Array, " batch *teacher"],
    *,
    eps: float = 1e-7,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``mean_j p_ij log((p_ij + eps) / (q_ij + eps))``, q_i the student's (1 + cos(s_i, s_j)) / 2 with sum 1 over j.

    Args:
        student_embeddings, teacher_embeddings: ``[batch, ...]``.
        eps: added to lengths and inside the logarithm, as in the code.
        where: ``[batch]``, True = counted.

    Returns:
        ``[batch]`` in nats, one value for each anchor i.

    Source:
        [PKT] Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018,
        arXiv:1803.10837, the cosine-based conditional probabilities and their KL.

    Code versus paper:
        The paper sums over pairs; its code takes the mean over all B² of them, as here, keeps j = i, and has weight 30000. The
        teacher is detached.

    Example:
        >>> jnp.allclose(pkt(jnp.eye(2), 3 * jnp.eye(2)), 0, atol=1e-6).item()
        True
    """
    kept, student, teacher = rows(where, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)

    def probabilities(x):
        unit = x / (norm(x, keepdims=True) + eps)
        # Rounding may take a cosine below -1.
        affinity = jnp.maximum((1 + gram(unit)) / 2, 0) * kept[None, :]
        total = jnp.sum(affinity, axis=1, keepdims=True)
        return affinity / jnp.where(total > 0, total, 1)

    p, q = probabilities(teacher), probabilities(student)
    # The sum of q - p is 0. With it no term is negative, so that rounding does not swamp a small divergence.
    terms = p * jnp.log1p((p - q) / (q + eps)) + (q - p)
    return jnp.sum(terms, axis=1) / count(kept) * kept


def correlation_congruence(
    student_embeddings: Real[Array, " batch dim"],
    teacher_embeddings: Real[Array, " batch dim"],
    *,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``mean_b sum_k d_bk d_(b+1)k``, d = |s - t|, over the B - 1 pairs of neighbours in the batch.

    Args:
        student_embeddings: ``[batch, dim]``, after a linear map to ``dim`` (128 in the code).
        teacher_embeddings: ``[batch, dim]``, after a linear map of its own.
        where: ``[batch]``, True = counted; neighbours are the kept examples that follow each other.

    Returns:
        ``[batch]``, the scalar repeated: the order of examples matters, so there is no value of one example.

    Source:
        [CC] Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv:1904.01802, the idea; the
        formula is that of the code.

    Code versus paper:
        The paper compares the batch's correlation matrices under a Taylor-expanded Gaussian kernel. This is the code that the
        authors gave to RepDistiller, with weight 0.02; both linear maps are trained.

    Example:
        >>> correlation_congruence(jnp.array([[1.0], [2.0], [3.0]]), jnp.zeros((3, 1))).tolist()  # (1 * 2 + 2 * 3) / 2
        [4.0, 4.0, 4.0]
    """
    check_rank(2, "[batch, dim]", student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    check_channels(student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    kept, student, teacher = rows(where, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    batch = kept.shape[0]
    if batch < 2:
        raise ValueError(f"student_embeddings must hold at least 2 examples (axis 0), got {describe(student_embeddings)}")
    difference = jnp.abs(student - teacher)
    if where is None:
        total, pairs = jnp.sum(difference[:-1] * difference[1:]), batch - 1
    else:
        index = jnp.where(kept != 0, jnp.arange(batch), batch)
        following = jnp.concatenate([jax.lax.cummin(index, reverse=True)[1:], jnp.full(1, batch, index.dtype)])
        # The last kept example has no successor: it reads a row out of range, which is 0.
        successor = difference.at[following].get(mode="fill", fill_value=0)
        total, pairs = jnp.sum(difference * successor), jnp.maximum(jnp.sum(kept) - 1, 1)
    return jnp.broadcast_to(total / pairs, (batch,))


def inter_channel(
    student_features: Real[Array, "*batch student_height student_width channels"],
    teacher_features: Real[Array, "*batch teacher_height teacher_width channels"],
) -> Float[Array, "*batch"]:
    """``mean_c sum_d (G_cd - H_cd)²``, G = the products of the student's channel maps, each row divided by its length.

    Args:
        student_features: ``[..., height, width, channels]``, after the projector (1x1 convolution and BatchNorm).
        teacher_features: ``[..., height, width, channels]``; height and width may differ.

    Returns:
        ``[...]``, one value for each example.

    Source:
        [ICKD] Liu et al., "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation", ICCV 2021,
        arXiv:2202.03680, the inter-channel correlation matrix and its squared difference.

    Code versus paper:
        The paper's loss has no row norm; its code divides rows by their length and the sum by channels, as here. The teacher is
        detached. Maps with fewer positions than channels take an equal form that needs positions² rather than channels² numbers.

    Example:
        >>> student, teacher = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[1.0, 1.0], [0.0, 0.0]])
        >>> round(inter_channel(student.reshape(2, 1, 2), teacher.reshape(2, 1, 2)).item(), 4)  # 2 - sqrt 2
        0.5858
    """
    check_maps(student_features=student_features, teacher_features=teacher_features)
    maps = promote(student_features, teacher_features)
    student, teacher = (unit_scale(x.reshape(*x.shape[:-3], -1, x.shape[-1])) for x in maps)
    if max(student.shape[-2], teacher.shape[-2]) >= student.shape[-1]:
        student, teacher = (normalize(gram(jnp.swapaxes(x, -1, -2))) for x in (student, teacher))
        return jnp.mean(jnp.sum(jnp.square(student - teacher), axis=-1), axis=-1)

    def product(a, b):
        """``sum_d <a_c, a_d> <b_c, b_d>`` for each channel c."""
        return jnp.sum(einsum("...nm,...mc->...nc", einsum("...nd,...md->...nm", a, b), b) * a, axis=-2)

    lengths = [safe_sqrt(product(x, x)) for x in (student, teacher)]
    scale = lengths[0] * lengths[1]
    cosine = product(student, teacher) / jnp.where(scale > 0, scale, 1)
    nonzero = sum((length > 0).astype(cosine.dtype) for length in lengths)
    return jnp.mean(nonzero - 2 * cosine, axis=-1)


def linear_cka_distance(
    student_embeddings: Real[Array, " batch *student"],
    teacher_embeddings: Real[Array, " batch *teacher"],
    *,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``1 - |sᵀt|² / (|sᵀs| |tᵀt|)`` of embeddings whose mean over the batch is taken off; Frobenius norms.

    Args:
        student_embeddings, teacher_embeddings: ``[batch, ...]``.
        where: ``[batch]``, True = counted.

    Returns:
        ``[batch]`` in 0..1, the scalar repeated: there is no value of one example. 1 where one side is constant.

    Source:
        [CKA] Kornblith et al., "Similarity of Neural Network Representations Revisited", ICML 2019, arXiv:1905.00414, linear
        CKA (biased estimator); in distillation: Zhou et al., "Rethinking Centered Kernel Alignment in Knowledge Distillation",
        IJCAI 2024, arXiv:2401.11824.

    Code versus paper:
        No code was compared. Products are taken between examples or between features, whichever is smaller. The teacher is
        detached.

    Example:
        >>> points = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> (linear_cka_distance(points, 5 * points + 3) < 1e-6).tolist()
        [True, True, True]
    """
    kept, student, teacher = rows(where, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    batch = kept.shape[0]
    student, teacher = unit_scale(centred(student, kept)), unit_scale(centred(teacher, kept))
    if batch <= max(student.shape[1], teacher.shape[1]):
        student, teacher = gram(student), gram(teacher)
        # |u - v|² / 2 is 1 - <u, v> for u and v of length 1, and exact where they are close; a zero one counts as far away.
        lengths = [norm(x, (0, 1)) for x in (student, teacher)]
        u, v = (x / jnp.where(length > 0, length, 1) for x, length in zip((student, teacher), lengths, strict=True))
        missing = sum(jnp.where(length > 0, 0, 0.5) for length in lengths)
        distance = jnp.sum(jnp.square(u - v)) / 2 + missing
    else:
        cross = jnp.sum(jnp.square(einsum("id,ie->de", student, teacher)))
        scale = norm(gram(student.T), (0, 1)) * norm(gram(teacher.T), (0, 1))
        distance = 1 - cross / jnp.where(scale > 0, scale, 1)
    return jnp.broadcast_to(distance, (batch,))
