"""Rows of the table: losses of logits, labels and scores."""

from __future__ import annotations

import formulas_logits as f
import numpy as np
from table import (
    BAD_LABELS,
    BAD_LOGITS,
    SHIFTS,
    TWIN_LOGITS,
    Case,
    changed,
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
        "masked_class": "dropped",
        "bad": BAD_LOGITS,
    }
    return Case(name=name, formula=formula, **(settings | more))


def decoupled(name, formula, **more):
    settings = {
        "inputs": logits_and_labels,
        "twins": TWIN_LOGITS,
        "invariances": SHIFTS | {"permute_classes": permute_classes},
        "masked_class": "dropped",
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
        masked_class="dropped",
        bad=BAD_CROSS_ENTROPY,
    ),
    Case(
        name="cross_entropy/smoothed",
        inputs=student_and_labels,
        formula=f.cross_entropy,
        hyper={"label_smoothing": 0.1},
        invariances=STUDENT_SHIFT,
        masked_class="dropped",
    ),
    Case(
        name="cross_entropy/distribution",
        inputs=student_and_distribution,
        formula=f.cross_entropy,
        hyper={"label_smoothing": 0.1},
        invariances=STUDENT_SHIFT,
        masked_class="dropped",
        plain_extremes=False,
    ),
    divergence("soft_cross_entropy", f.soft_cross_entropy, hyper={"temperature": 2.0}, twins=None),
    divergence("forward_kl", f.forward_kl),
    divergence("forward_kl/T=4", f.forward_kl, hyper={"temperature": 4.0}),
    divergence("reverse_kl", f.reverse_kl, hyper={"temperature": 2.0}),
    # From 64 classes on these three are computed from the logits.
    divergence("soft_cross_entropy/wide", f.soft_cross_entropy, hyper={"temperature": 2.0}, twins=None, size=80, bad={}),
    divergence("forward_kl/wide", f.forward_kl, hyper={"temperature": 2.0}, size=80, bad={}),
    divergence("reverse_kl/wide", f.reverse_kl, hyper={"temperature": 2.0}, size=80, bad={}),
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
    divergence("logistic_ranking", f.logistic_ranking, twins=None),
    divergence("logit_mse", f.logit_mse, invariances={"permute_classes": permute_classes}, masked_class=""),
]


DECOUPLED = [
    decoupled("dkd", f.dkd, hyper=dict(alpha=0.7, beta=8.0, temperature=4.0)),
    decoupled("dkd/T=1", f.dkd, hyper=dict(alpha=1.0, beta=0.5, temperature=1.0)),
    decoupled("nkd", f.nkd, hyper=dict(gamma=1.5, temperature=3.0), twins=None),
    Case(
        name="uskd",
        inputs=lambda *a: {dict(teacher_logits="weak_logits").get(n, n): v for n, v in logits_and_labels(*a).items()},
        formula=f.uskd,
        hyper=dict(alpha=1.0, beta=0.1, mu=0.05),
        leading=((5,), (), (2, 3)),
        couples=True,
        gradient=("student_logits", "weak_logits"),
        smooth=False,
        where=("where", 0),
        masked_class="dropped",
        invariances=STUDENT_SHIFT,
        bad=dict(
            label_dtype=BAD_LABELS["label_dtype"],
            label_shape=BAD_LABELS["label_shape"],
            classes=(
                lambda inputs: changed(inputs, weak_logits=lambda x: x[..., :-1]),
                ValueError,
                r"student_logits and weak_logits must have the same number of classes",
            ),
            one_class=(
                lambda inputs: changed(inputs, weak_logits=lambda x: x[..., :1], student_logits=lambda x: x[..., :1]),
                ValueError,
                r"student_logits must have at least 2 classes.*float32\[5,1\]",
            ),
        ),
    ),
    decoupled("wsld", f.wsld, hyper=dict(temperature=4.0), twins=None, smooth=False),
    divergence(
        "binary_kl",
        f.binary_kl,
        hyper=dict(temperature=2.0),
        invariances=dict(permute_classes=permute_classes),
    ),
    divergence(
        "binary_kl_norm",
        f.binary_kl_norm,
        hyper=dict(temperature=2.0),
        invariances=dict(permute_classes=permute_classes),
    ),
]


def correlation(name, formula, **more):
    settings = dict(
        inputs=logit_pair,
        leading=((5,),),
        couples=True,
        twins=TWIN_LOGITS,
        where=("where", 0),
        masked_class="finite",  # correlations are taken over all classes, also those of probability 0
        invariances=SHIFTS | dict(permute_classes=permute_classes),
        bad=dict(
            classes=BAD_LOGITS["classes"],
            dtype=BAD_LOGITS["dtype"],
            rank=(
                lambda inputs: changed(inputs, student_logits=lambda x: x[0], teacher_logits=lambda x: x[0]),
                ValueError,
                r"student_logits must be \[batch, classes\], with 2 axes, got float32\[7\]",
            ),
        ),
    )
    return Case(name=name, formula=formula, **(settings | more))


def affine(name, share):
    """Probabilities p (at temperature 1) become ``share * p + (1 - share) / classes``: a positive affine map of all of them."""

    def change(rng, inputs):
        def mapped(logits):
            return np.log(share * f.softmax(logits) + (1 - share) / logits.shape[-1])

        return changed(inputs, **{name: mapped})

    return change


AFFINE = dict(affine_student=affine("student_logits", 0.6), affine_teacher=affine("teacher_logits", 0.7))

CORRELATIONS = [
    # The code's 1e-8 in the denominator keeps the value from 0 by 1e-8 / |p|²; here |p|² is above 0.01.
    correlation(
        "dist",
        f.dist,
        hyper=dict(beta=1.0, gamma=2.0, temperature=1.0),
        twins_tolerance=1e-5,
        invariances=SHIFTS | AFFINE | dict(permute_classes=permute_classes),
        invariances_tolerance=2e-6,
    ),
    correlation("class_correlation", f.class_correlation, hyper=dict(temperature=2.0)),
    correlation("batch_correlation", f.batch_correlation, hyper=dict(temperature=2.0)),
]

CASES: list[Case] = [*DIVERGENCES, *DECOUPLED, *CORRELATIONS]
