"""Text as rows of tokens: `documents`, `text_files`, `jsonl`, `parquet`, `tfds_text`, `stdlib_text`.

Records hold ``tokens`` int32 ``[length]``, ``mask`` (1 = real), ``segment`` (0 is padding, documents count from 1), where there are
prompts ``loss_mask`` (1 = counted), and in evaluation ``bytes``: how much of the text each token stands for, which is what bits per
byte are divided by. What they mean to a model is in `jkd.tokens`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jkd.data import corpus as tokenised
from jkd.data.batch import Record
from jkd.data.corpus import Corpus, Layout, Rows
from jkd.data.pipeline import Data, Source
from jkd.data.tables import Columns, JsonLines, Parquet, Records
from jkd.data.texts import Document, Documents, Listed, TfdsText, conversational, matching, standard_library
from jkd.data.tokenizer import Bytes, Tokenizer
from jkd.data.views import Subset
from jkd.errors import InputError


def documents(
    train: Documents | Records | Sequence[Document],
    *,
    eval: Documents | Records | Sequence[Document] | None = None,
    length: int,
    tokenizer: Tokenizer | None = None,
    columns: str | Sequence[str] | None = None,
    template: str | None = None,
    layout: Layout = "stream",
    eval_rows: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    name: str = "documents",
) -> Data:
    """Texts, or conversations ``(prompt, response, …)``, as rows of tokens.

    No token sees, or is predicted from, another document of its row. A row is found by its number alone, so training goes on
    at the same row after a restart, on any number of hosts.

    Args:
        train: a list, or anything with ``__len__`` and ``__getitem__`` whose repr says what it is. Its items may be dicts, as
            those of a Hugging Face ``Dataset`` are: see ``columns``.
        eval: likewise for evaluation.
        length: tokens in a row.
        tokenizer: bytes by default; `jkd.data.tokenizer.File` reads a tokenizer.json.
        columns: of dicts: the one that holds text or chat messages (``[{"role": …, "content": …}, …]``), or several that make a
            conversation, prompt first; None: ``messages``, else ``prompt`` and ``completion``, else ``text``.
        template: of chats, in Jinja; None: the one published with the tokenizer. What assistants say, with the end of their turn,
            is counted, and no more (`jkd.data.chat.Template`).
        layout: ``stream``: the documents one after the other, cut into rows; ``fit``: whole documents, as many in a row as fit;
            ``pad``: one document in a row. The last two cut what is longer than a row.
        eval_rows: evaluate so many rows, spread over the evaluation text; None: all.
        folder: where the numbers are kept for the next time and mapped into memory from; None holds them in memory.
        name: for tables and messages.

    Raises:
        InputError: ``length`` below 2, ``eval_rows`` below 1; and, when first read, no text, or text that cannot be read.
    """
    if length < 2:
        raise InputError(f"{name}: length={length}: a row needs at least 2 tokens")
    if eval_rows is not None and eval_rows < 1:
        raise InputError(f"{name}: eval_rows={eval_rows}: must be at least 1, or None for all")
    tokenizer = Bytes() if tokenizer is None else tokenizer
    place = None if folder is None else os.fspath(folder)

    def source(texts: Any, **options: Any) -> Text:
        if not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
            raise InputError(f"{name}: a {type(texts).__name__} is no text: it needs __len__ and __getitem__")
        # what is read from files says what it is, and is not opened yet
        said = isinstance(texts, JsonLines | Parquet) or hasattr(texts, "conversational")
        if isinstance(texts, JsonLines | Parquet) or (not said and len(texts) and isinstance(texts[0], Mapping)):
            texts = Columns(texts, columns, tokenizer, template, name)
        elif isinstance(texts, list | tuple):
            texts = Listed(texts)
        return Text(texts, tokenizer, length, layout, place, **options)

    held_out: Source | None = None if eval is None else source(eval, bytes=True)
    if held_out is not None and eval_rows is not None:
        held_out = Spread(held_out, eval_rows)
    return Data(train=source(train), eval=held_out, tokenizer=tokenizer, name=name)


def text_files(
    train: str | Sequence[str], *, eval: str | Sequence[str] | None = None, name: str = "text", **options: Any
) -> Data:
    """Text files by glob patterns: ``text_files("corpus/train/**/*.txt", eval="corpus/valid/*.txt", length=1024)``.

    Args:
        train: pattern, or several; ``**`` stands for folders within folders. A file is a document.
        eval: likewise.
        name: for tables and messages.
        **options: see `documents`.
    """

    def found(patterns: str | Sequence[str]) -> Documents:
        return matching(*([patterns] if isinstance(patterns, str) else patterns))

    return documents(found(train), eval=None if eval is None else found(eval), name=name, **options)


def jsonl(train: str | Sequence[str], *, eval: str | Sequence[str] | None = None, name: str = "jsonl", **options: Any) -> Data:
    """JSON lines by glob patterns: ``jsonl("chats/train-*.jsonl", eval="chats/valid.jsonl", tokenizer=…, length=1024)``.

    Each line is an object with ``messages`` (a chat), ``prompt`` and ``completion``, or ``text``; or name ``columns``.

    Args:
        train: pattern, or several.
        eval: likewise.
        name: for tables and messages.
        **options: see `documents`.

    Raises:
        InputError: when first read: no such file, a line that is no JSON object, a column that is not there (it lists those that
            are), messages without a chat template.
    """
    return _table(JsonLines, train, eval, name, options)


def parquet(
    train: str | Sequence[str], *, eval: str | Sequence[str] | None = None, name: str = "parquet", **options: Any
) -> Data:
    """Parquet files by glob patterns, with columns as `jsonl` has them; they are held in memory as Arrow has them."""
    return _table(Parquet, train, eval, name, options)


def _table(kind: Any, train: Any, eval: Any, name: str, options: dict[str, Any]) -> Data:
    def found(patterns: str | Sequence[str]) -> Any:
        return kind(*([patterns] if isinstance(patterns, str) else patterns))

    return documents(found(train), eval=None if eval is None else found(eval), name=name, **options)


def tfds_text(
    name: str,
    *,
    split: str = "train",
    eval_split: str | None = "test",
    data_dir: str | os.PathLike[str] | None = None,
    feature: str | Sequence[str] = "text",
    **options: Any,
) -> Data:
    """A text set of TFDS, prepared as ArrayRecord (see `jkd.data.tfds`): ``tfds_text("lm1b", length=256, folder="tokens")``.

    Args:
        name, split, eval_split, data_dir: see `jkd.data.tfds`.
        feature: that holds the text; several are a conversation: ``("question", "answer")``.
        **options: see `documents`.
    """
    features = (feature,) if isinstance(feature, str) else tuple(feature)
    place = None if data_dir is None else os.fspath(data_dir)

    def part(split: str) -> TfdsText:
        return TfdsText(name, split, place, features)

    return documents(part(split), eval=None if eval_split is None else part(eval_split), name=name, **options)


def stdlib_text(*, length: int = 256, eval_rows: int | None = 256, **options: Any) -> Data:
    """The Python standard library's own source text, about 10 MB on every machine, without its tests; no download.

    One file in twenty is held out, by a hash of its name. Which text it is depends on the version of Python.

    Args:
        length: tokens in a row.
        eval_rows: rows to evaluate, spread over the files that are held out.
        **options: see `documents`.
    """
    train, held_out = standard_library("train"), standard_library("eval")
    return documents(train, eval=held_out, length=length, eval_rows=eval_rows, name="stdlib", **options)


class Text:
    """A `Source` of rows; the documents are read, and numbered, when the first row is."""

    classes = None

    def __init__(
        self,
        texts: Documents,
        tokenizer: Tokenizer,
        length: int,
        layout: Layout = "stream",
        folder: str | None = None,
        *,
        bytes: bool = False,
    ):
        self._texts, self._tokenizer, self._length, self._layout = texts, tokenizer, length, layout
        self._folder, self._bytes = folder, bytes

    @functools.cached_property
    def _corpus(self) -> Corpus:
        return tokenised.read(self._texts, self._tokenizer, self._folder)

    @functools.cached_property
    def _prompts(self) -> bool:
        return conversational(self._texts)

    @functools.cached_property
    def _rows(self) -> Rows:
        return Rows(self._corpus, self._length, self._layout)

    def __len__(self) -> int:
        return len(self._rows)

    def columns(self) -> None:
        return None

    def records(self, indices: Sequence[int]) -> list[Record]:
        return [self._record(index) for index in indices]

    def _record(self, index: int) -> Record:
        corpus, record = self._corpus, self.example()
        filled = 0
        for number, piece in enumerate(self._rows[index], start=1):
            own = slice(filled, filled + piece.stop - piece.start)
            record["tokens"][own] = corpus.tokens[piece.start : piece.stop]
            record["mask"][own] = 1
            record["segment"][own] = number
            if self._prompts:
                record["loss_mask"][own] = True if corpus.counted is None else corpus.counted[piece.start : piece.stop]
            if self._bytes:
                # Spread evenly: which token stands for how many bytes, a tokenizer does not always say.
                document = corpus.starts[piece.document + 1] - corpus.starts[piece.document]
                record["bytes"][own] = corpus.bytes[piece.document] / document
            filled = own.stop
        return record

    def example(self) -> Record:
        """A row of padding: the text need not be on this machine."""
        kinds: dict[str, Any] = {"tokens": np.int32, "mask": np.uint8, "segment": np.int32}
        kinds |= {"loss_mask": np.uint8} if self._prompts else {}
        kinds |= {"bytes": np.float32} if self._bytes else {}
        return {name: np.zeros(self._length, kind) for name, kind in kinds.items()}

    def __repr__(self) -> str:
        said = f"{self._texts!r}, tokenizer={self._tokenizer.fingerprint[:8]}, length={self._length}, layout={self._layout}"
        return f"Text({said})"


class Spread:
    """A `Source`: so many rows of another, evenly spread over it."""

    classes = None

    def __init__(self, inner: Source, rows: int):
        self._whole, self._wanted = inner, rows

    @functools.cached_property
    def _inner(self) -> Subset:
        size = len(self._whole)
        count = min(size, self._wanted)
        return Subset(self._whole, (np.arange(count) * size) // count)

    def __len__(self) -> int:
        return len(self._inner)

    def columns(self) -> None:
        return None

    def records(self, indices: Sequence[int]) -> list[Record]:
        return self._inner.records(indices)

    def example(self) -> Record:
        return self._whole.example()

    def __repr__(self) -> str:
        return f"Spread({self._whole!r}, {self._wanted})"
