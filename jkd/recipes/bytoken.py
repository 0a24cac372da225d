"""Losses of each token, by language models' Outputs: what every recipe on texts is made of.

Models of texts answer with (hidden, head). Then no logits of the whole text are made (`jkd.losses.chunked`); a recipe does not ask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd import sparse
from jkd.losses import chunked
from jkd.types import Array, Outputs

WHOLE = 1 << 20
"""Logits of no more numbers are made all at once: blocks would be no smaller, and programs are simpler."""


def by_part(
    mix: Sequence[tuple[Any, chunked.Part]],
    student: Outputs,
    teacher: Outputs | None = None,
    *,
    labels: Array | None = None,
    temperature: Any = 1.0,
    weights: Array | None = None,
) -> tuple[Array, ...]:
    """Each part's values ``[batch, time]``, in one pass over both models' heads.

    Args:
        mix: ``[(coef, part), …]``; the coefficients (numbers, or ``[batch, time]``) are those of the terms that the values go to.
        student, teacher: what they answer.
        labels: int ``[batch, time]``, where a part reads them.
        temperature: of the divergences.
        weights: ``[batch, time]``, what the terms weigh each token by, where that is known: it saves making the logits twice.
    """
    sides = [side for side in (student, teacher) if side is not None]
    if all(_apart(side) for side in sides) and any(math.prod(side.logits_shape) > WHOLE for side in sides):
        arrays = [array for side in sides for array in (side.hidden, _head(side))]
        return chunked.per_part(mix, *arrays, labels=labels, temperature=temperature, weights=weights)

    # what belongs to a token goes the way of its logits, which may be cut
    each = [part.rows if isinstance(part, chunked.Each) else () for _, part in mix]
    leaves, tree = jax.tree.flatten((labels, temperature, each))
    by_place = [np.ndim(leaf) > 0 for leaf in leaves]

    def values(*args: Array) -> tuple[Array, ...]:
        logits, given = args[: len(sides)], iter(args[len(sides) :])
        both = logits[0], logits[1] if len(logits) > 1 else None
        own = [next(given) if there else leaf for leaf, there in zip(leaves, by_place, strict=True)]
        labels, temperature, rows = jax.tree.unflatten(tree, own)
        parts = [
            dataclasses.replace(part, rows=some) if isinstance(part, chunked.Each) else part
            for (_, part), some in zip(mix, rows, strict=True)
        ]
        return tuple(part.full(*both, labels, temperature) for part in parts)

    shape = student.logits_shape[:-1]
    return sparse.by_position(
        values, *sides, *(jnp.broadcast_to(leaf, shape) for leaf, there in zip(leaves, by_place, strict=True) if there)
    )


def by_token(
    part: chunked.Part,
    student: Outputs,
    teacher: Outputs | None = None,
    *,
    labels: Array | None = None,
    temperature: Any = 1.0,
    weights: Array | None = None,
) -> Array:
    """`by_part` of a single one."""
    return by_part([(1.0, part)], student, teacher, labels=labels, temperature=temperature, weights=weights)[0]


def relative(weight: Array, among: Array) -> Array:
    """Factor ``[batch, time]`` of a coefficient in a mix whose ``weights`` are ``among``, for a term that weighs tokens by ``weight``.

    Of fewer tokens each weighs more in the mean. It says what gradient to prepare, of the rows at hand; what it comes to is the step's
    alone, which takes the mean over the whole batch however that is cut.
    """
    share = weight / jnp.where(among > 0, among, 1)
    total = weight.sum()
    return share * (among.sum() / jnp.where(total > 0, total, 1))


def _apart(outputs: Outputs) -> bool:
    return outputs.hidden is not None and outputs.head is not None


def _head(outputs: Outputs) -> chunked.Head:
    return chunked.Head(outputs.head, outputs.bias, outputs.softcap, outputs.classes, outputs.collects)
