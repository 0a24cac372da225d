"""Nested dicts by path."""

from __future__ import annotations

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import trees

TREE = {"b": {"kernel": 1, "bias": 2}, "a": {"deep": {"kernel": 3}}, "c": 4}


def test_paths_are_in_order_and_lead_back():
    assert list(trees.flatten(TREE)) == ["a/deep/kernel", "b/bias", "b/kernel", "c"]
    assert trees.unflatten(trees.flatten(TREE)) == TREE


@pytest.mark.parametrize(
    ("path", "patterns", "found"),
    [
        ("a/deep/kernel", ("*kernel",), True),
        ("a/deep/kernel", ("a/*",), True),
        ("a/deep/kernel", ("kernel",), False),
        ("a/deep/kernel", ("*", "!a/*"), False),
        ("a/deep/kernel", ("!a/*", "*"), True),
        ("a/deep/kernel", ("*", "!a/*", "*/deep/*"), True),
        ("A/kernel", ("a/*",), False),
        ("a/1/kernel", ("a/[0-9]/*",), True),
        ("a", (), False),
    ],
)
def test_patterns_cross_slashes_and_later_ones_win(path, patterns, found):
    assert trees.matches(path, patterns) == found


EMPTY = {"relu": {}, "dense": {"kernel": 1, "extra": {}}, "block": {"0": {}, "1": {"bias": 2}}}


@pytest.mark.parametrize("tree", [TREE, EMPTY, {}])
@pytest.mark.parametrize("keep", [lambda path: "kernel" in path, lambda path: True, lambda path: False])
def test_what_is_split_is_merged_again_empty_branches_too(tree, keep):
    kept, rest = trees.split(tree, keep)
    assert trees.merge(kept, rest) == tree
    assert all(keep(path) for path in trees.flatten(kept))
    assert not any(keep(path) for path in trees.flatten(rest))


def test_trees_that_share_a_leaf_are_not_merged():
    with pytest.raises(ValueError, match="share a leaf"):
        trees.merge(TREE, {"c": 4})


def test_map_sees_path_leaf_and_the_other_trees():
    found = trees.map_with_path(lambda path, leaf, other: (path, leaf, other), {"a": {"b": 1}}, {"a": {"b": 2}})
    assert found == {"a": {"b": ("a/b", 1, 2)}}


def test_counts_and_bytes_of_arrays_and_shapes():
    tree = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((), jnp.bfloat16)}
    for one in (tree, jax.eval_shape(lambda: tree)):
        assert trees.count(one) == 7
        assert trees.nbytes(one) == 26


def test_the_digest_is_over_bytes_in_path_order():
    tree = {"b": np.arange(3, dtype=np.int32), "a": {"c": np.ones((2, 2), np.float32).T}}
    wanted = hashlib.sha256(tree["a"]["c"].tobytes() + tree["b"].tobytes()).hexdigest()
    assert trees.sha256(tree) == trees.sha256(jax.tree.map(jnp.asarray, tree)) == wanted
    assert trees.sha256({"a": np.array([[1, 2], [3, 4]])}) != trees.sha256({"a": np.array([[1, 2], [3, 4]]).T})
