"""Losses between hidden states and heads, without the logits: no array of ``[tokens, vocab]`` is ever held.

``losses.chunked.forward_kl(student_hidden, student_head, teacher_hidden, teacher_head)`` is ``losses.forward_kl`` of the logits that
these make, one value for each token. `weighted_sum` is the sum that takes weights. Both take a mix of parts in one pass::

    mix = [(0.9, chunked.ForwardKL()), (0.1, chunked.CrossEntropy())]
    chunked.weighted_sum(mix, *student, *teacher, labels=labels, weights=mask, temperature=2.0)

Values are in float32, and so are sums of bfloat16 products. There are gradients by hidden states and heads of both sides. Heads may
be split over a mesh axis called ``tensor``: nothing of the vocabulary's size is gathered.
"""

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
