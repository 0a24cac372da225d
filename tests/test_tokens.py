"""Batches of text: masks, documents, positions, and the one shift."""

import jax.numpy as jnp
import numpy as np
import pytest

from jkd import tokens
from jkd.errors import InputError

TOKENS = jnp.asarray([[5, 6, 7, 8, 9, 4], [3, 2, 1, 3, 2, 1]])
MASK = jnp.asarray([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
SEGMENT = jnp.asarray([[0, 0, 1, 1, 1, 2], [4, 4, 4, 7, 7, 7]])


def test_segments():
    assert tokens.segments({"tokens": TOKENS}) is None
    np.testing.assert_array_equal(tokens.segments({"tokens": TOKENS, "mask": MASK}), MASK)
    both = tokens.segments({"tokens": TOKENS, "mask": MASK, "segment": SEGMENT})
    np.testing.assert_array_equal(both, [[1, 1, 2, 2, 0, 0], [0, 5, 5, 8, 8, 8]])  # padding is of no document, not of the first


def test_positions():
    np.testing.assert_array_equal(tokens.positions({"tokens": TOKENS}), [[0, 1, 2, 3, 4, 5]])
    padded = tokens.positions({"tokens": TOKENS, "mask": MASK})
    np.testing.assert_array_equal(np.where(MASK > 0, padded, -1), [[0, 1, 2, 3, -1, -1], [-1, 0, 1, 2, 3, 4]])
    packed = tokens.positions({"tokens": TOKENS, "segment": SEGMENT})
    np.testing.assert_array_equal(packed, [[0, 1, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2]])
    both = tokens.positions({"tokens": TOKENS, "segment": SEGMENT, "mask": MASK})
    np.testing.assert_array_equal(np.where(MASK > 0, both, -1), [[0, 1, 0, 1, -1, -1], [-1, 0, 1, 0, 1, 2]])
    given = {"tokens": TOKENS, "position": 10 + TOKENS}
    np.testing.assert_array_equal(tokens.positions(given), 10 + TOKENS)


def test_next_tokens():
    labels, weight = tokens.next_tokens({"tokens": TOKENS})
    np.testing.assert_array_equal(labels[:, :-1], TOKENS[:, 1:])
    np.testing.assert_array_equal(weight, [[1, 1, 1, 1, 1, 0]] * 2)
    assert weight.dtype == jnp.float32
    # rows of weight 0.5 and 0; padding neither predicts nor is predicted, nor does a document the next one
    batch = {"tokens": TOKENS, "mask": MASK, "segment": SEGMENT, "weight": jnp.asarray([0.5, 0.0])}
    np.testing.assert_array_equal(tokens.next_tokens(batch)[1], [[0.5, 0, 0.5, 0, 0, 0], [0] * 6])
    np.testing.assert_array_equal(tokens.next_tokens(batch | {"weight": jnp.ones(2)})[1][1], [0, 1, 0, 1, 1, 0])
    # the response begins at place 2: it is predicted from place 1
    counted = {"tokens": TOKENS, "loss_mask": jnp.asarray([[0, 0, 1, 1, 1, 1]] * 2)}
    np.testing.assert_array_equal(tokens.next_tokens(counted)[1], [[0, 1, 1, 1, 1, 0]] * 2)
    with pytest.raises(InputError, match=r"no 'tokens' but \['image'\]"):
        tokens.next_tokens({"image": TOKENS})


def test_a_teacher_of_another_vocabulary():
    own = {"tokens": TOKENS, "mask": MASK, "weight": jnp.ones(2)}
    assert tokens.for_teacher(own) is own
    other = {"teacher_tokens": TOKENS[:, :3], "teacher_mask": MASK[:, :3]}
    seen = tokens.for_teacher(own | other)
    assert set(seen) == {"tokens", "mask", "weight"}
    np.testing.assert_array_equal(seen["tokens"], TOKENS[:, :3])
    assert "mask" not in tokens.for_teacher(own | {"teacher_tokens": TOKENS})  # theirs has no padding, whatever ours has
