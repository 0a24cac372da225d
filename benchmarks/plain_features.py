"""The feature, relation, attention and contrastive losses as one would type them from the paper: see `plain_logits`.

Smallest shapes are given as ``(batch, size)`` and filled up.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from plain_logits import kl, log_softmax, row

from jkd import losses

MAP = (64, 14, 14, 256)
LATE = (64, 7, 7, 1024)
BATCH = (256, 512)
TOKENS = (16, 128, 384)
HEADS = 12


def maps(rng, shape):
    shape = shape if len(shape) == 4 else (shape[0], 4, 4, shape[1])
    return rng.normal(size=shape), rng.normal(size=shape)


def uneven_maps(rng, shape):
    """The teacher's map is twice as large along both axes."""
    (student, _), (teacher, _) = maps(rng, shape), maps(rng, shape)
    return student, np.repeat(np.repeat(teacher, 2, 1), 2, 2)


def maps_margin(rng, shape):
    return *maps(rng, shape), -rng.uniform(0.2, 1, size=shape[-1])


def two_ends(rng, shape):
    return *maps(rng, shape), *maps(rng, shape)


def embeddings(rng, shape):
    return rng.normal(size=shape), rng.normal(size=shape)


def similarities(rng, shape):
    return rng.uniform(-1, 1, size=shape), rng.dirichlet(np.ones(shape[-1]), size=shape[0])


def tokens(rng, shape):
    shape = shape if len(shape) == 3 else (shape[0], 8, 2 * HEADS)
    return rng.normal(size=shape), rng.normal(size=shape)


def head_values(rng, shape):
    return tuple(np.swapaxes(x.reshape(*x.shape[:2], HEADS, -1), 1, 2) for x in tokens(rng, shape))


def scores(rng, shape):
    batch, length, _ = tokens(rng, shape)[0].shape
    return rng.normal(size=(batch, HEADS, length, length)), rng.normal(size=(batch, HEADS, length, length))


def memory(rng, shape):
    """A batch of 64 against 4096 of 10000 stored vectors: a quarter of the paper's negatives."""
    batch, dim = shape
    size, negatives = (10_000, 4096) if batch >= 64 else (50, 9)
    bank = rng.normal(size=(2, size, dim))
    bank /= np.linalg.norm(bank, axis=-1, keepdims=True)
    index, others = rng.permutation(size)[:batch], rng.integers(0, size, size=(batch, negatives))
    return *embeddings(rng, shape), index.astype(np.int32), others.astype(np.int32), *bank


def unit(x, axis=-1):
    return x / (jnp.linalg.norm(x, axis=axis, keepdims=True) + 1e-12)


def flat(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


def pool(x, size):
    height, width = x.shape[1] // size, x.shape[2] // size
    cut = x[:, : height * size, : width * size]
    return cut.reshape(x.shape[0], size, height, size, width, x.shape[-1]).mean((2, 4))


# --- features and maps --------------------------------------------------------------------------------------------------


def mse(s, t):
    return jnp.mean((s - t) ** 2, -1)


def mse_resized(s, t):
    return mse(s, pool(t, s.shape[1]))


def cosine_distance(s, t):
    return 1 - jnp.sum(unit(s) * unit(t), -1)


def pearson_distance(s, t):
    def standard(x):
        return (x - x.mean((0, 1, 2))) / (x.std((0, 1, 2), ddof=1) + 1e-6)

    return jnp.mean((standard(s) - standard(t)) ** 2, -1) / 2


def hierarchical_context(s, t, levels):
    """At levels that divide the side; others need overlapping cells."""
    total, weight, weights = jnp.mean((s - t) ** 2, (1, 2, 3)), 1.0, 1.0
    for level in levels:
        weight /= 2
        total += weight * jnp.mean((pool(s, level) - pool(t, level)) ** 2, (1, 2, 3))
        weights += weight
    return total / weights


def activation_boundary(s, t, margin):
    on = (s - margin) ** 2 * ((s <= margin) & (t > 0))
    off = (s + margin) ** 2 * ((s > -margin) & (t <= 0))
    return jnp.sum(on + off, (1, 2, 3))


def overhaul(s, t, margin):
    target = jnp.maximum(t, margin)
    return jnp.sum((s - target) ** 2 * ((s > target) | (target > 0)), (1, 2, 3))


def variational_information(s, t, log_scale):
    variance = jax.nn.softplus(log_scale) + 1e-5
    return jnp.mean((s - t) ** 2 / variance + jnp.log(variance), -1) / 2


def masked_generative(s, t):
    return jnp.sum((s - t) ** 2, (1, 2, 3))


def attention(x):
    return unit(jnp.mean(flat(x) ** 2, -1))


def attention_transfer(s, t):
    return jnp.mean((attention(s) - attention(t)) ** 2, -1)


def factor_transfer(s, t):
    return jnp.mean(jnp.abs(attention(s) - attention(t)), -1)


def neuron_selectivity(s, t):
    s, t = unit(flat(s), 1), unit(flat(t), 1)

    def kernel(a, b):
        return jnp.mean(jnp.einsum("bnc,bnd->bcd", a, b) ** 2, (1, 2))

    return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)


def channel_wise(s, t, temperature):
    s, t = jnp.swapaxes(flat(s), 1, 2), jnp.swapaxes(flat(t), 1, 2)
    return kl(log_softmax(t, temperature), log_softmax(s, temperature)).mean(-1) * temperature**2


def class_attention(s, t, size):
    return jnp.mean((unit(flat(pool(s, size)), 1) - unit(flat(pool(t, size)), 1)) ** 2, (1, 2))


def fsp(s, s_next, t, t_next):
    def flow(a, b):
        return jnp.einsum("bnc,bnd->bcd", flat(a), flat(b)) / (a.shape[1] * a.shape[2])

    return jnp.mean((flow(s, s_next) - flow(t, t_next)) ** 2, (1, 2))


def inter_channel(s, t):
    s, t = (unit(jnp.einsum("bnc,bnd->bcd", flat(x), flat(x))) for x in (s, t))
    return jnp.sum((s - t) ** 2, (1, 2)) / s.shape[-1]


# --- relations ----------------------------------------------------------------------------------------------------------


def similarity_preserving(s, t):
    return jnp.sum((unit(s @ s.T) - unit(t @ t.T)) ** 2, 1) / s.shape[0]


def pkt(s, t):
    def probabilities(x):
        x = x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-7)
        affinity = (1 + x @ x.T) / 2
        return affinity / affinity.sum(1, keepdims=True)

    p, q = probabilities(t), probabilities(s)
    return jnp.mean(p * jnp.log((p + 1e-7) / (q + 1e-7)), 1)


def huber(x):
    return jnp.where(jnp.abs(x) < 1, x**2 / 2, jnp.abs(x) - 0.5)


def rkd_distance(s, t):
    def distances(x):
        square = jnp.sum(x**2, 1)
        other = 1 - jnp.eye(x.shape[0])
        d = jnp.sqrt(jnp.maximum(square[:, None] + square[None] - 2 * x @ x.T, 1e-12)) * other
        return d / (d.sum() / other.sum())

    return jnp.mean(huber(distances(s) - distances(t)), 1)


def rkd_angle(s, t):
    def cosines(x):
        edges = x[None] - x[:, None]
        edges = edges / jnp.sqrt(jnp.maximum(jnp.sum(edges**2, -1, keepdims=True), 1e-24))
        return jnp.einsum("ijd,ikd->ijk", edges, edges)

    return jnp.mean(huber(cosines(s) - cosines(t)), (1, 2))


def correlation_congruence(s, t):
    d = jnp.abs(s - t)
    return jnp.full(s.shape[0], jnp.mean(jnp.sum(d[:-1] * d[1:], 1)))


def linear_cka_distance(s, t):
    s, t = s - s.mean(0), t - t.mean(0)
    k, l = s @ s.T, t @ t.T
    return jnp.full(s.shape[0], 1 - jnp.sum(k * l) / jnp.sqrt(jnp.sum(k * k) * jnp.sum(l * l)))


# --- attention and contrast ---------------------------------------------------------------------------------------------


def attention_scores_mse(s, t):
    return jnp.mean((jnp.where(s <= -100, 0, s) - jnp.where(t <= -100, 0, t)) ** 2, (1, 2, 3))


def attention_kl(s, t):
    return jnp.mean(kl(log_softmax(t), log_softmax(s)), (1, 2))


def relations(x):
    return jnp.einsum("bhid,bhjd->bhij", x, x) / jnp.sqrt(x.shape[-1])


def value_relation_kl(s, t):
    return attention_kl(relations(s), relations(t))


def self_relation_kl(s, t, heads):
    return value_relation_kl(*(jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2) for x in (s, t)))


def info_nce(s, t, temperature):
    return -jnp.diag(log_softmax(unit(s) @ unit(t).T, temperature))


def soft_contrastive(s, t, temperature):
    return -jnp.sum(t * log_softmax(s, temperature), -1)


def crd(s, t, index, negatives, student_bank, teacher_bank):
    """Every negative of every example is gathered at once."""
    candidates = jnp.concatenate([index[:, None], negatives], 1)
    noise = negatives.shape[1] / student_bank.shape[0]
    total = 0.0
    for own, bank in ((unit(s), teacher_bank), (unit(t), student_bank)):
        h = jnp.exp(jnp.einsum("bkd,bd->bk", bank[candidates], own) / 0.07) / 1e4
        total -= jnp.log(h[:, 0] / (h[:, 0] + noise + 1e-7)) + jnp.sum(jnp.log(noise / (h[:, 1:] + noise + 1e-7)), 1)
    return total


def crd_with_memory(s, t, index, negatives, student_bank, teacher_bank):
    """`losses.crd` with its memory made of the inputs; the memory that it returns is not computed."""
    scale = jnp.float32(1e4)
    stored = {"student": student_bank, "teacher": teacher_bank, "student_scale": scale, "teacher_scale": scale}
    return losses.crd(s, t, index, negatives, stored)[0]


CALLS = {"crd": crd_with_memory}
"""What is timed where it is not the loss itself."""

ROWS = [
    row(mse, maps, MAP),
    ("mse", mse_resized, uneven_maps, MAP, {}),
    row(cosine_distance, maps, MAP),
    row(pearson_distance, maps, MAP),
    row(hierarchical_context, maps, MAP, levels=(2, 1)),
    row(activation_boundary, maps, MAP, margin=1.0),
    row(overhaul, maps_margin, MAP),
    row(variational_information, maps_margin, MAP),
    row(masked_generative, maps, MAP),
    row(attention_transfer, maps, MAP),
    row(factor_transfer, maps, MAP),
    row(neuron_selectivity, maps, MAP),
    row(neuron_selectivity, maps, LATE),
    row(channel_wise, maps, MAP, temperature=4.0),
    row(class_attention, maps, MAP, size=2),
    row(fsp, two_ends, MAP),
    row(inter_channel, maps, (16, 14, 14, 128)),
    row(inter_channel, maps, LATE),
    row(similarity_preserving, embeddings, BATCH),
    row(pkt, embeddings, BATCH),
    row(rkd_distance, embeddings, BATCH),
    row(rkd_angle, embeddings, (128, 128)),
    row(correlation_congruence, embeddings, BATCH),
    row(linear_cka_distance, embeddings, BATCH),
    row(linear_cka_distance, embeddings, (1024, 128)),
    row(attention_scores_mse, scores, TOKENS),
    row(attention_kl, scores, TOKENS),
    row(value_relation_kl, head_values, TOKENS),
    row(self_relation_kl, tokens, TOKENS, heads=HEADS),
    row(info_nce, embeddings, BATCH, temperature=0.07),
    row(soft_contrastive, similarities, BATCH, temperature=0.2),
    row(crd, memory, (64, 128)),
]
