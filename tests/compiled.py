"""A package's functions under jit. Outside of it JAX compiles every operation by itself, which takes ten times as long."""

from __future__ import annotations

import functools

import jax
import numpy as np


@functools.cache
def _program(function, settings):
    return jax.jit(functools.partial(function, **dict(settings)))


def compiled(function):
    """The function under jit; keywords that are no arrays (numbers, texts, None) stay what they are."""

    @functools.wraps(function)
    def call(*arrays, **keywords):
        traced = {name: value for name, value in keywords.items() if isinstance(value, (jax.Array, np.ndarray))}
        settings = tuple((name, value) for name, value in keywords.items() if name not in traced)
        return _program(function, settings)(*arrays, **traced)

    return call


class Compiled:
    """``Compiled(losses).forward_kl`` is `compiled` ``losses.forward_kl``."""

    def __init__(self, package):
        self._package = package

    def __getattr__(self, name):
        return compiled(getattr(self._package, name))


def grad(function):
    """`jax.grad` with respect to the first argument, as one program."""
    return jax.jit(jax.grad(function))


def value_and_grad(function):
    return jax.jit(jax.value_and_grad(function))
