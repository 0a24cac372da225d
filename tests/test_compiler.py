"""What XLA's CPU compiler is told, and when it is told nothing."""

import jax
import jax.numpy as jnp
import pytest

from jkd import compiler, sharding

X86 = "x86_64"


@pytest.fixture(autouse=True)
def ask_anew(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    compiler.options.cache_clear()
    yield
    compiler.options.cache_clear()


def test_convolutions_are_left_to_eigen_and_sums_and_products_are_not():
    def program(x, kernel, head):
        maps = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(maps), x.reshape(-1, 64) @ head

    mesh = sharding.MeshShape().build(jax.devices()[:1])
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16, 16, 64), (3, 3, 64, 64), (64, 128))]
    plain, told = (make(program).lower(*shapes).compile().as_text() for make in (jax.jit, lambda f: compiler.jit(f, mesh)))

    def handed_over(text, what):  # what is handed to a library stands in a computation of its own
        return f" {what}(" in text.partition("\nENTRY")[0]

    if compiler.options("cpu") is None or not handed_over(plain, "convolution"):
        pytest.skip("this version of XLA, or this processor, has no such choice")
    assert not handed_over(told, "convolution")
    assert handed_over(told, "dot")


def test_nothing_is_said_elsewhere_or_against_the_users_word(monkeypatch):
    assert compiler.options("tpu", X86) is None
    assert compiler.options("cpu", "aarch64") is None
    monkeypatch.setenv("XLA_FLAGS", f"--{compiler.LIBRARY}=")
    assert compiler.options("cpu", X86) is None


def test_a_version_without_the_option_is_told_nothing(monkeypatch):
    monkeypatch.setattr(compiler, "LIBRARY", "xla_cpu_no_such_option")
    assert compiler.options("cpu", X86) is None


def test_a_jitted_function_is_traced_once():
    traces = []

    @jax.jit
    def function(x):
        traces.append(x)
        return x + 1

    shape = jax.ShapeDtypeStruct((3,), jnp.float32)
    function.eval_shape(shape)
    compiler.jit(function, sharding.MeshShape().build(jax.devices()[:1])).lower(shape)
    assert len(traces) == 1
