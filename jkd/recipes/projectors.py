"""Learned maps from a student's features to the shape of the teacher's.

A projector is a frozen dataclass: ``init(key, student_shape, teacher_shape) -> params`` and ``projector(params, features)``. Its
parameters are float32; it computes in the features' dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jkd.errors import InputError
from jkd.types import Array, Tree

Shape = tuple[int, ...]


class Projector(Protocol):
    @property
    def couples_batch(self) -> bool: ...

    def init(self, key: Array, student_shape: Shape, teacher_shape: Shape) -> Tree: ...

    def __call__(self, params: Tree, features: Array) -> Array: ...


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
class Regressor:
    """FitNets' regressor as the CIFAR benchmark builds it: convolution, BatchNorm, ReLU; ``[batch, height, width, channels]``.

    The convolution follows from the two sizes: 3x3 with stride 2 where the student's map is twice as large, transposed 4x4 with
    stride 2 where it is half as large, else valid with kernel ``1 + student - teacher``.

    Args:
        batch_norm: BatchNorm (batch statistics) and ReLU after the convolution; without it examples stay independent.
    """

    batch_norm: bool = True

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
        if self.batch_norm:
            params |= {"scale": jnp.ones(channels[1]), "shift": jnp.zeros(channels[1])}
        return params

    def __call__(self, params: Tree, features: Array) -> Array:
        kind = next(name for name in ("halve", "double", "valid") if name in params)
        kernel, layout = params[kind].astype(features.dtype), ("NHWC", "HWIO", "NHWC")
        if kind == "halve":
            mapped = jax.lax.conv_general_dilated(features, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)
        elif kind == "double":
            mapped = jax.lax.conv_transpose(features, kernel, (2, 2), "SAME", dimension_numbers=layout)
        else:
            mapped = jax.lax.conv_general_dilated(features, kernel, (1, 1), "VALID", dimension_numbers=layout)
        mapped = add_bias(mapped, params["bias"])
        if not self.batch_norm:
            return mapped
        # statistics in float32, over examples and space, as BatchNorm in training (eps of the original)
        wide = mapped.astype(jnp.float32)
        mean = wide.mean((0, 1, 2), keepdims=True)
        variance = jnp.square(wide - mean).mean((0, 1, 2), keepdims=True)
        scale, shift = (params[name].reshape(1, 1, 1, -1) for name in ("scale", "shift"))
        normal = (wide - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + shift
        return jax.nn.relu(normal).astype(features.dtype)


def add_bias(features: Array, bias: Array) -> Array:
    """``features + bias`` on the last axis, in the features' dtype, with the broadcast written out."""
    return features + bias.astype(features.dtype).reshape((1,) * (features.ndim - 1) + (-1,))
