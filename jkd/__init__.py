"""jkd: knowledge distillation for JAX and Flax.

Submodules load on first use, so that ``from jkd import losses`` needs jax and numpy alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jkd import losses as losses
    from jkd import targets as targets

_SUBMODULES = {"losses", "targets", "models", "data", "recipes", "optim", "schedules", "cache"}


def __getattr__(name: str):
    if name in _SUBMODULES:
        return importlib.import_module(f"jkd.{name}")
    raise AttributeError(f"module 'jkd' has no attribute {name!r}")
