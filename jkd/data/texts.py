"""Where texts come from: files, the Python standard library, TensorFlow Datasets, or anything that can be indexed."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jkd.data.published import open_split, prepared_version
from jkd.errors import InputError

Document = str | tuple[str, ...]
"""A text; or a conversation ``(prompt, response, prompt, response, …)``, of which the responses alone are counted."""


class Written(tuple[str, ...]):
    """A conversation that a template wrote out, in the same order: the tokens around it are in it, and none are added."""


@runtime_checkable
class Documents(Protocol):
    """Texts by number. Their ``repr`` says which they are, for a config's record. Where it leaves room for others of that name (files
    that were written anew), ``revision``, a text, tells them apart: numbers that were kept on disk are of one revision."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Document: ...


def conversational(documents: Documents) -> bool:
    """Whether there are prompts, which are not counted. TFDS sets and files say so without being read."""
    said = getattr(documents, "conversational", None)
    return isinstance(documents[0], tuple) if said is None else said


class Listed:
    """Texts in memory; the repr holds a checksum of them.

    Raises:
        InputError: an item is neither a text nor a tuple of texts.
    """

    def __init__(self, items: Sequence[Document]):
        self._items = [tuple(item) if isinstance(item, list) else item for item in items]
        for place, item in enumerate(self._items):
            if not isinstance(item, str) and not (isinstance(item, tuple) and all(isinstance(part, str) for part in item)):
                raise InputError(f"document {place} is {type(item).__name__}: give a text, or (prompt, response)")

    @property
    def conversational(self) -> bool:
        return any(isinstance(item, tuple) for item in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Document:
        return self._items[index]

    def __repr__(self) -> str:
        said = hashlib.sha256()
        for item in self._items:
            for part in (item,) if isinstance(item, str) else item:
                said.update(len(part).to_bytes(8, "little") + part.encode(errors="surrogatepass"))
            said.update(b"\xff" * 8)
        return f"Listed({len(self)} documents, sha256={said.hexdigest()[:16]})"


class Files:
    """A document for each file, read when asked for; the repr holds a checksum of their names and sizes.

    Args:
        name: for messages.
        find: gives the folder that names are relative to, and the files in order.
    """

    conversational = False

    def __init__(self, name: str, find: Callable[[], tuple[Path, list[Path]]]):
        self.name, self._find = name, find

    @property
    def paths(self) -> list[Path]:
        return self._files[1]

    @functools.cached_property
    def _files(self) -> tuple[Path, list[Path]]:
        root, files = self._find()
        if not files:
            raise InputError(f"{self.name}: no files")
        return root, files

    def __len__(self) -> int:
        return len(self._files[1])

    def __getitem__(self, index: int) -> str:
        path = self._files[1][index]
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: no UTF-8 text ({error.reason} at byte {error.start})") from error

    @property
    def revision(self) -> str:
        """When each file was written."""
        return hashlib.sha256(repr([path.stat().st_mtime_ns for path in self.paths]).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        root, files = self._files
        sizes = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in files]
        said = hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]
        return f"Files({self.name}, {len(files)} files, {sum(size for _, size in sizes)} bytes, sha256={said})"


def matching(*patterns: str | os.PathLike[str]) -> Files:
    """The files that glob patterns name (``**`` for folders within folders), sorted, each once."""

    def find() -> tuple[Path, list[Path]]:
        found: set[str] = set()
        for pattern in patterns:
            here = [path for path in glob.glob(os.fspath(pattern), recursive=True) if os.path.isfile(path)]
            if not here:
                raise InputError(f"{os.fspath(pattern)}: no such file")
            found.update(map(os.path.abspath, here))
        root = Path(os.path.commonpath([os.path.dirname(path) for path in found]))
        return root, [Path(path) for path in sorted(found)]

    return Files(", ".join(os.fspath(pattern) for pattern in patterns), find)


_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}


def standard_library(part: Literal["train", "eval"]) -> Files:
    """The source files of this Python's standard library but its tests and its tables of character sets, about 10 MB.

    A file is in ``eval`` (about one in twenty) by a hash of its name, so that every Python splits it alike.
    """

    def find() -> tuple[Path, list[Path]]:
        root = Path(sysconfig.get_paths()["stdlib"])
        names = []
        for folder, folders, files in os.walk(root):
            folders[:] = set(folders) - _LEFT_OUT  # not to be looked into: installed packages lie among them
            names += [(Path(folder) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
        held_out = {name for name in names if hashlib.sha256(name.encode()).digest()[0] % 20 == 0}
        chosen = [root / name for name in sorted(names) if (name in held_out) == (part == "eval")]
        return root, chosen

    return Files(f"standard library, {part}", find)


class TfdsText:
    """One split of a text set of TFDS, prepared as ArrayRecord; opened when first read.

    Args:
        name, split, data_dir: as in `jkd.data.tfds`.
        features: the feature that holds the text, or several: a conversation, prompt first.
    """

    def __init__(self, name: str, split: str, data_dir: str | None, features: tuple[str, ...]):
        self._name, self._split, self._data_dir, self._features = name, split, data_dir, features
        self.conversational = len(features) > 1

    @functools.cached_property
    def _records(self) -> Any:
        records = open_split(self._name, self._data_dir, self._split)
        if len(records):
            for feature in self._features:
                if feature not in records[0]:
                    raise InputError(f"TFDS data set {self._name!r} has no feature {feature!r} but {sorted(records[0])}")
        return records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        record = self._records[index]
        parts = tuple(_text(record[feature]) for feature in self._features)
        return parts[0] if len(parts) == 1 else parts

    @property
    def revision(self) -> str:
        """Which version it is, and when it was prepared; the set must be there."""
        return prepared_version(self._name, self._data_dir)

    def __repr__(self) -> str:
        where = "" if self._data_dir is None else f", data_dir={self._data_dir!r}"
        return f"TfdsText({self._name!r}, {self._split!r}, {', '.join(self._features)}{where})"


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
