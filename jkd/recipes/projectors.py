"""Learned maps from a student's features to the shape of the teacher's.

A projector is a frozen dataclass: ``init(key, student_shape, teacher_shape) -> params`` and ``projector(params, features)``. Its
parameters are float32; it computes in the features' dtype. One that couples examples (BatchNorm) is called with ``where``
``[batch]``, True = counted, so that padding stays out of its statistics.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jkd.errors import InputError
from jkd.types import Array, Tree

Shape = tuple[int, ...]
LAYOUT = ("NHWC", "HWIO", "NHWC")

# kaiming_normal_(mode="fan_out"), as OFD and ReviewKD start their 1x1 convolutions
he_fan_out = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Projector(Protocol):
    """Maps a feature of one side into the form of the other's; its parameters are trained with the student's."""

    @property
    def couples_batch(self) -> bool:
        """Whether a row's image depends on the other rows; it then is told which of them count."""
        ...

    def init(self, key: Array, student_shape: Shape, teacher_shape: Shape) -> Tree: ...

    # with ``where=`` too where couples_batch is True
    def __call__(self, params: Tree, features: Array) -> Array: ...


def project(projector: Projector | None, params: Tree, features: Array, kept: Array) -> Array:
    """The features as the projector maps them (None: as they are); ``kept`` ``[batch]``, True = counted."""
    if projector is None:
        return features
    if projector.couples_batch:
        return projector(params, features, where=kept)  # type: ignore[call-arg]
    return projector(params, features)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear map of the last axis (a 1x1 convolution on maps): ``[..., student dim] -> [..., teacher dim]``.

    Args:
        bias: add a bias.
    """

    bias: bool = True
    couples_batch: bool = dataclasses.field(default=False, init=False)

    def init(self, key: Array, student_shape: Shape, teacher_shape: Shape) -> Tree:
        """LeCun-normal kernel ``[student dim, teacher dim]``, zero bias."""
        kernel = jax.nn.initializers.lecun_normal()(key, (student_shape[-1], teacher_shape[-1]))
        return {"kernel": kernel} | ({"bias": jnp.zeros(teacher_shape[-1])} if self.bias else {})

    def __call__(self, params: Tree, features: Array) -> Array:
        projected = features @ params["kernel"].astype(features.dtype)
        return add_bias(projected, params["bias"]) if self.bias else projected


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pointwise:
    """Linear maps of the last axis without bias (1x1 convolutions), ReLU between them; then BatchNorm and ReLU on request.

    Args:
        layers: how many; all but the first keep the teacher's width. VID has 3.
        batch_norm: BatchNorm (batch statistics) at the end.
        relu: ReLU at the very end.
    """

    layers: int = 1
    batch_norm: bool = False
    relu: bool = False

    @property
    def couples_batch(self) -> bool:
        return self.batch_norm

    def init(self, key: Array, student_shape: Shape, teacher_shape: Shape) -> Tree:
        """He-normal kernels ``[from, teacher dim]`` (by the outputs), unit scale."""
        widths = (student_shape[-1], *(teacher_shape[-1],) * self.layers)
        params: dict[str, Tree] = {
            str(i): {"kernel": he_fan_out(jax.random.fold_in(key, i), pair)}
            for i, pair in enumerate(zip(widths[:-1], widths[1:], strict=True))
        }
        return params | ({"norm": norm_init(teacher_shape[-1])} if self.batch_norm else {})

    def __call__(self, params: Tree, features: Array, *, where: Array | None = None) -> Array:
        for i in range(self.layers):
            features = jax.nn.relu(features) if i else features
            features = features @ params[str(i)]["kernel"].astype(features.dtype)
        features = batch_norm(params["norm"], features, where) if self.batch_norm else features
        return jax.nn.relu(features) if self.relu else features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regressor:
    """FitNets' regressor as the CIFAR benchmark builds it: convolution, BatchNorm, ReLU; ``[batch, height, width, channels]``.

    The convolution follows from the two sizes: 3x3 with stride 2 where the student's map is twice as large, transposed 4x4 with
    stride 2 where it is half as large, else valid with kernel ``1 + student - teacher``.

    Args:
        batch_norm: BatchNorm (batch statistics) after the convolution; without it examples stay independent, and there is no ReLU.
        relu: ReLU after BatchNorm. AB, which reads features before their activation, has none.
        keep_equal: pass features on as they are where both sides already have one shape (AB).
    """

    batch_norm: bool = True
    relu: bool = True
    keep_equal: bool = False

    @property
    def couples_batch(self) -> bool:
        return self.batch_norm

    def init(self, key: Array, student_shape: Shape, teacher_shape: Shape) -> Tree:
        """He-normal kernel ``[height, width, student channels, teacher channels]``, zero bias, unit scale.

        Raises:
            InputError: the maps are not ``[batch, height, width, channels]``, or the teacher's is larger and not twice as large.
        """
        if len(student_shape) != 4 or len(teacher_shape) != 4:
            raise InputError(f"Regressor: needs feature maps, got {student_shape} and {teacher_shape}; use projectors.Linear()")
        if self.keep_equal and student_shape[1:] == teacher_shape[1:]:
            return {}
        mine, theirs = student_shape[1], teacher_shape[1]
        if mine == 2 * theirs:
            kind, size = "halve", 3
        elif theirs == 2 * mine:
            kind, size = "double", 4
        elif mine >= theirs:
            kind, size = "valid", 1 + mine - theirs
        else:
            raise InputError(f"Regressor: cannot grow a map of {mine} to {theirs} (only to twice its size)")
        channels = (student_shape[-1], teacher_shape[-1])
        kernel = jax.nn.initializers.he_normal()(key, (size, size, *channels))
        # the kernel's name says which convolution it is for: its size alone does not
        params = {kind: kernel, "bias": jnp.zeros(channels[1])}
        return params | (norm_init(channels[1]) if self.batch_norm else {})

    def __call__(self, params: Tree, features: Array, *, where: Array | None = None) -> Array:
        if not params:
            return features
        kind = next(name for name in ("halve", "double", "valid") if name in params)
        kernel = params[kind].astype(features.dtype)
        if kind == "halve":
            mapped = jax.lax.conv_general_dilated(features, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=LAYOUT)
        elif kind == "double":
            mapped = jax.lax.conv_transpose(features, kernel, (2, 2), "SAME", dimension_numbers=LAYOUT)
        else:
            mapped = jax.lax.conv_general_dilated(features, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)
        mapped = add_bias(mapped, params["bias"])
        if not self.batch_norm:
            return mapped
        normal = batch_norm(params, mapped, where)
        return jax.nn.relu(normal) if self.relu else normal


def conv(features: Array, kernel: Array) -> Array:
    """A convolution that keeps height and width: ``[batch, height, width, channels]``, kernel ``[k, k, from, to]`` with odd k."""
    return jax.lax.conv_general_dilated(features, kernel.astype(features.dtype), (1, 1), "SAME", dimension_numbers=LAYOUT)


def norm_init(channels: int) -> dict[str, Array]:
    """Parameters of `batch_norm`."""
    return {"scale": jnp.ones(channels), "shift": jnp.zeros(channels)}


def batch_norm(params: Tree, features: Array, where: Array | None = None) -> Array:
    """BatchNorm of the last axis in training: this batch's statistics, in float32, over all other axes (eps 1e-5).

    Args:
        params: ``scale`` and ``shift``.
        features: ``[batch, ..., channels]``.
        where: ``[batch]``, True = counted in the statistics.
    """
    wide = features.astype(jnp.float32)
    return normalised(params, wide, *moments(wide, where)).astype(features.dtype)


def moments(features: Array, where: Array | None) -> tuple[Array, Array]:
    """Mean and (biased) variance of each channel over the counted examples and all positions, ``[1, ..., channels]``."""
    axes = tuple(range(features.ndim - 1))
    if where is None:
        mean = features.mean(axes, keepdims=True)
        return mean, jnp.square(features - mean).mean(axes, keepdims=True)
    kept = where.astype(features.dtype).reshape(-1, *(1,) * (features.ndim - 1))
    size = features.size // features.shape[0] // features.shape[-1]
    count = jnp.maximum(kept.sum(), 1) * size
    mean = jnp.where(kept == 0, 0, features).sum(axes, keepdims=True) / count
    return mean, jnp.where(kept == 0, 0, jnp.square(features - mean)).sum(axes, keepdims=True) / count


def normalised(params: Tree, features: Array, mean: Array, variance: Array) -> Array:
    """``scale * (features - mean) / sqrt(variance + 1e-5) + shift``; mean and variance of the features' rank."""
    scale, shift = (params[name].reshape((1,) * (features.ndim - 1) + (-1,)) for name in ("scale", "shift"))
    return (features - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + shift


def add_bias(features: Array, bias: Array) -> Array:
    """``features + bias`` on the last axis, in the features' dtype, with the broadcast written out."""
    return features + bias.astype(features.dtype).reshape((1,) * (features.ndim - 1) + (-1,))
