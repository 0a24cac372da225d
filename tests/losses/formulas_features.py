"""The formulas of the feature, relation, attention and contrastive losses in float64 NumPy, by loops where those are plainer."""

from __future__ import annotations

import math

import numpy as np
from formulas_logits import kl, softmax


def over_examples(axes):
    """A formula for one example (arrays with ``axes`` axes), mapped over all leading axes."""

    def decorate(function):
        def mapped(*arrays, **hyper):
            leading = arrays[0].shape[: arrays[0].ndim - axes]
            flat = [x.reshape(-1, *x.shape[len(leading) :]) for x in arrays]
            return np.reshape([function(*example, **hyper) for example in zip(*flat, strict=True)], leading)

        def call(*arrays, **named):
            """Arrays in the order of the call, whether by place or by name; the rest are settings."""
            given = [*arrays, *(v for v in named.values() if isinstance(v, np.ndarray))]
            return mapped(*given, **{k: v for k, v in named.items() if not isinstance(v, np.ndarray)})

        return call

    return decorate


# --- maps ---------------------------------------------------------------------------------------------------------------


def pool(x, height, width):
    """Adaptive average pooling of one map ``[height, width, channels]``, cell by cell."""
    out = np.zeros((height, width, x.shape[-1]))
    for i in range(height):
        for j in range(width):
            rows = slice(math.floor(i * x.shape[0] / height), math.ceil((i + 1) * x.shape[0] / height))
            columns = slice(math.floor(j * x.shape[1] / width), math.ceil((j + 1) * x.shape[1] / width))
            out[i, j] = x[rows, columns].mean((0, 1))
    return out


def same_size(a, b):
    size = [min(m, n) for m, n in zip(a.shape[:2], b.shape[:2], strict=True)]
    return pool(a, *size), pool(b, *size)


def unit(x, axis=-1):
    length = np.linalg.norm(x, axis=axis, keepdims=True)
    return x / np.where(length > 1e-12, length, 1)


def mse(student_features, teacher_features):
    return ((student_features - teacher_features) ** 2).mean(-1)


def pooled_pair(students, teachers):
    """`same_size` of each pair in two stacks."""
    pairs = [same_size(a, b) for a, b in zip(students, teachers, strict=True)]
    return tuple(np.stack(side) for side in zip(*pairs, strict=True))


def cosine_distance(student_features, teacher_features):
    dot = (student_features * teacher_features).sum(-1)
    return 1 - dot / np.linalg.norm(student_features, axis=-1) / np.linalg.norm(teacher_features, axis=-1)


def pearson_distance(student_features, teacher_features):
    def standard(x):
        flat = x.reshape(-1, x.shape[-1])
        std = flat.std(0, ddof=1) if len(flat) > 1 else np.zeros(x.shape[-1])
        return (x - flat.mean(0)) / (std + 1e-6)

    return ((standard(student_features) - standard(teacher_features)) ** 2).mean(-1) / 2


@over_examples(3)
def hierarchical_context(student, teacher):
    student, teacher = same_size(student, teacher)
    values, weights = [((student - teacher) ** 2).mean()], [1.0]
    for level in (4, 2, 1):
        if level < student.shape[0]:
            values.append(((pool(student, level, level) - pool(teacher, level, level)) ** 2).mean())
            weights.append(weights[-1] / 2)
    return np.dot(values, weights) / sum(weights)


@over_examples(3)
def activation_boundary(student, teacher, margin=1.0):
    student, teacher = same_size(student, teacher)
    total = 0.0
    for s, t in zip(student.ravel(), teacher.ravel(), strict=True):
        if t > 0 and s <= margin:
            total += (s - margin) ** 2
        if t <= 0 and s > -margin:
            total += (s + margin) ** 2
    return total


def overhaul(student_features, teacher_features, margin):
    @over_examples(3)
    def one(student, teacher):
        student, teacher = same_size(student, teacher)
        total = 0.0
        for (*_, c), s in np.ndenumerate(student):
            t = teacher[(*_, c)]
            if t > 0 or (margin[c] < t <= 0 and s > t):
                total += (s - t) ** 2
            elif t <= margin[c] and s > margin[c]:
                total += (s - margin[c]) ** 2
        return total

    return one(student_features, teacher_features)


def variational_information(predicted_mean, teacher_features, log_scale):
    variance = np.log1p(np.exp(log_scale)) + 1e-5
    return ((predicted_mean - teacher_features) ** 2 / variance + np.log(variance)).mean(-1) / 2


def masked_generative(generated_features, teacher_features, mask=None):
    squares = (generated_features - teacher_features) ** 2
    if mask is not None:
        squares = squares * mask[..., None]
    return squares.reshape(len(squares), -1).sum(1)


@over_examples(3)
def attention_transfer(student, teacher, p=2):
    a, b = (unit((np.abs(x) ** p).mean(-1).ravel()) for x in same_size(student, teacher))
    return ((a - b) ** 2).mean()


@over_examples(3)
def factor_transfer(student, teacher):
    a, b = (unit((x**2).mean(-1).ravel()) for x in same_size(student, teacher))
    return np.abs(a - b).mean()


@over_examples(3)
def neuron_selectivity(student, teacher):
    a, b = (unit(x.reshape(-1, x.shape[-1]).T) for x in same_size(student, teacher))
    return ((a @ a.T) ** 2).mean() + ((b @ b.T) ** 2).mean() - 2 * ((a @ b.T) ** 2).mean()


@over_examples(3)
def channel_wise(student, teacher, temperature=4.0):
    a, b = (softmax(x.reshape(-1, x.shape[-1]).T, temperature) for x in same_size(student, teacher))
    return temperature**2 * kl(b, a).mean()


@over_examples(3)
def class_attention(student, teacher, size=2):
    a, b = (unit(pool(x, size, size).reshape(-1, x.shape[-1]), 0) for x in (student, teacher))
    return ((a - b) ** 2).mean()


@over_examples(3)
def fsp(student, student_next, teacher, teacher_next):
    def flow(first, second):
        first, second = same_size(first, second)
        return np.mean([np.outer(first[i, j], second[i, j]) for i, j in np.ndindex(first.shape[:2])], 0)

    return ((flow(student, student_next) - flow(teacher, teacher_next)) ** 2).mean()


@over_examples(3)
def inter_channel(student, teacher):
    a, b = (unit(x.reshape(-1, x.shape[-1]).T @ x.reshape(-1, x.shape[-1])) for x in (student, teacher))
    return ((a - b) ** 2).sum() / len(a)


# --- attention ----------------------------------------------------------------------------------------------------------


@over_examples(3)
def attention_scores_mse(student, teacher, threshold=-100.0):
    student, teacher = (np.where(x <= threshold, 0, x) for x in (student, teacher))
    return ((student - teacher) ** 2).mean()


@over_examples(3)
def attention_kl(student, teacher):
    return kl(softmax(teacher), softmax(student)).mean()


@over_examples(3)
def value_relation_kl(student, teacher):
    relations = [[softmax(head @ head.T / np.sqrt(head.shape[-1])) for head in x] for x in (teacher, student)]
    return np.mean([kl(t, s).mean() for t, s in zip(*relations, strict=True)])


@over_examples(2)
def self_relation_kl(student, teacher, heads):
    return value_relation_kl(np.stack(np.split(student, heads, -1)), np.stack(np.split(teacher, heads, -1)))


# --- relations ----------------------------------------------------------------------------------------------------------


def flat(x):
    return x.reshape(len(x), -1)


def huber(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5)


def similarity_preserving(student_embeddings, teacher_embeddings):
    a, b = (unit(flat(x) @ flat(x).T) for x in (student_embeddings, teacher_embeddings))
    return ((a - b) ** 2).sum(1) / len(a)


def pkt(student_embeddings, teacher_embeddings, eps=1e-7):
    def probabilities(x):
        x = flat(x) / (np.linalg.norm(flat(x), axis=1, keepdims=True) + eps)
        affinity = (1 + x @ x.T) / 2
        return affinity / affinity.sum(1, keepdims=True)

    q, p = probabilities(student_embeddings), probabilities(teacher_embeddings)
    return (p * np.log((p + eps) / (q + eps))).mean(1)


def rkd_distance(student_embeddings, teacher_embeddings):
    def distances(x):
        d = np.linalg.norm(flat(x)[:, None] - flat(x)[None], axis=-1)
        return d / d[~np.eye(len(d), dtype=bool)].mean()

    return huber(distances(student_embeddings) - distances(teacher_embeddings)).mean(1)


def rkd_angle(student_embeddings, teacher_embeddings):
    def cosines(x):
        edges = unit(flat(x)[None] - flat(x)[:, None])
        return np.einsum("ijd,ikd->ijk", edges, edges)

    return huber(cosines(student_embeddings) - cosines(teacher_embeddings)).mean((1, 2))


def correlation_congruence(student_embeddings, teacher_embeddings):
    d = np.abs(student_embeddings - teacher_embeddings)
    return np.full(len(d), np.mean([d[i] @ d[i + 1] for i in range(len(d) - 1)]))


def linear_cka_distance(student_embeddings, teacher_embeddings):
    batch = len(student_embeddings)
    centre = np.eye(batch) - 1 / batch
    k, l = (centre @ flat(x) @ flat(x).T @ centre for x in (student_embeddings, teacher_embeddings))
    return np.full(batch, 1 - np.trace(k @ l) / np.sqrt(np.trace(k @ k) * np.trace(l @ l)))


# --- contrastive --------------------------------------------------------------------------------------------------------


def info_nce(student_embeddings, teacher_embeddings, temperature=0.07):
    similarities = unit(student_embeddings) @ unit(teacher_embeddings).T
    return -np.log(np.diag(softmax(similarities, temperature)))


def soft_contrastive(student_similarities, teacher_targets, temperature=0.2):
    return -(teacher_targets * np.log(softmax(student_similarities, temperature))).sum(-1)


def crd(
    student_embeddings, teacher_embeddings, index, negatives, student, teacher, student_scale, teacher_scale, temperature=0.07
):
    """The two sums of the code, with probabilities rather than their logarithms."""
    candidates = np.concatenate([index[:, None], negatives], 1)
    size, eps = len(student), 1e-7
    noise = negatives.shape[1] / size
    total = np.zeros(len(index))
    for own, bank, scale in ((student_embeddings, teacher, student_scale), (teacher_embeddings, student, teacher_scale)):
        e = np.exp(np.einsum("bd,bkd->bk", unit(own), bank[candidates]) / temperature)
        h = e / (scale if scale > 0 else e.mean() * size)
        total -= np.log(h[:, 0] / (h[:, 0] + noise + eps)) + np.log(noise / (h[:, 1:] + noise + eps)).sum(1)
    return total
