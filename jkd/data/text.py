"""Text as rows of tokens: `documents`, `text_files`, `jsonl`, `parquet`, `tfds_text`, `stdlib_text`.

Records hold ``tokens`` int32 ``[length]``, ``mask`` (1 = real), ``segment`` (0 is padding, documents count from 1), where there are
prompts ``loss_mask`` (1 = counted), and in evaluation ``bytes``: how much of the text each token stands for, which is what bits per
byte are divided by. For a teacher of another vocabulary the same documents stand there once more, as ``teacher_tokens`` and so on.
What they mean to a model is in `jkd.tokens`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jkd.data import corpus as tokenised
from jkd.data.batch import Record
from jkd.data.corpus import Corpus, Layout, Piece, Rows
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
    teacher_tokenizer: Tokenizer | None = None,
    teacher_length: int | None = None,
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
            is counted, and no more (`jkd.data.chat.Template`). It sees the column ``tools``, where there is one.
        layout: ``stream``: the documents one after the other, cut into rows; ``fit``: whole documents, as many in a row as fit;
            ``pad``: one document in a row. The last two cut what is longer than a row.
        eval_rows: evaluate so many rows, spread over the evaluation text; None: all.
        folder: where the numbers are kept for the next time and mapped into memory from; None holds them in memory.
        teacher_tokenizer: of a teacher with another vocabulary (`recipes.ULD`): rows then hold its view of their documents too. It
            needs whole documents, so ``layout`` must be ``fit`` or ``pad``; a template is of both.
        teacher_length: tokens in a row of that view, cut where there are more; None: ``length``.
        name: for tables and messages.

    Raises:
        InputError: ``length`` below 2, ``eval_rows`` below 1, a ``teacher_tokenizer`` for a stream; and, when first read, no text, or
            text that cannot be read.
    """
    if min(length, teacher_length or length) < 2:
        raise InputError(f"{name}: length={length}, teacher_length={teacher_length}: a row needs at least 2 tokens")
    if teacher_tokenizer is not None and layout == "stream":
        raise InputError(
            f"{name}: layout='stream' cuts documents where the student's tokens end; with a teacher_tokenizer give 'fit' or 'pad'"
        )
    if eval_rows is not None and eval_rows < 1:
        raise InputError(f"{name}: eval_rows={eval_rows}: must be at least 1, or None for all")
    tokenizer = Bytes() if tokenizer is None else tokenizer
    place = None if folder is None else os.fspath(folder)

    def source(texts: Any, bytes: bool = False) -> Text:
        if not (hasattr(texts, "__len__") and hasattr(texts, "__getitem__")):
            raise InputError(f"{name}: a {type(texts).__name__} is no text: it needs __len__ and __getitem__")
        # what is read from files says what it is, and is not opened yet
        said = isinstance(texts, JsonLines | Parquet) or hasattr(texts, "conversational")
        records = isinstance(texts, JsonLines | Parquet) or (not said and len(texts) and isinstance(texts[0], Mapping))

        def view(tokenizer: Tokenizer, length: int) -> View:
            if records:
                return View(Columns(texts, columns, tokenizer, template, name), tokenizer, length, place)
            return View(Listed(texts) if isinstance(texts, list | tuple) else texts, tokenizer, length, place)

        theirs = None if teacher_tokenizer is None else view(teacher_tokenizer, teacher_length or length)
        return Text(view(tokenizer, length), layout, teacher=theirs, bytes=bytes)

    held_out: Source | None = None if eval is None else source(eval, bytes=True)
    if held_out is not None and eval_rows is not None:
        held_out = Spread(held_out, eval_rows)
    return Data(train=source(train), eval=held_out, tokenizer=tokenizer, teacher_tokenizer=teacher_tokenizer, name=name)


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
    """Parquet files by glob patterns, with columns as `jsonl` has them. Columns that are looked at are read into memory, no others."""
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


@dataclasses.dataclass(frozen=True)
class View:
    """Documents as one tokenizer cuts them; they are read, and numbered, when first asked for.

    Args:
        texts: the documents.
        tokenizer: makes numbers of them.
        length: tokens in a row.
        folder: where the numbers are kept; None: in memory.
    """

    texts: Documents
    tokenizer: Tokenizer
    length: int
    folder: str | None = None

    @functools.cached_property
    def corpus(self) -> Corpus:
        return tokenised.read(self.texts, self.tokenizer, self.folder)

    @functools.cached_property
    def prompts(self) -> bool:
        return conversational(self.texts)

    def whole(self, document: int) -> slice:
        """Where it lies in the corpus."""
        start, stop = self.corpus.starts[document : document + 2]
        return slice(int(start), int(stop))

    def density(self, document: int) -> float:
        """Bytes that each of its tokens stands for; spread evenly, as a tokenizer does not always say."""
        where = self.whole(document)
        return self.corpus.bytes[document] / (where.stop - where.start)

    def row(self, pieces: Sequence[slice]) -> Record:
        """A row that holds these parts of the corpus, each a document, as far as there is room."""
        kinds = {"tokens": np.int32, "mask": np.uint8, "segment": np.int32} | ({"loss_mask": np.uint8} if self.prompts else {})
        record: Record = {name: np.zeros(self.length, kind) for name, kind in kinds.items()}
        filled = 0
        for number, piece in enumerate(pieces, start=1):
            piece = slice(piece.start, min(piece.stop, piece.start + self.length - filled))
            own = slice(filled, filled + piece.stop - piece.start)
            record["tokens"][own] = self.corpus.tokens[piece]
            record["mask"][own] = 1
            record["segment"][own] = number
            if self.prompts:
                record["loss_mask"][own] = True if self.corpus.counted is None else self.corpus.counted[piece]
            filled = own.stop
        return record

    def __repr__(self) -> str:
        return f"{self.texts!r}, tokenizer={self.tokenizer.fingerprint[:8]}, length={self.length}"


class Text:
    """A `Source` of rows.

    Args:
        own: the student's view, by which rows are made.
        layout: see `documents`.
        teacher: another one of the same documents.
        bytes: whether rows say how much of the text each token stands for.
    """

    classes = None

    def __init__(self, own: View, layout: Layout = "stream", *, teacher: View | None = None, bytes: bool = False):
        self._own, self._layout, self._teacher, self._bytes = own, layout, teacher, bytes

    @functools.cached_property
    def _rows(self) -> Rows:
        return Rows(self._own.corpus, self._own.length, self._layout)

    def __len__(self) -> int:
        return len(self._rows)

    def columns(self) -> None:
        return None

    def records(self, indices: Sequence[int]) -> list[Record]:
        return [self._record(self._rows[index]) for index in indices]

    def _record(self, pieces: Sequence[Piece]) -> Record:
        record = self._own.row([slice(piece.start, piece.stop) for piece in pieces])
        if self._bytes:
            record["bytes"] = np.zeros(self._own.length, np.float32)
            for number, piece in enumerate(pieces, start=1):
                record["bytes"][record["segment"] == number] = self._own.density(piece.document)
        if self._teacher is not None:
            theirs = self._teacher.row([self._teacher.whole(piece.document) for piece in pieces])
            record |= {f"teacher_{name}": column for name, column in theirs.items()}
        return record

    def example(self) -> Record:
        """A row of padding: the text need not be on this machine."""
        return self._record([])

    def __repr__(self) -> str:
        theirs = "" if self._teacher is None else f", teacher=({self._teacher!r})"
        return f"Text({self._own!r}, layout={self._layout}{theirs})"


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
