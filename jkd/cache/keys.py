"""What an example is called in a cache: a hash of its contents, the same in every process, on every machine, in every order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jkd.errors import InputError

KEY_BYTES = 16


def key(inputs: Mapping[str, Any] | None = None, *, augmentation: int = 0, **more: Any) -> bytes:
    """16 bytes that name an example: ``key(tokens=ids)``, ``key(image=pixels, augmentation=7)``.

    It is the BLAKE2b hash of names, shapes and values, whatever dtype the values come in: whole numbers (int32 tokens, int64
    tokens, a list) hash alike, and so do floats that are equal as float32.

    Args:
        inputs: arrays of one example by name, without a batch axis: all that the teacher's answer depends on.
        augmentation: seed of what is done to the inputs before the teacher sees them; 0 where they are hashed as it sees them.
        **more: further inputs.

    Raises:
        InputError: nothing to hash, or values that are no numbers.
    """
    named = {**(inputs or {}), **more}
    if not named:
        raise InputError("key(): give the inputs of one example, as in key(tokens=ids)")
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"jkd cache 1")
    for name in sorted(named):
        array = _plain(name, named[name])
        digest.update(f"{name} {array.dtype.str[1:]} {array.shape};".encode())
        digest.update(array.data)
    if augmentation:
        digest.update(f"augmentation {int(augmentation)}".encode())
    return digest.digest()


def _plain(name: str, value: Any) -> np.ndarray:
    """The values in the narrowest type that holds them: unsigned where none is negative, little-endian, contiguous."""
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return np.ascontiguousarray(array, "<f4")
    if array.dtype.kind not in "biu":
        raise InputError(f"key({name}=…): values are {array.dtype}; arrays of numbers are needed")
    if array.dtype == np.uint8:  # images: nothing to look for
        return np.ascontiguousarray(array)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    kind = "<i8" if low < 0 else next(kind for kind in ("u1", "<u2", "<u4", "<u8") if high <= np.iinfo(kind).max)
    return np.ascontiguousarray(array, kind)
