"""Batches of text: which tokens are real, which belong together, where each stands, and what each predicts.

``tokens`` int ``[batch, time]``; ``mask`` (1 = real, 0 = padding); ``segment`` (int, one number for each document of a packed row);
``position`` (int, from 0 in every document); ``loss_mask`` (1 = this token is counted when it is predicted: a response, not its
prompt); ``token_type`` (int, by which an encoder tells two texts apart); ``masked`` (1 = hidden, to be filled in). All but
``tokens`` may be missing. Where the teacher has another vocabulary its view of the same text is under the same names with
``teacher_`` before them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jkd.errors import InputError
from jkd.types import Array, Batch


def real(batch: Batch) -> Array:
    """``[batch, time]`` bool: the tokens that are no padding."""
    tokens = batch["tokens"]
    return batch["mask"] > 0 if "mask" in batch else jnp.ones(tokens.shape, bool)


def segments(batch: Batch) -> Array | None:
    """``[batch, time]`` int32: tokens see each other only where these are equal; None where all of a row's do.

    Padding is a segment of its own, 0, so that no token is without anything to see.
    """
    if "segment" not in batch and "mask" not in batch:
        return None
    document = batch["segment"].astype(jnp.int32) + 1 if "segment" in batch else 1
    return jnp.where(real(batch), document, 0)


def positions(batch: Batch) -> Array:
    """``[batch or 1, time]`` int32: ``batch["position"]``, else the number of real tokens before it in its document."""
    if "position" in batch:
        return batch["position"].astype(jnp.int32)
    if "segment" not in batch and "mask" not in batch:
        return jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)[None]
    counts = real(batch).astype(jnp.int32)
    before = jnp.cumsum(counts, axis=1) - counts
    if "segment" not in batch:
        return before
    document = batch["segment"]
    first = jnp.concatenate([jnp.ones_like(document[:, :1], bool), document[:, 1:] != document[:, :-1]], axis=1)
    return before - jax.lax.cummax(jnp.where(first, before, 0), axis=1)


def following(array: Array) -> Array:
    """What belongs to the token after, in the place of each; the last place has the first one's, which counts for nothing."""
    return jnp.roll(array, -1, axis=1)


def next_tokens(batch: Batch) -> tuple[Array, Array]:
    """What each place predicts, and how much it counts: the one shift from token t to token t + 1.

    Returns:
        ``labels`` ``[batch, time]``, the token after; ``weight`` ``[batch, time]`` float32, the row's ``weight`` where both tokens
        are real and of one document and the token after is counted (``loss_mask``), else 0. The last place predicts nothing.

    Raises:
        InputError: the batch has no ``tokens``.
    """
    if "tokens" not in batch:
        raise InputError(f"batch has no 'tokens' but {sorted(batch)}")
    tokens = batch["tokens"]
    counted = real(batch) & following(real(batch)) & (jnp.arange(tokens.shape[1]) < tokens.shape[1] - 1)[None]
    if "segment" in batch:
        counted &= batch["segment"] == following(batch["segment"])
    weight = counted.astype(jnp.float32)
    if "loss_mask" in batch:
        weight *= following(batch["loss_mask"]).astype(jnp.float32)
    if "weight" in batch:
        weight *= batch["weight"].astype(jnp.float32)[:, None]
    return following(tokens), weight


_PREFIX = "teacher_"


def for_teacher(batch: Batch) -> Batch:
    """The batch as a teacher of another vocabulary reads it: ``teacher_tokens`` as ``tokens``, and so on."""
    if _PREFIX + "tokens" not in batch:
        return batch
    own = {"tokens", "mask", "loss_mask", "segment", "position", "token_type"}
    theirs = {name.removeprefix(_PREFIX): value for name, value in batch.items() if name.startswith(_PREFIX)}
    return {name: value for name, value in batch.items() if name not in own and not name.startswith(_PREFIX)} | theirs
