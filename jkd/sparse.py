"""What a sparse method keeps of a teacher's distribution, and how logits of a whole text are never held for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jkd.errors import InputError
from jkd.types import Array, Outputs

BLOCKS = 32
"""Pieces that the time axis is cut into where logits are made piece by piece."""


def by_position(function: Callable[..., Any], *args: Any, whole: int = 1 << 22) -> Any:
    """``function(*args)`` with logits in the place of every `Outputs`, over one piece of the time axis after the other.

    So of logits that follow from (hidden, head) a 32nd is held at a time; the backward pass makes them again. Rows stay where they
    are on the mesh. Logits that are there anyway, or are small, go through in one piece.

    Args:
        function: of logits ``[batch, t, vocab]`` and arrays ``[batch, t, ...]``, each position by itself; gives any tree of arrays
            ``[batch, t, ...]``.
        *args: Outputs and arrays of all positions, ``[batch, time, ...]``.
        whole: how many numbers logits may be and still go through in one piece.
    """
    split = [arg for arg in args if isinstance(arg, Outputs) and _split(arg)]
    if not any(math.prod(arg.logits_shape) > whole for arg in split):
        return function(*(arg.logits if isinstance(arg, Outputs) else arg for arg in args))
    time = split[0].logits_shape[1]
    width = -(-time // BLOCKS)
    count = -(-time // width)

    def cut(array: Array) -> Array:
        rest = ((0, 0),) * (array.ndim - 2)
        # by what is there, for which the function is defined: nothing of it comes back
        padded = jnp.pad(array, ((0, 0), (0, count * width - time), *rest), mode="edge")
        return jnp.moveaxis(padded.reshape(array.shape[0], count, width, *array.shape[2:]), 1, 0)

    def rows(arg: Outputs | Array) -> Array:
        if not isinstance(arg, Outputs):
            return cut(arg)
        hidden = arg.hidden if _split(arg) else None
        return cut(arg.logits if hidden is None else hidden)

    def piece(arg: Outputs | Array, rows: Array) -> Array:
        return arg.replace(hidden=rows, heads=None, taps=None).logits if isinstance(arg, Outputs) and _split(arg) else rows

    @jax.checkpoint
    def step(_: None, pieces: tuple[Array, ...]) -> tuple[None, Any]:
        return None, function(*(piece(arg, rows) for arg, rows in zip(args, pieces, strict=True)))

    found = jax.lax.scan(step, None, tuple(map(rows, args)))[1]
    return jax.tree.map(
        lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[1], count * width, *leaf.shape[3:])[:, :time], found
    )


def _split(outputs: Outputs) -> bool:
    return outputs.hidden is not None and outputs.hidden.ndim == 3 and outputs.head is not None


def top_k(logits: Array, k: int) -> dict[str, Array]:
    """The likeliest classes of ``[..., vocab]`` in falling order.

    Returns:
        ``ids`` int32 ``[..., k]``, ``log_probs`` ``[..., k]`` and ``leftover`` ``[...]``, the probability of all other classes,
        summed over these (1 - sum of the kept would cancel).

    Raises:
        InputError: more classes than there are.
    """
    if k > logits.shape[-1]:
        raise InputError(f"the {k} likeliest of {logits.shape[-1]} classes: give a smaller k")
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    total = jax.nn.logsumexp(logits, axis=-1)
    values, ids = jax.lax.top_k(logits, k)
    others = jnp.put_along_axis(logits, ids, -jnp.inf, axis=-1, inplace=False)
    shifted = jnp.exp(others - total[..., None]).sum(-1)
    return {"ids": ids, "log_probs": values - total[..., None], "leftover": shifted}


def fewer(answer: dict[str, Array], k: int) -> dict[str, Array]:
    """The first k classes of an answer of `top_k`; the others join what is left.

    Raises:
        InputError: it has not as many.
    """
    there = answer["ids"].shape[-1]
    if there < k:
        raise InputError(f"the {k} likeliest classes of an answer that holds {there}: give k={there}, or an answer with more")
    rest = jnp.exp(answer["log_probs"][..., k:]).sum(-1)
    return {"ids": answer["ids"][..., :k], "log_probs": answer["log_probs"][..., :k], "leftover": answer["leftover"] + rest}


def draw(logits: Array, uniform: Array) -> Array:
    """Classes drawn with replacement from ``softmax(logits)``, by inverse transform.

    Args:
        logits: ``[..., vocab]``.
        uniform: ``[..., draws]`` in 0..1, one for each draw.

    Returns:
        int32 ``[..., draws]``. A class's chance is its probability to about 1e-7, the resolution of float32 in 0..1.
    """
    cumulative = jnp.cumsum(jax.nn.softmax(logits.astype(jnp.float32)), axis=-1)
    wanted = uniform * cumulative[..., -1:]
    vocab, draws = logits.shape[-1], uniform.shape[-1]
    find = jax.vmap(lambda row, one: jnp.searchsorted(row, one, side="right"))
    ids = find(cumulative.reshape(-1, vocab), wanted.reshape(-1, draws)).astype(jnp.int32)
    return jnp.minimum(ids, vocab - 1).reshape(wanted.shape)
