"""Tap paths, and what is done with the outputs that were captured under them.

A tap is written ``module/path[:method][#call][@layer]``: a module by its place in the model; one of its methods (default: being
called); which of several calls, counted from 0; and which layer where layers are stacked (``nnx.scan``, ``nnx.vmap``,
``nn.scan``), counted from 0 or, with a minus, from the end. ``:method`` alone is a method of the model itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jkd.errors import InputError, nearest

CALL = "__call__"
_GRAMMAR = re.compile(r"(?P<path>[^:#@]*)(:(?P<method>\w+))?(#(?P<call>\d+))?(@(?P<layer>-?\d+))?")

Key = tuple[str, str]
"""``(module path, method)``: what outputs are captured under."""


@dataclasses.dataclass(frozen=True)
class Tap:
    """One parsed tap path; ``text`` is how the user wrote it and how `Outputs.taps` names it."""

    text: str
    path: str
    method: str = CALL
    call: int | None = None
    layer: int | None = None


def parse(text: str) -> Tap:
    """The parts of ``module/path[:method][#call][@layer]``.

    Raises:
        InputError: not of that form.
    """
    match = _GRAMMAR.fullmatch(text)
    if not text or match is None:
        raise InputError(f"tap {text!r}: not of the form module/path[:method][#call][@layer]")
    call, layer = match["call"], match["layer"]
    number = lambda digits: None if digits is None else int(digits)  # noqa: E731
    return Tap(text, match["path"].strip("/"), match["method"] or CALL, number(call), number(layer))


@jax.tree_util.register_pytree_node_class
class Captured:
    """A captured value that remembers its rank, so that axes which ``scan`` and ``vmap`` stack onto it can be told apart.

    The ranks are static, hence survive every transformation, while the arrays inside gain their axes.
    """

    def __init__(self, value: Any, ranks: tuple[int, ...] | None = None):
        self.value = value
        self.ranks = tuple(np.ndim(leaf) for leaf in jax.tree.leaves(value)) if ranks is None else ranks

    @staticmethod
    def fits(value: Any) -> bool:
        """Whether this is an array or a tree of arrays (a method may return anything)."""
        leaves = jax.tree.leaves(value)
        return bool(leaves) and all(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)

    @property
    def stacked(self) -> bool:
        return all(len(leaf.shape) > rank for leaf, rank in zip(jax.tree.leaves(self.value), self.ranks, strict=True))

    def tree_flatten(self):
        return (self.value,), self.ranks

    @classmethod
    def tree_unflatten(cls, ranks, children):
        return cls(children[0], ranks)


def name(key: Key) -> str:
    """The tap path of a module's method."""
    path, method = key
    return path if method == CALL and path else f"{path}:{method}"


def shapes(captured: Mapping[Key, Sequence[Any]]) -> dict[str, Any]:
    """Every tappable path with what it gives; one path for each call where there are several."""
    table = {}
    for key in sorted(captured, key=_natural):
        calls = captured[key]
        for number, value in enumerate(calls):
            table[name(key) + (f"#{number}" if len(calls) > 1 else "")] = _bare(value)
    return table


def select(
    wanted: Sequence[Tap], captured: Mapping[Key, Sequence[Any]], known: Callable[[], Iterable[str]], *, model: str
) -> dict[str, Any]:
    """The captured values that were asked for, by the text that asked.

    Args:
        wanted: the parsed tap paths.
        captured: for each module path and method, what its calls returned, in order.
        known: all tappable paths, computed only to help after a wrong one.
        model: its name, for messages.

    Raises:
        InputError: a path that gives nothing, a call that must be chosen, a call or layer that is not there.
    """
    return {tap.text: _one(tap, captured, known, model) for tap in wanted}


def require(wanted: Iterable[Tap], known: Iterable[str], *, model: str) -> None:
    """Raises InputError for the first path under which nothing is computed."""
    known = list(known)
    bases = {path.partition("#")[0] for path in known}
    for tap in wanted:
        if name((tap.path, tap.method)) not in bases:
            raise InputError(f"tap {tap.text!r}: {model} computes nothing under this path{nearest(tap.text, known)}")


def _one(tap: Tap, captured: Mapping[Key, Sequence[Any]], known: Callable[[], Iterable[str]], model: str) -> Any:
    key = (tap.path, tap.method)
    calls = captured.get(key, ())
    if not calls:
        require([tap], known(), model=model)
        raise InputError(f"tap {tap.text!r}: {name(key)!r} is computed in other modes or batches of {model}, but not here")
    if len(calls) > 1 and (tap.call is None or tap.call >= len(calls)):
        choices = ", ".join(repr(f"{name(key)}#{number}") for number in range(len(calls)))
        raise InputError(f"tap {tap.text!r}: {name(key)!r} is called {len(calls)} times; choose one of {choices}")
    if (tap.call or 0) >= len(calls):
        raise InputError(f"tap {tap.text!r}: {name(key)!r} is called once; leave out #{tap.call}")
    value = calls[tap.call or 0]
    if tap.layer is None:
        return _bare(value)
    if isinstance(value, Captured) and not value.stacked:
        raise InputError(f"tap {tap.text!r}: {name(key)!r} is one layer, not a stack; leave out @{tap.layer}")
    layers = jax.tree.leaves(value)[0].shape[0]
    if not -layers <= tap.layer < layers:
        raise InputError(f"tap {tap.text!r}: {name(key)!r} stacks {layers} layers; choose @0 to @{layers - 1}")
    return jax.tree.map(lambda leaf: leaf[tap.layer], _bare(value))


def _bare(value: Any) -> Any:
    return value.value if isinstance(value, Captured) else value


def _natural(key: Key) -> tuple:
    # "blocks/10" after "blocks/2": numbers compare as numbers.
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in (*key[0].split("/"), key[1]))
