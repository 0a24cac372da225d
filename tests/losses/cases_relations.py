"""Rows of the table: losses of relations between examples, and of attention."""

from __future__ import annotations

import formulas_features as f
import numpy as np
from table import Case, changed

TWINS = {"student_embeddings": "teacher_embeddings"}
BATCHES = ((5,), (2,), (9,))


def pair(rng, leading, size):
    return {"student_embeddings": rng.normal(size=(*leading, size)), "teacher_embeddings": rng.normal(size=(*leading, size))}


def other_size(rng, leading, size):
    return pair(rng, leading, size) | {"teacher_embeddings": rng.normal(size=(*leading, size + 2))}


def maps(rng, leading, size):
    """Trailing axes are flattened."""
    return pair(rng, (*leading, 2, 3), size)


def rotated(size, rng):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def rotate_student(rng, inputs):
    student = inputs["student_embeddings"]
    return inputs | {"student_embeddings": student @ rotated(student.shape[-1], rng)}


def translate_student(rng, inputs):
    student = inputs["student_embeddings"]
    return inputs | {"student_embeddings": student + rng.normal(size=student.shape[-1])}


def scale_student(rng, inputs):
    return inputs | {"student_embeddings": 3.7 * inputs["student_embeddings"]}


def scale_student_rows(rng, inputs):
    student = inputs["student_embeddings"]
    return inputs | {"student_embeddings": student * rng.uniform(0.5, 2, size=(len(student), 1))}


SIMILARITY = {"rotate": rotate_student, "translate": translate_student, "scale": scale_student}


def two_equal_rows(rng, inputs):
    """The distance between two examples is zero."""
    return {n: np.concatenate([v[:1], v[:1], v[2:]]) for n, v in inputs.items()}


def all_equal_rows(rng, inputs):
    return {n: np.broadcast_to(v[:1], v.shape) for n, v in inputs.items()}


BAD = {
    "batch": (
        lambda inputs: changed(inputs, teacher_embeddings=lambda x: x[:-1]),
        ValueError,
        r"teacher_embeddings must have the batch \(axis 0\) of student_embeddings float32\[5,7\], got float32\[4,",
    ),
    "rank": (
        lambda inputs: changed(inputs, student_embeddings=lambda x: x[0]),
        ValueError,
        r"student_embeddings must be \[batch, .*\], with (at least )?2 axes, got float32\[7\]",
    ),
    "dtype": (
        lambda inputs: changed(inputs, teacher_embeddings=lambda x: x.astype(np.complex64)),
        TypeError,
        r"teacher_embeddings must hold real numbers, got complex64",
    ),
    "empty": (
        lambda inputs: changed(inputs, student_embeddings=lambda x: x[:, :0], teacher_embeddings=lambda x: x[:, :0]),
        ValueError,
        r"student_embeddings must have a non-empty feature axis.*float32\[5,0\]",
    ),
}
BAD_SAME_SIZE = BAD | {
    "size": (
        lambda inputs: changed(inputs, teacher_embeddings=lambda x: x[:, :-1]),
        ValueError,
        r"teacher_embeddings must have as many channels .* as student_embeddings float32\[5,7\], got float32\[5,6\]",
    )
}


def relation(name, formula, **more):
    settings = {
        "inputs": other_size,
        "leading": BATCHES,
        "couples": True,
        "where": ("where", 0),
        "extremes": {"two_equal_rows": two_equal_rows, "all_equal_rows": all_equal_rows},
        "bad": BAD,
    }
    return Case(name=name, formula=formula, **(settings | more))


def twins(name, formula, **more):
    """The same loss on maps of equal size, where student == teacher is possible."""
    return relation(name + "/maps", formula, **({"inputs": maps, "twins": TWINS, "where": None, "bad": {}} | more))


RELATIONS = [
    relation("similarity_preserving", f.similarity_preserving, invariances={"rotate": rotate_student, "scale": scale_student}),
    twins("similarity_preserving", f.similarity_preserving),
    relation("pkt", f.pkt, invariances={"rotate": rotate_student}),
    # The paper's eps moves the minimum away from p == q by about as much.
    twins("pkt", f.pkt, twins_tolerance=1e-8),
    relation("rkd_distance", f.rkd_distance, invariances=SIMILARITY),
    twins("rkd_distance", f.rkd_distance),
    relation("rkd_angle", f.rkd_angle, invariances=SIMILARITY),
    twins("rkd_angle", f.rkd_angle),
    relation(
        "correlation_congruence",
        f.correlation_congruence,
        inputs=pair,
        twins=TWINS,
        ordered=True,
        bad={n: BAD_SAME_SIZE[n] for n in ("batch", "rank", "dtype", "size")}
        | {
            "one": (
                lambda inputs: {n: v[:1] for n, v in inputs.items()},
                ValueError,
                r"student_embeddings must hold at least 2 examples \(axis 0\), got float32\[1,7\]",
            )
        },
    ),
    relation("linear_cka_distance", f.linear_cka_distance, invariances=SIMILARITY),
    relation("linear_cka_distance/narrow", f.linear_cka_distance, leading=((16,), (12,)), bad={}),
    twins("linear_cka_distance", f.linear_cka_distance),
]


# --- attention ----------------------------------------------------------------------------------------------------------

EXAMPLES = ((5,), (), (2, 3))
HEADS, TOKENS = 3, 4


def scores(rng, leading, size):
    shape = (*leading, HEADS, TOKENS, TOKENS)
    return {"student_scores": rng.normal(size=shape), "teacher_scores": rng.normal(size=shape)}


def masked_scores(rng, leading, size):
    """A causal mask as models add it."""
    causal = np.where(np.tril(np.ones((TOKENS, TOKENS))), 0, -1e4)
    return {name: x + causal for name, x in scores(rng, leading, size).items()}


def shift_queries(rng, inputs):
    student = inputs["student_scores"]
    return inputs | {"student_scores": student + rng.normal(size=(*student.shape[:-1], 1))}


def causal_infinity(rng, inputs):
    keep = np.tril(np.ones((TOKENS, TOKENS), bool))
    return {name: np.where(keep, x, -np.inf) for name, x in inputs.items()}


def values(rng, leading, size):
    return {
        "student_values": rng.normal(size=(*leading, HEADS, TOKENS, size)),
        "teacher_values": rng.normal(size=(*leading, HEADS, TOKENS, size + 2)),
    }


def same_values(rng, leading, size):
    inputs = values(rng, leading, size)
    return inputs | {"teacher_values": inputs["teacher_values"][..., :size]}


def rotate_values(rng, inputs):
    student = inputs["student_values"]
    return inputs | {"student_values": student @ rotated(student.shape[-1], rng)}


def token_vectors(rng, leading, size):
    return {"student_vectors": rng.normal(size=(*leading, size)), "teacher_vectors": rng.normal(size=(*leading, 2 * size))}


def same_vectors(rng, leading, size):
    inputs = token_vectors(rng, leading, size)
    return inputs | {"teacher_vectors": inputs["teacher_vectors"][..., :size]}


BAD_SCORES = {
    "heads": (
        lambda inputs: changed(inputs, teacher_scores=lambda x: x[:, :-1]),
        ValueError,
        r"teacher_scores must have the shape of student_scores float32\[5,3,4,4\], got float32\[5,2,4,4\]",
    ),
    "rank": (
        lambda inputs: {name: x[0, 0] for name, x in inputs.items()},
        ValueError,
        r"student_scores must be \[\.\.\., heads, queries, keys\], with at least 3 axes, got float32\[4,4\]",
    ),
}
TWIN_SCORES = {"student_scores": "teacher_scores"}

ATTENTION = [
    Case(
        name="attention_scores_mse",
        inputs=masked_scores,
        formula=f.attention_scores_mse,
        leading=EXAMPLES,
        twins=TWIN_SCORES,
        bad=BAD_SCORES,
    ),
    Case(
        name="attention_kl",
        inputs=scores,
        formula=f.attention_kl,
        leading=EXAMPLES,
        twins=TWIN_SCORES,
        invariances={"shift_queries": shift_queries},
        extremes={"causal_infinity": causal_infinity},
        bad=BAD_SCORES,
    ),
    Case(
        name="value_relation_kl",
        inputs=values,
        formula=f.value_relation_kl,
        leading=EXAMPLES,
        invariances={"rotate": rotate_values},
        bad={
            "heads": (
                lambda inputs: changed(inputs, teacher_values=lambda x: x[:, :-1]),
                ValueError,
                r"teacher_values must have the batch, heads and tokens .* student_values float32\[5,3,4,7\], got",
            )
        },
    ),
    Case(
        name="value_relation_kl/same",
        inputs=same_values,
        formula=f.value_relation_kl,
        leading=EXAMPLES,
        twins={"student_values": "teacher_values"},
    ),
    Case(
        name="self_relation_kl",
        inputs=token_vectors,
        formula=f.self_relation_kl,
        keywords=("mask", "segment"),
        hyper={"heads": 3},
        size=6,
        leading=((5, 4), (4,), (2, 3, 4)),
        rows=(16, 4),
        where=("mask", 1),
        bad={
            "heads": (
                lambda inputs: changed(inputs, student_vectors=lambda x: x[..., :-1]),
                ValueError,
                r"heads must divide the last axis of student_vectors float32\[5,4,5\], got 3",
            ),
            "tokens": (
                lambda inputs: changed(inputs, teacher_vectors=lambda x: x[:, :-1]),
                ValueError,
                r"teacher_vectors must have the batch and tokens .* student_vectors float32\[5,4,6\], got",
            ),
            "mask": (
                lambda inputs: inputs | {"mask": np.ones((5, 3), np.float32)},
                ValueError,
                r"mask must be \[\.\.\., tokens\] = \[5, 4\], got float32\[5,3\]",
            ),
            "segment": (
                lambda inputs: inputs | {"segment": np.ones((5, 3), np.int32)},
                ValueError,
                r"segment must be \[\.\.\., tokens\] = \[5, 4\], got int32\[5,3\]",
            ),
        },
    ),
    Case(
        name="self_relation_kl/same",
        inputs=same_vectors,
        formula=f.self_relation_kl,
        hyper={"heads": 2},
        size=6,
        leading=((5, 4), (4,), (2, 3, 4)),
        rows=(16, 4),
        twins={"student_vectors": "teacher_vectors"},
    ),
]

CASES: list[Case] = [*RELATIONS, *ATTENTION]
