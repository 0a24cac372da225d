"""Convolutions of images whose kernels' gradients are fast on CPUs too; a network takes them as ``nnx.Conv(conv_general_dilated=…)``.

XLA's CPU compiler makes one convolution of the gradient with respect to a kernel, whose window is the whole output: it reads the
batch across all its strides. Here that gradient is a sum of matrix products, one for a few rows of the output: the patches that
those rows saw, laid out side by side while they are in the cache, times the rows' gradient.
docs/benchmarks.md has whole steps beside PyTorch's.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array
Pads = tuple[tuple[int, int], ...]

_LAYOUT = ("NHWC", "HWIO", "NHWC")
_ROWS = 2048  # of a matrix product: enough to fill it, and few enough patches to stay in a core's cache
_WINDOW = 49  # pixels of the largest kernel whose patches are written out, 7x7


def convolution(
    x: Array,
    kernel: Array,
    strides: tuple[int, ...],
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    **more: Any,
) -> Array:
    """`jax.lax.conv_general_dilated`: the same values, and on one CPU device the same gradients by another way.

    That way is taken for images ``[batch, height, width, channels]`` without groups, dilation or a precision of one's own, and
    kernels up to 7x7; it can be differentiated again, backwards (a custom derivative has no forward mode). All else is XLA's: so is
    every gradient on accelerators, and on several CPU devices, which would add up their sums after each product.

    Args:
        x: ``[batch, height, width, channels]``, or any other layout that ``dimension_numbers`` tells.
        kernel: ``[height, width, channels, outputs]``.
        strides: along height and width.
        padding: ``"SAME"``, ``"VALID"``, or pixels before and after for height and width.
        lhs_dilation: as there, and so on.
    """
    numbers = lax.conv_dimension_numbers(x.shape, kernel.shape, dimension_numbers)
    window = kernel.shape[:2]
    plain = (
        x.ndim == 4
        and x.dtype == kernel.dtype
        and numbers == lax.conv_dimension_numbers(x.shape, kernel.shape, _LAYOUT)
        and math.prod(window) <= _WINDOW
        and all(size == 1 for size in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and all(value in (None, 1) for value in more.values())  # groups, precision, dtype and sharding of the answer
    )
    if not plain or jax.default_backend() != "cpu" or jax.device_count() > 1:
        dilations = {"lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation}
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dimension_numbers, **dilations, **more)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], window, strides, padding)
    return _convolution(x, kernel, tuple(strides), tuple((before, after) for before, after in padding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolution(x: Array, kernel: Array, strides: tuple[int, ...], pads: Pads) -> Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_LAYOUT)


def _forward(x: Array, kernel: Array, strides: tuple[int, ...], pads: Pads) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(x, kernel, strides, pads), (x, kernel)


def _backward(strides: tuple[int, ...], pads: Pads, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = kept
    plain = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=pads, dimension_numbers=_LAYOUT)
    (of_x,) = jax.linear_transpose(lambda x: plain(x, kernel), x)(gradient)

    def default(x: Array, gradient: Array) -> Array:
        return jax.linear_transpose(lambda kernel: plain(x, kernel), kernel)(gradient)[0]

    def rows(x: Array, gradient: Array) -> Array:
        return kernel_gradient(x, gradient, kernel.shape[:2], strides, pads)

    return of_x, lax.platform_dependent(x, gradient, cpu=rows, default=default)


_convolution.defvjp(_forward, _backward)


def kernel_gradient(x: Array, gradient: Array, window: tuple[int, ...], strides: tuple[int, ...], pads: Pads) -> Array:
    """Of a convolution with respect to its kernel, by matrix products.

    ``d kernel[i, j, c, k] = sum over n, h, w of x[n, h s + i - pad, w s + j - pad, c] · gradient[n, h, w, k]``, the sum over ``h``
    in turns of a few rows. Sums are float32 at least.

    Args:
        x: the convolution's input, ``[batch, height, width, channels]``.
        gradient: with respect to its output, ``[batch, rows, columns, outputs]``.
        window: height and width of the kernel.
        strides: along height and width.
        pads: pixels before and after.

    Returns:
        ``[*window, channels, outputs]``.
    """
    batch, height, width, outputs = gradient.shape
    turn = max(size for size in range(1, height + 1) if height % size == 0 and (size == 1 or batch * width * size <= _ROWS))
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((before, after, 0) for before, after in pads), (0, 0, 0)))
    (down, across), length = strides, window[0] * window[1] * x.shape[-1]
    sums = jnp.promote_types(x.dtype, jnp.float32)

    def add(total: Array, row: Array) -> tuple[Array, None]:
        strip = lax.dynamic_slice_in_dim(x, row * down, (turn - 1) * down + window[0], axis=1)
        patches = jnp.concatenate(
            [
                strip[:, i : i + (turn - 1) * down + 1 : down, j : j + (width - 1) * across + 1 : across]
                for i in range(window[0])
                for j in range(window[1])
            ],
            axis=-1,
        )
        part = lax.dynamic_slice_in_dim(gradient, row, turn, axis=1)
        # The gradient comes first: outputs are fewer than a patch is long, and the CPU's product is twice as fast this way round.
        product = lax.dot_general(
            part.reshape(-1, outputs), patches.reshape(-1, length), (((0,), (0,)), ((), ())), preferred_element_type=sums
        )
        return total + product, None

    total, _ = lax.scan(add, jnp.zeros((outputs, length), sums), jnp.arange(0, height, turn))
    return total.T.reshape(*window, -1, outputs).astype(x.dtype)
