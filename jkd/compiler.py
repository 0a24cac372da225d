"""What XLA is told when the engine's own programs are compiled: those that the host calls and that run networks."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
"""XLA's option for what its CPU compiler hands to the library YNNPACK, every dense convolution included unless told otherwise."""
KINDS = "LIBRARY_FUSION_TYPE_REDUCE,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
"""Sums and matrix products, as by default; convolutions are left to Eigen, which is quicker with them (docs/benchmarks.md)."""


def jit(function: Callable[..., Any], mesh: Mesh, **how: Any) -> Any:
    """`jax.jit` for a program of this mesh; a jitted function is compiled anew, from the same trace.

    Such a program can't be called within another one: JAX takes a compiler's options for outermost programs alone.
    """
    told = options(mesh.devices.flat[0].platform)
    return jax.jit(getattr(function, "__wrapped__", function), compiler_options=told, **how)


@functools.cache
def options(kind: str, machine: str = platform.machine()) -> dict[str, str] | None:
    """Of programs for devices of this platform (``cpu``, ``tpu``, …); None where there is nothing to say.

    That is so on other processors than those where it was measured (x86-64), where ``XLA_FLAGS`` has the same option, and where
    this version of XLA does not know it: it is called experimental.
    """
    if kind != "cpu" or machine.lower() not in ("x86_64", "amd64") or LIBRARY in os.environ.get("XLA_FLAGS", ""):
        return None
    said = {LIBRARY: KINDS}
    try:
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            jax.jit(lambda: 0, compiler_options=said).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return said
