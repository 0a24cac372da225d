"""Text in tables: JSON lines, Parquet, or any sequence of dicts (a Hugging Face ``Dataset`` is one), by the columns they have."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jkd.data.chat import Template
from jkd.data.texts import Document, matching
from jkd.data.tokenizer import Tokenizer
from jkd.errors import InputError, MissingExtra, nearest

COLUMNS = (("messages",), ("prompt", "completion"), ("text",))
"""What is looked for where no columns are named, in this order: a chat, a prompt and its answer, plain text."""

TOOLS = "tools"
"""The column of what a chat's assistant may call, where there is one: JSON schemas, as a list or as text."""


class Records(Protocol):
    """Dicts by number; the repr says which they are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Columns:
    """`Documents` from the columns of a table.

    Args:
        records: dicts with the same keys.
        columns: the column that holds texts or chats, or several that make a conversation, prompt first; None: the first of
            `COLUMNS` that is there.
        tokenizer: whose chat template writes messages.
        template: another one.
        name: for messages.
    """

    def __init__(
        self,
        records: Records,
        columns: str | Sequence[str] | None,
        tokenizer: Tokenizer,
        template: str | None = None,
        name: str = "the table",
    ):
        self._records, self._tokenizer, self._given, self._name = records, tokenizer, template, name
        self._wanted = (columns,) if isinstance(columns, str) else None if columns is None else tuple(columns)

    @functools.cached_property
    def _there(self) -> list[str]:
        names = getattr(self._records, "column_names", None)  # of those that need not read a row for it
        return list(self._records[0]) if names is None else list(names)

    @functools.cached_property
    def _rows(self) -> Records:
        """The records with no more columns than are looked at, where they can leave the others out."""
        select = getattr(self._records, "select_columns", None)
        return self._records if select is None else select([*self._columns, *({TOOLS} & set(self._there) - set(self._columns))])

    @functools.cached_property
    def _columns(self) -> tuple[str, ...]:
        if len(self._records) == 0:
            raise InputError(f"{self._name} has no rows")
        there = self._there
        if self._wanted is not None:
            for column in self._wanted:
                if column not in there:
                    raise InputError(f"{self._name} has no column {column!r}{nearest(column, there)} (columns: {_list(there)})")
            return self._wanted
        for columns in COLUMNS:
            if set(columns) <= set(there):
                return columns
        raise InputError(
            f"{self._name} has none of the columns messages, prompt and completion, or text; name yours with columns=; "
            f"there are: {_list(there)}"
        )

    @functools.cached_property
    def _template(self) -> Template:
        return Template.of(self._tokenizer, self._given)

    @functools.cached_property
    def conversational(self) -> bool:
        return len(self._columns) > 1 or not isinstance(self._rows[0][self._columns[0]], str)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Document:
        columns, record = self._columns, self._rows[index]
        try:
            parts = tuple(record[column] for column in columns)
        except KeyError as error:
            raise InputError(f"{self._name}, row {index}: no column {error}; there are: {_list(record)}") from None
        if len(parts) == 1 and isinstance(parts[0], Sequence) and not isinstance(parts[0], str):
            try:
                return self._template([dict(message) for message in parts[0]], _tools(record.get(TOOLS)))
            except (InputError, TypeError, ValueError) as error:
                raise InputError(f"{self._name}, row {index}: {error}") from error
        for column, part in zip(columns, parts, strict=True):
            if not isinstance(part, str):
                raise InputError(f"{self._name}, row {index}: {column} is {type(part).__name__}, not text")
        return parts[0] if len(parts) == 1 else parts

    def __repr__(self) -> str:
        template = f", template={_sha(repr(self._template).encode())}" if self._chats else ""
        return f"Columns({said(self._records)}, {', '.join(self._columns)}{template})"

    @property
    def revision(self) -> str:
        return getattr(self._records, "revision", "")

    @property
    def _chats(self) -> bool:
        return len(self._columns) == 1 and self.conversational


class JsonLines:
    """A record for each line of some files."""

    def __init__(self, *patterns: str | os.PathLike[str]):
        self._files = matching(*patterns)

    @functools.cached_property
    def _lines(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every line that is not empty: its file, where it begins, and its number there."""
        found: list[tuple[int, int, int]] = []
        for number, path in enumerate(self._files.paths):
            with path.open("rb") as file:
                start = 0
                for count, line in enumerate(file, 1):
                    if line.strip():
                        found.append((number, start, count))
                    start += len(line)
        files, starts, counts = np.array(found, np.int64).reshape(-1, 3).T
        return files, starts, counts

    def __len__(self) -> int:
        return len(self._lines[0])

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        number, start, count = (int(column[index]) for column in self._lines)
        path = self._files.paths[number]
        with path.open("rb") as file:
            file.seek(start)
            line = file.readline()
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {count}: no JSON ({error})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {count}: a {type(record).__name__}, not an object with columns")
        return record

    @property
    def revision(self) -> str:
        return self._files.revision

    def __repr__(self) -> str:
        return repr(self._files)


class Parquet:
    """The rows of some Parquet files. Nothing but the names of columns and the number of rows is read before a row is asked for."""

    def __init__(self, *patterns: str | os.PathLike[str], columns: Sequence[str] | None = None):
        self._patterns, self._chosen = patterns, columns
        self._files = matching(*patterns)

    def select_columns(self, names: Sequence[str]) -> Parquet:
        """The same rows with these columns alone; the others stay on the disk."""
        return Parquet(*self._patterns, columns=list(names))

    @property
    def column_names(self) -> list[str]:
        return list(self._described[0].schema.to_arrow_schema().names) if self._chosen is None else list(self._chosen)

    @functools.cached_property
    def _described(self) -> list[Any]:
        return [_parquet("read_metadata", path) for path in self._files.paths]

    @functools.cached_property
    def _table(self) -> Any:
        import pyarrow

        parts = [_parquet("read_table", path, columns=self._chosen) for path in self._files.paths]
        try:
            return pyarrow.concat_tables(parts).combine_chunks()
        except pyarrow.ArrowException as error:
            raise InputError(f"{self._files.name}: the files' columns differ ({error})") from error

    def __len__(self) -> int:
        return sum(one.num_rows for one in self._described)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return {name: column[index].as_py() for name, column in zip(self._table.column_names, self._table.columns, strict=True)}

    @property
    def revision(self) -> str:
        return self._files.revision

    def __repr__(self) -> str:
        return repr(self._files)


def _parquet(function: str, path: Path, **options: Any) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtra('Parquet files need pyarrow: pip install "jkd[train]"') from error
    try:
        return getattr(parquet, function)(path, **options)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: no Parquet file ({error})") from error


def said(records: Any) -> str:
    """Which records these are, for a config's record: their repr, a data set's own fingerprint, a checksum of a list."""
    kind = type(records).__name__
    if (own := getattr(records, "_fingerprint", None)) is not None:  # of a Hugging Face data set: of all that made it
        return f"{kind}({len(records)} rows, fingerprint={own})"
    if isinstance(records, list | tuple):
        text = json.dumps(records, sort_keys=True, default=repr)
        return f"{kind}({len(records)} rows, sha256={_sha(text.encode())})"
    return repr(records)


def _tools(value: Any) -> Any:
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InputError(f"{TOOLS}: no JSON ({error})") from error
    if found is not None and not (isinstance(found, list) and all(isinstance(tool, Mapping) for tool in found)):
        raise InputError(f"{TOOLS} = {str(value)[:60]}: give a list of JSON schemas, or that list as JSON text")
    return found


def _list(columns: Any) -> str:
    return ", ".join(map(repr, columns))


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
