"""The formulas of the logit losses in float64 NumPy, written from the papers, by loops where those are plainer."""

from __future__ import annotations

import numpy as np


def softmax(z, temperature=1.0):
    z = np.asarray(z, np.float64) / temperature
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def pq(student_logits, teacher_logits, temperature=1.0):
    return softmax(teacher_logits, temperature), softmax(student_logits, temperature)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def one_hot(labels, classes):
    return np.eye(classes)[labels]


def rowwise(function):
    """A formula for one position, mapped over all leading axes (those of the first array but its last)."""

    def mapped(**arguments):
        arrays = {n: v for n, v in arguments.items() if isinstance(v, np.ndarray)}
        hyper = {n: v for n, v in arguments.items() if n not in arrays}
        leading = next(iter(arrays.values())).shape[:-1]
        flat = [np.reshape(x, (-1, *x.shape[len(leading) :])) for x in arrays.values()]
        values = [function(**dict(zip(arrays, row, strict=True)), **hyper) for row in zip(*flat, strict=True)]
        return np.reshape(values, leading)

    return mapped


# --- divergences --------------------------------------------------------------------------------------------------------


def cross_entropy(student_logits, labels, label_smoothing=0.0):
    q = softmax(student_logits)
    classes = q.shape[-1]
    y = labels if np.issubdtype(labels.dtype, np.floating) else one_hot(labels, classes)
    y = (1 - label_smoothing) * y + label_smoothing / classes
    return -(y * np.log(q)).sum(-1)


def soft_cross_entropy(student_logits, teacher_logits, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return -(temperature**2) * (p * np.log(q)).sum(-1)


def forward_kl(student_logits, teacher_logits, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(p, q)


def reverse_kl(student_logits, teacher_logits, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(q, p)


def jeffreys(student_logits, teacher_logits, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return temperature**2 / 2 * ((p - q) * (np.log(p) - np.log(q))).sum(-1)


def js(student_logits, teacher_logits, beta=0.5, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    if beta == 0:
        return temperature**2 * kl(p, q)
    if beta == 1:
        return temperature**2 * kl(q, p)
    m = beta * p + (1 - beta) * q
    return temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))


def skew_forward_kl(student_logits, teacher_logits, lam=0.1, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(p, lam * p + (1 - lam) * q)


def skew_reverse_kl(student_logits, teacher_logits, lam=0.1, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return temperature**2 * kl(q, (1 - lam) * p + lam * q)


def total_variation(student_logits, teacher_logits, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return np.abs(p - q).sum(-1) / 2


def alpha_beta(student_logits, teacher_logits, alpha=0.5, beta=0.5, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    a, b = alpha, beta
    if a == b == 0:
        d = (np.log(q) - np.log(p)) ** 2 / 2
    elif b == 0:
        d = (p**a * np.log(p**a / q**a) - p**a + q**a) / a**2
    elif a == 0:
        d = (q**b * np.log(q**b / p**b) - q**b + p**b) / b**2
    elif a + b == 0:
        d = (np.log(q**a / p**a) + p**a / q**a - 1) / a**2
    else:
        d = p ** (a + b) / (b * (a + b)) + q ** (a + b) / (a * (a + b)) - p**a * q**b / (a * b)
    return temperature**2 * d.sum(-1)


@rowwise
def adaptive_kl(student_logits, teacher_logits, mu=0.5, temperature=1.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    head, cumulative = [], 0.0
    for rank, c in enumerate(np.argsort(-p, kind="stable")):
        cumulative += p[c]
        if rank == 0 or cumulative <= mu:
            head.append(c)
    gap = np.abs(p - q)
    g_head = gap[head].sum()
    g_tail = gap.sum() - g_head
    return temperature**2 * (g_head * kl(p, q) + g_tail * kl(q, p)) / (g_head + g_tail)


def logit_mse(student_logits, teacher_logits):
    return ((student_logits - teacher_logits) ** 2).mean(-1)


@rowwise
def logistic_ranking(student_logits, teacher_logits):
    losses = [
        np.log1p(np.exp(-(student_logits[i] - student_logits[j])))
        for i in range(len(teacher_logits))
        for j in range(len(teacher_logits))
        if teacher_logits[i] > teacher_logits[j]
    ]
    return np.mean(losses) if losses else 0.0


# --- decoupled ----------------------------------------------------------------------------------------------------------


@rowwise
def dkd(student_logits, teacher_logits, labels, alpha=1.0, beta=8.0, temperature=4.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    y = labels
    rest = [c for c in range(len(p)) if c != y]
    tckd = kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
    nckd = kl(p[rest] / p[rest].sum(), q[rest] / q[rest].sum())
    return temperature**2 * (alpha * tckd + beta * nckd)
