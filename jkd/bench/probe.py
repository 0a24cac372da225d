"""What this machine reaches on the spot: arithmetic in a matmul, and bytes in a copy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def flops_per_s(device: Any, dtype: str) -> float:
    """The most FLOPs a second that a square matmul of this dtype reached on a device, at JAX's default precision."""
    size = 1024 if device.platform == "cpu" else 8192
    a = jax.device_put(jnp.ones((size, size), dtype), device)
    return 2 * size**3 / _quickest(jax.jit(lambda a: a @ a), a)


def bytes_per_s(device: Any) -> float:
    """The most bytes a second that a device read and wrote while it added a number to an array larger than its caches."""
    size = 2**26 if device.platform == "cpu" else 2**30
    a = jax.device_put(jnp.zeros(size // 4, jnp.float32), device)
    return 2 * size / _quickest(jax.jit(lambda a: a + 1), a)


def _quickest(function: Callable[[Any], Any], argument: Any, repeats: int = 8) -> float:
    jax.block_until_ready(function(argument))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(argument))
        times.append(time.perf_counter() - start)
    return min(times)
