"""Data made from other data: joined streams, subsets, views drawn once for all, and noise of the same shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jkd.data.batch import Record
from jkd.data.labels import checksum
from jkd.data.order import check_seed, generator
from jkd.data.pipeline import Data, Map, Source
from jkd.data.sources import Arrays
from jkd.errors import InputError


def join(main: Data, **streams: Data | tuple[Data, int]) -> Data:
    """Training batches of ``main`` that hold further batches by name: ``join(labelled, unlabelled=(everything, 7))``.

    Args:
        main: gives the batch itself and the evaluation.
        **streams: by key of the batch: the data, or (data, ratio) with ``ratio`` times as many rows (default 1). Every stream
            has an order of its own, its own ids and its own maps.

    Raises:
        InputError: a key that a batch already uses, or a ratio below 1.
    """
    joined = list(main.streams)
    for name, value in streams.items():
        data, ratio = value if isinstance(value, tuple) else (value, 1)
        if not isinstance(data, Data) or not isinstance(ratio, int) or ratio < 1:
            raise InputError(f"join({name}={value!r}): must be data, or (data, ratio) with a ratio of at least 1")
        if name in ("image", "label", "weight", "index", "labelled", "teacher", *(other for other, _, _ in joined)):
            raise InputError(f"join({name}=…): a batch already has {name!r}; choose another key")
        joined.append((name, data, ratio))
    return dataclasses.replace(main, streams=tuple(joined))


def subset(data: Data, keep: np.ndarray) -> Data:
    """The same data with some of the training examples alone; their ``index`` counts anew from 0.

    Args:
        keep: a bool mask ``[train_size]``, or indices ``[examples]``.

    Raises:
        InputError: a mask of another length, indices out of range, or nothing kept.
    """
    keep, size = np.asarray(keep), data.train_size
    if keep.ndim != 1 or (keep.dtype == bool and len(keep) != size):
        raise InputError(f"subset: keep has shape {list(keep.shape)}; a mask [{size}] or indices are needed")
    indices = np.flatnonzero(keep) if keep.dtype == bool else keep.astype(np.int64)
    if not indices.size or indices.min() < 0 or indices.max() >= size:
        raise InputError(f"subset: must keep at least one example, all from 0 to {size - 1}")
    return dataclasses.replace(data, train=Subset(data.train, indices))


def labelled_only(data: Data) -> Data:
    """The labelled training examples alone: ``join(labelled_only(d), unlabelled=(d, 7))`` is the usual semi-supervised batch.

    Raises:
        InputError: none is labelled, or nothing says which are.
    """
    columns = data.train.columns()
    mask = getattr(data.train, "mask", None) if columns is None else columns.get("labelled")
    if mask is None:
        raise InputError(f"labelled_only: {data.name} does not say which examples are labelled; give labelled=")
    return subset(data, mask > 0)


def fixed_views(data: Data, count: int = 1, *, seed: int = 0) -> Data:
    """The same data with so many views of each training example, drawn by its ``train_maps`` once for all.

    Random maps otherwise draw anew at every place of the stream, and a teacher's answers to what they give could be used once. A
    view is example and number; an epoch holds each once, as an example with an ``index`` of its own.

    Args:
        count: views of each example.
        seed: of all their draws; of nothing else, so that runs with other seeds see the same views.

    Raises:
        InputError: a count below 1.
    """
    if not isinstance(count, int) or count < 1:
        raise InputError(f"fixed_views(count={count!r}): give at least 1")
    train = Views(data.train, data.train_maps, count, check_seed(seed))
    return dataclasses.replace(data, train=train, train_maps=())


def fake(like: Data, *, train_size: int = 256, eval_size: int = 64, seed: int = 0) -> Data:
    """Noise with the shapes, dtypes and classes of other data as it leaves the host-side maps: for dry runs and for throughput.

    Works for a `jkd.data.tfds` set that is not prepared on this machine.
    """
    rng = np.random.default_rng(seed)

    def noise(size: int) -> dict[str, np.ndarray]:
        columns = {}
        for name, spec in like.spec(size).items():
            if name in ("index", "weight", "labelled") or isinstance(spec, dict):
                continue
            if name == "label":
                columns[name] = rng.integers(0, like.classes or 2, spec.shape).astype(spec.dtype)
            elif spec.dtype.kind == "f":
                columns[name] = rng.random(spec.shape, np.float32).astype(spec.dtype)
            else:
                columns[name] = rng.integers(0, 2 if name != "image" else 256, spec.shape).astype(spec.dtype)
        return columns

    name = f"fake {like.name}"
    held_out = noise(eval_size) if like.has_eval else None
    made = Data(
        train=Arrays(noise(train_size), classes=like.classes),
        eval=None if held_out is None else Arrays(held_out, classes=like.classes),
        name=name,
    )
    streams = tuple((key, fake(data, train_size=train_size, seed=seed + 1), ratio) for key, data, ratio in like.streams)
    return dataclasses.replace(made, streams=streams)


class Views:
    """A `Source`: every example of another as often as there are views, each changed by its own draw of the maps.

    View v of example i has the index ``v * examples + i``.
    """

    def __init__(self, inner: Source, maps: Sequence[Map], count: int, seed: int):
        self._inner, self._maps, self._count, self._seed = inner, tuple(maps), count, seed

    @property
    def classes(self) -> int | None:
        return self._inner.classes

    def __len__(self) -> int:
        return self._count * len(self._inner)

    def columns(self) -> None:
        return None

    def records(self, indices: Sequence[int]) -> list[Record]:
        records = self._inner.records([index % len(self._inner) for index in indices])
        return [self._changed(record, index) for record, index in zip(records, indices, strict=True)]

    def example(self) -> Record:
        return self._changed(self._inner.example(), 0)

    def _changed(self, record: Record, index: int) -> Record:
        rng = generator(self._seed, index)
        for each in self._maps:
            record = each(record, rng)
        return record

    def __repr__(self) -> str:
        return f"Views({self._inner!r}, {self._maps!r}, count={self._count}, seed={self._seed})"


class Subset:
    """A `Source`: these examples of another, in this order, with ids of their own."""

    def __init__(self, inner: Source, indices: np.ndarray):
        self._inner, self._indices = inner, indices
        self._columns: Mapping[str, np.ndarray] | None = None

    @property
    def classes(self) -> int | None:
        return self._inner.classes

    def __len__(self) -> int:
        return len(self._indices)

    def columns(self) -> Mapping[str, np.ndarray] | None:
        columns = self._inner.columns()
        if columns is None:
            return None
        if self._columns is None:
            self._columns = {name: column[self._indices] for name, column in columns.items()}
        return self._columns

    def records(self, indices: Sequence[int]) -> list[Record]:
        return self._inner.records([int(self._indices[index]) for index in indices])

    def example(self) -> Record:
        return self._inner.example()

    def __repr__(self) -> str:
        return f"Subset({self._inner!r}, {len(self)} examples, sha256={checksum({'indices': self._indices})})"
