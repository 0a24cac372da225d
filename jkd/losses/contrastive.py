"""Losses that tell an example's own pair from others: within the batch, over given candidates, or against a memory."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import (
    check_exact_rank,
    check_nonempty,
    check_rank,
    check_same_shape,
    check_where,
    cross_entropy_with,
    describe,
    indices,
    normalize,
    promote,
)
from jkd.losses._maps import check_channels, einsum
from jkd.losses._rows import rows
from jkd.losses._typing import Array, Bool, Float, Int, Real, Scalar


def info_nce(
    student_embeddings: Real[Array, " batch dim"],
    teacher_embeddings: Real[Array, " batch dim"],
    *,
    temperature: Scalar = 0.07,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> Float[Array, " batch"]:
    """``- log softmax_j(cos(s_i, t_j) / T)_i``: the student's example i must find the teacher's i among the batch.

    Args:
        student_embeddings: ``[batch, dim]``, after the projector.
        teacher_embeddings: ``[batch, dim]``.
        temperature: T, may be learned. 0.07 in the paper.
        where: ``[batch]``, True = counted, as an anchor and as a candidate.

    Returns:
        ``[batch]`` in nats, one value for each anchor; 0 where dropped.

    Source:
        [InfoNCE] van den Oord, Li, Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
        arXiv:1807.03748, the InfoNCE loss; cosines and T as in the non-parametric softmax of Wu et al., CVPR 2018,
        arXiv:1805.01978.

    Code versus paper:
        Not multiplied by T² (contrastive papers don't). CLIP's symmetric form is the mean of ``info_nce(s, t)`` and
        ``info_nce(t, s)``. Whether the teacher is detached depends on the method; as a distillation target it is.

    Example:
        >>> info_nce(jnp.eye(2), jnp.eye(2), temperature=1.0).round(4).tolist() == [jnp.log(1 + jnp.exp(-1)).round(4).item()] * 2
        True
    """
    check_exact_rank(2, "[batch, dim]", student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    check_channels(student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    kept, student, teacher = rows(where, student_embeddings=student_embeddings, teacher_embeddings=teacher_embeddings)
    logits = einsum("id,jd->ij", normalize(student), normalize(teacher)) / temperature
    own = jnp.eye(kept.shape[0], dtype=bool)
    # A dropped candidate is -inf; each anchor keeps its own pair, so that no row is empty.
    logits = jnp.where(own | (kept[None, :] != 0), logits, -jnp.inf)
    return (jax.nn.logsumexp(logits, axis=1) - jnp.sum(jnp.where(own, logits, 0), axis=1)) * kept


def soft_contrastive(
    student_similarities: Real[Array, "*batch candidates"],
    teacher_targets: Real[Array, "*batch candidates"],
    *,
    temperature: Scalar = 0.2,
    where: Bool[Array, "*batch candidates"] | Real[Array, "*batch candidates"] | None = None,
) -> Float[Array, "*batch"]:
    """``- sum_j y_ij log softmax_j(s_i / T)_j``: similarities to candidates against a distribution over them.

    With one-hot targets on the diagonal of a cosine matrix this is `info_nce`.

    Args:
        student_similarities: ``[..., candidates]``: cosines to a queue, a batch or mined documents.
        teacher_targets: ``[..., candidates]`` with sum 1: ``softmax(teacher_similarities / 0.01)`` in the paper.
        temperature: T, may be learned. 0.2 in the paper.
        where: ``[..., candidates]``, True = counted; targets should sum to 1 over what is kept.

    Returns:
        ``[...]`` in nats, one value for each anchor; 0 where it has no candidate.

    Source:
        [SEED] Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021, arXiv:2101.04731, the
        cross-entropy of similarity distributions.

    Code versus paper:
        Not multiplied by T². UniME-V2 and LG-ANNA use divergences of the same two distributions: `forward_kl` or `jeffreys` of
        similarities divided by their T. The targets are detached.

    Example:
        >>> round(soft_contrastive(jnp.zeros(4), jnp.array([0.5, 0.5, 0.0, 0.0])).item(), 4)  # log 4
        1.3863
    """
    arrays = {"student_similarities": student_similarities, "teacher_targets": teacher_targets}
    check_rank(1, "[..., candidates]", **arrays)
    check_nonempty(-1, "candidates", **arrays)
    check_same_shape(**arrays)
    similarities, targets = promote(student_similarities, teacher_targets)
    if where is not None:
        check_where(where, similarities.shape, meaning="[..., candidates]")
        kept = jnp.asarray(where) != 0
        similarities, targets = jnp.where(kept, similarities, -jnp.inf), jnp.where(kept, targets, 0)
    return cross_entropy_with(targets, similarities, temperature)


def _scores(embeddings, bank, candidates):
    """``<v_b, bank[candidates_bk]>``, ``[batch, candidates]``, gathering about as many rows at a time as the bank has.

    The backward pass gathers again, so that no ``[batch, candidates, dim]`` is ever held (0.5 GB at the paper's sizes).
    """
    batch, total = candidates.shape
    step = min(total, max(1, bank.shape[0] // batch))
    steps = -(-total // step)
    padded = jnp.pad(candidates, ((0, 0), (0, steps * step - total)))

    @jax.checkpoint
    def some(chosen):
        return einsum("bd,bkd->bk", embeddings, bank[chosen])

    found = jax.lax.map(some, jnp.swapaxes(padded.reshape(batch, steps, step), 0, 1))
    return jnp.swapaxes(found, 0, 1).reshape(batch, steps * step)[:, :total]


def _noise_contrast(scores, scale, kept, size, eps):
    """One direction of CRD and the scale that it used: - log h(positive) - sum log(1 - h(negative)), h = P / (P + K/N + eps)."""
    negatives = scores.shape[1] - 1
    # The scale is memory: the first batch sets it and no gradient passes, as in the code.
    ones = jnp.broadcast_to(kept[:, None], scores.shape)
    mean = jnp.sum(jnp.where(ones != 0, jnp.exp(scores), 0)) / jnp.maximum(jnp.sum(ones), 1)
    used = jax.lax.stop_gradient(jnp.where(scale > 0, scale, mean * size))
    log_p = scores - jnp.log(jnp.where(used > 0, used, 1))
    noise = negatives / size
    total = jnp.logaddexp(log_p, math.log(noise + eps))
    return (total[:, 0] - log_p[:, 0] + jnp.sum(total[:, 1:] - math.log(noise), axis=1)) * kept, used


def crd(
    student_embeddings: Real[Array, " batch dim"],
    teacher_embeddings: Real[Array, " batch dim"],
    index: Int[Array, " batch"],
    negatives: Int[Array, " batch negatives"],
    memory: dict[str, Any],
    *,
    temperature: float = 0.07,
    momentum: float = 0.5,
    eps: float = 1e-7,
    where: Bool[Array, " batch"] | Real[Array, " batch"] | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Any]]:
    """``- log h(s_i, t_i) - sum_k log(1 - h(s_i, t_k))`` and the same with the sides exchanged, h(P) = P / (P + K/N + eps).

    P = exp(<v, m> / T) / Z, v the embedding of length 1 and m the other side's memory of the positive or of one of K negatives.

    Args:
        student_embeddings: ``[batch, dim]``, after a linear map to ``dim`` (128 in the paper); divided by their length here.
        teacher_embeddings: ``[batch, dim]``, after a linear map of its own, which is trained as well.
        index: int ``[batch]``, the example's row in the memory.
        negatives: int ``[batch, K]``, rows that serve as negatives: any (K = 16384), or those of another class.
        memory: ``student`` and ``teacher`` ``[N, dim]``, N the size of the data set, drawn uniformly from ± sqrt(3 / dim);
            ``student_scale`` and ``teacher_scale``, scalars that start at -1: the Z of each direction, set by the first batch.
        temperature: T.
        momentum: of the memory.
        eps: as in the code.
        where: ``[batch]``, True = counted. A dropped example writes no memory.

    Returns:
        ``[batch]`` in nats (0 where dropped), and the memory after the batch: rows ``index`` become ``momentum * row +
        (1 - momentum) * v``, divided by their length. Values are taken before the write.

    Source:
        [CRD] Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv:1910.10699, the
        noise-contrastive objective, equation 18, and its critic.

    Code versus paper:
        As the code, with weight 0.8 (and 1 for `forward_kl` in CRD+KD). The memory is detached, both embeddings are trained. The
        code draws the negatives inside and puts the positive before them.

    Example:
        >>> memory = {"student": jnp.eye(4), "teacher": jnp.eye(4), "student_scale": jnp.ones(()), "teacher_scale": jnp.ones(())}
        >>> value, memory = crd(jnp.eye(4)[:1], jnp.eye(4)[:1], jnp.array([0]), jnp.array([[1, 2]]), memory)
        >>> value.shape, memory["student"].shape
        ((1,), (4, 4))
    """
    embeddings = {"student_embeddings": student_embeddings, "teacher_embeddings": teacher_embeddings}
    check_exact_rank(2, "[batch, dim]", **embeddings)
    check_channels(**embeddings)
    kept, student, teacher = rows(where, **embeddings)
    _check_memory(student, index, negatives, memory)
    student, teacher = normalize(student), normalize(teacher)
    student_bank, teacher_bank = (jnp.asarray(memory[name], student.dtype) for name in ("student", "teacher"))
    size = student_bank.shape[0]
    index = indices(index)
    candidates = jnp.concatenate([index[:, None], indices(negatives)], axis=1)

    total, written = jnp.zeros((), student.dtype), {}
    # Dropped rows aim past the end, where a write is left out.
    target = jnp.where(kept != 0, index, size)
    for side, own, bank, other in (
        ("student", student, student_bank, teacher_bank),
        ("teacher", teacher, teacher_bank, student_bank),
    ):
        scores = _scores(own, other, candidates) / temperature
        value, scale = _noise_contrast(scores, memory[f"{side}_scale"].astype(own.dtype), kept, size, eps)
        total = total + value
        row = normalize(momentum * bank[index] + (1 - momentum) * own)
        written[side] = bank.at[target].set(row, mode="drop").astype(memory[side].dtype)
        written[f"{side}_scale"] = scale.astype(memory[f"{side}_scale"].dtype)
    return total, written


def _check_memory(embeddings, index, negatives, memory):
    names = {"student", "teacher", "student_scale", "teacher_scale"}
    if not isinstance(memory, dict) or set(memory) != names:
        got = sorted(memory) if isinstance(memory, dict) else type(memory).__name__
        raise ValueError(f"memory must be a dict of {sorted(names)}, got {got}")
    batch, dim = embeddings.shape
    check_exact_rank(2, "[N, dim]", **{f"memory[{side!r}]": memory[side] for side in ("student", "teacher")})
    check_same_shape(**{f"memory[{side!r}]": memory[side] for side in ("student", "teacher")})
    check_exact_rank(
        0, "a scalar array", **{f"memory['{side}_scale']": memory[f"{side}_scale"] for side in ("student", "teacher")}
    )
    if np.shape(memory["student"])[1] != dim:
        raise ValueError(f"memory['student'] must be [N, {dim}] like student_embeddings, got {describe(memory['student'])}")
    for name, array, rank in (("index", index, 1), ("negatives", negatives, 2)):
        if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must be integers, rows of the memory, got {getattr(array, 'dtype', type(array).__name__)}")
        if np.ndim(array) != rank or np.shape(array)[0] != batch:
            shape = "[batch]" if rank == 1 else "[batch, K]"
            raise ValueError(f"{name} must be {shape} with batch {batch} like student_embeddings, got {describe(array)}")
    if np.shape(negatives)[1] == 0:
        raise ValueError(f"negatives must hold at least one row for each example, got {describe(negatives)}")
