"""Documents as one long row of numbers, in memory or on disk, and which of them each training row holds.

Everything here is a function of the documents, the tokenizer and the length alone. So a row is found by its number, on any host
and after any restart, and packing has no state to save.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jkd.data.texts import Documents, Written
from jkd.data.tokenizer import Tokenizer
from jkd.errors import InputError

Layout = Literal["stream", "fit", "pad"]
_AT_ONCE = 256


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents, one after the other.

    Args:
        tokens: ``[tokens]`` uint16 or int32; those of a document are ``tokens[starts[d] : starts[d + 1]]``.
        counted: ``[tokens]`` bool, what a model learns to say; None where that is everything.
        starts: ``[documents + 1]`` int64.
        bytes: ``[documents]`` int64, length of each as UTF-8.
    """

    tokens: np.ndarray
    counted: np.ndarray | None
    starts: np.ndarray
    bytes: np.ndarray


def read(documents: Documents, tokenizer: Tokenizer, folder: str | os.PathLike[str] | None) -> Corpus:
    """The documents as numbers, each between the tokenizer's ``begin`` and ``end`` where it has them.

    Args:
        documents: read once, in order.
        tokenizer: makes the numbers.
        folder: where they are kept for the next time, and mapped into memory from; None holds them in memory.

    Raises:
        InputError: there is no document, or all are empty.
    """
    if len(documents) == 0:
        raise InputError("the text has no documents")
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.int32
    if folder is None:
        made = list(_encoded(documents, tokenizer, dtype))
        tokens, counted, lengths, sizes = (np.concatenate(parts) for parts in zip(*made, strict=True))
        everything = bool(counted.all())
    else:
        which = f"{documents!r} {getattr(documents, 'revision', '')} {tokenizer.fingerprint} {tokenizer.begin} {tokenizer.end}"
        place = Path(folder) / hashlib.sha256(which.encode()).hexdigest()[:16]
        _once(place, lambda alive: _write(place, documents, tokenizer, dtype, alive))
        everything = json.loads((place / _LAST).read_text(encoding="utf-8"))["all_counted"]
        tokens, counted, lengths, sizes = (np.memmap(place / f"{name}.bin", kind, "r") for name, kind in _kinds(dtype))
    if not sizes.any():
        raise InputError("the text is empty")
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
    return Corpus(tokens, None if everything else counted, starts, np.asarray(sizes))


def _kinds(dtype: Any) -> list[tuple[str, Any]]:
    return [("tokens", dtype), ("counted", np.bool_), ("lengths", np.int64), ("bytes", np.int64)]


def _encoded(documents: Documents, tokenizer: Tokenizer, dtype: Any) -> Iterator[tuple[np.ndarray, ...]]:
    """``(tokens, counted, lengths, bytes)`` of some documents at a time."""
    around = [[] if special is None else [special] for special in (tokenizer.begin, tokenizer.end)]
    for first in range(0, len(documents), _AT_ONCE):
        some = [documents[number] for number in range(first, min(first + _AT_ONCE, len(documents)))]
        parts = [(one,) if isinstance(one, str) else one for one in some]
        numbers = iter(tokenizer.encode_all([text for texts in parts for text in texts]))
        tokens, counted = [], []
        for texts in parts:
            pieces = [next(numbers) for _ in texts]
            begin, end = ([], []) if isinstance(texts, Written) else around
            # of a conversation every other text is a response; its end counts with the last one
            said = [len(texts) == 1 or place % 2 == 1 for place in range(len(texts))]
            tokens.append(np.concatenate([begin, *pieces, end]).astype(dtype))
            counted.append(np.repeat([said[0], *said, said[-1]], [len(begin), *map(len, pieces), len(end)]))
        sizes = [sum(len(text.encode(errors="surrogatepass")) for text in texts) for texts in parts]
        lengths = np.array([len(one) for one in tokens], np.int64)
        yield np.concatenate(tokens), np.concatenate(counted), lengths, np.array(sizes, np.int64)


_LAST = "corpus.json"
"""Written last: a folder that has it is whole."""
_LOOK_S, _STALE_S = 0.5, 60.0
"""Seconds between two looks at what another process makes, and after which one that gave no sign of life is taken to be dead."""


def _once(place: Path, make: Callable[[Callable[[], None]], None]) -> None:
    """Has the folder made by one of the processes that see it; the others wait, and one takes over from a maker that died.

    Args:
        place: the folder.
        make: makes it; it is given what to call now and then as a sign of life.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.making")
    seen, since = None, time.monotonic()
    while not (place / _LAST).exists():
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            sign = _written(lock)
            if sign != seen:  # by our own clock: that of the disk may be another
                seen, since = sign, time.monotonic()
            elif time.monotonic() - since > _STALE_S:
                lock.unlink(missing_ok=True)
            time.sleep(_LOOK_S)
            continue
        try:
            if not (place / _LAST).exists():
                make(lock.touch)
        finally:
            lock.unlink(missing_ok=True)


def _written(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _write(place: Path, documents: Documents, tokenizer: Tokenizer, dtype: Any, alive: Callable[[], None]) -> None:
    """Makes the folder whole or not at all; of several processes that make it the first wins."""
    made = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    everything = True
    try:
        for arrays in _encoded(documents, tokenizer, dtype):
            alive()
            everything &= bool(arrays[1].all())
            for (name, _), array in zip(_kinds(dtype), arrays, strict=True):
                with open(made / f"{name}.bin", "ab") as file:
                    array.tofile(file)
        described = {"documents": repr(documents), "tokenizer": tokenizer.fingerprint, "all_counted": everything}
        (made / _LAST).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        try:
            made.rename(place)
        except OSError:
            if not (place / _LAST).exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Piece:
    """Tokens ``start … stop - 1`` of the corpus, all of one document."""

    document: int
    start: int
    stop: int


class Rows:
    """Which pieces of a corpus each row of ``length`` tokens holds.

    ``stream``: the corpus cut every ``length - 1`` tokens, so that the last token of a row is the first of the next and every
    token of a document but its first is predicted exactly once. ``fit``: whole documents, as many in a row as fit (the longest
    first, each into the fullest row that has room). ``pad``: one document in a row. In the last two a longer document is cut.
    """

    def __init__(self, corpus: Corpus, length: int, layout: Layout):
        if length < 2:
            raise InputError(f"length={length}: a row needs at least 2 tokens")
        if layout not in ("stream", "fit", "pad"):
            raise InputError(f"layout={layout!r}: give stream, fit or pad")
        self.starts, self.length, self.layout = corpus.starts, length, layout
        kept = np.minimum(np.diff(corpus.starts), length)
        self._documents: list[np.ndarray] = []
        if layout == "stream":
            self._count = max(1, -(-(int(corpus.starts[-1]) - 1) // (length - 1)))
        elif layout == "pad":
            self._documents = list(np.flatnonzero(kept)[:, None])
        else:
            self._documents = fit(kept, length)
        self._count = self._count if layout == "stream" else len(self._documents)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> list[Piece]:
        starts = self.starts
        if self.layout != "stream":
            own = self._documents[row]
            return [Piece(int(d), int(starts[d]), int(min(starts[d + 1], starts[d] + self.length))) for d in own]
        first = row * (self.length - 1)
        last = min(first + self.length, int(starts[-1]))
        low, high = int(np.searchsorted(starts, first, "right")) - 1, int(np.searchsorted(starts, last, "left"))
        pieces = [Piece(d, max(first, int(starts[d])), min(last, int(starts[d + 1]))) for d in range(low, high)]
        return [piece for piece in pieces if piece.stop > piece.start]


def fit(sizes: np.ndarray, length: int) -> list[np.ndarray]:
    """Best fit decreasing: the numbers of the items in each row, none beyond ``length`` together; items of size 0 are left out.

    Args:
        sizes: ``[items]`` int, each at most ``length``.
        length: room in a row.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room that is left in them
    some = 0  # bit r: a row with room r
    for item in np.argsort(-sizes, kind="stable"):
        size = int(sizes[item])
        if size == 0:
            break
        enough = some >> size
        if enough:
            left = size + (enough & -enough).bit_length() - 1
            row = room[left].pop()
            if not room[left]:
                some &= ~(1 << left)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(int(item))
        room[left - size].append(row)
        some |= 1 << (left - size)
    return [np.array(row) for row in rows]
