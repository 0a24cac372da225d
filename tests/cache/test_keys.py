"""What an example is called: the same for the same contents, always."""

import numpy as np
import pytest

from jkd import cache
from jkd.errors import InputError

IDS = [3, 70_000, 5]


def test_names_are_for_ever():
    """A cache of last year must be found: these are the names that version 1 gave."""
    assert cache.key(tokens=IDS).hex() == "f1207078d4f62d287662f3223ede6382"
    assert cache.key(image=np.arange(12, dtype=np.uint8).reshape(2, 2, 3)).hex() == "6680b8b4ccc84ae35bfe23bd3274e79c"
    assert cache.key({"x": np.array([0.1, -2.0])}, augmentation=7).hex() == "189c71248bfac3e242ba9c28ab043cbf"


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32, ">i8"])
def test_whole_numbers_hash_alike(dtype):
    wide = np.zeros((3, 2), dtype)
    wide[:, 0] = IDS
    for same in (np.array(IDS, dtype), wide[:, 0]):
        assert cache.key(tokens=same) == cache.key(tokens=IDS)
    small = np.array([1, 0, 1])
    assert cache.key(tokens=small.astype(np.uint8)) == cache.key(tokens=small.astype(dtype)) == cache.key(tokens=small > 0)


def test_floats_hash_as_float32():
    values = np.array([0.1, 1e-3])
    assert cache.key(x=values) == cache.key(x=values.astype(np.float32))
    assert cache.key(x=values) != cache.key(x=values.astype(np.float16))


@pytest.mark.parametrize(
    "other",
    [
        dict(tokens=[3, 70_000, 6]),
        dict(tokens=[70_000, 3, 5]),
        dict(tokens=[IDS]),
        dict(tokens=[*IDS, 0]),
        dict(tokens=[-3, 70_000, 5]),
        dict(tokens=np.array(IDS, np.float32)),
        dict(ids=IDS),
        dict(tokens=IDS, mask=[1, 1, 1]),
        dict(tokens=IDS, augmentation=1),
    ],
)
def test_another_example_has_another_name(other):
    assert cache.key(**other) != cache.key(tokens=IDS)


def test_the_order_of_the_names_does_not_count():
    assert cache.key(a=1, b=2) == cache.key(dict(b=2), a=1) != cache.key(a=2, b=1)


def test_what_is_no_number_is_refused():
    with pytest.raises(InputError, match=r"key\(text=…\): values are <U2"):
        cache.key(text="ab")
    with pytest.raises(InputError, match="give the inputs"):
        cache.key()
