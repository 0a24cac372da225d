"""Compiled programs that stay from one command to the next. Only the command line calls this: a library must not set it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZE = 2 * 2**30
"""Bytes that the folder may hold; what was used longest ago goes first."""
WORTH = 0.1
"""Seconds that a program must have taken to be kept: below that, reading it back saves little."""


def start(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Turns JAX's persistent compilation cache on; call it before anything compiles.

    ``JAX_COMPILATION_CACHE_DIR`` says where, else ``$XDG_CACHE_HOME/jkd/xla``, else ``~/.cache/jkd/xla``; every other
    ``JAX_…`` variable of the cache counts as well. Off with ``JAX_ENABLE_COMPILATION_CACHE=false``, or where the folder cannot be
    made or bounded (without the package ``filelock`` JAX cannot). A folder of the user's own is not bounded: others may keep
    programs there. What is worth keeping is the same in both.

    Returns:
        The folder, or None where the cache is off or was set by ``JAX_COMPILATION_CACHE_DIR``.
    """
    import jax

    config: Any = jax.config
    if not config.jax_enable_compilation_cache:
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environment:
        config.update("jax_persistent_cache_min_compile_time_secs", WORTH)
    if config.jax_compilation_cache_dir is not None:
        return None
    if importlib.util.find_spec("filelock") is None:
        return None
    folder = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jkd" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    config.update("jax_compilation_cache_dir", str(folder))
    if "JAX_COMPILATION_CACHE_MAX_SIZE" not in environment:
        config.update("jax_compilation_cache_max_size", SIZE)
    return folder
