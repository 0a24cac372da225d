"""GPUs that are not here, as XLA's compiler for NVIDIA wants them described.

A description says how many cores and how much fast memory a program may count on. The numbers are NVIDIA's, of the tuning guides for
Ampere, Hopper and Blackwell (https://docs.nvidia.com/cuda/) and of what the driver says of such a chip; clocks are the boost clocks.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from jkd.chips import Chip

PLUGINS = ("xla_cuda12", "xla_cuda13")
# Triton's tiles are chosen by trying them, and it refuses products that the first guess does not fit; cuBLAS takes all.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cores:
    """What `jkd.chips` does not say of a GPU.

    Args:
        capability: CUDA's compute capability.
        count: streaming multiprocessors.
        fp32: units for float32 in each.
        shared: bytes of fast memory in each; a program's block may have 1 KiB less.
        l2: bytes of the cache that all share.
        ghz: boost clock.
    """

    capability: tuple[int, int]
    count: int
    fp32: int
    shared: int
    l2: int
    ghz: float


_AMPERE = Cores(capability=(8, 0), count=108, fp32=64, shared=164 << 10, l2=40 << 20, ghz=1.41)
_HOPPER = Cores(capability=(9, 0), count=132, fp32=128, shared=228 << 10, l2=50 << 20, ghz=1.98)
CORES = {
    "a100": _AMPERE,
    "a100-40gb": _AMPERE,
    "h100": _HOPPER,
    "h200": _HOPPER,
    "b200": Cores(capability=(10, 0), count=148, fp32=128, shared=228 << 10, l2=126 << 20, ghz=1.965),
}


def devices(name: str, chip: Chip, count: int) -> list[Any]:
    """So many of these GPUs on one host, to compile for; none where JAX's CUDA plugin is not installed, or does not take them."""
    if importlib.util.find_spec("jax_plugins") is None:
        return []
    if not any(importlib.util.find_spec(f"jax_plugins.{plugin}") for plugin in PLUGINS):
        return []
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(
            platform="cuda", topology_name=name, target_config=description(chip), topology=f"1x1x{count}"
        )
    except Exception:  # of a plugin that is made for another jax, or of libraries that it misses
        return []
    return list(found.devices)


def description(chip: Chip) -> str:
    """XLA's ``GpuTargetConfigProto`` as text."""
    cores = CORES[chip.name]
    major, minor = cores.capability
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  core_count: {cores.count}
  fpus_per_core: {cores.fp32}
  clock_rate_ghz: {cores.ghz}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_block: {48 << 10}
  shared_memory_per_block_optin: {cores.shared - 1024}
  shared_memory_per_core: {cores.shared}
  l2_cache_size: {cores.l2}
  memory_bandwidth: {int(chip.memory_bandwidth)}
  device_memory_size: {int(chip.memory)}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{chip.kinds[0]}"
"""
