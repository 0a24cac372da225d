"""Where examples come from when no download is needed: arrays in memory, scikit-learn's digits, and any sequence of records."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jkd.data.batch import Record
from jkd.data.labels import Labelled, check_fraction, checksum, mask_of
from jkd.data.order import check_seed, choose
from jkd.data.pipeline import Data, Map, Source
from jkd.data.vision import pixels
from jkd.errors import InputError, MissingExtra


def arrays(
    *,
    eval: Mapping[str, Any] | None = None,
    classes: int | None = None,
    labelled: float | np.ndarray | None = None,
    seed: int = 0,
    train_maps: Sequence[Map] = (),
    eval_maps: Sequence[Map] = (),
    name: str = "arrays",
    **columns: Any,
) -> Data:
    """Examples that are already in memory: ``arrays(image=x, label=y, eval=dict(image=x_test, label=y_test))``.

    Args:
        eval: the evaluation examples, the same names.
        classes: number of classes; None: the largest label that may be used, plus one.
        labelled: a fraction of the training examples (at most so many, drawn from ``seed`` in proportion to the classes), or a
            mask ``[examples]``. None: all that have a ``label``.
        seed: of that draw.
        train_maps: host-side maps of one training record (`jkd.data.vision`); without them a batch is gathered at once, which is
            much faster, and `jkd.data.augment` crops and flips on the device.
        eval_maps: likewise for evaluation.
        name: for tables and messages.
        **columns: ``[examples, ...]`` each: ``image`` ``[examples, height, width, channels]`` uint8 or float in 0..1, ``label``
            int ``[examples]``, and any others. float64 becomes float32 and int64 int32 in batches.

    Raises:
        InputError: no columns, columns of different lengths, an empty set, ``labelled`` outside 0..1 or of another length.
    """
    train = _columns(columns, name)
    size = len(next(iter(train.values())))
    if labelled is not None:
        train["labelled"] = mask_of(labelled, size, seed, train.get("label"))
    evaluation = None if eval is None else _columns(eval, f"{name} eval")
    if classes is None:
        classes = _count_classes([train, *([evaluation] if evaluation else [])])
    held_out = None if evaluation is None else Arrays(evaluation, classes=classes)
    source = Arrays(train, classes=classes)
    return Data(train=source, eval=held_out, train_maps=tuple(train_maps), eval_maps=tuple(eval_maps), name=name)


def digits(*, labelled: float = 1.0, seed: int = 0, train_maps: Sequence[Map] = (), eval_maps: Sequence[Map] = ()) -> Data:
    """scikit-learn's 1,797 real handwritten digits, 8x8 gray (the test part of UCI's optical recognition set); no download.

    ``image`` is uint8 ``[8, 8, 1]``, the original 0..16 scaled to 0..255; ``label`` 0..9. 360 images (a fifth, in proportion to
    the classes) are for evaluation and 1,437 for training; this split never changes, whatever the seed.

    Args:
        labelled: at most this fraction of the training images keeps its label (0.1: 143 of 1,437), in proportion to the
            classes; the others have ``labelled`` 0.
        seed: of the choice of those.
        train_maps: host-side maps of one training record.
        eval_maps: likewise for evaluation.

    Raises:
        InputError: ``labelled`` outside 0..1, or scikit-learn is not installed.
    """
    check_fraction(labelled)
    return Data(
        train=Digits(split="train", labelled=float(labelled), seed=check_seed(seed)),
        eval=Digits(split="eval"),
        train_maps=tuple(train_maps),
        eval_maps=tuple(eval_maps),
        name="digits",
    )


def source(
    train: Any,
    *,
    eval: Any = None,
    columns: Mapping[str, str] | None = None,
    classes: int | None = None,
    labelled: float | np.ndarray | None = None,
    seed: int = 0,
    train_maps: Sequence[Map] = (),
    eval_maps: Sequence[Map] = (),
    threads: int | None = None,
    workers: int = 0,
    name: str | None = None,
) -> Data:
    """Examples from anything with ``__len__`` and ``__getitem__`` (index to dict): a list, a PyTorch-style dataset, a database,
    a Hugging Face ``Dataset``: ``source(load_dataset("cifar10", split="train"), columns={"image": "img"}, …)``. Of text see
    `jkd.data.documents`, which takes the same objects.

    Args:
        train: gives ``dict(image=…, label=…)``; values that are not numbers (names, file paths) reach the maps and then go.
            It is read from several threads at once, through ``__getitems__`` (indices to a list of dicts) where it has that.
            Images that Pillow has opened become RGB (gray ones, one channel).
        eval: likewise, or None.
        columns: ``{key: theirs}`` where they call something otherwise; what no entry names keeps its name.
        classes: number of classes; labels are checked against it. None: what a Hugging Face ``Dataset`` says of its labels, else
            unknown and unchecked.
        labelled: a fraction of the training examples (at most so many, drawn from ``seed`` regardless of class: labels are not
            read beforehand), or a mask ``[examples]``.
        seed: of that draw.
        train_maps: host-side maps of one training record, in order.
        eval_maps: likewise for evaluation.
        threads: see `Data`.
        workers: see `Data`; the object must then be picklable.
        name: for tables and messages; default: the object's type.

    Raises:
        InputError: no ``__len__`` or ``__getitem__``, an empty set, a column that is not there, ``labelled`` outside 0..1 or of
            another length.
    """
    name = name or type(train).__name__
    for kind, each in (("train", train), ("eval", eval)):
        if each is not None and not (hasattr(each, "__len__") and hasattr(each, "__getitem__")):
            raise InputError(f"data.source({kind}={type(each).__name__}): needs __len__ and __getitem__")
    if len(train) == 0 or (eval is not None and len(eval) == 0):
        raise InputError(f"{name}: the {'training' if len(train) == 0 else 'evaluation'} set is empty")
    columns = dict(columns or {})
    features: Any = getattr(train, "features", None)
    label = features.get(columns.get("label", "label")) if hasattr(features, "get") else None
    if classes is None:
        classes = getattr(label, "num_classes", None)
    names = tuple(getattr(label, "names", None) or ())
    records: Source = Records(train, classes=classes, columns=columns, names=names)
    if labelled is not None:
        mask_of(labelled, len(train), seed)  # says at once what is wrong with it
        records = Labelled(records, labelled, seed)
    return Data(
        train=records,
        eval=None if eval is None else Records(eval, classes=classes, columns=columns, names=names),
        train_maps=tuple(train_maps),
        eval_maps=tuple(eval_maps),
        threads=threads,
        workers=workers,
        name=name,
    )


class Arrays:
    """A `Source` in memory: ``columns`` by name, each ``[examples, ...]``. Its repr holds a checksum of the contents."""

    def __init__(self, columns: Mapping[str, np.ndarray], *, classes: int | None = None):
        self._columns = dict(columns)
        self.classes = classes

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def columns(self) -> Mapping[str, np.ndarray]:
        return self._columns

    def records(self, indices: Sequence[int]) -> list[Record]:
        return [{name: column[index] for name, column in self._columns.items()} for index in indices]

    def example(self) -> Record:
        return self.records([0])[0]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={column.dtype}{list(column.shape)}" for name, column in self._columns.items())
        return f"Arrays({shapes}, classes={self.classes}, sha256={self._sha256})"

    @functools.cached_property
    def _sha256(self) -> str:
        return checksum(self._columns)


@dataclasses.dataclass(frozen=True)
class Digits:
    """A `Source`: one part of the digits; loaded when first read."""

    split: str
    labelled: float = 1.0
    seed: int = 0
    classes = 10

    def __len__(self) -> int:
        return len(self.columns()["label"])

    def columns(self) -> Mapping[str, np.ndarray]:
        return _digits(self.split, self.labelled, self.seed)

    def records(self, indices: Sequence[int]) -> list[Record]:
        return [{name: column[index] for name, column in self.columns().items()} for index in indices]

    def example(self) -> Record:
        return self.records([0])[0]


@functools.lru_cache(maxsize=8)
def _digits(split: str, labelled: float, seed: int) -> dict[str, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra('digits need scikit-learn: pip install "jkd[train]"') from error
    raw = load_digits()
    held_out = choose(raw.target, 360, seed=0)
    rows = held_out if split == "eval" else ~held_out
    image = np.round(raw.images[rows, :, :, None] * (255 / 16)).astype(np.uint8)
    label = raw.target[rows].astype(np.int32)
    return {"image": image, "label": label, "labelled": mask_of(labelled, len(label), seed, label)}


class Records:
    """A `Source` that reads one record after another from an object with ``__len__`` and ``__getitem__``."""

    def __init__(
        self, read: Any, *, classes: int | None = None, columns: Mapping[str, str] | None = None, names: Sequence[str] = ()
    ):
        self._read = read
        self._columns = dict(columns or {})
        self.classes, self.names = classes, tuple(names)

    def __len__(self) -> int:
        return len(self._read)

    def columns(self) -> None:
        return None

    def records(self, indices: Sequence[int]) -> list[Record]:
        many = getattr(self._read, "__getitems__", None)
        records = list(many(list(indices))) if many is not None else [self._record(index) for index in indices]
        for position, (index, record) in enumerate(zip(indices, records, strict=True)):
            if not isinstance(record, Mapping):
                raise InputError(f"record {index} is a {type(record).__name__}, not a dict like dict(image=…, label=…)")
            records[position] = self._named(dict(record), index)
        return records

    def _record(self, index: int) -> Any:
        try:
            return self._read[index]
        except InputError:
            raise
        except Exception as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise InputError(
                f"record {index} of {type(self._read).__name__}: {type(error).__name__}{': ' if text else ''}{text}"
            ) from error

    def _named(self, record: Record, index: int) -> Record:
        """A copy (maps may change it in place, and the object may hand out what it keeps) under the names that batches have."""
        for theirs in self._columns.values():
            if theirs not in record:
                raise InputError(f"record {index} has no column {theirs!r}; there are: {', '.join(map(repr, record))}")
        taken = {name: record[theirs] for name, theirs in self._columns.items()}
        record = {name: value for name, value in record.items() if name not in self._columns.values()} | taken
        image = record.get("image")
        mode = getattr(image, "mode", None)
        if mode is not None and hasattr(image, "convert"):  # Pillow's, which need not be installed
            record["image"] = pixels(image, 1 if mode in ("1", "L") else 3)
        return record

    def example(self) -> Record:
        return self.records([0])[0]

    def __repr__(self) -> str:
        own = getattr(self._read, "_fingerprint", None)  # a Hugging Face data set's, of all that made it
        more = (f", fingerprint={own}" if own else "") + (f", columns={self._columns}" if self._columns else "")
        return f"Records({type(self._read).__name__}, {len(self)} examples, classes={self.classes}{more})"


def _columns(columns: Mapping[str, Any], name: str) -> dict[str, np.ndarray]:
    if not columns:
        raise InputError(f"{name}: no columns; give at least image= or tokens=")
    given = {key: np.asarray(value) for key, value in columns.items()}
    sizes = {key: len(value) if value.ndim else None for key, value in given.items()}
    if len(set(sizes.values())) != 1 or None in sizes.values():
        raise InputError(f"{name}: columns must have one length, not {sizes}")
    if 0 in sizes.values():
        raise InputError(f"{name}: the data set is empty")
    return given


def _count_classes(sets: Sequence[Mapping[str, np.ndarray]]) -> int | None:
    found = []
    for columns in sets:
        label = columns.get("label")
        if label is not None and label.ndim == 1 and label.dtype.kind in "iu":
            used = label[columns["labelled"] > 0] if "labelled" in columns else label
            found += [int(used.max()) + 1] if used.size else []
        elif label is not None and label.ndim == 2:
            found.append(label.shape[1])
    return max(found) if found else None


_: type[Source] = Digits  # mypy checks here that it fits the protocol
