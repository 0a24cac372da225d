"""Documents as a source of rows of tokens.

Records hold ``tokens`` int32 ``[length]``, ``mask`` (1 = real), ``segment`` (0 is padding, documents count from 1), where there are
prompts ``loss_mask`` (1 = counted), and in evaluation ``bytes``: how much of the text each token stands for, which is what bits per
byte are divided by. For a teacher of another vocabulary the same documents stand there once more, as ``teacher_tokens`` and so on.
What they mean to a model is in `jkd.tokens`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jkd.data import corpus as tokenised
from jkd.data.batch import Record
from jkd.data.corpus import Corpus, Layout, Piece, Rows
from jkd.data.pipeline import Source
from jkd.data.texts import Documents, conversational
from jkd.data.tokenizer import Tokenizer
from jkd.data.views import Subset


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
        layout: see `jkd.data.documents`.
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
