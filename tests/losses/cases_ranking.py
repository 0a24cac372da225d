"""Rows of the table: losses of scores, and of logits against a teacher of which not all is known or whose vocabulary is another."""

from __future__ import annotations

import formulas_logits as f
import numpy as np
from cases_logits import STUDENT_SHIFT, decoupled, divergence
from table import SHIFTS, Case, changed, logit_pair


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

CASES: list[Case] = [*RANKING, *SPARSE]
