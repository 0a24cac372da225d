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


def without(values, y):
    """The entries that are not the label's, renormalised."""
    rest = np.delete(values, y)
    return rest / rest.sum()


@rowwise
def nkd(student_logits, teacher_logits, labels, gamma=1.5, temperature=1.0):
    p, q = pq(student_logits, teacher_logits)
    at_t = pq(student_logits, teacher_logits, temperature)
    rest_p, rest_q = (without(x, labels) for x in at_t)
    return -p[labels] * np.log(q[labels]) - gamma * temperature**2 * (rest_p * np.log(rest_q)).sum()


def uskd(student_logits, weak_logits, labels, alpha=1.0, beta=0.1, mu=0.005):
    q, w = softmax(student_logits), softmax(weak_logits)
    classes = q.shape[-1]
    q, w, y = q.reshape(-1, classes), w.reshape(-1, classes), labels.reshape(-1)
    mean = np.mean([q[b, y[b]] ** 2 for b in range(len(y))])
    values = []
    for b in range(len(y)):
        target = q[b, y[b]] ** 2 + 1 - mean
        order = w[b] / (1 - w[b, y[b]] + 1e-6) + np.log(q[b]) / (1 - np.log(q[b, y[b]]) + 1e-6)
        rank = {c: 1 + sum(order > order[c]) for c in range(classes)}
        zipf = without(np.array([1 / rank[c] for c in range(classes)]), y[b])
        rest = -(zipf * np.log(without(q[b], y[b]))).sum()
        own = -((0.9 * one_hot(y[b], classes) + 0.1 / classes) * np.log(w[b])).sum()
        values.append(-alpha * target * np.log(q[b, y[b]]) + beta * rest + mu * own)
    return np.reshape(values, labels.shape)


def wsld(student_logits, teacher_logits, labels, temperature=4.0):
    of_student = cross_entropy(student_logits, labels)
    of_teacher = cross_entropy(teacher_logits, labels)
    return (1 - np.exp(-of_student / (of_teacher + 1e-7))) * soft_cross_entropy(student_logits, teacher_logits, temperature)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def log_sigmoid(z):
    return -np.logaddexp(0, -z)  # 1 - sigmoid(z) would cancel for large z


def binary_kl(student_logits, teacher_logits, temperature=2.0):
    s, t = student_logits / temperature, teacher_logits / temperature
    yes = sigmoid(t) * (log_sigmoid(t) - log_sigmoid(s))
    no = sigmoid(-t) * (log_sigmoid(-t) - log_sigmoid(-s))
    return temperature**2 * (yes + no).sum(-1)


def binary_kl_norm(student_logits, teacher_logits, temperature=2.0):
    u = (student_logits - teacher_logits) / temperature
    return temperature**2 * (-np.log(2) - (log_sigmoid(u) + log_sigmoid(-u)) / 2).sum(-1)


# --- correlations -------------------------------------------------------------------------------------------------------


def pearson(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / (np.sqrt((x**2).sum()) * np.sqrt((y**2).sum()) + 1e-8)


def dist(student_logits, teacher_logits, beta=1.0, gamma=1.0, temperature=4.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    rows = np.array([1 - pearson(q[b], p[b]) for b in range(len(p))])
    columns = np.mean([1 - pearson(q[:, c], p[:, c]) for c in range(p.shape[1])])
    return temperature**2 * (beta * rows + gamma * columns)


def class_correlation(student_logits, teacher_logits, temperature=4.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return np.full(len(p), ((q.T @ q - p.T @ p) ** 2).sum() / p.shape[1])


def batch_correlation(student_logits, teacher_logits, temperature=4.0):
    p, q = pq(student_logits, teacher_logits, temperature)
    return ((q @ q.T - p @ p.T) ** 2).sum(1)


# --- ranking and retrieval ----------------------------------------------------------------------------------------------


@rowwise
def pld(student_logits, teacher_logits, labels, teacher_temperature=1.0):
    p = softmax(teacher_logits, teacher_temperature)
    order = [labels, *[c for c in np.argsort(-teacher_logits, kind="stable") if c != labels]]
    z = student_logits
    return sum(p[c] * (np.log(np.exp(z[order[k:]]).sum()) - z[c]) for k, c in enumerate(order))


def margin_mse(student_positive, student_negative, teacher_positive, teacher_negative):
    return ((student_positive - student_negative) - (teacher_positive - teacher_negative)) ** 2


@rowwise
def listwise_kl(student_scores, teacher_scores, where=None, temperature=0.02, teacher_temperature=None):
    keep = np.ones(len(student_scores), bool) if where is None else where
    if not keep.any():
        return 0.0
    p = softmax(teacher_scores[keep], temperature if teacher_temperature is None else teacher_temperature)
    return kl(p, softmax(student_scores[keep], temperature))


@rowwise
def decoupled_softmax(student_scores, positives, temperature=0.05):
    s = student_scores / temperature
    others = np.exp(s[~positives]).sum()
    values = [-np.log(np.exp(s_p) / (np.exp(s_p) + others)) for s_p in s[positives]]
    return np.mean(values) if values else 0.0


@rowwise
def soft_top_k(student_scores, positives, k=5, alpha=2.0, temperature=0.05):
    s = student_scores / temperature
    low, high = -s.max() - 50 / alpha, -s.min() + 50 / alpha
    for _ in range(200):
        t = (low + high) / 2
        low, high = (t, high) if sigmoid(alpha * (s + t)).sum() < k else (low, t)
    values = -np.log(sigmoid(alpha * (s[positives] + t)))
    return values.mean() if len(values) else 0.0


# --- sparse teachers ----------------------------------------------------------------------------------------------------


@rowwise
def topk_forward_kl(student_logits, teacher_ids, teacher_log_probs, teacher_leftover=None, tail="ghost", temperature=1.0):
    return temperature**2 * kl(*sparse_pq(student_logits, teacher_ids, teacher_log_probs, teacher_leftover, tail, temperature))


@rowwise
def topk_reverse_kl(student_logits, teacher_ids, teacher_log_probs, teacher_leftover=None, tail="ghost", temperature=1.0):
    p, q = sparse_pq(student_logits, teacher_ids, teacher_log_probs, teacher_leftover, tail, temperature)
    return temperature**2 * kl(q, p)


def sparse_pq(student_logits, teacher_ids, teacher_log_probs, teacher_leftover, tail, temperature):
    real = np.isfinite(teacher_log_probs)
    ids, p = teacher_ids[real], np.exp(teacher_log_probs[real]) ** (1 / temperature)
    q = softmax(student_logits, temperature)
    if tail == "ghost":
        p = np.append(p, teacher_leftover ** (1 / temperature))
        q = np.append(q[ids], np.delete(q, ids).sum())
    elif tail == "renormalise":
        q = q[ids] / q[ids].sum()
    else:
        q = q[ids]
    return p / p.sum(), q


@rowwise
def sampled_forward_kl(student_logits, teacher_ids, teacher_weights, teacher_log_probs=None, temperature=1.0):
    log_q = np.log(softmax(student_logits, temperature))
    log_p = np.zeros(len(teacher_ids)) if teacher_log_probs is None else teacher_log_probs
    pairs = zip(teacher_ids, teacher_weights, log_p, strict=True)
    return temperature**2 * sum(w * (lp - log_q[i]) for i, w, lp in pairs)


def uld(student_logits, teacher_logits, temperature=1.0):
    q, p = (-np.sort(-softmax(z, temperature), axis=-1) for z in (student_logits, teacher_logits))
    size = max(q.shape[-1], p.shape[-1])
    q, p = (np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]))], -1) for x in (q, p))
    return np.abs(q - p).sum(-1)
