"""Losses between hidden states and heads, without the logits: ``[tokens, vocab]`` is never held."""

from __future__ import annotations

from jkd.losses.chunked.heads import Head
from jkd.losses.chunked.mixes import per_part, per_token, weighted_sum
from jkd.losses.chunked.named import (
    alpha_beta,
    cross_entropy,
    forward_kl,
    js,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
)
from jkd.losses.chunked.parts import (
    JS,
    AlphaBeta,
    CrossEntropy,
    Each,
    ForwardKL,
    Part,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
)
from jkd.losses.chunked.plan import Schedule
from jkd.losses.chunked.tokens import Tokens
from jkd.losses.chunked.vocabulary import Vocabulary

__all__ = [
    "JS",
    "AlphaBeta",
    "CrossEntropy",
    "Each",
    "ForwardKL",
    "Head",
    "Part",
    "ReverseKL",
    "Schedule",
    "SkewForwardKL",
    "SkewReverseKL",
    "Tokens",
    "Vocabulary",
    "alpha_beta",
    "cross_entropy",
    "forward_kl",
    "js",
    "per_part",
    "per_token",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "weighted_sum",
]
