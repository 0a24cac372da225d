"""Nested dicts by path: ``{"block": {"kernel": x}}`` is ``{"block/kernel": x}``, and patterns are shell globs on such paths."""

from __future__ import annotations

import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jkd.types import Tree


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """``{path: leaf}`` in path order. Whatever is no mapping is a leaf."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name in sorted(tree):
        flat |= flatten(tree[name], f"{prefix}/{name}" if prefix else name)
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """The inverse of `flatten` (empty dicts apart, which have no path)."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether any glob pattern matches the path; ``*`` crosses ``/``, a leading ``!`` takes what it matches out again."""
    found = False
    for pattern in patterns:
        if pattern.startswith("!"):
            found = found and not fnmatch.fnmatchcase(path, pattern[1:])
        else:
            found = found or fnmatch.fnmatchcase(path, pattern)
    return found


def split(tree: Tree, keep: Callable[[str], bool], prefix: str = "") -> tuple[Tree, Tree]:
    """Two trees: the leaves whose path is kept, and the others (empty dicts among them). `merge` joins them again."""
    kept, rest = dict[str, Any](), dict[str, Any]()
    for name, node in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if not isinstance(node, Mapping):
            (kept if keep(path) else rest)[name] = node
        elif not node:
            rest[name] = node
        else:
            for side, part in zip((kept, rest), split(node, keep, path), strict=True):
                if part:
                    side[name] = part
    return kept, rest


def merge(first: Tree, second: Tree) -> Tree:
    """The union of two nested dicts that share no leaf."""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        raise ValueError("merge: the two trees share a leaf")
    both = {name: merge(first[name], second[name]) for name in first.keys() & second.keys()}
    return {**first, **second, **both}


def map_with_path(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``function(path, leaf, …)`` on every leaf of a nested dict; the further trees have the same paths."""

    def walk(path: str, node: Tree, others: tuple[Tree, ...]) -> Tree:
        if isinstance(node, Mapping):
            return {k: walk(f"{path}/{k}" if path else k, v, tuple(o[k] for o in others)) for k, v in node.items()}
        return function(path, node, *others)

    return walk("", tree, rest)


def count(tree: Tree) -> int:
    """The number of scalars in all leaves (arrays or shapes)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """The number of bytes in all leaves (arrays or shapes)."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sha256(tree: Tree) -> str:
    """Hex digest over the leaves' bytes in path order (row major, little endian)."""
    digest = hashlib.sha256()
    for leaf in flatten(tree).values():
        digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
    return digest.hexdigest()
