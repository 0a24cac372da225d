"""Which devices a command runs on, and whether it is one process of several. Only the command line calls this."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jkd.errors import InputError

INSTALL = {"gpu": "pip install 'jkd[cuda13]' (or 'jkd[cuda12]' for an older driver)", "tpu": "pip install 'jkd[tpu]'"}
_GOOGLE = "0x1ae0"
# Seconds without a sign of a process after which it counts as dead. Collectives fail at once when a peer dies; who waits for it at a
# barrier (at the end of a save) learns it this way alone, and JAX's own 100 s would keep a pod idle.
_SILENCE = 20
joining = False
"""Whether this process looks for the others; it stays true where a signal ended the search."""


def start(device: str | None, environment: Mapping[str, str] = os.environ) -> None:
    """Chooses the platform and joins the other processes; call it before anything touches a device.

    Args:
        device: ``cpu``, ``gpu``, ``tpu``, or None for the best that is there.
        environment: where a launcher leaves its marks.

    Raises:
        InputError: a launcher is there and the processes cannot find each other.
    """
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    launcher = launched_by(environment)
    if launcher is None:
        return
    # Ignored where the backend is not the CPU; there it must be set before the backend starts.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit: dict[str, Any] = {
        name: int(environment[key])
        for name, key in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID"))
        if key in environment
    }
    try:
        address = environment.get("JAX_COORDINATOR_ADDRESS")
        _join(coordinator_address=address, heartbeat_timeout_seconds=_SILENCE, **explicit)
    except (ValueError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"started by {launcher}, but the processes did not find each other: {first}; for one process alone start jkd outside it"
        ) from error


def _join(**options: Any) -> None:
    """`jax.distributed.initialize` on a thread: it waits for minutes outside Python, and only a main thread in Python hears signals."""
    import jax

    global joining
    wrong: list[BaseException] = []

    def join() -> None:
        try:
            jax.distributed.initialize(**options)
        except BaseException as error:
            wrong.append(error)

    joining = True
    thread = threading.Thread(target=join, name="jax.distributed", daemon=True)
    thread.start()
    thread.join()
    joining = False
    if wrong:
        raise wrong[0]


def launched_by(environment: Mapping[str, str]) -> str | None:
    """The launcher that started this process as one of several; None for a process on its own.

    ``JAX_COORDINATOR_ADDRESS`` (with ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``) says so by hand.
    """

    def several(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    if environment.get("JAX_COORDINATOR_ADDRESS"):
        return "JAX_COORDINATOR_ADDRESS"
    # Inside salloc or a batch script, SLURM_NTASKS is the job's; only srun makes several processes and names their nodes.
    if several("SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment:
        return "srun"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "mpirun"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "," in environment.get("TPU_PROCESS_ADDRESSES", ""):
        return "a TPU pod"
    return None


def check(device: str | None, environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> None:
    """Refuses to run on another device than was asked for, or on the CPU beside an accelerator that nobody declined.

    Raises:
        InputError: with the install command that is missing.
    """
    import jax

    found = jax.default_backend()
    if device is not None:
        if found != device:
            fix = INSTALL.get(device, "start a new process")
            raise InputError(f"--device {device}: jax finds no {device.upper()}, its backend is {found}; {fix}")
        return
    meant = "cpu" in environment.get("JAX_PLATFORMS", "").split(",")
    idle = visible(root) if found == "cpu" and not meant else None
    if idle is not None:
        kind, file = idle
        raise InputError(
            f"jax runs on the CPU, though {file} says that a {kind.upper()} is here: {INSTALL[kind]}, or --device cpu to mean it"
        )


def visible(root: Path = Path("/")) -> tuple[str, str] | None:
    """``("gpu" or "tpu", the file that shows it)`` for an accelerator of this machine, whatever jax can use; else None."""
    devices = root / "dev"
    names = sorted(each.name for each in devices.iterdir()) if devices.is_dir() else []
    for pattern, kind in ((r"nvidia\d+", "gpu"), (r"accel\d+", "tpu")):
        for name in names:
            if re.fullmatch(pattern, name):
                return kind, f"/dev/{name}"
    groups = sorted((devices / "vfio").glob("[0-9]*"))
    # vfio hands any PCI device to user space: only Google's count, and of those not network (02) and storage (01).
    for vendor in sorted((root / "sys/bus/pci/devices").glob("*/vendor")) if groups else []:
        kind = vendor.with_name("class").read_text().strip()
        if vendor.read_text().strip() == _GOOGLE and kind[:4] not in ("0x01", "0x02"):
            return "tpu", f"/dev/vfio/{groups[0].name}"
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room for an array or a program."""
    return type(error).__name__ in ("XlaRuntimeError", "JaxRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)


def asked_for(error: BaseException) -> str:
    """How much memory the allocation that failed wanted, as the runtime says it; empty where it does not."""
    found = re.search(r"(?:allocat\w*|of) (\d[\d.]* ?(?:bytes|[KMGT]i?B?))", str(error))
    return found[1] if found else ""
