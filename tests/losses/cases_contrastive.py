"""Rows of the table: losses that tell an example's own pair from others."""

from __future__ import annotations

import dataclasses

import formulas_features as f
import numpy as np
from cases_relations import BAD_SAME_SIZE, BATCHES, TWINS, pair, relation, scale_student_rows
from table import Case, changed

from jkd import losses

STORED, NEGATIVES = 24, 6


def similarities(rng, leading, size):
    return {
        "student_similarities": rng.uniform(-1, 1, size=(*leading, size)),
        "teacher_targets": rng.dirichlet(np.ones(size), size=leading),
    }


def shift_similarities(rng, inputs):
    student = inputs["student_similarities"]
    return inputs | {"student_similarities": student + rng.normal(size=(*student.shape[:-1], 1))}


def with_memory(rng, leading, size):
    (batch,) = leading
    bank = [f.unit(rng.normal(size=(STORED, size))) for _ in range(2)]
    return pair(rng, leading, size) | {
        "index": rng.permutation(STORED)[:batch].astype(np.int32),
        "negatives": rng.integers(0, STORED, size=(batch, NEGATIVES)).astype(np.int32),
        "student": bank[0],
        "teacher": bank[1],
        "student_scale": np.array(30.0),
        "teacher_scale": np.array(50.0),
    }


def first_batch(rng, leading, size):
    return with_memory(rng, leading, size) | {"student_scale": np.array(-1.0), "teacher_scale": np.array(-1.0)}


BATCH = ("student_embeddings", "teacher_embeddings", "index", "negatives")
MEMORY = ("student", "teacher", "student_scale", "teacher_scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithMemory(Case):
    """The memory is one argument, a dict; its parts are inputs of the row."""

    def call(self, inputs, **more):
        memory = {name: inputs[name] for name in MEMORY}
        return losses.crd(*(inputs[name] for name in BATCH), memory, **self.hyper, **more)[0]


def extreme_embeddings(value):
    def change(rng, inputs):
        return inputs | {name: np.full_like(inputs[name], value) for name in (*TWINS, *TWINS.values())}

    return change


def memory_row(name, inputs, **more):
    settings = {
        "formula": f.crd,
        "leading": BATCHES,
        "shared": MEMORY,
        "gradient": ("student_embeddings", "teacher_embeddings"),
        "where": ("where", 0),
        "plain_extremes": False,
        "extremes": {f"embeddings of {value}": extreme_embeddings(value) for value in (0.0, 1e4, -1e4)},
        "invariances": {"scale": scale_student_rows},
        "bad": {
            "index": (
                lambda inputs: changed(inputs, index=lambda x: x.astype(np.float32)),
                TypeError,
                r"index must be integers, rows of the memory, got float32",
            ),
            "negatives": (
                lambda inputs: changed(inputs, negatives=lambda x: x[:-1]),
                ValueError,
                r"negatives must be \[batch, K\] with batch 5 like student_embeddings, got int32\[4,6\]",
            ),
            "memory": (
                lambda inputs: changed(inputs, student=lambda x: x[:, :-1], teacher=lambda x: x[:, :-1]),
                ValueError,
                r"memory\['student'\] must be \[N, 7\] like student_embeddings, got float32\[24,6\]",
            ),
        },
    }
    return WithMemory(name=name, inputs=inputs, **(settings | more))


CONTRASTIVE = [
    relation("info_nce", f.info_nce, inputs=pair, invariances={"scale": scale_student_rows}, bad=BAD_SAME_SIZE),
    Case(
        name="soft_contrastive",
        inputs=similarities,
        formula=f.soft_contrastive,
        masked_class="dropped",
        leading=((5,), (), (2, 3)),
        invariances={"shift": shift_similarities},
        bad={
            "shape": (
                lambda inputs: changed(inputs, teacher_targets=lambda x: x[..., :-1]),
                ValueError,
                r"teacher_targets must have the shape of student_similarities float32\[5,7\], got float32\[5,6\]",
            )
        },
    ),
    memory_row("crd", with_memory),
    # The first batch sets the scale, through which no gradient passes: differences of values are not its gradient.
    memory_row("crd/first batch", first_batch, couples=True, smooth=False, bad={}),
]

CASES: list[Case] = CONTRASTIVE
