"""What this machine reaches on the spot: arithmetic in a matmul, and bytes in passes over an array."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def flops_per_s(device: Any, dtype: str) -> float:
    """The most FLOPs a second that a square matmul of this dtype reached on a device, at JAX's default precision."""
    size = 1024 if device.platform == "cpu" else 8192
    a = jnp.ones((size, size), dtype, device=device)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / _quickest(lambda: product(a))


def bytes_per_s(device: Any) -> float:
    """The most bytes a second that a device read and wrote while it added a number to an array larger than its caches.

    The array is donated and goes on from pass to pass: one that is new at each would have its pages made by the operating system
    within the time.
    """
    size = 2**29 if device.platform == "cpu" else 2**30
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    a = jnp.zeros(size // 4, jnp.float32, device=device)

    def step() -> Any:
        nonlocal a
        a = add(a)
        return a

    return 2 * size / _quickest(step)


def _quickest(step: Callable[[], Any], repeats: int = 8) -> float:
    jax.block_until_ready(step())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - start)
    return min(times)
