"""Distillation losses: pure functions of arrays, student first, teacher second.

Every loss is ``name(student_…, teacher_…, [labels], *, hyperparameters) -> Array``: unreduced (one value for each example,
token or pixel, in float32 or float64), without example weights, state or ``stop_gradient`` on the teacher. Its plain mean is
the number that the paper's code prints. Logarithms are natural: values of divergences are in nats.

Temperature² is inside (Hinton's convention), so gradients keep their size as the temperature grows. TRL (GKD) and DistiLLM leave
it out: ``coef = 1 / temperature**2`` makes a term equal to theirs. TinyBERT leaves it out of a soft cross-entropy and averages that
over the classes too: `soft_cross_entropy` with ``coef = 1 / (classes * temperature**2)``.
"""

from __future__ import annotations

from jkd.losses import chunked as chunked
from jkd.losses.activations import activation_boundary, overhaul
from jkd.losses.attention import attention_kl, attention_scores_mse, self_relation_kl, value_relation_kl
from jkd.losses.contrastive import crd, info_nce, soft_contrastive
from jkd.losses.correlations import batch_correlation, class_correlation, dist
from jkd.losses.decoupled import binary_kl, binary_kl_norm, dkd, nkd, uskd, wsld
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
from jkd.losses.logits import adaptive_kl, alpha_beta, logistic_ranking, logit_mse
from jkd.losses.maps import (
    attention_transfer,
    channel_wise,
    class_attention,
    factor_transfer,
    fsp,
    neuron_selectivity,
)
from jkd.losses.ranking import decoupled_softmax, listwise_kl, margin_mse, pld, soft_top_k
from jkd.losses.relations import (
    correlation_congruence,
    inter_channel,
    linear_cka_distance,
    pkt,
    similarity_preserving,
)
from jkd.losses.rkd import rkd_angle, rkd_distance
from jkd.losses.sparse import sampled_forward_kl, topk_forward_kl, topk_reverse_kl, uld

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
    "logistic_ranking",
    # decoupled and standardised
    "dkd",
    "nkd",
    "uskd",
    "wsld",
    "binary_kl",
    "binary_kl_norm",
    "dist",
    "class_correlation",
    "batch_correlation",
    # ranking and retrieval
    "pld",
    "margin_mse",
    "listwise_kl",
    "decoupled_softmax",
    "soft_top_k",
    # sparse teachers, other vocabularies
    "topk_forward_kl",
    "topk_reverse_kl",
    "sampled_forward_kl",
    "uld",
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
    # relations
    "similarity_preserving",
    "pkt",
    "rkd_distance",
    "rkd_angle",
    "correlation_congruence",
    "inter_channel",
    "linear_cka_distance",
    # attention
    "attention_scores_mse",
    "attention_kl",
    "value_relation_kl",
    "self_relation_kl",
    # contrastive
    "info_nce",
    "soft_contrastive",
    "crd",
]
