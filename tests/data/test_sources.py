"""Digits, arrays, subsets, noise; what they say of themselves, and what they refuse."""

import numpy as np
import pytest

from jkd import data
from jkd.data.labels import mask_of
from jkd.errors import InputError


def image(size):
    return np.zeros((size, 4, 4, 1), np.uint8)


def test_digits_are_the_digits():
    from sklearn.datasets import load_digits

    raw = load_digits()
    digits = data.digits()
    assert (digits.train_size, digits.eval_size, digits.classes, digits.has_eval) == (1437, 360, 10, True)
    train, held_out = digits.train.columns(), digits.eval.columns()
    for name, shape in (("image", (8, 8, 1)), ("label", ())):
        assert train[name].shape[1:] == shape
    assert train["image"].dtype == np.uint8
    assert (train["image"].min(), train["image"].max()) == (0, 255)
    # The two parts are all the digits, each once.
    together = np.concatenate([train["image"], held_out["image"]])[..., 0]
    original = np.round(raw.images * 255 / 16).astype(np.uint8)
    assert sorted(map(bytes, together.reshape(1797, -1))) == sorted(map(bytes, original.reshape(1797, -1)))
    # Stratified: a fifth of each class.
    share = np.bincount(held_out["label"]) / np.bincount(raw.target)
    np.testing.assert_allclose(share, 360 / 1797, atol=0.006)


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.01, 0.1, 0.5, 1.0])
def test_digits_keep_at_most_the_labelled_fraction(fraction):
    columns = data.digits(labelled=fraction, seed=3).train.columns()
    kept = columns["labelled"].sum()
    assert 1437 * fraction - 1 < kept <= 1437 * fraction
    per_class = np.bincount(columns["label"][columns["labelled"] > 0], minlength=10)
    assert per_class.max() - per_class.min() <= 1 + np.ptp(np.bincount(columns["label"])) * fraction


def test_the_split_never_changes_and_the_labelled_follow_the_seed():
    one, two = data.digits(labelled=0.1, seed=0), data.digits(labelled=0.1, seed=1)
    np.testing.assert_array_equal(one.train.columns()["image"], two.train.columns()["image"])
    assert (one.train.columns()["labelled"] != two.train.columns()["labelled"]).any()
    np.testing.assert_array_equal(
        data.digits(labelled=0.1, seed=0).train.columns()["labelled"], one.train.columns()["labelled"]
    )
    assert (one.eval.columns()["labelled"] == 1).all()


def test_labels_of_unlabelled_digits_never_reach_a_batch():
    digits = data.digits(labelled=0.1)
    batches = digits.batches(479, seed=0)
    for _ in range(3):
        batch = next(batches)
        assert not batch["label"][batch["labelled"] == 0].any()
    batches.close()


def test_classes_are_counted_where_labels_may_be_used():
    made = data.arrays(image=image(4), label=np.array([0, 1, 2, 9]), labelled=np.array([1, 1, 1, 0]))
    assert made.classes == 3
    assert data.arrays(image=image(4), label=np.arange(4), eval={"image": image(2), "label": np.array([5, 0])}).classes == 6
    assert data.arrays(image=image(4), label=np.zeros((4, 7))).classes == 7
    assert data.arrays(image=image(4)).classes is None


@pytest.mark.parametrize("labelled", [0.5, np.array([1, 0, 1, 0, 0, 1, 0, 1, 0, 0])])
def test_labelled_records_and_arrays(labelled):
    label = np.arange(10) % 2
    kept = 5 if np.ndim(labelled) == 0 else labelled.sum()
    records = [{"image": image(1)[0], "label": each} for each in label]
    for made in (
        data.arrays(image=image(10), label=label, labelled=labelled),
        data.source(records, labelled=labelled),
        data.source(records, labelled=labelled, train_maps=(lambda record, rng: record,)),
    ):
        batches = made.batches(10, seed=0)
        batch = next(batches)
        batches.close()
        assert batch["labelled"].sum() == kept
        if np.ndim(labelled):
            np.testing.assert_array_equal(batch["labelled"][np.argsort(batch["index"])], labelled)
        only = data.labelled_only(made)
        assert (only.train_size, made.train_size) == (kept, 10)
        batches = only.batches(20, seed=0)
        batch = next(batches)
        batches.close()
        assert (batch["labelled"] == 1).all()
        assert batch["index"].max() < kept


def test_subset_keeps_those_examples():
    made = data.arrays(image=image(6), label=np.arange(6))
    for keep in (np.array([4, 1]), np.arange(6) == 4):
        part = data.subset(made, keep)
        batch = next(part.batches(8, seed=0))
        assert set(batch["label"]) == set(np.arange(6)[keep])
        assert part.classes == 6


def test_fake_has_the_same_shapes():
    joined = data.join(data.digits(labelled=0.1), unlabelled=(data.digits(), 2))
    noise = data.fake(joined, train_size=32, eval_size=8)
    assert noise.spec(4) == joined.spec(4)
    assert (noise.train_size, noise.eval_size, noise.classes) == (32, 8, 10)


def test_reprs_tell_data_apart():
    """A run's directory is named after its config, of which this is a part."""
    assert repr(data.digits(labelled=0.1)) == repr(data.digits(labelled=0.1)) != repr(data.digits(labelled=0.1, seed=1))
    one, other = image(4), image(4)
    other[2, 1, 1] = 7
    assert repr(data.arrays(image=one)) == repr(data.arrays(image=one.copy())) != repr(data.arrays(image=other))
    records = [{"image": image(1)[0]}] * 4
    masks = [repr(data.source(records, labelled=np.eye(4)[row])) for row in (0, 0, 1)]
    assert masks[0] == masks[1] != masks[2]
    subsets = [repr(data.subset(data.digits(), np.arange(size))) for size in (5, 5, 6)]
    assert subsets[0] == subsets[1] != subsets[2]
    assert "0x" not in masks[0] + subsets[0]


ERRORS = {
    "nothing": (lambda: data.arrays(), "no columns"),
    "empty": (lambda: data.arrays(image=image(0)), "empty"),
    "empty evaluation": (lambda: data.arrays(image=image(1), eval={"image": image(0)}), "eval: the data set is empty"),
    "lengths": (lambda: data.arrays(image=image(3), label=np.zeros(2)), "one length.*'image': 3, 'label': 2"),
    "scalar": (lambda: data.arrays(image=image(3), label=1), "one length"),
    "fraction": (lambda: data.digits(labelled=10), "labelled=10: must be a fraction"),
    "mask": (lambda: data.arrays(image=image(3), labelled=np.ones(2)), r"labelled has shape \[2\]"),
    "record mask": (lambda: data.source([{}] * 3, labelled=np.ones(2)), r"labelled has shape \[2\]"),
    "no sequence": (lambda: data.source(iter([1])), "list_iterator.*__len__ and __getitem__"),
    "no records": (lambda: data.source([]), "training set is empty"),
    "no evaluation records": (lambda: data.source([{}], eval=[]), "evaluation set is empty"),
    "digits seed": (lambda: data.digits(seed=-1), "seed=-1"),
    "subset mask": (lambda: data.subset(data.arrays(image=image(3)), np.ones(2, bool)), r"shape \[2\]"),
    "subset range": (lambda: data.subset(data.arrays(image=image(3)), np.array([3])), "from 0 to 2"),
    "subset of nothing": (lambda: data.subset(data.arrays(image=image(3)), np.zeros(3, bool)), "at least one"),
    "not said": (lambda: data.labelled_only(data.arrays(image=image(3))), "does not say which"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    call, message = ERRORS[case]
    with pytest.raises(InputError, match=message):
        call()


def test_a_fraction_is_not_lost_to_rounding():
    assert mask_of(0.1, 10, 0).sum() == 1
    assert mask_of(0.3, 10, 0).sum() == 3
    assert mask_of(1 / 3, 3, 0).sum() == 1
