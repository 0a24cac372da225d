"""Rows of the table: losses of features and of feature maps."""

from __future__ import annotations

import formulas_features as f
import numpy as np
from table import Case, changed

TWINS = {"student_features": "teacher_features"}
ENTRIES = ((5,), (), (2, 3), (2, 2, 3))
"""Leading shapes of losses that have a value for each position."""
MAPS = ((5, 3, 4), (4, 4), (2, 2, 3, 3), (2, 8, 8), (3, 1, 1))
"""Leading shapes (with height and width) of losses of maps."""
ROWS = (16, 3, 4)


def pair(rng, leading, size):
    return {"student_features": rng.normal(size=(*leading, size)), "teacher_features": rng.normal(size=(*leading, size))}


def resized(rng, leading, size):
    """The teacher's map is larger, and not by a whole factor."""
    *batch, height, width = leading
    larger = (*batch, 2 * height, width + width // 2 + 1)
    return {"student_features": rng.normal(size=(*leading, size)), "teacher_features": rng.normal(size=(*larger, size))}


def more_channels(rng, leading, size):
    return pair(rng, leading, size) | {"teacher_features": rng.normal(size=(*leading, size + 2))}


def wide(rng, leading, size):
    """More channels than positions."""
    return {
        "student_features": rng.normal(size=(*leading, 4 * size)),
        "teacher_features": rng.normal(size=(*leading, 5 * size)),
    }


# --- changes that keep a value ------------------------------------------------------------------------------------------


def scale_student(rng, inputs):
    return inputs | {"student_features": 3.7 * inputs["student_features"]}


def scale_student_channels(rng, inputs):
    student = inputs["student_features"]
    return inputs | {"student_features": student * rng.uniform(0.5, 2, size=student.shape[-1])}


def scale_student_vectors(rng, inputs):
    student = inputs["student_features"]
    return inputs | {"student_features": student * rng.uniform(0.5, 2, size=(*student.shape[:-1], 1))}


def shift_student_channels(rng, inputs):
    student = inputs["student_features"]
    return inputs | {"student_features": student + rng.normal(size=student.shape[-1])}


def permute_student_channels(rng, inputs):
    student = inputs["student_features"]
    return inputs | {"student_features": student[..., rng.permutation(student.shape[-1])]}


def permute_channels(rng, inputs):
    order = rng.permutation(inputs["student_features"].shape[-1])
    return inputs | {name: inputs[name][..., order] for name in TWINS | {"teacher_features": ""}}


def mirror(rng, inputs):
    return {name: v[..., ::-1, :] if v.ndim > 2 else v for name, v in inputs.items()}


# --- mistakes -----------------------------------------------------------------------------------------------------------

BAD_CHANNELS = (
    lambda inputs: changed(inputs, teacher_features=lambda x: x[..., :-1]),
    ValueError,
    r"teacher_features must have as many channels .* as student_features float32\[.*7\], got float32\[.*6\]; a projector",
)
BAD_BATCH = (
    lambda inputs: changed(inputs, teacher_features=lambda x: x[:-1]),
    ValueError,
    r"teacher_features must have the (shape|leading axes) of student_features float32\[5.*\].*got float32\[4",
)
BAD_DTYPE = (
    lambda inputs: changed(inputs, teacher_features=lambda x: x.astype(np.complex64)),
    TypeError,
    r"teacher_features must hold real numbers, got complex64",
)
BAD_VECTORS = {
    "channels": BAD_CHANNELS,
    "batch": BAD_BATCH,
    "dtype": BAD_DTYPE,
    "scalar": (
        lambda inputs: changed(inputs, student_features=lambda x: x[0, 0]),
        (TypeError, ValueError),
        r"student_features must be",
    ),
    "tokens": (
        lambda inputs: changed(inputs, student_features=lambda x: x[:, None], teacher_features=lambda x: np.stack([x, x], 1)),
        ValueError,
        r"teacher_features must have the shape of student_features float32\[5,1,7\], or be \[batch, height, width, channels\]",
    ),
    "empty": (
        lambda inputs: changed(inputs, student_features=lambda x: x[..., :0], teacher_features=lambda x: x[..., :0]),
        ValueError,
        r"student_features must have a non-empty channels axis.*float32\[5,0\]",
    ),
}
BAD_ANY_CHANNELS = {
    "batch": BAD_BATCH,
    "dtype": BAD_DTYPE,
    "rank": (
        lambda inputs: changed(inputs, student_features=lambda x: x[0, 0]),
        ValueError,
        r"student_features must be \[\.\.\., height, width, channels\], with at least 3 axes, got float32\[4,7\]",
    ),
    "empty": (
        lambda inputs: changed(inputs, student_features=lambda x: x[:, :0]),
        ValueError,
        r"student_features must have a non-empty height axis.*float32\[5,0,4,7\]",
    ),
}
BAD_MAPS = BAD_ANY_CHANNELS | {"channels": BAD_CHANNELS}


def vectors(name, formula, **more):
    """A row for a loss with one value for each position."""
    settings = {
        "inputs": pair,
        "leading": ENTRIES,
        "twins": TWINS,
        "invariances": {"permute_channels": permute_channels},
        "bad": BAD_VECTORS,
    }
    return Case(name=name, formula=formula, **(settings | more))


def maps(name, formula, **more):
    """A row for a loss of maps with one value for each example."""
    settings = {
        "inputs": pair,
        "leading": MAPS,
        "rows": ROWS,
        "twins": TWINS,
        "invariances": {"permute_channels": permute_channels, "mirror": mirror},
        "bad": BAD_MAPS,
    }
    return Case(name=name, formula=formula, **(settings | more))


def larger_teacher(name, formula, **more):
    return maps(name + "/resized", formula, **({"inputs": resized, "twins": None, "bad": {}, "invariances": {}} | more))


def with_margin(rng, leading, size):
    return pair(rng, leading, size) | {"margin": -rng.uniform(0.2, 1, size=size)}


def with_log_scale(rng, leading, size):
    inputs = pair(rng, leading, size)
    return {
        "predicted_mean": inputs["student_features"],
        "teacher_features": inputs["teacher_features"],
        "log_scale": rng.normal(size=size),
    }


def class_maps(rng, leading, size):
    inputs = resized(rng, leading, size)
    return {"student_maps": inputs["student_features"], "teacher_maps": inputs["teacher_features"]}


def scale_classes(rng, inputs):
    student = inputs["student_maps"]
    return inputs | {"student_maps": student * rng.uniform(0.5, 2, size=student.shape[-1])}


def generated(rng, leading, size):
    inputs = pair(rng, leading, size)
    return {"generated_features": inputs["student_features"], "teacher_features": inputs["teacher_features"]}


def generated_and_mask(rng, leading, size):
    return generated(rng, leading, size) | {"mask": rng.integers(0, 2, size=leading).astype(np.int32)}


def two_ends(rng, leading, size):
    """The next layer's map is half the size; the teacher's maps have sizes of their own."""
    *batch, height, width = leading
    half, double = (*batch, -(-height // 2), -(-width // 2)), (*batch, 2 * height, 2 * width)
    return {
        "student_features": rng.normal(size=(*leading, size)),
        "student_features_next": rng.normal(size=(*half, size + 1)),
        "teacher_features": rng.normal(size=(*double, size)),
        "teacher_features_next": rng.normal(size=(*leading, size + 1)),
    }


def resized_mse(student_features, teacher_features):
    student, teacher = f.pooled_pair(student_features, teacher_features)
    return f.mse(student, teacher)


POSITIONS = ("where", 2)
SCALES = {"scale_student": scale_student}

CASES: list[Case] = [
    vectors("mse", f.mse),
    Case(name="mse/resized", inputs=resized, formula=resized_mse, leading=((5, 3, 4), (2, 4, 4)), rows=ROWS),
    vectors("cosine_distance", f.cosine_distance, invariances={"scale": scale_student_vectors}),
    vectors(
        "pearson_distance",
        f.pearson_distance,
        leading=((5,), (2, 3), (2, 2, 3)),
        invariances={"shift": shift_student_channels, "permute_channels": permute_channels},
        couples=True,
        where=("where", 0),
    ),
    vectors(
        "pearson_distance/maps", f.pearson_distance, leading=((5, 3, 4),), rows=ROWS, couples=True, where=POSITIONS, bad={}
    ),
    Case(
        name="variational_information",
        inputs=with_log_scale,
        formula=f.variational_information,
        leading=ENTRIES,
        shared=("log_scale",),
        gradient=("predicted_mean", "log_scale"),
        bad={
            "log_scale": (
                lambda inputs: changed(inputs, log_scale=lambda x: x[:-1]),
                ValueError,
                r"log_scale must have as many channels .* as predicted_mean float32\[5,7\], got float32\[6\]",
            ),
            "scalar": (
                lambda inputs: changed(inputs, log_scale=lambda x: x[0]),
                (TypeError, ValueError),
                r"log_scale must be",
            ),
        },
    ),
    Case(
        name="masked_generative",
        inputs=generated,
        formula=f.masked_generative,
        leading=((5,), (5, 4), (2, 3, 4)),
        twins={"generated_features": "teacher_features"},
        bad={
            "shape": (
                lambda inputs: changed(inputs, teacher_features=lambda x: x[:-1]),
                ValueError,
                r"teacher_features must have the shape of generated_features float32\[5,7\], got float32\[4,7\]",
            )
        },
    ),
    Case(
        name="masked_generative/masked",
        inputs=generated_and_mask,
        formula=f.masked_generative,
        keywords=("mask",),
        leading=((5, 4), (2, 3, 4)),
        rows=(16, 4),
        twins={"generated_features": "teacher_features"},
        bad={
            "mask": (
                lambda inputs: changed(inputs, mask=lambda x: x[:, :-1]),
                ValueError,
                r"mask must be \[batch, \.\.\.\].* = \[5, 4\], got int32\[5,3\]",
            )
        },
    ),
    maps("hierarchical_context", f.hierarchical_context, invariances={"permute_channels": permute_channels}),
    larger_teacher("hierarchical_context", f.hierarchical_context),
    maps("activation_boundary", f.activation_boundary, twins=None, hyper={"margin": 0.7}),
    larger_teacher("activation_boundary", f.activation_boundary),
    maps(
        "overhaul",
        f.overhaul,
        inputs=with_margin,
        shared=("margin",),
        invariances={
            "mirror": lambda rng, inputs: inputs | mirror(rng, {n: inputs[n] for n in ("student_features", "teacher_features")})
        },
        bad=BAD_MAPS
        | {
            "margin": (
                lambda inputs: changed(inputs, margin=lambda x: x[:-1]),
                ValueError,
                r"margin must have as many channels .* as student_features float32\[5,3,4,7\], got float32\[6\]",
            )
        },
    ),
    maps(
        "attention_transfer",
        f.attention_transfer,
        inputs=more_channels,
        keywords=("where",),
        twins=None,
        where=POSITIONS,
        invariances=SCALES | {"permute_channels": permute_student_channels, "mirror": mirror},
        bad=BAD_ANY_CHANNELS
        | {
            "where": (
                lambda inputs: inputs | {"where": np.ones((5, 4, 3), bool)},
                ValueError,
                r"where must be \[\.\.\., height, width\].* = \[5, 3, 4\], got bool\[5,4,3\]",
            )
        },
    ),
    maps("attention_transfer/p=3", f.attention_transfer, hyper={"p": 3}, invariances=SCALES, bad={}),
    larger_teacher("attention_transfer", f.attention_transfer),
    maps("factor_transfer", f.factor_transfer, where=POSITIONS, invariances=SCALES, flat_at_twins=False, bad=BAD_ANY_CHANNELS),
    larger_teacher("factor_transfer", f.factor_transfer),
    maps(
        "neuron_selectivity",
        f.neuron_selectivity,
        where=POSITIONS,
        invariances={"scale": scale_student_channels, "permute_channels": permute_student_channels, "mirror": mirror},
        bad=BAD_ANY_CHANNELS,
    ),
    maps("neuron_selectivity/wide", f.neuron_selectivity, inputs=wide, twins=None, where=POSITIONS, invariances=SCALES, bad={}),
    larger_teacher("neuron_selectivity", f.neuron_selectivity),
    maps(
        "channel_wise",
        f.channel_wise,
        where=POSITIONS,
        hyper={"temperature": 2.0},
        invariances={"shift": shift_student_channels, "permute_channels": permute_channels, "mirror": mirror},
    ),
    larger_teacher("channel_wise", f.channel_wise),
    Case(
        name="class_attention",
        inputs=class_maps,
        formula=f.class_attention,
        leading=MAPS,
        rows=ROWS,
        invariances={"scale_classes": scale_classes},
        bad={
            "classes": (
                lambda inputs: changed(inputs, teacher_maps=lambda x: x[..., :-1]),
                ValueError,
                r"teacher_maps must have as many channels .* as student_maps float32\[5,3,4,7\], got float32\[5,6,7,6\]",
            )
        },
    ),
    Case(
        name="fsp",
        inputs=two_ends,
        formula=f.fsp,
        leading=MAPS,
        rows=ROWS,
        gradient=("student_features", "student_features_next"),
        bad={
            "channels": (
                lambda inputs: changed(inputs, teacher_features_next=lambda x: x[..., :-1]),
                ValueError,
                r"teacher_features_next must have as many channels .* as student_features_next float32\[5,2,2,8\]",
            )
        },
    ),
    maps("inter_channel", f.inter_channel, invariances=SCALES | {"mirror": mirror}),
    maps("inter_channel/square", f.inter_channel, leading=((5, 3, 3), (2, 1, 2)), size=12, invariances=SCALES, bad={}),
    larger_teacher("inter_channel", f.inter_channel, invariances=SCALES),
]
