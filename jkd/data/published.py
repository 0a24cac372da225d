"""Data sets by name from TensorFlow Datasets, read without TensorFlow: ArrayRecord for random access, Pillow for pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jkd.data.batch import Record
from jkd.data.labels import Labelled
from jkd.data.pipeline import Data, Map
from jkd.data.vision import decode_image
from jkd.errors import InputError, MissingExtra, nearest


def tfds(
    name: str,
    *,
    split: str = "train",
    eval_split: str | None = "test",
    data_dir: str | os.PathLike[str] | None = None,
    image: str = "image",
    label: str | None = "label",
    labelled: float | np.ndarray | None = None,
    seed: int = 0,
    train_maps: Sequence[Map] = (),
    eval_maps: Sequence[Map] = (),
    in_memory: bool = False,
    threads: int | None = None,
    workers: int = 0,
) -> Data:
    """An image data set of TFDS: ``tfds("cifar100")``, ``tfds("imagenet2012", eval_split="validation", …)``.

    Nothing is opened here: a config may name a set that this machine doesn't have. The set must have been prepared once as
    ArrayRecord, which needs TensorFlow: ``tfds build cifar100 --file_format=array_record --data_dir=…``.

    Args:
        name: as in TFDS, ``name``, ``name/config`` or ``name/config:version``.
        split: of the training examples; slices work (``"train[:90%]"``).
        eval_split: likewise, or None.
        data_dir: where prepared sets lie; None: ``$TFDS_DATA_DIR``, else ``~/tensorflow_datasets``.
        image: the feature that becomes ``image``.
        label: the feature that becomes ``label`` (``"coarse_label"`` of CIFAR-100), None for none.
        labelled: a fraction of the training examples (at most so many, drawn from ``seed``; in proportion to the classes with
            ``in_memory``, else regardless of class: labels are not read beforehand), or a mask ``[examples]``.
        seed: of that draw.
        train_maps: host-side maps of one training record, in order (`jkd.data.vision`).
        eval_maps: likewise for evaluation.
        in_memory: decode every image once and keep it (images of one size only). CIFAR takes 0.2 GB and then costs a batch
            what an array costs, with `jkd.data.augment` for crops and flips.
        threads: see `Data`.
        workers: see `Data`.

    Raises:
        InputError: when first used: no such set (the nearest names are given), split or feature; not prepared, or prepared in
            another format (the command that prepares it is given).
    """
    folder = None if data_dir is None else os.fspath(data_dir)

    def part(split: str) -> Tfds:
        return Tfds(name=name, split=split, data_dir=folder, image=image, label=label, in_memory=in_memory)

    return Data(
        train=part(split) if labelled is None else Labelled(part(split), labelled, seed),
        eval=None if eval_split is None else part(eval_split),
        train_maps=tuple(train_maps),
        eval_maps=tuple(eval_maps),
        threads=threads,
        workers=workers,
        name=name,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tfds:
    """A `Source`: one split, opened when first read (again in every worker process)."""

    name: str
    split: str
    data_dir: str | None = None
    image: str = "image"
    label: str | None = "label"
    in_memory: bool = False

    @property
    def classes(self) -> int | None:
        feature = None if self.label is None else self._feature(self.label)
        return getattr(feature, "num_classes", None)

    @property
    def names(self) -> tuple[str, ...]:
        """The classes; empty where the set does not name them."""
        feature = None if self.label is None else self._feature(self.label)
        return tuple(getattr(feature, "names", None) or ())

    def __len__(self) -> int:
        return len(open_split(self.name, self.data_dir, self.split, self.image))

    def columns(self) -> Mapping[str, np.ndarray] | None:
        return _load(self) if self.in_memory else None

    def records(self, indices: Sequence[int]) -> list[Record]:
        found = open_split(self.name, self.data_dir, self.split, self.image).__getitems__(list(indices))
        channels = self._image_shape()[-1]
        records = []
        for index, each in zip(indices, found, strict=True):
            try:
                record: Record = {"image": decode_image(each[self.image], channels)}
            except InputError as error:
                raise InputError(f"{self.name} {self.split}, record {index}: {error}") from error
            if self.label is not None:
                record["label"] = each[self.label]
            records.append(record)
        return records

    def example(self) -> Record:
        """A black image of the right size, known from the set's description even where the set isn't prepared."""
        label = {} if self.label is None else {"label": np.int32(0)}
        return {"image": np.zeros(self._image_shape(), np.uint8), **label}

    def _image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self._feature(self.image).shape
        return height or 256, width or 256, channels or 3  # where sizes differ between images, the maps give them one

    def _feature(self, key: str) -> Any:
        with _quietly():
            features = _builder(self.name, self.data_dir).info.features
        if key not in features:
            raise InputError(f"TFDS data set {self.name!r} has no feature {key!r}{nearest(key, features)}")
        return features[key]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """TFDS warns through absl about what becomes an error here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@functools.lru_cache(maxsize=32)
def _builder(name: str, data_dir: str | None) -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise MissingExtra('TFDS data sets need tensorflow-datasets: pip install "jkd[train]"') from error
    try:
        with _quietly():
            return tensorflow_datasets.builder(name, data_dir=data_dir)
    except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
        where = data_dir or tensorflow_datasets.core.constants.DATA_DIR
        close = nearest(name, tensorflow_datasets.list_builders(with_community_datasets=False))
        raise InputError(f"TFDS has no data set {name!r}, nor is one prepared in {where}{close}") from error
    except (ValueError, RuntimeError, AssertionError) as error:  # an unknown config or version
        # Its first line, without the part that repeats how the builder was called.
        raise InputError(f"TFDS data set {name!r}: {str(error).splitlines()[0].split(chr(34) + ': ')[-1].strip()}") from error


@functools.lru_cache(maxsize=32)
def open_split(name: str, data_dir: str | None, split: str, image: str | None = None) -> Any:
    """A split's records by number, as they were written; the feature ``image`` stays encoded."""
    builder = _builder(name, data_dir)
    where = os.path.dirname(os.fspath(builder.data_dir).rstrip("/"))
    build = f"tfds build {name} --file_format=array_record --data_dir={builder._data_dir_root}"
    if name.startswith("imagenet2012"):
        build += " --manual_dir=<folder with ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar>"
    with _quietly():
        prepared = builder.is_prepared()
    if not prepared:
        raise InputError(
            f"TFDS data set {name!r} is not prepared in {where}; once, where TensorFlow is installed "
            f"(pip install tensorflow tensorflow-datasets array-record): {build}"
        )
    import tensorflow_datasets

    try:
        with _quietly():
            encoded = None if image is None else {image: tensorflow_datasets.decode.SkipDecoding()}
            return builder.as_data_source(split, decoders=encoded)
    except NotImplementedError as error:
        raise InputError(
            f"TFDS data set {name!r} in {where} is {builder.info.file_format.value}, which has no random access; convert it "
            f"once, where TensorFlow is installed: tfds convert_format --dataset_version_dir={os.fspath(builder.data_dir)} "
            "--out_file_format=array_record"
        ) from error
    except ImportError as error:
        raise MissingExtra(f'TFDS data set {name!r} needs array_record to be read: pip install "jkd[train]"') from error
    except (ValueError, KeyError) as error:
        close = nearest(split, builder.info.splits)
        raise InputError(f"TFDS data set {name!r} has no split {split!r}{close}") from error


def prepared_version(name: str, data_dir: str | None) -> str:
    """Where a prepared set lies (its folder's name is its version), how large it is and when it was described."""
    builder = _builder(name, data_dir)
    folder = os.fspath(builder.data_dir)
    described = os.path.join(folder, "dataset_info.json")
    written = os.stat(described).st_mtime_ns if os.path.exists(described) else 0  # of a bucket there is no such time
    return f"{folder} {builder.info.dataset_size} {written}"


@functools.lru_cache(maxsize=4)
def _load(source: Tfds) -> dict[str, np.ndarray]:
    size = len(source)
    columns: dict[str, np.ndarray] = {}
    for first in range(0, size, 1024):
        rows = range(first, min(first + 1024, size))
        for row, record in zip(rows, source.records(rows), strict=True):
            for key, value in record.items():
                value = np.asarray(value)
                if key not in columns:
                    columns[key] = np.empty((size, *value.shape), value.dtype)
                if value.shape != columns[key].shape[1:]:
                    sizes = f"{list(value.shape)}, that of record 0 {list(columns[key].shape[1:])}"
                    raise InputError(f"{source.name}: in_memory needs one size, but {key} of record {row} has shape {sizes}")
                columns[key][row] = value
    return columns
