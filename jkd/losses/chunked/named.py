"""The losses of a mix by their own names, one value for each token.

Heads are ``[dim, vocab]`` or `Head` (bias, soft-cap, padded columns), and each side has a dim of its own. Values and gradients are
those of the twin in `jkd.losses` on whole logits. For sums that take weights, and for several losses in one pass, see `weighted_sum`
and `per_token`.
"""

from __future__ import annotations

from jkd.losses._typing import Array, Float, Int, Number, PerPosition, Real, Scalar
from jkd.losses.chunked.heads import Head
from jkd.losses.chunked.mixes import per_token
from jkd.losses.chunked.parts import JS, AlphaBeta, CrossEntropy, ForwardKL, ReverseKL, SkewForwardKL, SkewReverseKL
from jkd.losses.chunked.plan import Schedule


def forward_kl(
    student_hidden: Real[Array, "*batch student_dim"],
    student_head: Real[Array, "student_dim vocab"] | Head,
    teacher_hidden: Real[Array, "*batch teacher_dim"],
    teacher_head: Real[Array, "teacher_dim vocab"] | Head,
    *,
    temperature: PerPosition = 1.0,
    weights: Real[Array, "*batch"] | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "*batch"]:
    """``T² sum_c p_c (log p_c - log q_c)``, KL(teacher || student), of heads' logits.

    Args:
        student_hidden: ``[..., student_dim]``.
        student_head: ``[student_dim, vocab]``, or a `Head`.
        teacher_hidden: ``[..., teacher_dim]``.
        teacher_head: ``[teacher_dim, vocab]``, or a `Head`.
        temperature: T.
        weights: ``[...]``, what each token is expected to weigh; see `per_token`.
        schedule: `Tokens`, `Vocabulary`, or None for the cheaper one.

    Returns:
        ``[...]`` in nats.

    Source:
        [KD] Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, the soft targets at
        temperature T and the factor T².

    Example:
        >>> hidden, head = jnp.ones((2, 3)), jnp.log(jnp.array([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))
        >>> print(forward_kl(hidden, 0 * head, hidden, head).round(4))
        [0.0566 0.0566]
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    return per_token(ForwardKL(), *sides, temperature=temperature, weights=weights, schedule=schedule)


def reverse_kl(
    student_hidden: Real[Array, "*batch student_dim"],
    student_head: Real[Array, "student_dim vocab"] | Head,
    teacher_hidden: Real[Array, "*batch teacher_dim"],
    teacher_head: Real[Array, "teacher_dim vocab"] | Head,
    *,
    temperature: PerPosition = 1.0,
    weights: Real[Array, "*batch"] | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "*batch"]:
    """``T² sum_c q_c (log q_c - log p_c)``, KL(student || teacher), of heads' logits.

    Args:
        student_hidden: ``[..., student_dim]``.
        student_head: ``[student_dim, vocab]``, or a `Head`.
        teacher_hidden: ``[..., teacher_dim]``.
        teacher_head: ``[teacher_dim, vocab]``, or a `Head`.
        temperature: T.
        weights: ``[...]``, what each token is expected to weigh; see `per_token`.
        schedule: `Tokens`, `Vocabulary`, or None for the cheaper one.

    Returns:
        ``[...]`` in nats.

    Source:
        [RKL] Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, arXiv:2306.08543, the reverse KL
        objective.

    Example:
        >>> hidden, head = jnp.ones((2, 3)), jnp.log(jnp.array([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))
        >>> print(reverse_kl(hidden, 0 * head, hidden, head).round(4))
        [0.0589 0.0589]
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    return per_token(ReverseKL(), *sides, temperature=temperature, weights=weights, schedule=schedule)


def js(
    student_hidden: Real[Array, "*batch student_dim"],
    student_head: Real[Array, "student_dim vocab"] | Head,
    teacher_hidden: Real[Array, "*batch teacher_dim"],
    teacher_head: Real[Array, "teacher_dim vocab"] | Head,
    *,
    beta: Scalar = 0.5,
    temperature: PerPosition = 1.0,
    weights: Real[Array, "*batch"] | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "*batch"]:
    """``T² (beta KL(p || m) + (1 - beta) KL(q || m))``, m = beta p + (1 - beta) q, of heads' logits.

    Args:
        student_hidden: ``[..., student_dim]``.
        student_head: ``[student_dim, vocab]``, or a `Head`.
        teacher_hidden: ``[..., teacher_dim]``.
        teacher_head: ``[teacher_dim, vocab]``, or a `Head`.
        beta: 0 gives `forward_kl` and 1 gives `reverse_kl`.
        temperature: T.
        weights: ``[...]``, what each token is expected to weigh; see `per_token`.
        schedule: `Tokens`, `Vocabulary`, or None for the cheaper one.

    Returns:
        ``[...]`` in nats.

    Source:
        [GKD, generalised JSD] Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated
        Mistakes", ICLR 2024, arXiv:2306.13649, equation 1.

    Example:
        >>> hidden, head = jnp.ones((2, 3)), jnp.log(jnp.array([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))
        >>> print(js(hidden, 0 * head, hidden, head).round(4))
        [0.0144 0.0144]
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    return per_token(JS(beta), *sides, temperature=temperature, weights=weights, schedule=schedule)


def skew_forward_kl(
    student_hidden: Real[Array, "*batch student_dim"],
    student_head: Real[Array, "student_dim vocab"] | Head,
    teacher_hidden: Real[Array, "*batch teacher_dim"],
    teacher_head: Real[Array, "teacher_dim vocab"] | Head,
    *,
    lam: Scalar = 0.1,
    temperature: PerPosition = 1.0,
    weights: Real[Array, "*batch"] | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "*batch"]:
    """``T² KL(p || lam p + (1 - lam) q)`` of heads' logits.

    Args:
        student_hidden: ``[..., student_dim]``.
        student_head: ``[student_dim, vocab]``, or a `Head`.
        teacher_hidden: ``[..., teacher_dim]``.
        teacher_head: ``[teacher_dim, vocab]``, or a `Head`.
        lam: share of the teacher in the mixture; 0 is `forward_kl`.
        temperature: T.
        weights: ``[...]``, what each token is expected to weigh; see `per_token`.
        schedule: `Tokens`, `Vocabulary`, or None for the cheaper one.

    Returns:
        ``[...]`` in nats.

    Source:
        [SKL] Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024, arXiv:2402.03898,
        the skew KL.

    Example:
        >>> hidden, head = jnp.ones((2, 3)), jnp.log(jnp.array([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))
        >>> print(skew_forward_kl(hidden, 0 * head, hidden, head).round(4))
        [0.0461 0.0461]
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    return per_token(SkewForwardKL(lam), *sides, temperature=temperature, weights=weights, schedule=schedule)


def skew_reverse_kl(
    student_hidden: Real[Array, "*batch student_dim"],
    student_head: Real[Array, "student_dim vocab"] | Head,
    teacher_hidden: Real[Array, "*batch teacher_dim"],
    teacher_head: Real[Array, "teacher_dim vocab"] | Head,
    *,
    lam: Scalar = 0.1,
    temperature: PerPosition = 1.0,
    weights: Real[Array, "*batch"] | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "*batch"]:
    """``T² KL(q || (1 - lam) p + lam q)`` of heads' logits.

    Args:
        student_hidden: ``[..., student_dim]``.
        student_head: ``[student_dim, vocab]``, or a `Head`.
        teacher_hidden: ``[..., teacher_dim]``.
        teacher_head: ``[teacher_dim, vocab]``, or a `Head`.
        lam: share of the student in the mixture; 0 is `reverse_kl`.
        temperature: T.
        weights: ``[...]``, what each token is expected to weigh; see `per_token`.
        schedule: `Tokens`, `Vocabulary`, or None for the cheaper one.

    Returns:
        ``[...]`` in nats.

    Source:
        [SRKL] Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", ICML 2024, arXiv:2402.03898,
        the skew reverse KL.

    Example:
        >>> hidden, head = jnp.ones((2, 3)), jnp.log(jnp.array([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))
        >>> print(skew_reverse_kl(hidden, 0 * head, hidden, head).round(4))
        [0.0472 0.0472]
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    return per_token(SkewReverseKL(lam), *sides, temperature=temperature, weights=weights, schedule=schedule)


def alpha_beta(
    student_hidden: Real[Array, "*batch student_dim"],
    student_head: Real[Array, "student_dim vocab"] | Head,
    teacher_hidden: Real[Array, "*batch teacher_dim"],
    teacher_head: Real[Array, "teacher_dim vocab"] | Head,
    *,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    temperature: PerPosition = 1.0,
    weights: Real[Array, "*batch"] | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "*batch"]:
    """``T² sum_c [p^(a+b) / (b (a+b)) + q^(a+b) / (a (a+b)) - p^a q^b / (a b)]``, with its limits, of heads' logits.

    Args:
        student_hidden: ``[..., student_dim]``.
        student_head: ``[student_dim, vocab]``, or a `Head`.
        teacher_hidden: ``[..., teacher_dim]``.
        teacher_head: ``[teacher_dim, vocab]``, or a `Head`.
        alpha: a, a Python number: it chooses the formula.
        beta: b, likewise.
        temperature: T.
        weights: ``[...]``, what each token is expected to weigh; see `per_token`.
        schedule: `Tokens`, `Vocabulary`, or None for the cheaper one.

    Returns:
        ``[...]`` in nats.

    Source:
        [ABKD] Wang et al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
        alpha-beta-Divergence", ICML 2025, arXiv:2505.04560, the alpha-beta-divergence.

    Example:
        >>> hidden, head = jnp.ones((2, 3)), jnp.log(jnp.array([[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))
        >>> print(alpha_beta(hidden, 0 * head, hidden, head).round(4))
        [0.0576 0.0576]
    """
    sides = (student_hidden, student_head, teacher_hidden, teacher_head)
    return per_token(AlphaBeta(alpha, beta), *sides, temperature=temperature, weights=weights, schedule=schedule)


def cross_entropy(
    student_hidden: Real[Array, "*batch student_dim"],
    student_head: Real[Array, "student_dim vocab"] | Head,
    labels: Int[Array, "*batch"],
    *,
    weights: Real[Array, "*batch"] | None = None,
    schedule: Schedule | None = None,
) -> Float[Array, "*batch"]:
    """``- log q_label`` of a head's logits.

    Args:
        student_hidden: ``[..., student_dim]``.
        student_head: ``[student_dim, vocab]``, or a `Head`.
        labels: int ``[...]``. One out of range reads the nearest class.
        weights: ``[...]``, what each token is expected to weigh; see `per_token`.
        schedule: `Tokens`, `Vocabulary`, or None for the cheaper one.

    Returns:
        ``[...]`` in nats.

    Source:
        [CE] Shannon, "A Mathematical Theory of Communication", 1948, the surprise of the label.

    Example:
        >>> print(cross_entropy(jnp.ones((2, 3)), jnp.zeros((3, 4)), jnp.array([0, 3])).round(4))
        [1.3863 1.3863]
    """
    return per_token(CrossEntropy(), student_hidden, student_head, labels=labels, weights=weights, schedule=schedule)
