"""What a resolved config is, as JSON that is the same in every process and on every machine, and eight hex digits of it.

Dataclasses become their class and fields, arrays and weights a checksum of their contents, functions their name. What has no
name to import it by (lambdas, functions inside functions, and all that a config file itself defines) counts by its source and
by the values it closes over, so that an edit of the config is another config.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import math
import re
import types
from collections.abc import Callable, Mapping, Set
from typing import Any

import jax
import numpy as np

from jkd import codehash, trees
from jkd.config import Experiment, Run
from jkd.types import Model

CLASS = "class"
"""Key of a JSON object's class, beside its fields."""
PLACEMENT = ("mesh", "rules", "teacher_rules")
"""Fields of `Run` that say where arrays lie, and nothing of what they are."""


def to_json(value: Experiment | Run | Any) -> Any:
    """Objects, lists, strings, numbers, booleans and None; equal to itself after ``json.dumps`` and ``loads``."""
    return _json(value, ())


def digest(value: Experiment | Run | Any) -> str:
    """The first eight hex digits of the SHA-256 of `to_json`."""
    return codehash.sha(json.dumps(to_json(value), sort_keys=True))


def differences(before: Any, after: Any) -> list[str]:
    """Lines like ``student.steps: 50 -> 60``, one for each value that differs between two `to_json`."""
    return list(_differ(before, after, ""))


def anywhere(value: Any) -> Any:
    """A `to_json` without where its runs keep their arrays: what a run is, whatever devices it goes on with."""
    if isinstance(value, dict):
        placed = PLACEMENT if value.get(CLASS) == codehash.name(Run) else ()
        return {name: anywhere(inner) for name, inner in value.items() if name not in placed}
    return [anywhere(inner) for inner in value] if isinstance(value, list) else value


def _differ(before: Any, after: Any, where: str):
    if isinstance(before, dict) and isinstance(after, dict):
        if before.get(CLASS) != after.get(CLASS):
            yield f"{where}: {_short(before)} -> {_short(after)}"
            return
        for name in [*before, *(name for name in after if name not in before)]:
            inner = f"{where}.{name}" if where else name
            if name not in before or name not in after:
                absent, there = ("absent", _short(after[name])) if name not in before else (_short(before[name]), "absent")
                yield f"{inner}: {absent} -> {there}"
            else:
                yield from _differ(before[name], after[name], inner)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, pair in enumerate(zip(before, after, strict=True)):
            yield from _differ(*pair, f"{where}.{place}")
    elif before != after or type(before) is not type(after):
        yield f"{where}: {_short(before)} -> {_short(after)}"


def _short(value: Any) -> str:
    if isinstance(value, dict) and CLASS in value:
        return str(value[CLASS]).rpartition(":")[2]
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json(value: Any, above: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, (bool, int, str)) and not isinstance(value, enum.Enum):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if id(value) in above:
        return "(itself)"
    inside = functools.partial(_json, above=(*above, id(value)))
    if isinstance(value, Experiment):
        return {name: inside(node) for name, node in value.nodes.items()}
    if isinstance(value, Model):
        return _model(value, inside)
    if isinstance(value, enum.Enum):
        return f"{codehash.name(type(value))}.{value.name}"
    if isinstance(value, np.generic):
        return inside(value.item())
    if isinstance(value, (np.ndarray, jax.Array)):
        return _array(value)
    if isinstance(value, np.dtype):
        return str(value)
    if isinstance(value, jax.P):
        return {CLASS: "PartitionSpec", "axes": [inside(axis) for axis in value]}
    if isinstance(value, Mapping):
        return {_key(key): inside(value[key]) for key in sorted(value, key=_key)}
    if isinstance(value, (list, tuple)):
        return [inside(item) for item in value]
    if isinstance(value, Set):
        return sorted((inside(item) for item in value), key=json.dumps)
    return _named(value, inside)


def _named(value: Any, inside: Callable[[Any], Any]) -> Any:
    """Classes, functions and objects: what has a name, and what it is made of."""
    if isinstance(value, type):
        return {CLASS: codehash.name(value)} | _code(value)
    if isinstance(value, functools.partial):
        return {
            CLASS: "functools:partial",
            "function": inside(value.func),
            "arguments": inside(value.args),
            **inside(value.keywords),
        }
    if isinstance(value, types.MethodType):
        return {CLASS: codehash.name(value.__func__), "self": inside(value.__self__)}
    if isinstance(value, types.FunctionType):
        return _function(value, inside)
    if isinstance(value, types.ModuleType) or hasattr(value, "__qualname__"):
        return {CLASS: getattr(value, "__qualname__", value.__name__)}  # builtins, jitted functions
    kind = {CLASS: codehash.name(type(value))} | _code(type(value))
    if dataclasses.is_dataclass(value):
        return kind | {field.name: inside(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if type(value).__repr__ is not object.__repr__:
        return kind | {"is": re.sub(r" at 0x[0-9a-f]+", "", repr(value))}
    return kind | {name: inside(item) for name, item in sorted(getattr(value, "__dict__", {}).items())}


def _function(function: types.FunctionType, inside: Callable[[Any], Any]) -> Any:
    name = codehash.name(function)
    if not codehash.is_local(function):
        return {CLASS: name}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    closed = {name: inside(cell.cell_contents) for name, cell in cells if not _empty(cell)}
    return {CLASS: name} | _code(function) | ({"closure": closed} if closed else {})


def _empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # the variable is assigned later, or never
        return True
    return False


def _code(thing: Any) -> dict[str, str]:
    return {"code": codehash.code(thing)} if codehash.is_local(thing) else {}


def _model(model: Model, inside: Callable[[Any], Any]) -> Any:
    """A network by its name, its preprocessing and its weights: their contents, or their shapes where they are still to come."""
    weights = {"params": model.params, "buffers": model.buffers}
    if model.initialised:
        what = {"weights": trees.sha256(weights)[:16]}
    else:
        what = {
            "shapes": codehash.sha(repr([(path, leaf.shape, str(leaf.dtype)) for path, leaf in trees.flatten(weights).items()]))
        }
    return {CLASS: "jkd.types:Model", "name": model.name, "preprocess": inside(model.preprocess), **what}


def _array(array: Any) -> Any:
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.ascontiguousarray(array)
    if array.dtype.hasobject:
        return {CLASS: "array", "is": repr(array.tolist())}
    return {
        CLASS: "array",
        "of": f"{array.dtype}{list(array.shape)}",
        "sha256": hashlib.sha256(array.tobytes()).hexdigest()[:16],
    }


def _key(key: Any) -> str:
    return key if isinstance(key, str) else repr(key)
