"""JSON that keeps NumPy arrays and scalars exactly, beside them plain values that a person can read."""

from __future__ import annotations

import base64
import json
from typing import Any

import jax.numpy as jnp
import numpy as np

from jkd.errors import InputError

_ARRAY = "$array"


def encode(value: Any) -> str:
    """Text from dicts with string keys, lists, tuples (they come back as lists), str, int, float, bool, None and arrays.

    An array becomes ``{"$array": base64 of its bytes, "dtype": …, "shape": …}``: exact for every dtype, bfloat16 and NaNs included.

    Raises:
        InputError: there is something else in it; names the place and the type.
    """
    return json.dumps(_plain(value, "meta"), indent=1)


def decode(text: str) -> Any:
    """The inverse of `encode`."""
    return json.loads(text, object_hook=_array)


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (str, bool)) or type(value) in (int, float):
        return value
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key == _ARRAY:
                raise InputError(f"{where} has the key {key!r}: JSON keeps string keys only, and {_ARRAY!r} is taken")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        array = np.asarray(value)
        if not array.dtype.hasobject:
            data = base64.b64encode(array.tobytes()).decode()
            return {
                _ARRAY: data,
                "dtype": array.dtype.name,
                "shape": list(array.shape),
                "scalar": isinstance(value, np.generic),
            }
    raise InputError(f"{where} is a {type(value).__name__}, which JSON cannot keep; give plain values or arrays")


def _array(item: dict) -> Any:
    if _ARRAY not in item:
        return item
    data = base64.b64decode(item[_ARRAY])
    array = np.frombuffer(data, jnp.dtype(item["dtype"])).reshape(item["shape"]).copy()
    return array[()] if item["scalar"] else array
