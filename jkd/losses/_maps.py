"""Feature maps ``[..., height, width, channels]``: checks, and how two resolutions are made one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd.losses._common import check_rank, check_where, describe, promote, where_like
from jkd.losses._typing import Array, Float

SPACE = (-3, -2)


def einsum(formula: str, *arrays: Any) -> Any:
    """`jnp.einsum` at the precision of its inputs.

    By default GPUs and TPUs round float32 operands to 10 or 7 bits. Differences of products don't survive that, and these
    products are small beside the network's.
    """
    return jnp.einsum(formula, *arrays, precision=jax.lax.Precision.HIGHEST)


@jax.custom_jvp
def gram(x: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch rows rows"]:
    """``x xᵀ``. The bare product's gradient is two products, of the cotangent and of its transpose; this one adds these first."""
    return einsum("...id,...jd->...ij", x, x)


@gram.defjvp
def _(primals, tangents):
    (x,), (moved,) = primals, tangents
    half = einsum("...id,...jd->...ij", moved, x)
    return gram(x), half + jnp.swapaxes(half, -1, -2)


def per_channel(x: Float[Array, " channels"], like: Float[Array, "..."]) -> Float[Array, "..."]:
    """``[channels]`` with leading axes of size 1 up to the rank of ``like``."""
    return x.reshape((1,) * (like.ndim - 1) + x.shape)


def check_maps(*, same_channels: bool = True, **maps: Any) -> None:
    """Arrays ``[..., height, width, channels]``, none empty, with equal leading axes (and channels)."""
    check_rank(3, "[..., height, width, channels]", **maps)
    (first, reference), *_ = maps.items()
    for name, array in maps.items():
        for axis, meaning in zip((-3, -2, -1), ("height", "width", "channels"), strict=True):
            if np.shape(array)[axis] == 0:
                raise ValueError(f"{name} must have a non-empty {meaning} axis (axis {axis}), got {describe(array)}")
        if np.shape(array)[:-3] != np.shape(reference)[:-3]:
            raise ValueError(
                f"{name} must have the leading axes of {first} {describe(reference)} (all but height, width and channels), "
                f"got {describe(array)}"
            )
    if same_channels:
        check_channels(**maps)


def check_channels(**features: Any) -> None:
    """Equally many channels; the message says what mends it."""
    (first, reference), *others = features.items()
    for name, array in others:
        if np.shape(array)[-1] != np.shape(reference)[-1]:
            raise ValueError(
                f"{name} must have as many channels (last axis) as {first} {describe(reference)}, got {describe(array)}; "
                "a projector on the student makes them equal"
            )


def check_vectors(**features: Any) -> bool:
    """Arrays ``[..., channels]`` of one shape, or maps that differ in height and width only; True where they differ so.

    Maps need four axes for that: in ``[batch, tokens, channels]`` another number of tokens is a mistake.
    """
    check_rank(1, "[..., channels]", **features)
    (first, reference), *others = features.items()
    if np.shape(reference)[-1] == 0:
        raise ValueError(f"{first} must have a non-empty channels axis (axis -1), got {describe(reference)}")
    check_channels(**features)
    resized = False
    for name, array in others:
        if np.shape(array) == np.shape(reference):
            continue
        if np.ndim(array) < 4 or np.ndim(array) != np.ndim(reference) or np.shape(array)[:-3] != np.shape(reference)[:-3]:
            raise ValueError(
                f"{name} must have the shape of {first} {describe(reference)}, or be [batch, height, width, channels] of "
                f"another height and width, got {describe(array)}"
            )
        resized = True
    if resized:
        check_maps(**features)
    return resized


def _pool_axis(x: Any, axis: int, size: int) -> Any:
    """Adaptive average pooling along a negative axis: cell i is the mean over ``floor(i n / size) .. ceil((i+1) n / size)``."""
    length = x.shape[axis]
    if length == size:
        return x
    cells = np.zeros((size, length))
    for i in range(size):
        start, stop = (i * length) // size, -((-(i + 1) * length) // size)
        cells[i, start:stop] = 1 / (stop - start)
    formula = "sh,...hwc->...swc" if axis == -3 else "sw,...hwc->...hsc"
    return einsum(formula, jnp.asarray(cells, x.dtype), x)


def adaptive_average_pool(x: Any, height: int, width: int) -> Any:
    """``[..., height, width, channels]`` averaged as ``adaptive_avg_pool2d`` does: cells overlap where sizes don't divide."""
    *batch, rows, columns, channels = x.shape
    if (rows, columns) == (height, width):
        return x
    if rows % height == 0 and columns % width == 0:
        cells = x.reshape(*batch, height, rows // height, width, columns // width, channels)
        return jnp.mean(cells, axis=(-4, -2))
    return _pool_axis(_pool_axis(x, -3, height), -2, width)


def match(first: Any, second: Any) -> tuple[Any, Any]:
    """Both maps at one resolution: along each axis the larger is averaged down to the smaller."""
    height, width = (min(first.shape[axis], second.shape[axis]) for axis in SPACE)
    return adaptive_average_pool(first, height, width), adaptive_average_pool(second, height, width)


def vector_pair(**features: Any) -> tuple[Any, Any]:
    """Two ``[..., channels]``: checked, promoted, at one resolution."""
    resized = check_vectors(**features)
    first, second = promote(*features.values())
    return match(first, second) if resized else (first, second)


def map_pair(*, same_channels: bool = True, **features: Any) -> tuple[Any, Any]:
    """Two ``[..., height, width, channels]``: checked, promoted, at one resolution."""
    check_maps(same_channels=same_channels, **features)
    first, second = promote(*features.values())
    return match(first, second)


def keep_positions(where: Any, *maps: Any) -> tuple[Any, ...]:
    """``(mask with a channel axis, or None; the maps with 0 at positions that are dropped)``."""
    if where is None:
        return (None, *maps)
    check_where(where, maps[0].shape[:-1], meaning="[..., height, width] of the smaller map")
    kept = where_like(where, maps[0]) != 0
    return (kept, *(jnp.where(kept, x, 0) for x in maps))
