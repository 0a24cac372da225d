"""From a cache to ``batch["teacher"]``: what `jkd.data` puts into the batches of a run whose teacher is a `Cache`."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jkd.cache.config import Cache
from jkd.cache.keys import key
from jkd.cache.reader import Reader
from jkd.config import Run
from jkd.data import Data
from jkd.errors import InputError
from jkd.types import Batch, Outputs

if TYPE_CHECKING:
    from jkd.context import Context

_NO_INPUTS = ("index", "weight", "label", "labelled", "loss_mask", "bytes", "teacher")
"""What a teacher's answer does not depend on."""


def attached(run: Run, batch: Batch | None = None) -> tuple[Run, Batch | None]:
    """The run whose batches hold the cache's answers, and the batch (or its shapes) with theirs; nothing is opened yet."""
    from jkd import models

    cache = run.teacher
    assert isinstance(cache, Cache)
    if missing := set(run.recipe.teacher_taps) - set(getattr(cache.codec, "taps", ())):
        raise InputError(
            f"{type(run.recipe).__name__} reads {min(missing)!r} of the teacher, which the cache does not hold: add it to "
            "Cache.codec, as in Dense(taps={path: shape})"
        )
    run = dataclasses.replace(run, teacher=models.prepared())
    if run.data is None:
        return run, batch
    answers = Answers(cache, run.data)
    if batch is not None and "teacher" not in batch:
        batch = {**batch, "teacher": answers.spec(batch)}
    return dataclasses.replace(run, data=dataclasses.replace(run.data, answers=answers)), batch


def check_classes(cache: Cache, ctx: Context) -> None:
    """Raises InputError: the answers are numbers of other classes than the student's, beyond which an id would be read as its last."""
    vocab, kind = getattr(cache.codec, "vocab", None), type(cache.codec).__name__
    if vocab is not None and ctx.classes is not None and vocab != ctx.classes and ctx.recipe.same_classes:
        raise InputError(
            f"Cache.codec: {kind}.vocab = {vocab}, but the student {ctx.student.name} tells {ctx.classes} classes apart; give "
            f"{kind}(vocab={ctx.classes}), also where another program fills the cache: rows that only pad a head are no classes"
        )


def inputs_of(batch: Batch) -> tuple[str, ...]:
    """Names of the arrays of a batch (or of its shapes) that its examples' keys are made of."""
    return tuple(sorted(name for name, array in batch.items() if name not in _NO_INPUTS and hasattr(array, "shape")))


def keys_of(batch: Mapping[str, np.ndarray], inputs: tuple[str, ...]) -> list[bytes]:
    """The key of each row."""
    columns = [batch[name] for name in inputs]
    return [key(dict(zip(inputs, row, strict=True))) for row in zip(*columns, strict=True)]


class Answers:
    """The answers to a data's batches. Opened when first needed, once in every process that reads.

    Examples that lie in memory are all looked up when it is opened; others are hashed as they are read.
    """

    def __init__(self, cache: Cache, data: Data):
        self.cache, self._data = cache, data
        self._reader: Reader | None = None
        self._train_rows: np.ndarray | None = None
        self._has_eval: bool | None = None
        self._lock = threading.Lock()

    def spec(self, batch: Batch) -> Outputs:
        """Shapes of the answers to a batch of these shapes; the cache need not be there."""
        rows = batch["weight"].shape[0]
        time = batch["tokens"].shape[1] if "tokens" in batch else None
        shapes = self.cache.codec.shapes(time)
        return self._outputs({name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()})

    def __call__(self, batch: Batch, *, train: bool) -> Outputs | None:
        """The answers to a batch of NumPy arrays; None for evaluation batches where the cache has none for those.

        Raises:
            InputError: the cache is not there, not finished, damaged, of another codec, or lacks an example.
        """
        if not train and not (getattr(self.cache.codec, "classes", None) and Path(self.cache.path).exists()):
            return None
        reader = self.open()
        if train and self._train_rows is not None:
            return self._outputs(reader.answers(self._train_rows[batch["index"]]))
        keys = keys_of(batch, reader.facts.inputs)
        rows = reader.rows(keys)
        if not train and self._has_eval is None:
            self._has_eval = bool((rows >= 0).all())
        if not train and not self._has_eval:
            return None
        self._check(rows, batch["index"], keys)
        return self._outputs(reader.answers(rows))

    def open(self) -> Reader:
        """The cache's reader, opened and compared with what the config says."""
        with self._lock:
            if self._reader is None:
                reader = Reader(self.cache.path)
                dataclasses.replace(reader.facts, codec=self.cache.codec).check(reader.facts, reader.folder)
                own = getattr(self._data.tokenizer, "fingerprint", None)
                if None not in (own, reader.facts.tokenizer) and own != reader.facts.tokenizer:
                    raise InputError(
                        f"cache {self.cache.path} is of tokenizer {reader.facts.tokenizer}, the data of {own}: its answers are about "
                        "other tokens; recipes for other vocabularies (ULD) need the teacher itself"
                    )
                known = self._data.spec(1)
                if unknown := [name for name in reader.facts.inputs if name not in known]:
                    raise InputError(
                        f"cache {self.cache.path} knows its examples by {', '.join(reader.facts.inputs)}; the data's batches have no "
                        f"{unknown[0]!r} but {', '.join(known)}"
                    )
                columns = self._data.train.columns()
                if columns is not None and not self._data.train_maps:
                    keys = keys_of(columns, reader.facts.inputs)
                    self._train_rows = reader.rows(keys)
                    self._check(self._train_rows, np.arange(len(keys)), keys)
                self._reader = reader
            return self._reader

    def _check(self, rows: np.ndarray, index: np.ndarray, keys: list[bytes]) -> None:
        missing = np.flatnonzero(rows < 0)
        if missing.size:
            first = missing[0]
            raise InputError(
                f"cache {self.cache.path} has no answer to example {int(index[first])} (key {keys[first].hex()}; {missing.size} of "
                f"{len(rows)} are missing): it was filled for other data, another tokenizer or other maps; `jkd cache CONFIG` adds "
                "what is missing, and random train_maps must be drawn once, by data.fixed_views"
            )

    def _outputs(self, arrays: Mapping[str, Any]) -> Outputs:
        if "ids" in arrays:
            return Outputs(heads={"topk" if "leftover" in arrays else "sampled": dict(arrays)})
        taps, heads = (
            {name.removeprefix(kind): array for name, array in arrays.items() if name.startswith(kind)}
            for kind in ("taps/", "heads/")
        )
        return Outputs(arrays.get("logits"), taps=taps, heads=heads)

    def __getstate__(self) -> dict[str, Any]:
        """A worker process opens its own."""
        return {"cache": self.cache, "_data": self._data}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["cache"], state["_data"])  # type: ignore[misc]
