"""Maps of one image record on the host, before the batch: ``f(record, rng) -> record``.

They are frozen dataclasses, so that a config prints them, named like functions, because they are used like functions that
return a map: ``train_maps=(vision.random_resized_crop(224), vision.flip())``. All of them work on ``record["image"]``
``[height, width, channels]`` and draw from the generator of the record's place in the stream, so a restart, another number of
hosts or of threads changes nothing. Images of one size can be cropped and flipped for less on the device (`jkd.data.augment`).
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from typing import Any

import numpy as np

from jkd.errors import InputError, MissingExtra

Record = dict[str, Any]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra('decoding and resizing images needs Pillow: pip install "jkd[train]"') from error
    return Image


def decode_image(content: bytes, channels: int = 3) -> np.ndarray:
    """JPEG, PNG or any other encoding that Pillow reads, to uint8 ``[height, width, channels]``.

    Args:
        content: the encoded bytes. CMYK, palette and gray images are converted (ImageNet holds a few).
        channels: 1 (gray), 3 (RGB) or 4 (RGB and alpha).

    Raises:
        InputError: other ``channels``; the bytes are no image, or it is cut short, damaged or too large for Pillow.
    """
    _mode(channels)
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(content)) as opened:
            return pixels(opened, channels)
    except MemoryError:
        raise
    except Exception as error:  # of broken files Pillow raises OSError, SyntaxError, ValueError, errors of its own and others
        raise InputError(f"an image of {len(content)} bytes cannot be decoded: {error}") from error


def pixels(opened: Any, channels: int = 3) -> np.ndarray:
    """An image that Pillow has opened as uint8 ``[height, width, channels]``, turned as its EXIF says the camera was held."""
    opened.load()  # of TIFF that turns it already
    if _orientation(opened) != 1:
        from PIL import ImageOps

        opened = ImageOps.exif_transpose(opened)
    image = np.asarray(opened.convert(_mode(channels)))
    return image[:, :, None] if channels == 1 else image


def _orientation(opened: Any) -> int:
    try:
        return opened.getexif().get(274, 1)
    except Exception:  # what is written beside the pixels may be damaged where they are not
        return 1


def _mode(channels: int) -> str:
    modes = {1: "L", 3: "RGB", 4: "RGBA"}
    if channels not in modes:
        raise InputError(f"channels={channels}: give 1 (gray), 3 (RGB) or 4 (RGB and alpha)")
    return modes[channels]


def whole_image(path: str | os.PathLike[str]) -> str:
    """Why a file cannot be decoded to its end; empty where it can. JPEG is read at an eighth of its size, which is enough."""
    try:
        with _pillow().open(path) as opened:
            opened.draft("RGB", (1, 1))
            opened.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others of broken files
        text = str(error).replace(repr(os.fspath(path)), "the file")
        return text.partition("\n")[0] or type(error).__name__
    return ""


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 ``[height, width, channels]`` to ``[*size, channels]``: antialiased bilinear, as torchvision does to PIL images."""
    if image.dtype != np.uint8 or image.shape[-1] not in (1, 3, 4):
        raise InputError(f"resizing needs uint8 images with 1, 3 or 4 channels, not {image.dtype}{list(image.shape)}")
    if image.shape[:2] == tuple(size):
        return image
    pillow = _pillow()
    opened = pillow.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(opened.resize((size[1], size[0]), pillow.Resampling.BILINEAR))
    return resized.reshape(*size, image.shape[-1])


@dataclasses.dataclass(frozen=True)
class decode:
    """Bytes to pixels: see `decode_image`. For `jkd.data.source`; `jkd.data.tfds` decodes by itself.

    Takes images that Pillow has opened too, as Hugging Face data sets give them.
    """

    channels: int = 3

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        image = record["image"]
        return record | {"image": (decode_image if isinstance(image, bytes) else pixels)(image, self.channels)}


@dataclasses.dataclass(frozen=True)
class random_crop:
    """Pads every side with zeros, then takes a window of the original size at a random place.

    Args:
        padding: pixels on each side; 4 for CIFAR (He et al. 2015, arXiv:1512.03385, section 4.2).
    """

    padding: int = 4

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        image, pad = record["image"], self.padding
        height, width = image.shape[:2]
        top, left = rng.integers(0, 2 * pad + 1, size=2)
        padded = np.zeros((height + 2 * pad, width + 2 * pad, image.shape[2]), image.dtype)  # np.pad: 45 µs instead of 2
        padded[pad : pad + height, pad : pad + width] = image
        return record | {"image": padded[top : top + height, left : left + width]}


@dataclasses.dataclass(frozen=True)
class flip:
    """Mirrors left and right with this probability."""

    probability: float = 0.5

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        return record | {"image": record["image"][:, ::-1]} if rng.random() < self.probability else record


@dataclasses.dataclass(frozen=True)
class random_resized_crop:
    """A window of random area and shape, resized to one size (the "Inception crop").

    Args:
        size: of the result, ``size x size`` pixels.
        scale: range of the window's share of the image's area, drawn uniformly; (0.08, 1) as in Szegedy et al. 2014
            (arXiv:1409.4842, section 6).
        ratio: range of width / height, drawn uniformly in its logarithm; (3/4, 4/3), likewise.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        image = record["image"]
        height, width = image.shape[:2]
        # A fixed number of draws for each record, whichever attempt fits.
        areas = rng.uniform(*self.scale, size=10) * (height * width)
        ratios = np.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), size=10))
        places = rng.random((10, 2))
        widths, heights = np.rint(np.sqrt(areas * ratios)).astype(int), np.rint(np.sqrt(areas / ratios)).astype(int)
        fits = np.flatnonzero((widths > 0) & (heights > 0) & (widths <= width) & (heights <= height))
        if fits.size:
            h, w = heights[fits[0]], widths[fits[0]]
            top, left = (int(u * (room + 1)) for u, room in zip(places[fits[0]], (height - h, width - w), strict=True))
        else:  # the largest central window with a ratio in range
            w = min(width, round(height * self.ratio[1]))
            h = min(height, round(width / self.ratio[0]))
            top, left = (height - h) // 2, (width - w) // 2
        window = np.ascontiguousarray(image[top : top + h, left : left + w])
        return record | {"image": resize_image(window, (self.size, self.size))}


@dataclasses.dataclass(frozen=True)
class resize:
    """To ``(height, width)``; with one number the shorter side gets that length and the shape is kept."""

    size: int | tuple[int, int]

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        image = record["image"]
        if isinstance(self.size, int):
            factor = self.size / min(image.shape[:2])
            size = (math.floor(image.shape[0] * factor + 1e-6), math.floor(image.shape[1] * factor + 1e-6))
        else:
            size = self.size
        return record | {"image": resize_image(image, size)}


@dataclasses.dataclass(frozen=True)
class center_crop:
    """The central ``size x size`` pixels.

    Raises:
        InputError: (from the map) the image is smaller.
    """

    size: int

    def __call__(self, record: Record, rng: np.random.Generator) -> Record:
        image = record["image"]
        if min(image.shape[:2]) < self.size:
            raise InputError(f"center_crop({self.size}): the image is {list(image.shape)}; put vision.resize first")
        top, left = ((length - self.size) // 2 for length in image.shape[:2])
        return record | {"image": image[top : top + self.size, left : left + self.size]}


def cifar_train() -> tuple[Any, ...]:
    """Padding by 4, random crop, flip (He et al. 2015, section 4.2)."""
    return (random_crop(4), flip())


def cifar_eval() -> tuple[Any, ...]:
    """Nothing: CIFAR is evaluated as it is."""
    return ()


def imagenet_train(size: int = 224) -> tuple[Any, ...]:
    """Inception crop and flip."""
    return (random_resized_crop(size), flip())


def imagenet_eval(size: int = 224, ratio: float = 0.875) -> tuple[Any, ...]:
    """Shorter side to ``size / ratio`` (256 for 224), then the centre."""
    return (resize(round(size / ratio)), center_crop(size))
