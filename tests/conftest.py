"""Every test runs on 8 fake CPU devices, with silent rank promotion an error."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # the command line would keep programs in the user's home
# Nearly all of the suite's time is the CPU compiler making programs that run once: LLVM does not optimise them, and the plain
# emitters compile in a third of the time of the new ones (jaxlib 0.11 has no others). XLA's own passes (sharding, fusion, donation)
# stay as they are; what is run for real, in processes of its own, is optimised as for users.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    # eight devices share what cores there are: on a busy machine one may arrive at a collective late, and XLA would abort
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import jax  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

# Signatures in jkd.losses and jkd.targets are jaxtyping annotations, which only tests evaluate: each call's shapes and dtypes
# are checked by beartype. The hook must be in place before the first import of either package.
from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["jkd.losses", "jkd.targets"], "beartype.beartype")

import gc  # noqa: E402
import itertools  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

# Tracing makes millions of objects that live on: looking through all of them for cycles at Python's own pace costs a few per cent.
gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 50)

MAPS = Path("/proc/self/maps")
_TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _room_for_programs():
    """Drops compiled programs before the process runs out of memory maps.

    Every program that XLA compiles for the CPU takes about ten; Linux gives a process 65,530, and LLVM crashes past them.
    """
    yield
    if next(_TESTS) % 20 == 0 and MAPS.exists():
        with MAPS.open("rb") as maps:
            crowded = sum(1 for _ in maps) > 30_000
        if crowded:
            jax.clear_caches()
            gc.collect()
