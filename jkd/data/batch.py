"""What every batch holds, and what is checked on each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jkd.errors import InputError
from jkd.types import Batch

Record = dict[str, Any]
"""One example: ``image`` ``[height, width, channels]``, ``label`` int, and what else the source has; no batch axis."""


def check_batch(batch: Batch, classes: int | None, *, field: str = "label") -> None:
    """Labels that may be used must lie in ``0 … classes - 1``; rows of weight 0 or ``labelled`` 0 are free.

    Args:
        batch: NumPy arrays; ``label`` int ``[batch]`` (distributions are left alone).
        classes: None checks nothing, nor does 1, which is a score.

    Raises:
        InputError: names the value, the example's ``index`` and the field.
    """
    label = batch.get(field)
    if classes in (None, 1) or label is None or label.ndim != 1:
        return
    used = np.ones(len(label), bool)
    for name in ("weight", "labelled"):
        if name in batch:
            used &= batch[name] > 0
    bad = np.flatnonzero(used & ((label < 0) | (label >= classes)))
    if bad.size:
        row = bad[0]
        where = f"example {batch['index'][row]}" if "index" in batch else f"row {row}"
        raise InputError(f"{field} {label[row]} of {where} is outside 0..{classes - 1} ({classes} classes)")


def collate(records: Sequence[Record], indices: np.ndarray) -> Batch:
    """Records that hold the same keys, one below the other; what is no number (a name, a path) is left out.

    Raises:
        InputError: names the record that lacks a key, or whose shape is another.
    """
    batch = {}
    for name in dict.fromkeys(name for record in records for name in record):
        without = [index for index, record in zip(indices, records, strict=True) if name not in record]
        if without:
            raise InputError(f"record {without[0]} has no {name!r}, but others have")
        values = [record[name] for record in records]
        if name == "image" and isinstance(values[0], bytes):
            raise InputError(f"image of record {indices[0]} is bytes: put vision.decode() first among the maps")
        if isinstance(values[0], str | bytes):
            continue
        arrays = [np.asarray(value) for value in values]
        for index, array in zip(indices, arrays, strict=True):
            if array.shape != arrays[0].shape:
                fix = "; add a map that gives one size, such as vision.random_resized_crop(224)" if name == "image" else ""
                sizes = f"{list(array.shape)}, that of record {indices[0]} {list(arrays[0].shape)}"
                raise InputError(f"{name} of record {index} has shape {sizes}{fix}")
        batch[name] = np.stack(arrays)
    return batch


_NARROW = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32, np.dtype(np.uint64): np.uint32}


def standard(batch: Batch, indices: np.ndarray, classes: int | None) -> Batch:
    """The keys and dtypes that every batch has; see `jkd.types.Batch`."""
    rows = len(indices)
    batch = {name: array for name, array in batch.items() if array.dtype.kind in "biuf"}
    batch = {name: array.astype(_NARROW.get(array.dtype, array.dtype), copy=False) for name, array in batch.items()}
    batch["index"] = indices.astype(np.int32)
    batch["weight"] = np.ones(rows, np.float32)
    has_label = "label" in batch
    batch["labelled"] = batch["labelled"].astype(np.float32) if "labelled" in batch else np.full(rows, has_label, np.float32)
    if not has_label:
        batch["label"] = np.zeros(rows, np.int32)
    elif batch["label"].ndim == 1:
        if batch["label"].dtype.kind == "f":
            raise InputError(f"label of example {indices[0]} is the float {batch['label'][0]}: class labels are integers")
        # A label that may not be used is not there: no term can read it by mistake, and none is out of range.
        batch["label"] = np.where(batch["labelled"] > 0, batch["label"], 0).astype(np.int32)
        check_batch(batch, classes)
    image = batch.get("image")
    if image is not None:
        if image.ndim != 4:
            raise InputError(f"image of example {indices[0]} has shape {list(image.shape[1:])}, not [height, width, channels]")
        if image.dtype != np.uint8 and image.dtype.kind != "f":
            raise InputError(f"image is {image.dtype}: uint8 in 0..255 or float in 0..1 is needed")
        if image.dtype.kind == "f" and image.size and (most := image.max()) > 2 and image.min() >= 0 and not (image % 1).any():
            # whole numbers from 0 on: pixels that nobody has divided
            raise InputError(
                f"image of example {indices[image.max((1, 2, 3)).argmax()]} holds whole numbers up to {most:g} as floats: floats are "
                "meant to lie in 0..1; divide them, or give uint8 in 0..255"
            )
    return batch
