"""Convolutions whose kernel's gradient is a sum of matrix products: against XLA's own, and where they step aside."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import hlo
from jkd.models import convolution
from jkd.models.convolution import _convolution, kernel_gradient

LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES = [  # image, window, strides, pads
    ((6, 5), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((7, 8), (3, 3), (2, 2), ((1, 1), (1, 1))),
    ((8, 6), (3, 2), (2, 1), ((0, 1), (2, 0))),
    ((5, 5), (1, 1), (2, 2), ((0, 0), (0, 0))),
]


def draw(*shapes, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("limit", [1, 2048], ids=["row by row", "all rows"])
def test_the_gradient_is_xlas(limit, monkeypatch):
    monkeypatch.setattr(convolution, "_ROWS", limit)

    @jax.jit
    def both(inputs):
        found = []
        for (_, window, strides, pads), (x, kernel) in zip(CASES, inputs, strict=True):
            plain = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=pads, dimension_numbers=LAYOUT)
            out, back = jax.vjp(plain, x, kernel)
            gradient = jnp.sin(out)
            ours = kernel_gradient(x, gradient, window, strides, pads)
            found.append((ours, back(gradient)[1]))
        return found

    inputs = [draw((4, *image, 3), (*window, 3, 5)) for image, window, _, _ in CASES]
    for ours, expected in both(inputs):
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-5)  # sums of up to 120 products in another order


def test_both_gradients_and_those_of_gradients_go_through_the_custom_derivative():
    x, kernel = draw((4, 6, 6, 3), (3, 3, 3, 5))
    pads = ((1, 1), (1, 1))

    def penalty(conv, x, kernel):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(conv(x, kernel)))

        of_x, of_kernel = jax.grad(loss, (0, 1))(x, kernel)
        return jnp.sum(of_x**2) + jnp.sum(of_kernel**2)

    def plain(x, kernel):
        return lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=LAYOUT)

    def ours(x, kernel):
        return _convolution(x, kernel, (1, 1), pads)

    @jax.jit
    def both(x, kernel):
        return [jax.value_and_grad(functools.partial(penalty, conv), (0, 1))(x, kernel) for conv in (ours, plain)]

    found, expected = both(x, kernel)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * float(jnp.abs(other).max()))


def test_sums_over_a_bfloat16_batch_are_float32():
    x, gradient = draw((64, 8, 8, 1), (64, 8, 8, 1), dtype=jnp.bfloat16)
    found = jax.jit(lambda *arrays: kernel_gradient(*arrays, (1, 1), (1, 1), ((0, 0), (0, 0))))(x, gradient)
    exact = np.sum(np.asarray(x, np.float64) * np.asarray(gradient, np.float64))
    assert found.dtype == jnp.bfloat16
    assert float(found[0, 0, 0, 0]) == pytest.approx(exact, rel=2**-8)  # rounded once


def test_a_sharded_batch_is_not_gathered():
    mesh = Mesh(np.array(jax.devices()), ("data",))
    split = NamedSharding(mesh, P("data"))
    x, gradient = (jax.ShapeDtypeStruct((16, 8, 8, 4), jnp.float32, sharding=split) for _ in range(2))
    program = jax.jit(lambda *arrays: kernel_gradient(*arrays, (3, 3), (1, 1), ((1, 1), (1, 1)))).lower(x, gradient).compile()
    assert {each.kind for each in hlo.collectives(program.as_text())} == {"all-reduce"}


ONE_DEVICE = """
import jax, jax.numpy as jnp
from jkd.models.convolution import convolution

def text(platform, **changes):
    x, kernel = jnp.ones((2, 4, 4, 2)), jnp.ones((3, 3, 2 // changes.get("feature_group_count", 1), 2))
    def loss(kernel):
        return jnp.sum(convolution(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **changes) ** 2)
    return jax.jit(jax.grad(loss)).trace(kernel).lower(lowering_platforms=(platform,)).as_text()

print(*["while" in each for each in (text("cpu"), text("cuda"), text("tpu"), text("cpu", feature_group_count=2))])
"""


def test_it_is_the_default_of_one_cpu_device_and_of_nothing_else():
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", ONE_DEVICE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False"]
