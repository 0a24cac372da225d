"""Starts `jkd train tests/programs/pod.py` for real: in one process, or as one of several that find each other over loopback."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
CONFIG = HERE / "programs" / "pod.py"
PATIENCE = 240
"""Seconds for anything to happen; the machine may be busy."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment(*, devices: int = 1, pause: float = 0.0, package: Path = HERE.parent, **more: str) -> dict[str, str]:
    # from the tests' own, which compile quickly, where they are set
    others = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    flags = " ".join([*others, f"--xla_force_host_platform_device_count={devices}"])
    fixed = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "PYTHONPATH": str(package),
        "PAUSE": str(pause),
        "PYTHONFAULTHANDLER": "1",
    }
    return os.environ | fixed | more


def programs(folder: Path) -> dict[str, str]:
    """Where processes that are started one after the other keep what they compile."""
    return {
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(workdir: Path, *arguments: str, **options) -> subprocess.Popen:
    """One process; its output goes to a file, which a kill leaves whole. What one compiles the next finds, as users' commands do."""
    command = [sys.executable, "-m", "jkd", "train", str(CONFIG), "--workdir", str(workdir), *arguments]
    log = Path(f"{workdir}-{time.monotonic_ns()}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            env=environment(**programs(workdir.parent), **options),
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=workdir.parent,
        )
    process.log = log
    return process


def start_pair(workdir: Path, *arguments: str, second: tuple[str, ...] = (), package: Path = HERE.parent, **options):
    """Two processes; ``second`` and ``package`` are the second's alone."""
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    return [
        start(workdir, *arguments, **options, **several, JAX_PROCESS_ID="0"),
        start(workdir, *arguments, *second, package=package, **options, **several, JAX_PROCESS_ID="1"),
    ]


def end(process: subprocess.Popen, *, within: float = PATIENCE) -> str:
    """Waits, kills what does not end, and answers what it said."""
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)  # says where it is
        process.wait()
        raise AssertionError(f"it hung: {process.log.read_text()}") from None
    return process.log.read_text()


def wait(what, *processes: subprocess.Popen, within: float = PATIENCE):
    """The first true answer of ``what()``; fails where one of the processes ends before."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if found := what():
            return found
        for process in processes:
            assert process.poll() is None, f"ended with {process.returncode}: {process.log.read_text()}"
        time.sleep(0.02)
    raise AssertionError("".join(process.log.read_text() for process in processes))


def finished(workdir: Path) -> list[int]:
    """Steps of the finished checkpoints, read without jkd: those with as many manifests as they name."""
    steps = []
    for folder in (workdir / "student" / "checkpoints").glob("*"):
        names = [path.name for path in folder.glob("manifest-*-of-*.json")]
        if names and len(names) == int(names[0].rpartition("-")[2].removesuffix(".json")):
            steps.append(int(folder.name.partition(".")[0]))
    return sorted(steps)


def went_on(said: str) -> int:
    """The step that a run went on after; 0 where it began."""
    found = re.search(r"goes on after step (\d+)", said)
    return int(found[1]) if found else 0
