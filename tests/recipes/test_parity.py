"""Each recipe's terms, through a real context: the numbers that the authors' code prints, or the formula in NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import small
import tiny
from scipy.special import ndtr

from jkd import recipes
from jkd.recipes.attention import margin
from jkd.recipes.projectors import Linear, Pointwise
from jkd.types import Outputs

FOLDER = Path(__file__).parent.parent / "golden"
INPUTS = {case["name"]: case["inputs"] for case in json.loads((FOLDER / "index.json").read_text())}

FEATURES = dict(student_taps=("student_features",), teacher_taps=("teacher_features",))
EMBEDDINGS = dict(student_taps=("student_embeddings",), teacher_taps=("teacher_embeddings",))
FLOW = dict(
    student_taps=("student_features", "student_features_next"), teacher_taps=("teacher_features", "teacher_features_next")
)

# golden file, recipe with the file's hyperparameters, its terms' weights in the sum that the file holds
GOLDEN = [
    ("forward_kl_T1", recipes.KD(temperature=1.0, task_weight=0.0), {"kd": 1}),
    ("forward_kl_T4", recipes.KD(), {"kd": 1}),
    ("forward_kl_T4", recipes.FunMatch(temperature=4.0), {"kd": 1}),
    ("forward_kl_standardized_T2", recipes.StandardizedKD(), {"kd": 1}),
    ("forward_kl_standardized_T2", recipes.Standardized(recipe=recipes.KD(temperature=2.0)), {"kd": 1}),
    ("dkd_a1_b8_T4", recipes.DKD(), {"dkd": 1}),
    ("nkd_g1.5_T1", recipes.NKD(gamma=1.5, temperature=1.0), {"nkd": 1}),
    ("wsld_T4", recipes.WSLD(), {"wsld": 1}),
    ("dist_T1", recipes.DIST(temperature=1.0, gamma=2.0), {"dist": 1}),
    ("attention_transfer", recipes.AT(**FEATURES), {"match": 1}),
    ("attention_transfer_resize", recipes.AT(**FEATURES), {"match": 1}),
    ("neuron_selectivity", recipes.NST(**FEATURES), {"match": 1}),
    ("fsp", recipes.FSP(**FLOW), {"flow0": 1}),
    ("activation_boundary", recipes.AB(**FEATURES), {"match": 1}),
    ("similarity_preserving", recipes.SP(**EMBEDDINGS), {"match": 1}),
    ("pkt", recipes.PKT(**EMBEDDINGS), {"match": 1}),
    ("rkd", recipes.RKD(**EMBEDDINGS), {"distance": 25, "angle": 50}),
]


@pytest.mark.parametrize(("name", "recipe", "sums"), GOLDEN, ids=[f"{type(r).__name__}-{n}" for n, r, _ in GOLDEN])
def test_terms_are_the_authors_numbers(name, recipe, sums):
    stored = np.load(FOLDER / f"{name}.npz")
    rows = {key: np.asarray(stored[f"in_{key}"]) for key in INPUTS[name]}
    rows = {key: value.astype(np.float32) if value.dtype.kind == "f" else value for key, value in rows.items()}
    count = len(next(iter(rows.values())))
    classes = rows.get("student_logits", np.zeros((count, 2))).shape[-1]
    rows["label"] = rows.pop("labels", np.arange(count) % classes).astype(np.int32)
    rows["weight"] = np.ones(count, np.float32)
    found = small.Terms(recipe, rows, student=small.echo("student"), teacher=small.echo("teacher"))
    np.testing.assert_allclose(sum(weight * found.mean(term) for term, weight in sums.items()), stored["expected"], rtol=2e-5)


PAIRS = dict(student_taps=small.TAPS, teacher_taps=small.TAPS)
PRES = dict(student_taps=small.PRE, teacher_taps=small.PRE)
LATE = dict(student_taps=("late",), teacher_taps=("late",))
POOL = dict(student_taps=("pool",), teacher_taps=("pool",))
NORMS = dict(teacher_norms=small.TAPS)

DEFAULTS = {
    "FitNet": (recipes.FitNet(**LATE), {"task": 1, "match": 100}),
    "AT": (recipes.AT(**PAIRS), {"task": 1, "match0": 1000, "match1": 1000}),
    "SP": (recipes.SP(**LATE), {"task": 1, "match": 3000}),
    "CC": (recipes.CC(**POOL), {"task": 1, "match": 0.02}),
    "VID": (recipes.VID(**PAIRS), {"task": 1, "match0": 1, "match1": 1}),
    "RKD": (recipes.RKD(**POOL), {"task": 1, "distance": 25, "angle": 50}),
    "PKT": (recipes.PKT(**POOL), {"task": 1, "match": 30000}),
    "AB": (recipes.AB(**PRES), {"match0": 0.0015, "match1": 0.003}),
    "FSP": (recipes.FSP(**PAIRS), {"flow0": 50}),
    "FT": (recipes.FT(**LATE), {"task": 1, "transfer": 200, "reconstruct": 1}),
    "NST": (recipes.NST(**PAIRS), {"task": 1, "match0": 50, "match1": 50}),
    "OFD": (recipes.OFD(**PRES, **NORMS), {"task": 1, "match0": 0.0005, "match1": 0.001}),
    "CRD": (recipes.CRD(**POOL, negatives=8), {"task": 1, "crd": 0.8}),
    "DIST": (recipes.DIST(), {"task": 1, "dist": 2}),
    "StandardizedKD": (recipes.StandardizedKD(), {"task": 0.1, "kd": 9}),
    "NKD": (recipes.NKD(), {"task": 1, "nkd": 1}),
    "WSLD": (recipes.WSLD(), {"task": 1, "wsld": 2.25}),
    "DeiT": (recipes.DeiT(), {"task": 0.5, "token": 0.5}),
    "SimKD": (recipes.SimKD(**LATE), {"match": 1}),
    "SRRL": (recipes.SRRL(**LATE), {"task": 1, "features": 1, "head": 5}),
    # 20 epochs of warm-up: at the first of them one twentieth
    "ReviewKD": (
        recipes.ReviewKD(student_taps=small.LEVELS, teacher_taps=small.LEVELS),
        {"task": 1, "review0": 0.25, "review1": 0.25, "review2": 0.25},
    ),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_default_weights_are_the_benchmarks(name):
    recipe, coefs = DEFAULTS[name]
    found = small.coefs(recipe, tiny.batch(8), student=small.student(token=True), teacher=small.teacher(width=width_of(recipe)))
    assert found.keys() == coefs.keys()
    for term, coef in coefs.items():
        np.testing.assert_allclose(found[term], coef, rtol=1e-6)


def width_of(recipe):
    return 6 if isinstance(recipe, recipes.FSP) else 8


def terms_of(recipe, rows, **fields):
    return small.Terms(recipe, rows, train_size=8, student=small.student(), teacher=small.teacher(), **fields)


def of(found, *groups):
    tree = found.state.params
    for group in groups:
        tree = tree[group]
    return {name: np.asarray(leaf, np.float64) for name, leaf in tree.items()}


def normed(x, scale=1.0, shift=0.0):
    axes = tuple(range(x.ndim - 1))
    return scale * (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-5) + shift


def relu(x):
    return np.maximum(x, 0)


def conv3(x, kernel):
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))


def both(rows, *paths):
    return [small.taps(network, rows, *paths) for network in (small.student(), small.teacher())]


def strided(x, kernel, padding, stride=1):
    """A convolution by sums over the kernel's places."""
    padded, size = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0))), len(kernel)
    count = (padded.shape[1] - size) // stride + 1
    along = [slice(i, i + stride * (count - 1) + 1, stride) for i in range(size)]
    return sum(padded[:, along[i], along[j]] @ kernel[i, j] for i in range(size) for j in range(size))


def test_fitnet_regresses_larger_smaller_and_equal_maps_and_takes_the_mean_of_all_squares():
    rows = tiny.batch(8)
    recipe = recipes.FitNet(student_taps=("early", "late", "late"), teacher_taps=("late", "early", "late"))
    found = terms_of(recipe, rows)
    (early, late), (their_early, their_late) = both(rows, *small.TAPS)
    stuffed = np.zeros((8, 3, 3, late.shape[-1]))
    stuffed[:, ::2, ::2] = late  # what a transposed 4x4 convolution of stride 2 with padding 1 convolves
    cases = [
        (early, "halve", 3, 1, 2, their_late),
        (stuffed, "double", 4, 2, 1, their_early),
        (late, "valid", 1, 0, 1, their_late),
    ]
    for i, (mine, kind, size, padding, stride, theirs) in enumerate(cases):
        params = of(found, "projector", str(i))
        assert params[kind].shape[:2] == (size, size)
        mapped = relu(normed(strided(mine, params[kind], padding, stride) + params["bias"]))
        assert mapped.shape == theirs.shape
        np.testing.assert_allclose(found.mean(f"match{i}"), ((mapped - theirs) ** 2).mean(), rtol=1e-5)


def test_vid_is_the_log_likelihood_of_the_teachers_features():
    rows = tiny.batch(8)
    found = terms_of(recipes.VID(**PAIRS), rows)
    for i, (mine, theirs) in enumerate(zip(*both(rows, *small.TAPS), strict=True)):
        kernels = [of(found, "projector", str(i), str(layer))["kernel"] for layer in range(3)]
        mean = relu(relu(mine @ kernels[0]) @ kernels[1]) @ kernels[2]
        np.testing.assert_allclose(found.mean(f"match{i}"), 0.5 * (((mean - theirs) ** 2) / 5 + np.log(5)).mean(), rtol=1e-5)


def test_vid_averages_a_larger_map_before_its_regressor():
    rows = tiny.batch(8)
    found = terms_of(recipes.VID(student_taps=("early",), teacher_taps=("late",)), rows)
    (mine,), (theirs,) = small.taps(small.student(), rows, "early"), small.taps(small.teacher(), rows, "late")
    mine = mine.reshape(8, 2, 2, 2, 2, -1).mean((2, 4))
    kernels = [of(found, "projector", "0", str(layer))["kernel"] for layer in range(3)]
    mean = relu(relu(mine @ kernels[0]) @ kernels[1]) @ kernels[2]
    np.testing.assert_allclose(found.mean("match"), 0.5 * (((mean - theirs) ** 2) / 5 + np.log(5)).mean(), rtol=1e-5)


def test_cc_multiplies_neighbours_differences():
    rows = tiny.batch(8)
    found = terms_of(recipes.CC(**POOL, dim=5), rows)
    ((mine,), (theirs,)) = both(rows, "pool")
    maps = [of(found, "projector", side) for side in ("student", "teacher")]
    mine, theirs = (x @ one["kernel"] + one["bias"] for x, one in zip((mine, theirs), maps, strict=True))
    apart = np.abs(mine - theirs)
    np.testing.assert_allclose(found.mean("match"), (apart[:-1] * apart[1:]).sum(-1).mean(), rtol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
def test_ofd_cuts_the_teacher_off_at_its_margin(keep):
    rows = tiny.batch(8)
    rows["weight"][3] = 0 if keep else 1
    kept = rows["weight"] > 0
    found = terms_of(recipes.OFD(**PRES, **NORMS), rows)
    for i, (mine, theirs) in enumerate(zip(*both(rows, *small.PRE), strict=True)):
        mine, theirs = mine[kept], theirs[kept]
        params, norm = of(found, "projector", str(i), "0"), small.teacher().params[small.TAPS[i]]
        mine = normed(mine @ params["kernel"])
        scale, bias = np.abs(np.float64(norm["scale"])), np.float64(norm["bias"])
        density = np.exp(-((bias / scale) ** 2) / 2) / np.sqrt(2 * np.pi)
        cut = bias - scale * density / ndtr(-bias / scale)
        target = np.maximum(theirs, cut)
        counted = (mine > cut) & (theirs <= cut) | (mine > theirs) & (theirs > cut) & (theirs <= 0) | (theirs > 0)
        wanted = np.where(counted, (mine - target) ** 2, 0).sum((1, 2, 3)).mean()
        np.testing.assert_allclose(found.mean(f"match{i}"), wanted, rtol=1e-4)


def test_ofds_margin_is_the_mean_of_the_negative_values():
    rng = np.random.default_rng(0)
    scale, bias = np.float32([1.0, -2.0, 0.5, 1.0, 0.0]), np.float32([0.0, 1.0, -1.0, 4.0, 0.3])
    found = np.asarray(margin(scale, bias))
    for i in range(3):
        drawn = bias[i] + scale[i] * rng.normal(size=400_000)
        np.testing.assert_allclose(found[i], drawn[drawn < 0].mean(), atol=1e-2)
    np.testing.assert_allclose(found[3:], [-3.0, 0.0])


def test_ft_compares_factors_and_rebuilds_the_teacher():
    rows = tiny.batch(8)
    found = terms_of(recipes.FT(**LATE), rows)
    ((mine,), (theirs,)) = both(rows, "late")

    def stack(layers, x, norm):
        for i in range(3):
            layer = of(found, *layers, str(i))
            x = conv3(x, layer["kernel"])
            x = normed(x) if norm else x + layer["bias"]
            x = np.where(x > 0, x, 0.1 * x)
        return x

    factors = stack(("paraphraser", "encoder"), theirs, norm=False)
    assert factors.shape[-1] == theirs.shape[-1] // 2
    rebuilt = stack(("paraphraser", "decoder"), factors, norm=False)
    np.testing.assert_allclose(found.mean("reconstruct"), ((rebuilt - theirs) ** 2).mean(), rtol=1e-4)

    def attention(x):
        flat = (x**2).mean(-1).reshape(8, -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    wanted = np.abs(attention(stack(("projector",), mine, norm=True)) - attention(factors)).mean()
    np.testing.assert_allclose(found.mean("transfer"), wanted, rtol=1e-4)


def test_reviewkd_fuses_from_the_deepest_level_upwards():
    rows = tiny.batch(8)
    recipe = recipes.ReviewKD(student_taps=small.LEVELS, teacher_taps=small.LEVELS, middle=7)
    found = terms_of(recipe, rows)
    mine, theirs = both(rows, *small.LEVELS)
    deeper = None
    for i in (2, 1, 0):
        x, wanted = (v if v.ndim == 4 else v[:, None, None] for v in (mine[i], theirs[i]))
        fusion = {name: of(found, "projector", str(i), name) for name in found.state.params["projector"][str(i)]}
        x = normed(x @ fusion["in"]["kernel"][0, 0])
        assert x.shape[-1] == 7
        if deeper is not None:
            times = x.shape[1] // deeper.shape[1]
            deeper = deeper.repeat(times, 1).repeat(times, 2)
            z = np.concatenate([x, deeper], -1) @ fusion["attention"]["kernel"][0, 0] + fusion["attention"]["bias"]
            share = 1 / (1 + np.exp(-z))
            x = x * share[..., :1] + deeper * share[..., 1:]
        deeper = x
        difference = normed(conv3(x, fusion["out"]["kernel"])) - wanted
        total, weights, factor = (difference**2).mean(), 1.0, 1.0
        for level in (4, 2, 1):
            if level < difference.shape[1]:
                size = difference.shape[1] // level
                pooled = difference.reshape(8, level, size, level, size, -1).mean((2, 4))
                factor /= 2
                total, weights = total + factor * (pooled**2).mean(), weights + factor
        np.testing.assert_allclose(found.mean(f"review{i}"), total / weights, rtol=1e-4)


def simkd_features(found, mine):
    for i, convolve in enumerate((lambda x, k: x @ k[0, 0], conv3, lambda x, k: x @ k[0, 0])):
        layer = of(found, "projector", str(i))
        mine = convolve(mine, layer["kernel"])
        mine = relu(normed(mine))
    return mine


def test_simkd_matches_the_last_map():
    rows = tiny.batch(8)
    found = terms_of(recipes.SimKD(**LATE, task_weight=1.0), rows)
    ((mine,), (theirs,)) = both(rows, "late")
    projected = simkd_features(found, mine)
    np.testing.assert_allclose(found.mean("match"), ((projected - theirs) ** 2).mean(), rtol=1e-4)
    head = small.teacher().params["head"]
    logits = projected.mean((1, 2)) @ head["kernel"] + head["bias"]
    nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(8), rows["label"]]
    np.testing.assert_allclose(found.mean("task"), nll.mean(), rtol=1e-4)


def test_srrl_asks_the_teachers_head():
    rows = tiny.batch(8)
    found = terms_of(recipes.SRRL(**LATE), rows)
    ((mine,), (theirs,)) = both(rows, "late")
    mine = relu(normed(mine @ of(found, "projector", "0", "0")["kernel"])).mean((1, 2))
    theirs = theirs.mean((1, 2))
    np.testing.assert_allclose(found.mean("features"), ((mine - theirs) ** 2).mean(), rtol=1e-4)
    kernel = np.float64(small.teacher().params["head"]["kernel"])
    np.testing.assert_allclose(found.mean("head"), (((mine - theirs) @ kernel) ** 2).mean(), rtol=1e-4)


def test_deit_gives_each_head_its_own_target():
    rows = tiny.batch(8)
    student = small.student(token=True)
    found = small.Terms(recipes.DeiT(), rows, student=student, teacher=small.teacher())
    ((pool,), (theirs,)) = small.taps(student, rows, "pool"), small.taps(small.teacher(), rows, "pool")

    def answer(params, x):
        logits = x @ np.float64(params["kernel"]) + np.float64(params["bias"])
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    decided = answer(small.teacher().params["head"], theirs).argmax(-1)
    each = np.arange(8)
    np.testing.assert_allclose(found.mean("token"), -answer(student.params["token"], pool)[each, decided].mean(), rtol=1e-5)
    log_q = answer(student.params["head"], pool)
    np.testing.assert_allclose(found.mean("task"), -(0.9 * log_q[each, rows["label"]] + 0.1 * log_q.mean(-1)).mean(), rtol=1e-5)


def test_standardized_leaves_the_labels_term_alone():
    rows = tiny.batch(8)
    plain, wrapped = (terms_of(recipe, rows) for recipe in (recipes.DKD(), recipes.Standardized(recipe=recipes.DKD())))
    np.testing.assert_allclose(wrapped.mean("task"), plain.mean("task"), rtol=1e-6)
    assert abs(wrapped.mean("dkd") - plain.mean("dkd")) > 1e-2
    scaled = small.Terms(recipes.Standardized(recipe=recipes.DKD()), rows, student=small.student(), teacher=scaled_teacher(3.0))
    np.testing.assert_allclose(scaled.mean("dkd"), wrapped.mean("dkd"), rtol=1e-4)


def scaled_teacher(factor):
    import dataclasses

    teacher = small.teacher()

    def apply(*args, **options):
        outputs, buffers = teacher.apply(*args, **options)
        return Outputs(factor * outputs.logits + 1, taps=outputs.taps), buffers

    return dataclasses.replace(teacher, apply=apply)


def test_projectors_do_not_see_padding():
    rows = tiny.batch(8)
    rows["weight"][[1, 5]] = 0
    garbage = rows | {"image": np.where(rows["weight"][:, None, None, None] == 0, 50.0, rows["image"]).astype(np.float32)}
    recipe = recipes.Match(**LATE, projector=Pointwise(batch_norm=True))
    found, wanted = (terms_of(recipe, one).mean("match") for one in (garbage, rows))
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert not recipes.Match(**LATE, projector=Linear()).couples_batch
