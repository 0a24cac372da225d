"""Embeddings ``[batch, ...]`` of the losses that compare examples: checks, masks, centring."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import check_nonempty, check_rank, check_where, describe, masked_mean, promote


def rows(where, **embeddings):
    """Checked, promoted ``[batch, dim]`` with zeros in dropped rows, and ``kept`` ``[batch]`` float (ones without a mask)."""
    check_rank(2, "[batch, ...]", **embeddings)
    (first, reference), *_ = embeddings.items()
    for name, array in embeddings.items():
        for axis in range(np.ndim(array)):
            check_nonempty(axis, "batch" if axis == 0 else "feature", **{name: array})
        if np.shape(array)[0] != np.shape(reference)[0]:
            raise ValueError(f"{name} must have the batch (axis 0) of {first} {describe(reference)}, got {describe(array)}")
    flat = [x.reshape(x.shape[0], -1) for x in promote(*embeddings.values())]
    batch, dtype = flat[0].shape[0], flat[0].dtype
    if where is None:
        return jnp.ones(batch, dtype), *flat
    check_where(where, (batch,), meaning="[batch]")
    kept = (jnp.asarray(where) != 0).astype(dtype)
    return kept, *(jnp.where(kept[:, None] != 0, x, 0) for x in flat)


def count(kept):
    """How many rows are kept, at least 1: what means over examples are divided by."""
    return jnp.maximum(jnp.sum(kept), 1)


def centred(x, kept):
    """Less the mean of the kept rows; dropped rows stay 0."""
    return (x - masked_mean(x, kept[:, None], 0, keepdims=True)) * kept[:, None]


def unit_scale(x):
    """Times the power of two that brings the example's largest entry below 1 (exact; the norms cancel it): fourth powers fit."""
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    bound = jnp.finfo(x.dtype).maxexp - 2
    return x * jnp.ldexp(jnp.ones((), x.dtype), -jnp.clip(jnp.frexp(largest)[1], -bound, bound))
