"""The devices of a machine that is not here: what `jkd plan` compiles for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import Any

from jkd import chips, gpus
from jkd.errors import InputError, MissingExtra, nearest

_FORMS = "v5e:16x16 (v5p, v6e), gpu:h100x8 (a100, h200, b200) or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Args:
        name: as it was written.
        chip: what one of them is; None for the CPU, of which nothing is claimed.
        devices: as many as there are chips.
        exact: whether what is compiled for them is what will run; for GPUs, whose compiler chooses kernels by trying them, it is not.
        note: how it is compiled instead; empty where it is exact.
        options: of the compiler.
        instead: devices to compile for where the compiler cannot do without a real one.
    """

    name: str
    chip: chips.Chip | None
    devices: list[Any]
    exact: bool
    note: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    instead: list[Any] = dataclasses.field(default_factory=list)


_BY_CPU = "compiled for as many CPU devices: what the compiler decides is an estimate"
_UNTRIED = "compiled for GPUs that are not here: kernels are chosen without trying them, an estimate"


def by_cpu(topology: Topology, why: str) -> Topology:
    """The same, compiled for the CPU devices that are kept for this."""
    note = f"{_BY_CPU} (the GPU's compiler says: {why})"
    return dataclasses.replace(topology, devices=topology.instead, note=note, options={}, instead=[])


def of(name: str) -> Topology:
    """The devices that a name stands for: ``v5e:16x16``, ``gpu:h100x8``, ``cpu:8``.

    Call it before anything touches a device: from then on jax runs on the CPU of this machine, with as many devices as are wanted.

    Raises:
        InputError: no such chip, or a shape that the platform does not have.
        MissingExtra: a TPU is asked for and its compiler is not installed.
    """
    kind, colon, shape = name.partition(":")
    wrong = InputError(f"--topology {name}: give {_FORMS}{nearest(kind, ('cpu', 'gpu', *_tpus()))}")
    if kind == "cpu":
        if not shape.isdigit() or int(shape) < 1:
            raise wrong
        return Topology(name, None, _cpus(int(shape)), True)
    if kind == "gpu":
        if not (found := re.fullmatch(r"(.+)x([1-9]\d*)", shape)):
            raise wrong
        chip, count = _chip(found[1], "gpu"), int(found[2])
        cpus = _cpus(count)
        if there := gpus.devices(name, chip, count):
            return Topology(name, chip, there, False, _UNTRIED, gpus.OPTIONS, cpus)
        return Topology(name, chip, cpus, False, _BY_CPU)
    if kind not in _tpus() or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise wrong
    return Topology(name, _chip(kind, "tpu"), _tpu(name), True)


def _tpus() -> list[str]:
    return [chip.name for chip in chips.CHIPS.values() if chip.platform == "tpu"]


def _chip(name: str, platform: str) -> chips.Chip:
    if (chip := chips.find(name)).platform != platform:
        raise InputError(f"{name} is no {platform.upper()}; give {_FORMS}")
    return chip


def _cpus(count: int) -> list[Any]:
    import jax

    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # jax has begun already, with as many as it has
            jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_platforms", "cpu")
    found = jax.devices("cpu")
    if len(found) < count:
        raise InputError(
            f"{count} devices are wanted and jax has begun with {len(found)}; start a new process without XLA_FLAGS"
        )
    return found[:count]


def _tpu(name: str) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtra(f"--topology {name} needs the TPU's compiler (not a TPU): pip install 'jkd[tpu]'")
    # There is no TPU here to ask, nor a metadata server that knows of one, nor anything to be had by one process alone.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # of a host that is not asked for anything; else it complains
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    import jax
    from jax.experimental import topologies

    jax.config.update("jax_platforms", "cpu")
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # jax.errors.JaxRuntimeError; other versions raise others
        line = (str(error).splitlines() or [""])[0]
        raise InputError(f"--topology {name}: the TPU compiler knows no such slice ({line})") from error
