"""Answers out of a finished cache, by key, in any order; each is checked as it is read."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jkd.cache import manifest
from jkd.cache.keys import KEY_BYTES
from jkd.cache.manifest import DATA, INDEX
from jkd.errors import InputError

TABLE_BYTES = 4096
"""Answers of one size up to this are laid out in a memory-mapped table, from which a batch is gathered at once."""
_OPEN_FILES = 256


class Reader:
    """A finished cache, open for reading from several threads.

    Opening checks the manifest, every shard's size, and the indices' checksums. Reading checks each record: the container's own
    checksum, and that the answer is the one that was asked for. Small answers of one size (a classifier's logits) are all read,
    and so checked, when the first is asked for; they then lie in a temporary file (in ``TMPDIR``) that is memory-mapped.

    Args:
        folder: where it lies.

    Raises:
        InputError: it is not there, not finished, or damaged; the message names the file.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.facts = manifest.read_facts(self.folder)
        body = manifest.read_manifest(self.folder)
        self._names = list(body["shards"])
        parts = []
        for name in self._names:
            path = self.folder / f"{name}{INDEX}"
            if manifest.measure(path) != body["shards"][name][INDEX]:
                raise InputError(f"cache {self.folder}: {path.name} does not match its checksum")
            parts.append(np.load(path))
        if not parts:
            raise InputError(f"cache {self.folder} is empty")
        entries = np.concatenate(parts)
        prefix = _prefix(entries["key"])
        order = np.argsort(prefix, kind="stable")
        self._entries, self._prefix = entries[order], prefix[order]
        self._shard = np.repeat(np.arange(len(parts)), [len(part) for part in parts])[order]
        # how many entries share their first eight bytes at most: one, unless two hosts added the same example
        same = np.flatnonzero(np.diff(self._prefix, prepend=self._prefix[0] ^ 1))
        self._run = int(np.diff(np.append(same, len(entries))).max())
        self._lock, self._files = threading.RLock(), dict[int, Any]()
        self._table: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self._entries)

    def rows(self, keys: Sequence[bytes]) -> np.ndarray:
        """The rows of these examples, int64 ``[examples]``, -1 for those that are not there."""
        wanted = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        first = np.searchsorted(self._prefix, _prefix(wanted))
        found = np.full(len(wanted), -1)
        for step in range(self._run):
            place = np.minimum(first + step, len(self) - 1)
            here = (self._entries["key"][place] == wanted).all(-1)
            found = np.where((found < 0) & here, place, found)
        return found

    def answers(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The answers of these rows, decoded, each array ``[examples, ...]``.

        Raises:
            InputError: a record is damaged, or the examples are not of one length.
        """
        try:
            return self.facts.codec.decode(self._payloads(rows))
        except ValueError as error:
            raise InputError(f"cache {self.folder}: {error}") from error

    def _payloads(self, rows: np.ndarray) -> np.ndarray | list[bytes]:
        size = self.facts.codec.size
        if size is None or size > TABLE_BYTES:
            return self._read(rows)
        with self._lock:
            if self._table is None:
                self._table = self._lay_out(size)
        return self._table[rows]

    def _read(self, rows: np.ndarray) -> list[bytes]:
        """The payloads of these rows, from their records."""
        payloads: list[bytes] = [b""] * len(rows)
        shards = self._shard[rows]
        for shard in np.unique(shards):
            places = np.flatnonzero(shards == shard)
            entries = self._entries[rows[places]]
            records, which = np.unique(entries["record"], return_inverse=True)
            raw = self._records(int(shard), records)
            keys = entries["key"].tobytes()
            columns = (column.tolist() for column in (places, which, entries["start"], entries["size"]))
            for number, (place, record, start, size) in enumerate(zip(*columns, strict=True)):
                middle, end = start + KEY_BYTES, start + KEY_BYTES + size
                key = keys[number * KEY_BYTES : (number + 1) * KEY_BYTES]
                if raw[record][start:middle] != key or len(raw[record]) < end:
                    self._damaged(int(shard), int(records[record]), "holds another example than its index says")
                payloads[place] = raw[record][middle:end]
        return payloads

    def _records(self, shard: int, records: np.ndarray) -> list[bytes]:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                if len(self._files) >= _OPEN_FILES:
                    self._files.pop(next(iter(self._files)))  # closed when whoever reads from it is done
                path = self.folder / f"{self._names[shard]}{DATA}"
                file = manifest.array_record().ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
                self._files[shard] = file
        try:
            return file.read([int(record) for record in records])
        except (RuntimeError, ValueError, IndexError) as error:
            told = str(error).partition("(")[0].strip() or type(error).__name__
            return self._damaged(shard, int(records[0]), f"(or one of {len(records)} after it) cannot be read: {told}")

    def _damaged(self, shard: int, record: int, what: str) -> Any:
        raise InputError(
            f"cache {self.folder}: record {record} of {self._names[shard]}{DATA} {what}; delete the three files of that shard and "
            "fill the cache again"
        )

    def _lay_out(self, size: int) -> np.ndarray:
        """All payloads, uint8 ``[examples, size]``, in a file that goes with the process."""
        with tempfile.TemporaryFile(prefix="jkd-cache-") as file:
            file.truncate(len(self) * size)
            table = np.memmap(file, np.uint8, "r+", shape=(len(self), size))
        for shard in range(len(self._names)):
            rows = np.flatnonzero(self._shard == shard)
            rows = rows[np.argsort(self._entries["record"][rows], kind="stable")]
            for part in np.array_split(rows, -(-len(rows) * size // (16 << 20))):
                payloads = self._read(part)
                if any(len(payload) != size for payload in payloads):
                    raise ValueError(f"{self._names[shard]}: an answer that has not {size} bytes")
                table[part] = np.frombuffer(b"".join(payloads), np.uint8).reshape(-1, size)
        return table


def _prefix(keys: np.ndarray) -> np.ndarray:
    """The first eight bytes of each key, as numbers."""
    return np.ascontiguousarray(keys).view(">u8")[:, 0].astype(np.uint64)
