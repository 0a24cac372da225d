"""The logit losses as one would type them from the paper, with arrays of a usual size: what `benchmarks/losses.py` compares with.

No guard, no fusion by hand: probabilities, logarithms of them, and one temporary for each symbol.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

IMAGENET = (256, 1000)
VOCABULARY = (4, 64, 8192)
TINY = (8, 16)


def softmax(z, temperature=1.0):
    return jax.nn.softmax(z / temperature, axis=-1)


def log_softmax(z, temperature=1.0):
    return jax.nn.log_softmax(z / temperature, axis=-1)


def kl(log_p, log_q):
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def soft_cross_entropy(s, t, temperature):
    return -jnp.sum(softmax(t, temperature) * log_softmax(s, temperature), -1) * temperature**2


def forward_kl(s, t, temperature):
    return kl(log_softmax(t, temperature), log_softmax(s, temperature)) * temperature**2


def reverse_kl(s, t, temperature):
    return kl(log_softmax(s, temperature), log_softmax(t, temperature)) * temperature**2


def jeffreys(s, t, temperature):
    log_p, log_q = log_softmax(t, temperature), log_softmax(s, temperature)
    return (kl(log_p, log_q) + kl(log_q, log_p)) / 2 * temperature**2


def js(s, t, beta, temperature):
    log_p, log_q = log_softmax(t, temperature), log_softmax(s, temperature)
    log_m = jnp.log(beta * jnp.exp(log_p) + (1 - beta) * jnp.exp(log_q))
    return (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)) * temperature**2


def skew_forward_kl(s, t, lam, temperature):
    log_p, log_q = log_softmax(t, temperature), log_softmax(s, temperature)
    return kl(log_p, jnp.log(lam * jnp.exp(log_p) + (1 - lam) * jnp.exp(log_q))) * temperature**2


def skew_reverse_kl(s, t, lam, temperature):
    return skew_forward_kl(t, s, lam, temperature)


def total_variation(s, t, temperature):
    return jnp.sum(jnp.abs(softmax(t, temperature) - softmax(s, temperature)), -1) / 2


def alpha_beta(s, t, alpha, beta):
    p, q = softmax(t), softmax(s)
    both = alpha + beta
    first = p**both / (beta * both) + q**both / (alpha * both)
    return jnp.sum(first - p**alpha * q**beta / (alpha * beta), -1)


def adaptive_kl(s, t, mu):
    log_p, log_q = log_softmax(t), log_softmax(s)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    order = jnp.argsort(-p, axis=-1)
    gap = jax.lax.stop_gradient(jnp.take_along_axis(jnp.abs(p - q), order, -1))
    head = jnp.cumsum(jnp.take_along_axis(p, order, -1), -1) <= mu
    head = head.at[..., 0].set(True)
    g_head, g_tail = jnp.sum(gap * head, -1), jnp.sum(gap * ~head, -1)
    return (g_head * kl(log_p, log_q) + g_tail * kl(log_q, log_p)) / (g_head + g_tail)


def logit_mse(s, t):
    return jnp.mean((s - t) ** 2, -1)


def logistic_ranking(s, t):
    above = t[..., :, None] > t[..., None, :]
    pairs = jax.nn.softplus(s[..., None, :] - s[..., :, None])
    return jnp.sum(pairs * above, (-2, -1)) / jnp.sum(above, (-2, -1))


def cross_entropy(s, y):
    return -jnp.take_along_axis(log_softmax(s), y[..., None], -1)[..., 0]


def without_label(z, y, temperature):
    """mdistiller's way: the label's logit less 1000."""
    return log_softmax(z / temperature - 1000.0 * jax.nn.one_hot(y, z.shape[-1]))


def dkd(s, t, y, alpha, beta, temperature):
    one_hot = jax.nn.one_hot(y, s.shape[-1])
    p, q = softmax(t, temperature), softmax(s, temperature)
    b_p = jnp.stack([jnp.sum(p * one_hot, -1), jnp.sum(p * (1 - one_hot), -1)], -1)
    b_q = jnp.stack([jnp.sum(q * one_hot, -1), jnp.sum(q * (1 - one_hot), -1)], -1)
    target = kl(jnp.log(b_p), jnp.log(b_q))
    rest = kl(without_label(t, y, temperature), without_label(s, y, temperature))
    return (alpha * target + beta * rest) * temperature**2


def nkd(s, t, y, gamma, temperature):
    one_hot = jax.nn.one_hot(y, s.shape[-1])
    label = -jnp.sum(softmax(t) * one_hot, -1) * jnp.sum(log_softmax(s) * one_hot, -1)
    rest_p, rest_q = without_label(t, y, temperature), without_label(s, y, temperature)
    return label - gamma * jnp.sum(jnp.exp(rest_p) * rest_q * (1 - one_hot), -1) * temperature**2


def uskd(s, w, y, alpha, beta, mu):
    one_hot = jax.nn.one_hot(y, s.shape[-1])
    log_q, log_w = log_softmax(s), log_softmax(w)
    label_q = jnp.sum(log_q * one_hot, -1)
    squared = jax.lax.stop_gradient(jnp.exp(label_q) ** 2)
    weak = jnp.exp(log_w)
    order = weak / (1 - jnp.sum(weak * one_hot, -1) + 1e-6)[..., None] + log_q / (1 - label_q + 1e-6)[..., None]
    rank = jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(order), -1), -1) + 1
    share = (1 - one_hot) / rank
    share = share / jnp.sum(share, -1, keepdims=True)
    rest = -jnp.sum(share * without_label(s, y, 1.0), -1)
    own = -jnp.sum((0.9 * one_hot + 0.1 / s.shape[-1]) * log_w, -1)
    return -alpha * (squared + 1 - jnp.mean(squared)) * label_q + beta * rest + mu * own


def wsld(s, t, y, temperature):
    of_s, of_t = cross_entropy(s, y), cross_entropy(t, y)
    weight = jax.lax.stop_gradient(1 - jnp.exp(-of_s / (of_t + 1e-7)))
    return weight * soft_cross_entropy(s, t, temperature)


def binary_kl(s, t, temperature):
    p, q = jax.nn.sigmoid(t / temperature), jax.nn.sigmoid(s / temperature)
    eps = 1e-8
    yes = p * (jnp.log(p + eps) - jnp.log(q + eps))
    no = (1 - p) * (jnp.log(1 - p + eps) - jnp.log(1 - q + eps))
    return jnp.sum(yes + no, -1) * temperature**2


def binary_kl_norm(s, t, temperature):
    q = jax.nn.sigmoid((s - t) / temperature)
    terms = 0.5 * (jnp.log(0.5) - jnp.log(q + 1e-8)) + 0.5 * (jnp.log(0.5) - jnp.log(1 - q + 1e-8))
    return jnp.sum(terms, -1) * temperature**2


def pearson(x, y, axis):
    x, y = x - jnp.mean(x, axis, keepdims=True), y - jnp.mean(y, axis, keepdims=True)
    return jnp.sum(x * y, axis) / (jnp.linalg.norm(x, axis=axis) * jnp.linalg.norm(y, axis=axis) + 1e-8)


def dist(s, t, beta, gamma, temperature):
    p, q = softmax(t, temperature), softmax(s, temperature)
    return (beta * (1 - pearson(q, p, 1)) + gamma * (1 - jnp.mean(pearson(q, p, 0)))) * temperature**2


def class_correlation(s, t, temperature):
    p, q = softmax(t, temperature), softmax(s, temperature)
    return jnp.full(p.shape[0], jnp.sum((q.T @ q - p.T @ p) ** 2) / p.shape[1])


def batch_correlation(s, t, temperature):
    p, q = softmax(t, temperature), softmax(s, temperature)
    return jnp.sum((q @ q.T - p @ p.T) ** 2, 1)


def pld(s, t, y):
    p = softmax(t)
    key = jnp.where(jax.nn.one_hot(y, s.shape[-1]) > 0, jnp.inf, t)
    order = jnp.argsort(-key, -1)
    s, p = jnp.take_along_axis(s, order, -1), jnp.take_along_axis(p, order, -1)
    tails = jnp.where(jnp.tril(jnp.ones((s.shape[-1],) * 2, bool)).T[None], s[..., None, :], -jnp.inf)
    return jnp.sum(p * (jax.nn.logsumexp(tails, -1) - s), -1)


def margin_mse(sp, sn, tp, tn):
    return ((sp - sn) - (tp - tn)) ** 2


def listwise_kl(s, t, temperature):
    return kl(log_softmax(t, temperature), log_softmax(s, temperature))


def decoupled_softmax(s, positives, temperature):
    s = s / temperature
    others = jax.nn.logsumexp(jnp.where(positives, -jnp.inf, s), -1, keepdims=True)
    return jnp.sum(jnp.where(positives, jnp.logaddexp(s, others) - s, 0), -1) / jnp.sum(positives, -1)


def soft_top_k(s, positives, k, alpha, temperature):
    """32 halvings as in the authors' code, then one Newton step that carries the gradient."""
    s = s * (alpha / temperature)
    fixed = jax.lax.stop_gradient(s)
    low, high = -jnp.max(fixed, -1) - 10, -jnp.min(fixed, -1) + 10
    for _ in range(32):
        middle = (low + high) / 2
        short = jnp.sum(jax.nn.sigmoid(fixed + middle[..., None]), -1) < k
        low, high = jnp.where(short, middle, low), jnp.where(short, high, middle)
    t = low[..., None]
    slope = jax.nn.sigmoid(fixed + t) * jax.nn.sigmoid(-fixed - t)
    t = t - jnp.sum(slope * (s - fixed), -1, keepdims=True) / jnp.sum(slope, -1, keepdims=True)
    return -jnp.sum(jnp.where(positives, jax.nn.log_sigmoid(s + t), 0), -1) / jnp.sum(positives, -1)


def ghost(s, ids, log_p, leftover):
    """DistillKit's way: probabilities summed, rests clamped."""
    log_q = jnp.take_along_axis(log_softmax(s), ids, -1)
    rest_p = jnp.clip(leftover, 1e-8, 1 - 1e-8)[..., None]
    rest_q = jnp.clip(1 - jnp.sum(jnp.exp(log_q), -1, keepdims=True), 1e-8, 1 - 1e-8)
    return jnp.concatenate([log_p, jnp.log(rest_p)], -1), jnp.concatenate([log_q, jnp.log(rest_q)], -1)


def topk_forward_kl(s, ids, log_p, leftover):
    return kl(*ghost(s, ids, log_p, leftover))


def topk_reverse_kl(s, ids, log_p, leftover):
    return kl(*ghost(s, ids, log_p, leftover)[::-1])


def sampled_forward_kl(s, ids, weights, log_p):
    return jnp.sum(weights * (log_p - jnp.take_along_axis(log_softmax(s), ids, -1)), -1)


def uld(s, t):
    q, p = jnp.sort(softmax(s), -1)[..., ::-1], jnp.sort(softmax(t), -1)[..., ::-1]
    return jnp.sum(jnp.abs(q - p), -1)


# --- inputs -------------------------------------------------------------------------------------------------------------


def logits(rng, shape):
    return [3 * rng.normal(size=shape), 3 * rng.normal(size=shape)]


def logits_labels(rng, shape):
    return [*logits(rng, shape), rng.integers(0, shape[-1], size=shape[:-1])]


def student_labels(rng, shape):
    return logits_labels(rng, shape)[::2]


def scores(rng, shape):
    return [rng.normal(size=shape[:-1]) for _ in range(4)]


def positives(rng, shape):
    mask = rng.random(shape) < 0.02
    mask[..., 0] = True
    return [0.3 * rng.normal(size=shape), mask]


def top_k(rng, shape):
    s, t = logits(rng, shape)
    log_p = t - np.log(np.exp(t).sum(-1, keepdims=True))
    ids = np.argsort(-log_p, -1)[..., : min(64, shape[-1] // 2)]
    log_p = np.take_along_axis(log_p, ids, -1)
    return [s, ids, log_p, 1 - np.exp(log_p).sum(-1)]


def drawn(rng, shape):
    s, ids, log_p, _ = top_k(rng, shape)
    return [s, ids, np.full(ids.shape, 1 / ids.shape[-1]), log_p]


def row(plain, inputs, shape=IMAGENET, **hyper):
    return plain.__name__, plain, inputs, shape, hyper


ROWS = [
    row(cross_entropy, student_labels, VOCABULARY),
    row(soft_cross_entropy, logits, temperature=2.0),
    row(forward_kl, logits, temperature=4.0),
    row(forward_kl, logits, VOCABULARY, temperature=1.0),
    row(reverse_kl, logits, VOCABULARY, temperature=1.0),
    row(jeffreys, logits, temperature=1.0),
    row(js, logits, VOCABULARY, beta=0.5, temperature=1.0),
    row(skew_forward_kl, logits, VOCABULARY, lam=0.1, temperature=1.0),
    row(skew_reverse_kl, logits, VOCABULARY, lam=0.1, temperature=1.0),
    row(total_variation, logits, temperature=1.0),
    row(alpha_beta, logits, alpha=0.2, beta=0.7),
    row(adaptive_kl, logits, mu=0.5),
    row(logit_mse, logits),
    row(logistic_ranking, logits, (64, 256)),
    row(dkd, logits_labels, alpha=1.0, beta=8.0, temperature=4.0),
    row(nkd, logits_labels, gamma=1.5, temperature=1.0),
    row(uskd, logits_labels, alpha=1.0, beta=0.1, mu=0.005),
    row(wsld, logits_labels, temperature=4.0),
    row(binary_kl, logits, temperature=2.0),
    row(binary_kl_norm, logits, temperature=2.0),
    row(dist, logits, beta=1.0, gamma=1.0, temperature=4.0),
    row(class_correlation, logits, temperature=4.0),
    row(batch_correlation, logits, temperature=4.0),
    row(pld, logits_labels, (64, 256)),
    row(margin_mse, scores, (65536, 1)),
    row(listwise_kl, logits, (4096, 32), temperature=1.0),
    row(decoupled_softmax, positives, temperature=0.05),
    row(soft_top_k, positives, k=5, alpha=2.0, temperature=0.05),
    row(topk_forward_kl, top_k, VOCABULARY),
    row(topk_reverse_kl, top_k, VOCABULARY),
    row(sampled_forward_kl, drawn, VOCABULARY),
    row(uld, logits, (256, 1000)),
]
