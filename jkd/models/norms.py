"""Normalisations as values: what a network's config takes, and builds once for each layer."""

from __future__ import annotations

import dataclasses
import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jkd.errors import InputError

Array = jax.Array


class Norm(Protocol):
    """What `Config.norm` may be: a frozen dataclass with this method."""

    def build(self, features: int, rngs: nnx.Rngs) -> nnx.Module: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """Batch statistics; ``momentum`` is the share of the running average that is kept (PyTorch's is one minus it)."""

    momentum: float = 0.9
    epsilon: float = 1e-5

    def build(self, features: int, rngs: nnx.Rngs) -> nnx.Module:
        return BatchNormed(features, momentum=self.momentum, epsilon=self.epsilon, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """Statistics of one example's channel groups: examples stay independent, so microbatches change nothing."""

    groups: int = 8
    epsilon: float = 1e-5

    def build(self, features: int, rngs: nnx.Rngs) -> nnx.Module:
        if features % self.groups:
            raise InputError(f"norm=GroupNorm(groups={self.groups}): {features} channels don't divide into that many groups")
        return nnx.GroupNorm(features, num_groups=self.groups, epsilon=self.epsilon, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Statistics of one pixel's channels."""

    epsilon: float = 1e-6

    def build(self, features: int, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.LayerNorm(features, epsilon=self.epsilon, rngs=rngs)


class BatchNormed(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`: the same numbers, but in training its features are read and written as seldom as can be."""

    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        running = self.use_running_average if use_running_average is None else use_running_average
        scale, bias = self.scale, self.bias
        if running or mask is not None or scale is None or bias is None or self.axis != -1 or self.axis_name is not None:
            return super().__call__(x, use_running_average, mask=mask)
        y, mean, variance = normalised(x, scale.get_value(), bias.get_value(), self.epsilon)
        for average, new in ((self.mean, mean), (self.var, variance)):
            average.set_value(self.momentum * average.get_value() + (1 - self.momentum) * new)
        return y if self.dtype is None else y.astype(self.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalised(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array, Array]:
    """``scale · (x - mean) / sqrt(variance + epsilon) + bias``, with the mean and the variance of each channel.

    The gradient is written out: what is kept for it is ``x`` alone, and it takes one pass for the sums and one for the answer.
    Derived, it keeps ``x - mean`` too, and writes two more arrays of the features' size.

    Args:
        x: ``[..., channels]``; computed in float32 at least.
        scale: ``[channels]``.
        bias: ``[channels]``.
        epsilon: added to the variance.
    """
    return _normalised(x, scale, bias, epsilon)[0]


def _normalised(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = tuple(range(x.ndim - 1))
    mean = wide.mean(axes)
    variance = jnp.maximum(jnp.square(wide).mean(axes) - jnp.square(mean), 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    slope = scale * inverse
    return (_affine(wide, slope, bias - mean * slope), mean, variance), (x, scale, bias, mean, inverse)


def _backward(epsilon: float, kept: tuple[Array, ...], gradients: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, inverse = kept
    gradient, of_mean, of_variance = gradients
    axes, count = tuple(range(x.ndim - 1)), x.size // x.shape[-1]
    wide = x.astype(gradient.dtype)
    total = gradient.sum(axes)
    product = (gradient * _affine(wide, jnp.ones_like(mean), -mean)).sum(axes)
    of_variance = of_variance - scale * inverse**3 * product / 2
    of_mean = of_mean - scale * inverse * total
    slope = 2 * of_variance / count
    of_x = _affine(gradient, scale * inverse, jnp.zeros_like(mean)) + _affine(wide, slope, of_mean / count - slope * mean)
    return of_x.astype(x.dtype), (product * inverse).astype(scale.dtype), total.astype(bias.dtype)


def _affine(x: Array, slope: Array, shift: Array) -> Array:
    shape = (1,) * (x.ndim - 1) + (-1,)
    return x * slope.reshape(shape) + shift.reshape(shape)


normalised.defvjp(_normalised, _backward)
