"""Losses between two logit vectors that are no plain divergence of their softmaxes, one value for each position.

p is the teacher's softmax and q the student's; see `jkd.losses.divergences`. A class that one side masks with -inf contributes
nothing, except to `logit_mse`, where -inf has no meaning.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jkd.losses._common import check_classes, kl, log_softmax, promote, softplus, squared
from jkd.losses._typing import Array, Float, Number, PerPosition, Real, Scalar


def alpha_beta(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² sum_c [p^(a+b) / (b (a+b)) + q^(a+b) / (a (a+b)) - p^a q^b / (a b)]``, with its limits at a, b or a+b = 0.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        alpha: a. (1, 0) is `forward_kl`, (0, 1) is `reverse_kl`, (1/2, 1/2) is 2 sum (sqrt p - sqrt q)², (1, 1) is half the
            squared distance. A Python number, because it chooses the formula; the limits are taken at exactly 0, and within
            1e-3 of 0 the plain formula loses float32 digits.
        beta: b.
        temperature: T.

    Returns:
        ``[...]``; in nats where a + b = 1.

    Source:
        [ABKD] Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
        alpha-beta-Divergence", ICML 2025, arXiv:2505.04560, the alpha-beta-divergence.

    Code versus paper:
        The code's limits carry 1/a and 1/b where the limit of the formula has 1/a² and 1/b²: they agree at 1 only. Here the
        value is continuous in a and b. The code for images has T without T²: ``coef = 1 / T²``; the one
        for language models has no temperature.

    Example:
        >>> print(f"{alpha_beta(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.8, 0.2])), alpha=1.0, beta=1.0):.4f}")
        0.0900
    """
    check_classes(student_logits, teacher_logits)
    student, teacher = promote(student_logits, teacher_logits)
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    # A class at -inf on either side is left out; elsewhere p^a is exp(a log p), exact where p itself underflows.
    kept = (log_p > -jnp.inf) & (log_q > -jnp.inf)
    log_p, log_q = jnp.where(kept, log_p, 0), jnp.where(kept, log_q, 0)
    a, b = alpha, beta
    if a == 0 and b == 0:
        terms = 0.5 * (log_q - log_p) ** 2
    elif a == 0:
        terms = (jnp.exp(b * log_q) * (b * (log_q - log_p) - 1) + jnp.exp(b * log_p)) / b**2
    elif b == 0:
        terms = (jnp.exp(a * log_p) * (a * (log_p - log_q) - 1) + jnp.exp(a * log_q)) / a**2
    elif a + b == 0:
        terms = (jnp.exp(a * (log_p - log_q)) - a * (log_p - log_q) - 1) / a**2
    else:
        mixed = jnp.exp(a * log_p + b * log_q) / (a * b)
        terms = jnp.exp((a + b) * log_p) / (b * (a + b)) + jnp.exp((a + b) * log_q) / (a * (a + b)) - mixed
    return jnp.sum(jnp.where(kept, terms, 0), axis=-1) * squared(temperature)


def adaptive_kl(
    student_logits: Real[Array, "*batch classes"],
    teacher_logits: Real[Array, "*batch classes"],
    *,
    mu: Scalar = 0.5,
    temperature: PerPosition = 1.0,
) -> Float[Array, "*batch"]:
    """``T² (g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t)``, g the gap sum |p - q| over the teacher's head and tail.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.
        mu: the head is the most probable class and those whose cumulative probability stays within mu. The paper uses 0.5.
        temperature: T.

    Returns:
        ``[...]`` in nats. No gradient passes through the weights g (that is the method).

    Source:
        [AKL] Wu et al., "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models", COLING
        2025, arXiv:2404.02657, the head and tail gaps and the weights made of them.

    Code versus paper:
        The code has no temperature (T = 1). It gives the student's -inf classes the logit 0 in the gaps; here they have q = 0.

    Example:
        >>> print(f"{adaptive_kl(jnp.zeros(3), jnp.log(jnp.array([0.5, 0.25, 0.25]))):.4f}")
        0.0578
    """
    check_classes(student_logits, teacher_logits)
    student, teacher = promote(student_logits, teacher_logits)
    log_q, log_p = log_softmax(student, temperature), log_softmax(teacher, temperature)
    p = jnp.exp(log_p)
    gap = jnp.abs(p - jnp.exp(log_q))
    descending, gap = jax.lax.stop_gradient((-p, gap))
    # One sort that carries the gaps along: no gather, no inverse permutation.
    descending, gap = jax.lax.sort((descending, gap), dimension=-1, num_keys=1, is_stable=True)
    first = jnp.arange(gap.shape[-1]).reshape((1,) * (gap.ndim - 1) + (-1,)) == 0
    head = (jnp.cumsum(-descending, axis=-1) <= mu) | first
    g_head = jnp.sum(jnp.where(head, gap, 0), axis=-1)
    g_tail = jnp.sum(jnp.where(head, 0, gap), axis=-1)
    total = g_head + g_tail
    share = jnp.where(total > 0, g_head / jnp.where(total > 0, total, 1), 0.5)  # p = q: both divergences are 0
    return (share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)) * squared(temperature)


def logit_mse(
    student_logits: Real[Array, "*batch classes"], teacher_logits: Real[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """``1 / C sum_c (z_s,c - z_t,c)²``: for zero-mean logits twice the limit of `forward_kl` as T grows.

    Args:
        student_logits, teacher_logits: ``[..., classes]``.

    Returns:
        ``[...]``, squared logits.

    Source:
        [logit matching] Ba, Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv:1312.6184, regression on
        logits with L2 loss.

    Code versus paper:
        The paper has 1/2 sum_c: ``coef = C / 2``. The mean over classes is what codes that use PyTorch's ``MSELoss`` print (Kim
        et al., "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss", IJCAI 2021).

    Example:
        >>> logit_mse(jnp.array([1.0, 3.0]), jnp.array([1.0, 1.0])).item()
        2.0
    """
    check_classes(student_logits, teacher_logits)
    student, teacher = promote(student_logits, teacher_logits)
    return jnp.mean((student - teacher) ** 2, axis=-1)


def _over_classes(step, start, *arrays):
    """Folds ``step(carry, (one class of each array))`` over the classes: never more than one row of the pairs exists."""
    rows = tuple(jnp.moveaxis(array, -1, 0)[..., None] for array in arrays)
    return jax.lax.scan(step, start, rows)


@jax.custom_jvp
def _ranking(student, low, high):
    """Mean of softplus(s_j - s_i) over the pairs with low_i > high_j, in memory of the order of the inputs.

    Automatic differentiation would store all pairs, so the gradient (again a sum over pairs) is given in closed form.
    """

    def step(carry, row):
        total, count = carry
        s, t = row
        above = t > high
        total += jnp.sum(jnp.where(above, softplus(student - s), 0), axis=-1)
        return (total, count + jnp.sum(above, axis=-1).astype(total.dtype)), None

    zero = jnp.sum(student * 0, axis=-1)  # zeros that are split over devices as the logits are
    (total, count), _ = _over_classes(step, (zero, zero), student, low)
    return total / jnp.maximum(count, 1)


@_ranking.defjvp
def _ranking_jvp(primals, tangents):
    student, low, high = primals

    def step(count, row):
        s, t_low, t_high = row
        above, below = t_low > high, t_high < low
        slope = jnp.where(below, jax.nn.sigmoid(s - student), 0) - jnp.where(above, jax.nn.sigmoid(student - s), 0)
        return count + jnp.sum(above, axis=-1).astype(count.dtype), jnp.sum(slope, axis=-1)

    count, gradient = _over_classes(step, jnp.sum(student * 0, axis=-1), student, low, high)
    gradient = jnp.moveaxis(gradient, 0, -1) / jnp.maximum(count, 1)[..., None]
    return _ranking(*primals), jnp.sum(gradient * tangents[0], axis=-1)


def logistic_ranking(
    student_logits: Real[Array, "*batch classes"], teacher_logits: Real[Array, "*batch classes"]
) -> Float[Array, "*batch"]:
    """``mean over i, j with z_t,i > z_t,j of log(1 + exp(z_s,j - z_s,i))``: the teacher's order, not its probabilities.

    Args:
        student_logits: ``[..., classes]``.
        teacher_logits: ``[..., classes]``; only the order counts. No teacher preference at all gives 0.

    Returns:
        ``[...]`` in nats. Time grows with classes², memory with classes.

    Source:
        [RankNet] Burges et al., "Learning to Rank using Gradient Descent", ICML 2005, the pairwise cross-entropy; as a
        distillation loss in DistillKit (``sparse_logistic_ranking_loss``), there on the teacher's top k only.

    Code versus paper:
        DistillKit divides by the number of pairs in the whole batch; here each position has its own mean, which is the same
        number where positions have equally many pairs.

    Example:
        >>> print(f"{logistic_ranking(jnp.array([0.0, 0.0, 0.0]), jnp.array([3.0, 2.0, 1.0])):.4f}")
        0.6931
    """
    check_classes(student_logits, teacher_logits)
    student, teacher = promote(student_logits, teacher_logits)
    # A class that either side masks with -inf is above none, and none is above it.
    real = (student > -jnp.inf) & (teacher > -jnp.inf)
    low, high = (jnp.where(real, teacher, aside) for aside in (-jnp.inf, jnp.inf))
    return _ranking(jnp.where(real, student, 0), low, high)
