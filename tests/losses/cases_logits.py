"""Rows of the table: losses of logits, labels and scores."""

from __future__ import annotations

import formulas_logits as f
from table import (
    BAD_LABELS,
    BAD_LOGITS,
    SHIFTS,
    TWIN_LOGITS,
    Case,
    logit_pair,
    logits_and_labels,
    permute_classes,
)


def divergence(name, formula, **more):
    """A row for a function of two logit vectors that is 0 at student == teacher and blind to a common shift."""
    settings = {
        "inputs": logit_pair,
        "twins": TWIN_LOGITS,
        "invariances": SHIFTS | {"permute_classes": permute_classes},
        "masked_class": True,
        "bad": BAD_LOGITS,
    }
    return Case(name=name, formula=formula, **(settings | more))


def decoupled(name, formula, **more):
    settings = {
        "inputs": logits_and_labels,
        "twins": TWIN_LOGITS,
        "invariances": SHIFTS | {"permute_classes": permute_classes},
        "bad": BAD_LABELS,
    }
    return Case(name=name, formula=formula, **(settings | more))


def student_and_labels(rng, leading, size):
    inputs = logits_and_labels(rng, leading, size)
    return {"student_logits": inputs["student_logits"], "labels": inputs["labels"]}


def student_and_distribution(rng, leading, size):
    inputs = logit_pair(rng, leading, size)
    return {"student_logits": inputs["student_logits"], "labels": f.softmax(inputs["teacher_logits"])}


BAD_CROSS_ENTROPY = {name: BAD_LABELS[name] for name in ("label_dtype", "label_shape")}
STUDENT_SHIFT = {"shift_student": SHIFTS["shift_student"]}

DIVERGENCES = [
    Case(
        name="cross_entropy",
        inputs=student_and_labels,
        formula=f.cross_entropy,
        invariances=STUDENT_SHIFT | {"permute_classes": permute_classes},
        masked_class=True,
        bad=BAD_CROSS_ENTROPY,
    ),
    Case(
        name="cross_entropy/smoothed",
        inputs=student_and_labels,
        formula=f.cross_entropy,
        hyper={"label_smoothing": 0.1},
        invariances=STUDENT_SHIFT,
    ),
    Case(
        name="cross_entropy/distribution",
        inputs=student_and_distribution,
        formula=f.cross_entropy,
        hyper={"label_smoothing": 0.1},
        invariances=STUDENT_SHIFT,
        plain_extremes=False,
    ),
    divergence("soft_cross_entropy", f.soft_cross_entropy, hyper={"temperature": 2.0}, twins=None),
    divergence("forward_kl", f.forward_kl),
    divergence("forward_kl/T=4", f.forward_kl, hyper={"temperature": 4.0}),
    divergence("reverse_kl", f.reverse_kl, hyper={"temperature": 2.0}),
    divergence("jeffreys", f.jeffreys, hyper={"temperature": 2.0}),
    divergence("js", f.js, hyper={"beta": 0.3, "temperature": 2.0}),
    divergence("js/0", f.js, hyper={"beta": 0.0}),
    divergence("js/1", f.js, hyper={"beta": 1}),
    divergence("skew_forward_kl", f.skew_forward_kl, hyper={"lam": 0.1, "temperature": 2.0}),
    divergence("skew_reverse_kl", f.skew_reverse_kl, hyper={"lam": 0.1, "temperature": 2.0}),
    divergence("total_variation", f.total_variation, hyper={"temperature": 2.0}, flat_at_twins=False),
    divergence("alpha_beta", f.alpha_beta, hyper={"alpha": 0.2, "beta": 0.7, "temperature": 2.0}),
    divergence("alpha_beta/beta=0", f.alpha_beta, hyper={"alpha": 0.6, "beta": 0.0}),
    divergence("alpha_beta/alpha=0", f.alpha_beta, hyper={"alpha": 0.0, "beta": 0.6}),
    # p^-b grows without bound: no value at 1e4 fits a float, and that is the divergence itself.
    divergence("alpha_beta/sum=0", f.alpha_beta, hyper={"alpha": 0.5, "beta": -0.5}, plain_extremes=False),
    divergence("alpha_beta/0,0", f.alpha_beta, hyper={"alpha": 0, "beta": 0}),
    divergence("adaptive_kl", f.adaptive_kl, hyper={"mu": 0.5, "temperature": 2.0}, smooth=False),
    divergence("logit_mse", f.logit_mse, invariances={"permute_classes": permute_classes}, masked_class=False),
]

DECOUPLED = [
    decoupled("dkd", f.dkd, hyper={"alpha": 0.7, "beta": 8.0, "temperature": 4.0}, masked_class=True),
    decoupled("dkd/T=1", f.dkd, hyper={"alpha": 1.0, "beta": 0.5, "temperature": 1.0}),
]

CASES: list[Case] = [*DIVERGENCES, *DECOUPLED]
