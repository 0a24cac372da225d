"""Fills a cache; needs NumPy, and array_record for the files, so that any program may do it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jkd.cache import manifest
from jkd.cache.codec import Answer, Codec
from jkd.cache.keys import KEY_BYTES
from jkd.cache.manifest import DATA, ENTRY, INDEX, LISTED, Facts
from jkd.errors import InputError

RECORD_BYTES = 1 << 16
"""Small answers share a record until it has as many bytes."""


class Writer:
    """Adds answers to the cache in a folder, which is made where it is not there.

        with Writer(folder, TopK(k=64, vocab=151_669), inputs=("tokens",), teacher="Qwen3-4B, revision 1cfa9a7") as writer:
            for tokens in rows:                     # int [time]
                if key(tokens=tokens) not in writer:
                    writer.add(key(tokens=tokens), {"ids": …, "log_probs": …, "leftover": …})

    A program that is killed and started again goes on: shards that were finished count, the one under way is written anew.

    Args:
        folder: a local folder, or a mounted one that all hosts see.
        codec: how answers are coded; see its class for what an answer is.
        inputs: names of the arrays that keys are made of; training makes them of the same ones.
        teacher: any text that no other teacher has; see `Facts`.
        tokenizer: fingerprint of the vocabulary, or None.
        host: (index, count) of this writer, where several fill one cache. A single one seals the cache when it is closed; of
            several, call `seal` when all are closed.
        shard_bytes: size at which a shard is finished, and so what a kill costs at most.

    Raises:
        InputError: the folder holds a cache of another kind (teacher, tokenizer, codec or inputs).
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        codec: Codec,
        *,
        inputs: Sequence[str],
        teacher: str,
        tokenizer: str | None = None,
        host: tuple[int, int] = (0, 1),
        shard_bytes: int = 256 << 20,
    ):
        self.folder, self.codec, self._host, self._shard_bytes = Path(folder), codec, host, shard_bytes
        if isinstance(inputs, str) or not inputs:
            raise InputError(
                f"Writer(inputs={inputs!r}): give the names of the arrays that keys are made of, as in ('tokens',)"
            )
        facts = Facts(codec=codec, inputs=tuple(inputs), teacher=teacher, tokenizer=tokenizer)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "cache.json").exists():
            manifest.write_json(self.folder / "cache.json", facts.to_json())
        facts.check(manifest.read_facts(self.folder), self.folder)
        self._prefix = f"shard-{host[0]:05d}-"
        finished = manifest.shards(self.folder)
        self._known: set[bytes] = set()
        for name in finished:
            self._known.update(map(bytes, np.load(self.folder / f"{name}{INDEX}")["key"]))
        for path in self.folder.glob(f"{self._prefix}*"):
            if path.name.partition(".")[0] not in finished:
                path.unlink()  # of a shard that was being written when its writer was killed
        own = [int(name.removeprefix(self._prefix)) for name in finished if name.startswith(self._prefix)]
        self._number = max(own, default=-1) + 1
        self._shard: Any = None

    def __len__(self) -> int:
        """Examples in the cache: the finished shards of all hosts, and what this writer added."""
        return len(self._known)

    def __contains__(self, key: bytes) -> bool:
        return key in self._known

    def add(self, key: bytes, answer: Answer) -> None:
        """Adds the answer to an example; of one that is there already nothing is changed.

        Args:
            key: what `key` gives for the example's inputs.
            answer: arrays by name, as the codec's class says.

        Raises:
            InputError: the answer is not of that kind, or the key is none.
        """
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise InputError(f"Writer.add({key!r}, …): the key must be what jkd.cache.key gives ({KEY_BYTES} bytes)")
        if key in self._known:
            return
        payload = self.codec.encode(answer)
        if self._shard is None:
            self._shard = _Shard(self.folder / f"{self._prefix}{self._number:05d}")
        self._shard.add(key, payload)
        self._known.add(key)
        if self._shard.bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Finishes the shard under way: what was added so far survives a kill."""
        if self._shard is not None:
            self._shard.finish()
            self._shard, self._number = None, self._number + 1

    def close(self) -> None:
        """Finishes the shard under way, and seals the cache where this is its only writer."""
        self.flush()
        if self._host[1] == 1:
            manifest.seal(self.folder)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if kind is None:
            self.close()
        else:
            self.flush()  # what is there is good; the cache is not whole


class _Shard:
    """A shard under way. Each record holds keys and payloads one behind the other: one where it is large, else many."""

    def __init__(self, path: Path):
        self._path = path
        # every record can then be read by itself; log-probabilities and packed bits do not shrink
        self._file = manifest.array_record().ArrayRecordWriter(str(path) + DATA, "group_size:1,uncompressed")
        self._entries: list[tuple[bytes, int, int, int]] = []
        self._record: list[bytes] = []
        self._records, self._filled, self.bytes = 0, 0, 0

    def add(self, key: bytes, payload: bytes) -> None:
        self._entries.append((key, self._records, self._filled, len(payload)))
        self._record += [key, payload]
        self._filled += len(key) + len(payload)
        self.bytes += len(key) + len(payload)
        if self._filled >= RECORD_BYTES:
            self._write()

    def _write(self) -> None:
        self._file.write(b"".join(self._record))
        self._record, self._filled = [], 0
        self._records += 1

    def finish(self) -> None:
        if self._record:
            self._write()
        self._file.close()
        index = np.zeros(len(self._entries), ENTRY)
        keys, *places = zip(*self._entries, strict=True)
        index["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        for name, column in zip(("record", "start", "size"), places, strict=True):
            index[name] = column
        np.save(str(self._path) + INDEX, index)
        listed: dict[str, Any] = {"examples": len(index), "records": self._records}
        for suffix in (DATA, INDEX):
            path = Path(str(self._path) + suffix)
            _to_disk(path)
            listed[suffix] = manifest.measure(path)
        manifest.write_json(Path(str(self._path) + LISTED), listed)


def _to_disk(path: Path) -> None:
    """A file that is listed must outlive a crash of the machine too."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
