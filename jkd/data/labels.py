"""Which training examples keep their label."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jkd.data.batch import Record
from jkd.data.order import check_seed, choose
from jkd.data.pipeline import Source
from jkd.errors import InputError


class Labelled:
    """A `Source` of which only some examples keep their label: ``mask`` float32 ``[examples]``."""

    def __init__(self, inner: Source, labelled: float | np.ndarray, seed: int = 0):
        if np.ndim(labelled) == 0:
            check_fraction(labelled)
        self._inner, self._labelled, self._seed = inner, labelled, check_seed(seed)

    @property
    def classes(self) -> int | None:
        return self._inner.classes

    @functools.cached_property
    def mask(self) -> np.ndarray:
        columns = self._inner.columns()
        return mask_of(self._labelled, len(self._inner), self._seed, None if columns is None else columns.get("label"))

    def __len__(self) -> int:
        return len(self._inner)

    def columns(self) -> Mapping[str, np.ndarray] | None:
        columns = self._inner.columns()
        return None if columns is None else {**columns, "labelled": self.mask}

    def records(self, indices: Sequence[int]) -> list[Record]:
        records = self._inner.records(indices)
        return [record | {"labelled": self.mask[index]} for index, record in zip(indices, records, strict=True)]

    def example(self) -> Record:
        return self._inner.example() | {"labelled": np.float32(1)}

    def __repr__(self) -> str:
        labelled = (
            self._labelled if np.ndim(self._labelled) == 0 else f"sha256={checksum({'labelled': np.asarray(self._labelled)})}"
        )
        return f"Labelled({self._inner!r}, labelled={labelled}, seed={self._seed})"


def mask_of(labelled: float | np.ndarray, size: int, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """``labelled`` as float32 0/1 ``[size]``: a fraction (at most so many, in proportion to ``groups``) or a mask."""
    if np.ndim(labelled) == 0:
        fraction = check_fraction(labelled)
        # The small addend keeps 0.1 * 10 from counting as less than 1 in floating point.
        count = min(size, int(fraction * size + 1e-9))
        groups = np.zeros(size, int) if groups is None or groups.ndim != 1 else groups
        return choose(groups, count, check_seed(seed)).astype(np.float32)
    mask = np.asarray(labelled)
    if mask.shape != (size,):
        raise InputError(f"labelled has shape {list(mask.shape)}: a fraction or a mask [{size}] is needed")
    return (mask > 0).astype(np.float32)


def checksum(columns: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(columns):
        column = np.ascontiguousarray(columns[name])
        digest.update(f"{name} {column.dtype.str} {column.shape}".encode())
        digest.update(column.tobytes())
    return digest.hexdigest()[:16]


def check_fraction(labelled: Any) -> float:
    if isinstance(labelled, str) or not 0 <= labelled <= 1:
        raise InputError(f"labelled={labelled!r}: must be a fraction from 0 to 1")
    return float(labelled)
