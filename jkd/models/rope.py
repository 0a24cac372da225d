"""Rotary position embedding (https://arxiv.org/abs/2104.09864), and the ways in which its frequencies are stretched."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jkd.errors import InputError

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """All frequencies divided by ``factor`` (positions interpolated, https://arxiv.org/abs/2306.15595)."""

    factor: float

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Low frequencies divided by ``factor``, high ones kept, those between blended, as Llama 3.1 does.

    Args:
        factor: how much longer the context became.
        low, high: a frequency is low where fewer than ``low`` of its periods fit in ``length``, high where more than ``high`` do.
        length: context in tokens before it was stretched.
    """

    factor: float
    low: float = 1.0
    high: float = 4.0
    length: int = 8192

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        periods = self.length * frequencies / (2 * math.pi)
        kept = np.clip((periods - self.low) / (self.high - self.low), 0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotation of pairs ``(x[i], x[i + dim/2])`` by ``position * theta ** (-2 i / dim)``, the frequency stretched on request."""

    theta: float = 10_000.0
    scaling: Linear | Llama3 | None = None

    def table(self, positions: Array, dim: int) -> Array:
        """Cosines and sines, ``[2, batch, time, dim / 2]`` in float32, of integer ``positions`` ``[batch, time]``."""
        if dim % 2:
            raise InputError(f"rope: head_dim={dim} must be even")
        frequencies = self.theta ** -(np.arange(0, dim, 2) / dim)
        if self.scaling is not None:
            frequencies = self.scaling(frequencies)
        angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)[None, None]
        return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Array, table: Array) -> Array:
    """``[batch, time, heads, dim]`` rotated by a `Rope.table`; computed in float32, returned in the dtype of ``x``."""
    cos, sin = table[:, :, :, None, :]
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)
