"""Distillation losses: pure functions of arrays, student first, teacher second.

Every loss is ``name(student_…, teacher_…, [labels], *, hyperparameters) -> Array``: unreduced (one value for each example,
token or pixel, in float32 or float64), without example weights, state or ``stop_gradient`` on the teacher. Its plain mean is
the number that the paper's code prints. Logarithms are natural: values of divergences are in nats.

Temperature² is inside (Hinton's convention), so gradients keep their size as the temperature grows. TRL (GKD), DistiLLM and
TinyBERT leave it out: ``coef = 1 / temperature**2`` makes a term equal to theirs.
"""

from __future__ import annotations

from jkd.losses.activations import activation_boundary, overhaul
from jkd.losses.decoupled import dkd
from jkd.losses.divergences import (
    cross_entropy,
    forward_kl,
    jeffreys,
    js,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    soft_cross_entropy,
    total_variation,
)
from jkd.losses.features import (
    cosine_distance,
    hierarchical_context,
    masked_generative,
    mse,
    pearson_distance,
    variational_information,
)
from jkd.losses.logits import adaptive_kl, alpha_beta, logit_mse
from jkd.losses.maps import (
    attention_transfer,
    channel_wise,
    class_attention,
    factor_transfer,
    fsp,
    neuron_selectivity,
)

__all__ = [
    # divergences
    "cross_entropy",
    "soft_cross_entropy",
    "forward_kl",
    "reverse_kl",
    "jeffreys",
    "js",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
    "alpha_beta",
    "adaptive_kl",
    "logit_mse",
    # decoupled
    "dkd",
    # features
    "mse",
    "cosine_distance",
    "pearson_distance",
    "variational_information",
    "masked_generative",
    "hierarchical_context",
    "activation_boundary",
    "overhaul",
    "attention_transfer",
    "factor_transfer",
    "neuron_selectivity",
    "channel_wise",
    "class_attention",
    "fsp",
]
