"""Images in folders, one folder for each class."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from jkd.data.batch import Record
from jkd.data.labels import Labelled
from jkd.data.pipeline import Data, Map
from jkd.data.vision import decode_image, whole_image
from jkd.errors import InputError, nearest

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def image_folder(
    train: str | os.PathLike[str],
    *,
    eval: str | os.PathLike[str] | float | None = 0.1,
    channels: int = 3,
    check: bool = True,
    labelled: float | np.ndarray | None = None,
    seed: int = 0,
    train_maps: Sequence[Map] = (),
    eval_maps: Sequence[Map] = (),
    threads: int | None = None,
    workers: int = 0,
    name: str | None = None,
) -> Data:
    """Images in folders by class: ``image_folder("photos")`` of ``photos/cat/1.jpg``, ``photos/dog/more/2.png``, ….

    Classes are the folders in the order of their names. Nothing is read before the first use. Maps must bring the images to one
    size: ``train_maps=vision.imagenet_train(224), eval_maps=vision.imagenet_eval(224)``.

    Args:
        train: the folder that holds the classes' folders.
        eval: another one, whose classes must be among those of ``train``; or the share of each class of ``train`` that is held
            out, rounded: the files whose names have the lowest hashes, whatever the seed and the other classes. Each file
            that is added or taken away later moves at most one other between the two. None for no evaluation.
        channels: 1 (gray), 3 (RGB) or 4; images of other kinds are converted.
        check: read every image once at first, a few thousand a second; files that are broken are left out, with a warning that
            names them. Without it a broken file stops the training when its turn comes.
        labelled: a fraction of the training examples, in proportion to nothing, or a mask; see `jkd.data.source`.
        seed: of that draw.
        train_maps, eval_maps, threads, workers: see `jkd.data.Data`.
        name: for tables and messages; default: the folder's.

    Raises:
        InputError: a share outside 0..1; and, when first read, no such folder, no class, a class without images.
    """
    root = Path(train)
    share = eval if isinstance(eval, float | int) and not isinstance(eval, bool) else 0.0
    if not 0 <= share < 1:
        raise InputError(f"image_folder(eval={eval!r}): give a share from 0 to 1, or a folder")
    options = dict(channels=channels, check=check)
    held_out: ImageFolder | None = None
    if share:
        held_out = ImageFolder(root, part="eval", share=share, **options)  # type: ignore[arg-type]
    elif eval is not None and not isinstance(eval, float | int):
        held_out = ImageFolder(Path(eval), like=root, **options)  # type: ignore[arg-type]
    source = ImageFolder(root, share=share, **options)  # type: ignore[arg-type]
    return Data(
        train=source if labelled is None else Labelled(source, labelled, seed),
        eval=held_out,
        train_maps=tuple(train_maps),
        eval_maps=tuple(eval_maps),
        threads=threads,
        workers=workers,
        name=name or root.name,
    )


class ImageFolder:
    """A `Source` of one folder, or of the part of it that is held out or is not.

    Args:
        root: the folder of the classes' folders.
        like: the folder that says which classes there are; None: itself.
        part: ``train``, or ``eval`` for what is held out.
        share: how much of each class that is.
        channels, check: see `image_folder`.
    """

    def __init__(
        self,
        root: Path,
        *,
        like: Path | None = None,
        part: Literal["train", "eval"] = "train",
        share: float = 0.0,
        channels: int = 3,
        check: bool = True,
    ):
        self._root, self._like, self._part, self._share = root, like or root, part, share
        self._channels, self._check = channels, check

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The classes."""
        return _classes(self._like)

    @property
    def classes(self) -> int:
        return len(self.names)

    @functools.cached_property
    def _files(self) -> tuple[list[Path], np.ndarray]:
        """The images and their labels; of what is broken nothing, though it had its part in what is held out."""
        files, labels, held = [], [], []
        for folder in _classes(self._root):
            if folder not in self.names:
                raise InputError(f"{self._root}: class {folder!r} is not one of {self._like}{nearest(folder, self.names)}")
            found = sorted(_images(self._root / folder))
            if not found:
                raise InputError(f"{self._root / folder}: no images ({', '.join(SUFFIXES)})")
            files += found
            labels += [self.names.index(folder)] * len(found)
            held += _held_out([path.relative_to(self._root).as_posix() for path in found], self._share)
        label = np.array(labels, np.int32)
        mine = np.flatnonzero(np.array(held) == (self._part == "eval"))
        if self._check:
            mine = self._whole(files, mine)
        return [files[place] for place in mine], label[mine]

    def _whole(self, files: Sequence[Path], places: np.ndarray) -> np.ndarray:
        """Those of them that can be read to their end."""
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            problems = list(threads.map(lambda place: whole_image(files[place]), places))
        broken = [(files[place], why) for place, why in zip(places, problems, strict=True) if why]
        if broken:
            some = "; ".join(f"{path.relative_to(self._root)} ({why})" for path, why in broken[:5])
            more = "; …" if len(broken) > 5 else ""
            warnings.warn(
                f"{self._root}: {len(broken)} of {len(places)} files are broken and left out: {some}{more}", stacklevel=2
            )
        return places[[not why for why in problems]]

    def __len__(self) -> int:
        return len(self._files[0])

    def columns(self) -> None:
        return None

    def records(self, indices: Sequence[int]) -> list[Record]:
        return [self._record(index) for index in indices]

    def _record(self, index: int) -> Record:
        files, labels = self._files
        try:
            image = decode_image(files[index].read_bytes(), self._channels)
        except InputError as error:
            raise InputError(f"{files[index]}: {error}") from error
        return {"image": image, "label": labels[index]}

    def example(self) -> Record:
        return self._record(0)

    def __repr__(self) -> str:
        found = [path for folder in _classes(self._root) for path in sorted(_images(self._root / folder))]
        sizes = [(path.relative_to(self._root).as_posix(), path.stat().st_size) for path in found]
        sha = hashlib.sha256(repr(sizes).encode()).hexdigest()[:16]
        said = f"{self._root.name!r}, {len(found)} files, sha256={sha}, part={self._part}, share={self._share}"
        return f"ImageFolder({said}, classes={list(self.names)}, channels={self._channels}, check={self._check})"


def _classes(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise InputError(f"image_folder: {root} is no folder")
    names = tuple(sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")))
    if not names:
        raise InputError(f"image_folder: {root} holds no folders; give the folder that holds a folder for each class")
    return names


def _held_out(names: Sequence[str], share: float) -> list[bool]:
    """Of a class: which of its files are evaluated on. By hash, so that they stay when others come; so many as the share says, so
    that small classes have their part."""
    lowest = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="surrogatepass")).digest())
    chosen = set(lowest[: int(share * len(names) + 0.5)])
    return [name in chosen for name in names]


def _images(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path
