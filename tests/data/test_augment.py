"""Device-side augmentation: its maths against NumPy, what padding and missing labels do to it, and 8 devices like one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd.data import At, Choose, Crop, CutMix, Flip, Mixup
from jkd.errors import InputError

ROWS, CLASSES = 16, 5


def start(rows=ROWS, dtype=np.uint8, weight=None, labelled=None):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (rows, 8, 6, 3), dtype=np.uint8)
    return {
        "image": image if dtype == np.uint8 else image.astype(np.float32) / 255,
        "label": rng.integers(0, CLASSES, rows).astype(np.int32),
        "weight": np.ones(rows, np.float32) if weight is None else np.asarray(weight, np.float32),
        "labelled": np.ones(rows, np.float32) if labelled is None else np.asarray(labelled, np.float32),
        "index": np.arange(rows, dtype=np.int32),
    }


MIXING = {
    "mixup": Mixup(classes=CLASSES),
    "mixup per example": Mixup(0.8, classes=CLASSES, per_example=True, probability=0.7),
    "cutmix": CutMix(classes=CLASSES),
    "choose": Choose(Mixup(classes=CLASSES), CutMix(classes=CLASSES), probabilities=(0.3, 0.7)),
}
ALL = MIXING | {"crop": Crop(2), "flip": Flip()}
JITTED = {name: jax.jit(augment) for name, augment in ALL.items()}


def shares(out, given):
    """The share of itself that each row's label kept; None where the two labels are the same."""
    found = []
    for row, (own, partner) in enumerate(zip(given["label"], given["label"][::-1], strict=True)):
        found.append(None if own == partner else float(out["label"][row, own]))
    return found


@pytest.mark.parametrize("case", ALL)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_shapes_and_dtypes(case, dtype):
    given = start(dtype=dtype)
    out = JITTED[case](given, jax.random.key(0))
    mixed = case in MIXING
    assert out["image"].shape == given["image"].shape
    assert out["image"].dtype == (np.float32 if mixed else dtype)
    assert (out["label"].shape, out["label"].dtype) == (((ROWS, CLASSES), np.float32) if mixed else ((ROWS,), np.int32))
    for name in ("weight", "index", "labelled"):
        np.testing.assert_array_equal(out[name], given[name])


@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_mixup_is_its_formula(seed, per_example):
    given = start()
    out = JITTED["mixup per example" if per_example else "mixup"](given, jax.random.key(seed))
    share = np.array([1.0 if each is None else each for each in shares(out, given)])
    image = given["image"].astype(np.float64) / 255
    one_hot = np.eye(CLASSES)[given["label"]]
    known = np.array([each is not None for each in shares(out, given)])
    if not per_example:
        assert np.ptp(share[known]) < 1e-6
    expected = share[:, None, None, None] * image + (1 - share[:, None, None, None]) * image[::-1]
    np.testing.assert_allclose(np.asarray(out["image"])[known], expected[known], atol=1e-6)
    np.testing.assert_allclose(out["label"], share[:, None] * one_hot + (1 - share[:, None]) * one_hot[::-1], atol=1e-6)


def test_mixup_of_one_is_uniform():
    draw = jax.jit(jax.vmap(lambda key: Mixup(classes=2)({**start(rows=2), "label": jnp.array([0, 1])}, key)["label"][0, 0]))
    found = np.sort(draw(jax.random.split(jax.random.key(0), 2000)))
    assert np.abs(found - np.linspace(0, 1, 2000)).max() < 0.05  # Kolmogorov-Smirnov: 1.95 / sqrt(2000) at 0.1 %


@pytest.mark.parametrize("seed", range(6))
def test_cutmix_is_a_rectangle_whose_area_is_the_label(seed):
    given = start()
    given["image"] = np.broadcast_to(np.arange(ROWS, dtype=np.float32)[:, None, None, None] / ROWS, (ROWS, 8, 6, 3)).copy()
    out = JITTED["cutmix"](given, jax.random.key(seed))
    cut = np.asarray(out["image"]) != given["image"]
    box = cut[0, :, :, 0]
    assert (cut == box[None, :, :, None]).all()  # one rectangle for the batch and its channels
    rows, columns = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
    assert box.sum() == len(rows) * len(columns)
    np.testing.assert_array_equal(np.asarray(out["image"])[cut], np.broadcast_to(given["image"][::-1], cut.shape)[cut])
    for share in shares(out, given):
        assert share is None or share == pytest.approx(1 - box.mean(), abs=1e-6)


def test_cutmix_covers_the_share_that_was_drawn():
    """On average over places the clipped rectangle is smaller than 1 - share, never larger."""
    given = {**start(rows=2), "label": jnp.array([0, 1]), "image": jnp.zeros((2, 64, 64, 1))}
    draw = jax.jit(jax.vmap(lambda key: CutMix(classes=2)(given, key)["label"][0, 0]))
    left = draw(jax.random.split(jax.random.key(1), 500))
    assert 0.5 < left.mean() < 0.75
    assert left.min() >= 0
    assert left.max() <= 1


@pytest.mark.parametrize("case", MIXING)
def test_padding_stays_out(case):
    weight = np.ones(ROWS)
    weight[[3, 14, 15]] = 0
    given = start(weight=weight)
    noisy = dict(given, image=given["image"].copy(), label=given["label"].copy())
    noisy["image"][weight == 0] = 255
    noisy["label"][weight == 0] = 4
    key = jax.random.key(5)
    out, other = (JITTED[case](each, key) for each in (given, noisy))
    real = weight > 0
    for name in ("image", "label", "labelled", "weight"):
        np.testing.assert_array_equal(np.asarray(out[name])[real], np.asarray(other[name])[real])
    # Partners of padding are what they were.
    alone = np.flatnonzero(real & (weight[::-1] == 0))
    np.testing.assert_allclose(np.asarray(out["image"])[alone], given["image"][alone] / 255, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(out["label"])[alone], np.eye(CLASSES)[given["label"]][alone])
    np.testing.assert_array_equal(out["weight"], weight)


@pytest.mark.parametrize("case", MIXING)
def test_a_mixture_is_labelled_where_both_are(case):
    labelled = np.tile([1, 1, 0, 1], 4)
    weight = np.ones(ROWS)
    weight[0] = 0
    out = JITTED[case](start(labelled=labelled, weight=weight), jax.random.key(0))
    expected = labelled * labelled[::-1]
    mixed = np.array([share is not None and share < 1 for share in shares(out, start())])
    np.testing.assert_array_equal(np.asarray(out["labelled"])[mixed], expected[mixed])
    assert out["labelled"][ROWS - 1] == labelled[ROWS - 1]  # its partner is padding: not mixed, so its own


@pytest.mark.parametrize("augment", [Mixup, CutMix])
def test_probability_zero_mixes_nothing(augment):
    given = start()
    out = jax.jit(augment(classes=CLASSES, probability=0.0))(given, jax.random.key(0))
    np.testing.assert_allclose(out["image"], given["image"] / 255, atol=1e-6)
    np.testing.assert_array_equal(out["label"], np.eye(CLASSES)[given["label"]])


def test_distributions_are_mixed_as_they_are():
    given = {**start(), "label": np.full((ROWS, CLASSES), 1 / CLASSES, np.float32)}
    np.testing.assert_allclose(jax.jit(Mixup())(given, jax.random.key(0))["label"], 1 / CLASSES, atol=1e-6)


def test_crop_and_flip_are_their_definitions():
    given = start()
    padded = np.pad(given["image"], ((0, 0), (2, 2), (2, 2), (0, 0)))
    out = np.asarray(Crop(2)(given, jax.random.key(0))["image"])
    places = set()
    for row in range(ROWS):
        at = [(t, l) for t in range(5) for l in range(5) if (padded[row, t : t + 8, l : l + 6] == out[row]).all()]
        assert len(at) == 1
        places.add(at[0])
    assert len(places) > 5
    out = np.asarray(Flip()(given, jax.random.key(0))["image"])
    flipped = (out == given["image"][:, :, ::-1]).all((1, 2, 3))
    assert (flipped | (out == given["image"]).all((1, 2, 3))).all()
    assert 0 < flipped.sum() < ROWS


def test_choose_draws_each_as_often_as_it_should():
    options = Choose(Flip(0.0), Flip(1.0), probabilities=(0.25, 0.75))
    given = start(rows=1)
    out = jax.jit(jax.vmap(lambda key: options(given, key)["image"]))(jax.random.split(jax.random.key(0), 400))
    assert 0.65 < np.mean((np.asarray(out) == given["image"][:, :, ::-1]).all((1, 2, 3, 4))) < 0.85


def test_at_reaches_a_batch_inside():
    given = {**start(), "unlabelled": start(rows=8)}
    out = At("unlabelled", Flip(1.0))(given, jax.random.key(0))
    np.testing.assert_array_equal(out["unlabelled"]["image"], given["unlabelled"]["image"][:, :, ::-1])
    np.testing.assert_array_equal(out["image"], given["image"])


@pytest.mark.parametrize("case", ALL)
def test_eight_devices_are_like_one(case):
    weight = np.ones(ROWS)
    weight[13:] = 0
    given = start(weight=weight, labelled=np.tile([1, 1, 0, 1], 4))
    key = jax.random.key(2)
    alone = JITTED[case](given, key)
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), P("data"))
    compiled = jax.jit(ALL[case], out_shardings=sharding).lower(jax.device_put(given, sharding), key).compile()
    spread = compiled(jax.device_put(given, sharding), key)
    for name in alone:
        np.testing.assert_allclose(np.asarray(spread[name]), np.asarray(alone[name]), atol=1e-6)
    images = [line for line in compiled.as_text().splitlines() if "all-gather" in line and "8,6,3" in line]
    assert not images, images[0]


ERRORS = {
    "alpha": (lambda: Mixup(0.0), r"Mixup\(alpha=0\.0\)"),
    "probability": (lambda: CutMix(probability=2), r"CutMix\(probability=2\)"),
    "classes": (lambda: Mixup()(start(), jax.random.key(0)), "needs the number of classes"),
    "answers": (lambda: Mixup(classes=5)({**start(), "teacher": 0}, jax.random.key(0)), "prepared for unmixed images"),
    "no options": (lambda: Choose(), "at least one"),
    "probabilities": (lambda: Choose(Flip(), Flip(), probabilities=(0.5, 0.6)), "sum to 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(InputError, match=message):
        call()


def test_configs_can_print_them():
    names = {"Mixup": Mixup, "CutMix": CutMix, "Crop": Crop, "Flip": Flip}
    for each in (Mixup(0.8, classes=10), CutMix(), Crop(), Flip(0.1)):
        assert eval(repr(each), names) == each
    assert Choose(Mixup(0.8), CutMix()) == Choose(Mixup(0.8), CutMix()) != Choose(Mixup(0.7), CutMix())
