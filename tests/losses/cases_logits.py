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


def scores_and_positives(rng, leading, size):
    """Cosine-like scores; every row has a positive and a negative."""
    positives = rng.random((*leading, size)) < 0.4
    positives[..., 0], positives[..., -1] = True, False
    return dict(student_scores=0.3 * rng.normal(size=(*leading, size)), positives=positives)


def margins(rng, leading, size):
    names = ("student_positive", "student_negative", "teacher_positive", "teacher_negative")
    return {name: rng.normal(size=leading) for name in names}


def candidates(rng, leading, size):
    return {name: 0.3 * rng.normal(size=(*leading, size)) for name in ("student_scores", "teacher_scores")}


def some_candidates(rng, leading, size):
    where = rng.random((*leading, size)) < 0.6
    where[..., 0] = True
    return candidates(rng, leading, size) | dict(where=where)


def sparse_teacher(rng, leading, size):
    """The largest half of a teacher's probabilities, the last entry being padding."""
    inputs = logit_pair(rng, leading, size)
    p = f.softmax(inputs["teacher_logits"])
    k = max(size // 2, 1)
    ids = np.argsort(-p, axis=-1)[..., :k]
    kept = np.take_along_axis(p, ids, -1)
    log_p = np.concatenate([np.log(kept), np.full((*leading, 1), -np.inf)], -1)
    padded = np.concatenate([ids, np.zeros((*leading, 1), int)], -1).astype(np.int32)
    leftover = np.asarray(1 - kept.sum(-1))
    return dict(student_logits=inputs["student_logits"], teacher_ids=padded, teacher_log_probs=log_p, teacher_leftover=leftover)


def sampled_teacher(rng, leading, size):
    inputs = logit_pair(rng, leading, size)
    ids = rng.integers(0, size, size=(*leading, 6)).astype(np.int32)
    log_p = np.take_along_axis(np.log(f.softmax(inputs["teacher_logits"])), ids, -1)
    weights = rng.integers(0, 4, size=ids.shape) / 6
    return dict(student_logits=inputs["student_logits"], teacher_ids=ids, teacher_weights=weights, teacher_log_probs=log_p)


def two_vocabularies(rng, leading, size):
    inputs = logit_pair(rng, leading, size)
    return inputs | dict(teacher_logits=rng.normal(size=(*leading, size + 3)))


def permute_each_vocabulary(rng, inputs):
    return {name: v[..., rng.permutation(v.shape[-1])] for name, v in inputs.items()}


def shift_scores(rng, inputs):
    return {n: v + rng.normal(size=(*v.shape[:-1], 1)) if v.dtype == float else v for n, v in inputs.items()}


def certain_elsewhere(rng, inputs):
    """All the student's mass on a class that the teacher kept, to 1e4 logits."""
    ids = inputs["teacher_ids"]
    return inputs | dict(student_logits=1e4 * np.eye(inputs["student_logits"].shape[-1])[ids[..., 0]])


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

BAD_POSITIVES = dict(
    shape=(
        lambda inputs: changed(inputs, positives=lambda x: x[..., :-1]),
        ValueError,
        r"positives must be \[..., labels\] = \[5, 7\], got bool\[5,6\]",
    ),
    scalar=(
        lambda inputs: changed(inputs, student_scores=lambda x: x[0, 0]),
        ValueError,
        r"student_scores must be \[..., labels\]",
    ),
)

RANKING = [
    decoupled("pld", f.pld, twins=None),
    Case(
        name="margin_mse",
        inputs=margins,
        formula=f.margin_mse,
        twins=dict(student_positive="teacher_positive", student_negative="teacher_negative"),
        bad=dict(
            shape=(
                lambda inputs: changed(inputs, teacher_negative=lambda x: x[:-1]),
                ValueError,
                r"teacher_negative must have the shape of student_positive float32\[5\], got float32\[4\]",
            )
        ),
    ),
    Case(
        name="listwise_kl",
        inputs=candidates,
        formula=f.listwise_kl,
        hyper=dict(temperature=0.1),
        twins=dict(student_scores="teacher_scores"),
        masked_class="dropped",
        invariances=dict(shift=shift_scores),
        bad=dict(
            candidates=(
                lambda inputs: changed(inputs, teacher_scores=lambda x: x[..., :-1]),
                ValueError,
                r"student_scores and teacher_scores must have the same number of candidates",
            )
        ),
    ),
    Case(
        name="listwise_kl/where",
        inputs=some_candidates,
        keywords=("where",),
        formula=f.listwise_kl,
        hyper=dict(temperature=0.1, teacher_temperature=0.2),
        masked_class="dropped",
        extremes=dict(nothing_counted=lambda rng, inputs: inputs | dict(where=np.zeros_like(inputs["where"]))),
        bad=dict(
            where=(
                lambda inputs: changed(inputs, where=lambda x: x[:-1]),
                ValueError,
                r"where must be \[..., candidates\] = \[5, 7\], got bool\[4,7\]",
            )
        ),
    ),
    Case(
        name="decoupled_softmax",
        inputs=scores_and_positives,
        formula=f.decoupled_softmax,
        masked_class="dropped",
        hyper=dict(temperature=0.2),
        invariances=dict(shift=shift_scores),
        extremes=dict(
            all_positive=lambda rng, inputs: inputs | dict(positives=np.ones_like(inputs["positives"])),
            no_positive=lambda rng, inputs: inputs | dict(positives=np.zeros_like(inputs["positives"])),
        ),
        bad=BAD_POSITIVES,
    ),
    Case(
        name="soft_top_k",
        inputs=scores_and_positives,
        formula=f.soft_top_k,
        masked_class="dropped",
        hyper=dict(k=1, alpha=2.0, temperature=0.2),
        invariances=dict(shift=shift_scores),
        extremes=dict(no_positive=lambda rng, inputs: inputs | dict(positives=np.zeros_like(inputs["positives"]))),
        bad=BAD_POSITIVES
        | dict(
            too_few_labels=(
                lambda inputs: changed(inputs, student_scores=lambda x: x[..., :1], positives=lambda x: x[..., :1]),
                ValueError,
                r"k must lie between 0 and the number of labels, got 1 for student_scores float32\[5,1\]",
            )
        ),
    ),
]

BAD_IDS = dict(
    ids_dtype=(
        lambda inputs: changed(inputs, teacher_ids=lambda x: x.astype(np.float32)),
        TypeError,
        r"teacher_ids must be integers, got float32",
    ),
    ids_shape=(
        lambda inputs: changed(inputs, teacher_ids=lambda x: x[:-1]),
        ValueError,
        r"teacher_ids must be \[..., k\] with the leading shape of student_logits float32\[5,7\], got int32\[4,",
    ),
    others_shape=(
        lambda inputs: changed(inputs, teacher_log_probs=lambda x: x[..., :-1]),
        ValueError,
        r"teacher_log_probs must have the shape of teacher_ids",
    ),
)


def sparse(name, formula, **more):
    settings = dict(
        inputs=sparse_teacher,
        masked_class="finite",
        invariances=STUDENT_SHIFT,
        extremes=dict(certain=certain_elsewhere),
        bad=BAD_IDS,
    )
    return Case(name=name, formula=formula, **(settings | more))


SPARSE = [
    sparse("topk_forward_kl", f.topk_forward_kl),
    sparse("topk_forward_kl/ghost,T=2", f.topk_forward_kl, hyper=dict(tail="ghost", temperature=2.0)),
    sparse("topk_forward_kl/zero", f.topk_forward_kl, hyper=dict(tail="zero", temperature=2.0)),
    sparse("topk_forward_kl/renormalise", f.topk_forward_kl, hyper=dict(tail="renormalise", temperature=2.0)),
    sparse("topk_reverse_kl", f.topk_reverse_kl, hyper=dict(temperature=2.0)),
    sparse("topk_reverse_kl/renormalise", f.topk_reverse_kl, hyper=dict(tail="renormalise")),
    sparse("sampled_forward_kl", f.sampled_forward_kl, inputs=sampled_teacher, hyper=dict(temperature=2.0)),
    divergence(
        "uld",
        f.uld,
        inputs=two_vocabularies,
        hyper=dict(temperature=2.0),
        twins=None,
        invariances=SHIFTS | dict(permute_each_vocabulary=permute_each_vocabulary),
        extremes=dict(identical=lambda rng, inputs: inputs | dict(student_logits=inputs["teacher_logits"])),
        bad=dict(
            leading=(
                lambda inputs: changed(inputs, teacher_logits=lambda x: x[:-1]),
                ValueError,
                r"teacher_logits must have the leading shape of student_logits float32\[5,7\], got float32\[4,10\]",
            )
        ),
    ),
]

CASES: list[Case] = [*DIVERGENCES, *DECOUPLED, *CORRELATIONS, *RANKING, *SPARSE]
