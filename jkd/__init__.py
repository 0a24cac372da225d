"""jkd: knowledge distillation for JAX and Flax.

Everything loads on first use, so that ``from jkd import losses`` needs jax and numpy alone.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jkd import cache as cache
    from jkd import data as data
    from jkd import losses as losses
    from jkd import models as models
    from jkd import optim as optim
    from jkd import recipes as recipes
    from jkd import schedules as schedules
    from jkd import targets as targets
    from jkd.config import Ema as Ema
    from jkd.config import Ensemble as Ensemble
    from jkd.config import Experiment as Experiment
    from jkd.config import Run as Run
    from jkd.config import StudentEma as StudentEma
    from jkd.context import Context as Context
    from jkd.errors import InputError as InputError
    from jkd.loop import Failed as Failed
    from jkd.loop import Listener as Listener
    from jkd.loop import Result as Result
    from jkd.loop import Stopped as Stopped
    from jkd.loop import train as train
    from jkd.recipe import Bank as Bank
    from jkd.recipe import Models as Models
    from jkd.recipe import Recipe as Recipe
    from jkd.recipe import Update as Update
    from jkd.recipe import Vars as Vars
    from jkd.recipe import label_weight as label_weight
    from jkd.resolve import make_context as make_context
    from jkd.schedules import Clock as Clock
    from jkd.sharding import MeshShape as MeshShape
    from jkd.sharding import put_batch as put_batch
    from jkd.state import State as State
    from jkd.state import init_state as init_state
    from jkd.step import make_eval_step as make_eval_step
    from jkd.step import make_step as make_step
    from jkd.types import Model as Model
    from jkd.types import Outputs as Outputs
    from jkd.types import Preprocess as Preprocess
    from jkd.types import Term as Term

_NAMES = {
    "config": ("Ema", "Ensemble", "Experiment", "Run", "StudentEma"),
    "context": ("Context",),
    "errors": ("InputError",),
    "recipe": ("Bank", "Models", "Recipe", "Update", "Vars", "label_weight"),
    "resolve": ("make_context",),
    "schedules": ("Clock",),
    "sharding": ("MeshShape", "put_batch"),
    "state": ("State", "init_state"),
    "step": ("make_eval_step", "make_step"),
    "loop": ("Failed", "Listener", "Result", "Stopped", "train"),
    "types": ("Model", "Outputs", "Preprocess", "Term"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("cache", "data", "losses", "models", "optim", "recipes", "schedules", "targets")

__all__ = ["__version__", *sorted(_HOME), *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return _load(_HOME[name], name)
    if name in _MODULES:
        return _load(name)
    for module in ("recipes", "models", "data", "losses"):
        found = sys.modules.get(f"jkd.{module}")
        if found is not None and hasattr(found, name):
            raise AttributeError(f"module 'jkd' has no attribute {name!r}: it is jkd.{module}.{name}")
    raise AttributeError(f"module 'jkd' has no attribute {name!r}")


def _load(module: str, name: str | None = None) -> Any:
    from jkd.errors import MissingExtra

    try:
        loaded = importlib.import_module(f"jkd.{module}")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "jkd":
            raise
        raise MissingExtra(f"jkd.{name or module} needs the package {error.name!r}: pip install 'jkd[train]'") from error
    value = loaded if name is None else getattr(loaded, name)
    globals()[name or module] = value
    return value


def __dir__() -> list[str]:
    return __all__
