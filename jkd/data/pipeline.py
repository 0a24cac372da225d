"""From a source to the batches of this host: `Data`, the value of ``Run.data``.

Every element of the grain pipeline is a whole batch, computed from its position alone: `Order` says which examples it holds,
the source gives them, the maps change them. Threads, worker processes, prefetching and restarts therefore cannot change what a
batch holds, and grain's cost for each element (about 0.1 ms) is paid for each batch instead of for each record; batches that take
less than that to gather from memory do without grain.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jkd.data.batch import Record, collate, standard
from jkd.data.order import Order, check_seed, generator, seed_of
from jkd.data.tokenizer import Tokenizer
from jkd.errors import InputError, MissingExtra
from jkd.types import Batch

Map = Callable[[Record, np.random.Generator], Record]
"""What is done to one record on the host; all its randomness comes from the generator it is given."""


@runtime_checkable
class Source(Protocol):
    """Where examples come from. `jkd.data.arrays`, `digits`, `tfds` and `source` make them."""

    @property
    def classes(self) -> int | None: ...

    def __len__(self) -> int: ...

    def columns(self) -> Mapping[str, np.ndarray] | None:
        """All examples at once, each ``[examples, ...]``; None where they must be read one by one."""
        ...

    def records(self, indices: Sequence[int]) -> list[Record]: ...

    def example(self) -> Record:
        """A record with the right shapes; it need not be one of the examples."""
        ...


class Answers(Protocol):
    """A teacher's answers that lie ready (`jkd.cache.Cache` makes these)."""

    def __call__(self, batch: Batch, *, train: bool) -> Any:
        """The answers to the rows of a NumPy batch, an `Outputs` of NumPy arrays; None where there are none."""
        ...

    def spec(self, batch: Batch) -> Any:
        """Their shapes for a training batch of these shapes."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Training and evaluation examples, and how they become batches.

    Args:
        train: the training examples.
        eval: the evaluation examples, or None.
        train_maps: host-side maps of one training record, in order (`jkd.data.vision`).
        eval_maps: likewise for evaluation.
        threads: threads that prepare batches ahead (one batch each; ``threads + 1`` are held ready). None: 1 where the examples
            lie in memory and there are no maps, else one for each CPU core, at most 16.
        workers: processes that prepare batches, for maps that hold Python's lock; 0 (the default) uses threads alone.
            They are started afresh, so a script of your own needs its ``if __name__ == "__main__":``.
        streams: further training streams ``(name, data, ratio)``, made by `join`.
        tokenizer: what its tokens are numbers of, if it is text.
        teacher_tokenizer: what ``teacher_tokens`` are numbers of, where the teacher has a vocabulary of its own.
        answers: what batches hold as ``teacher``, or None.
        name: for tables and messages.

    The order of the training examples depends on the seed and the epoch alone: not on hosts, threads, workers or restarts.
    """

    train: Source
    eval: Source | None = None
    train_maps: tuple[Map, ...] = ()
    eval_maps: tuple[Map, ...] = ()
    threads: int | None = None
    workers: int = 0
    streams: tuple[tuple[str, Data, int], ...] = ()
    tokenizer: Tokenizer | None = None
    teacher_tokenizer: Tokenizer | None = None
    answers: Answers | None = None
    name: str = "data"

    def __post_init__(self):
        for field in ("train_maps", "eval_maps"):
            maps = getattr(self, field)
            object.__setattr__(self, field, tuple(maps) if isinstance(maps, Sequence) else (maps,))
            for each in getattr(self, field):
                if not callable(each):
                    raise InputError(f"data.{field}: {each!r} is not callable; a map is a function f(record, rng) -> record")
        if self.threads is not None and self.threads < 1:
            raise InputError(f"data.threads={self.threads}: must be at least 1")
        if self.workers < 0:
            raise InputError(f"data.workers={self.workers}: must not be negative")

    @property
    def classes(self) -> int | None:
        """Number of classes; None where the source does not say."""
        return self.train.classes

    @property
    def train_size(self) -> int:
        """Number of training examples; ``index`` counts from 0 to ``train_size - 1``."""
        return _size(self.train, self.name, "training")

    @property
    def eval_size(self) -> int:
        """Number of evaluation examples; 0 without an evaluation source."""
        return 0 if self.eval is None else _size(self.eval, self.name, "evaluation")

    @property
    def has_eval(self) -> bool:
        return self.eval is not None

    def batches(
        self,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        process: tuple[int, int] = (0, 1),
        weights: np.ndarray | None = None,
    ) -> Iterator[Batch]:
        """This host's rows of the global batches ``start``, ``start + 1``, …, without end.

        Args:
            batch_size: rows of the *global* batch.
            seed: of the order and of every random map.
            start: global batches already trained on. Nothing is replayed.
            process: (index, count) of this host: it gets rows ``[index * b, (index + 1) * b)``, ``b = batch_size / count``.
            weights: ``[train_size]`` sampling weights: rows become independent draws with replacement, row r drawn from
                (seed, r) and the weights alone.

        Returns:
            An iterator of NumPy batches ``[b, ...]``. ``close()`` it when done: batches under way are then dropped.

        Raises:
            InputError: empty data, a batch that does not divide by the hosts, bad weights; and, from the iterator, a label
                outside the classes or images of different sizes.
        """
        _check_batch_size(batch_size, process)
        if start < 0:
            raise InputError(f"start={start}: the data position must not be negative")
        return _iterate(_Train(self, batch_size, check_seed(seed), start, process, weights), self)

    def eval_batches(self, batch_size: int, *, process: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """The evaluation examples once, in order: this host's rows of every global batch.

        The last batch is filled up with rows of zeros, ``weight`` included: every batch has the full size and every host gets
        the same number of batches.

        Raises:
            InputError: there is no evaluation source, or it is empty; a batch that does not divide by the hosts.
        """
        if self.eval is None:
            raise InputError(f"{self.name}: there is no evaluation source; give eval=")
        _check_batch_size(batch_size, process)
        return _iterate(_Eval(self, batch_size, process), self)

    def spec(self, batch_size: int) -> Batch:
        """Shapes and dtypes of a training batch, as ``jax.ShapeDtypeStruct``, from one example."""
        import jax

        record = self.train.example()
        rng = generator(0, 0)
        for each in self.train_maps:
            record = each(record, rng)
        example = {name: np.asarray(value)[None] for name, value in record.items()}
        batch: Batch = {}
        for name, array in standard(example, np.zeros(1, int), None).items():
            batch[name] = jax.ShapeDtypeStruct((batch_size, *array.shape[1:]), array.dtype)
        if self.answers is not None:
            batch["teacher"] = self.answers.spec(batch)
        for name, data, ratio in self.streams:
            batch[name] = data.spec(batch_size * ratio)
        return batch


def _size(source: Source, name: str, kind: str) -> int:
    size = len(source)
    if size == 0:
        raise InputError(f"{name}: the {kind} set is empty")
    return size


def _check_batch_size(batch_size: int, process: tuple[int, int]) -> None:
    index, count = process
    if not 0 <= index < count:
        raise InputError(f"process={process}: must be (index, count) with 0 <= index < count")
    if batch_size < 1 or batch_size % count:
        raise InputError(f"batch_size={batch_size}: must be a positive multiple of the number of hosts ({count})")


def _read(source: Source, maps: Sequence[Map], indices: np.ndarray, first: int, seed: int) -> Batch:
    """The examples ``indices`` as a batch; they are global rows ``first``, ``first + 1``, … to the random maps."""
    columns = source.columns()
    if columns is not None and not maps:
        batch = {name: np.take(column, indices, axis=0) for name, column in columns.items()}
    else:
        records = source.records([int(index) for index in indices])
        for position, record in enumerate(records):
            if maps:
                rng = generator(seed, first + position)
                for each in maps:
                    record = each(record, rng)
            records[position] = record
        batch = collate(records, indices)
    return standard(batch, indices, source.classes)


class _Train:
    """Batch ``start + k`` of this host at place k: a random-access source for grain that never ends."""

    def __init__(self, data: Data, batch_size: int, seed: int, start: int, process: tuple[int, int], weights: Any = None):
        self._data, self._seed, self._start, self._process = data, seed, start, process
        self._batch_size = batch_size
        self._order = Order(data.train_size, seed, weights)
        self._streams: list[tuple[str, _Train]] = []
        for name, other, ratio in data.streams:
            self._streams.append((name, _Train(other, batch_size * ratio, seed_of(seed, name), start, process)))

    @property
    def gathered(self) -> bool:
        """Whether batches are so cheap that nothing need be ready before it is asked for."""
        data = self._data
        plain = not (data.train_maps or data.streams or data.answers or data.threads or data.workers)
        return plain and _gathers(data.train, self._batch_size // self._process[1])

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, place: int) -> Batch:
        index, count = self._process
        rows = self._batch_size // count
        first = (self._start + place) * self._batch_size + index * rows
        data = self._data
        batch = _answered(
            data, _read(data.train, data.train_maps, self._order.examples(first, rows), first, self._seed), train=True
        )
        for name, stream in self._streams:
            batch[name] = stream[place]
        return batch


class _Eval:
    """Evaluation batch k of this host at place k."""

    def __init__(self, data: Data, batch_size: int, process: tuple[int, int]):
        self._data, self._batch_size, self._process = data, batch_size, process
        self._size = data.eval_size

    @property
    def gathered(self) -> bool:
        data = self._data
        plain = not (data.eval_maps or data.answers or data.threads or data.workers)
        return plain and data.eval is not None and _gathers(data.eval, self._batch_size // self._process[1])

    def __len__(self) -> int:
        return -(-self._size // self._batch_size)

    def __getitem__(self, place: int) -> Batch:
        index, count = self._process
        rows = self._batch_size // count
        first = place * self._batch_size + index * rows
        real = max(0, min(rows, self._size - first))
        data = self._data
        assert data.eval is not None  # eval_batches has said so
        # A host whose rows are all padding reads one example for its shapes.
        indices = np.arange(first, first + real) if real else np.zeros(1, int)
        batch = _answered(data, _read(data.eval, data.eval_maps, indices, first, 0), train=False)
        if real == rows:
            return batch
        import jax

        return jax.tree.map(lambda array: _pad(array[:real], rows), batch)


def _answered(data: Data, batch: Batch, *, train: bool) -> Batch:
    found = None if data.answers is None else data.answers(batch, train=train)
    return batch if found is None else {**batch, "teacher": found}


def _pad(array: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


GATHERED = 2**18
"""Bytes of a batch up to which it is gathered from memory when it is asked for: handing it over from a thread would take longer."""


def _gathers(source: Source, rows: int) -> bool:
    columns = source.columns()
    return columns is not None and rows * sum(column.nbytes for column in columns.values()) <= GATHERED * len(source)


def _iterate(batches: _Train | _Eval, data: Data) -> Iterator[Batch]:
    if batches.gathered:
        return (batches[place] for place in range(len(batches)))
    try:
        import grain
    except ImportError as error:
        raise MissingExtra('batches need grain: pip install "jkd[train]"') from error
    simple = data.train.columns() is not None and not (data.train_maps or data.streams or data.answers)
    threads = data.threads or (1 if simple else min(16, os.cpu_count() or 1))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    pipeline = grain.MapDataset.source(batches).to_iter_dataset(options)
    if data.workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain hands absl's flags to its workers, and jkd's command line does not use absl
        several = grain.MultiprocessingOptions(num_workers=data.workers, per_worker_buffer_size=2)
        pipeline = pipeline.mp_prefetch(several, worker_init_fn=_worker)
    made = _closing(pipeline)
    _open.add(made)
    # Registered again each time, so that it comes before what multiprocessing does at exit: it would end the workers first.
    atexit.unregister(_close_all)
    atexit.register(_close_all)
    return made


def _worker(index: int, count: int) -> None:
    """In a worker: a notice to stop, which schedulers and terminals send to all processes, is for the training; it ends with that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _closing(pipeline: Any) -> Generator[Batch]:
    iterator = iter(pipeline)
    try:
        yield from iterator
    finally:
        iterator.close()


_open: weakref.WeakSet[Generator[Batch]] = weakref.WeakSet()


def _close_all() -> None:
    """While the modules that grain needs for closing are still there."""
    for batches in list(_open):
        with contextlib.suppress(ValueError):  # another thread is inside it
            batches.close()
