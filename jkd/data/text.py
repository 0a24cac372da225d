"""Text as rows of tokens: `documents`, `text_files`, `jsonl`, `parquet`, `tfds_text`, `stdlib_text`.

`jkd.data.rows` says what a row holds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from jkd.data.corpus import Layout
from jkd.data.pipeline import Data, Source
from jkd.data.rows import Spread, Text, View
from jkd.data.tables import Columns, JsonLines, Parquet, Records
from jkd.data.texts import Document, Documents, Listed, TfdsText, matching, standard_library
from jkd.data.tokenizer import Bytes, Tokenizer
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
