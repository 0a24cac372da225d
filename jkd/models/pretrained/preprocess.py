"""preprocessor_config.json: how a published network wants its images."""

from __future__ import annotations

from typing import Any

from jkd.errors import InputError
from jkd.models.pretrained.family import Json
from jkd.types import Preprocess

FILE = "preprocessor_config.json"
# PIL's numbers of the ways to resize.
_METHODS = {2: "bilinear", 3: "bicubic"}


def read(json: Json) -> Preprocess:
    """A preprocessor_config.json.

    Raises:
        InputError: a way of resizing that is not known here.
    """
    resample = json.get("resample", 2)
    if resample not in _METHODS:
        raise InputError(
            f"preprocessor_config.json: resample = {resample!r} is not supported, only 2 (bilinear) or 3 (bicubic)"
        )
    scale = json.get("rescale_factor", 1 / 255) if json.get("do_rescale", True) else 1.0
    if abs(scale * 255 - 1) > 1e-6:
        raise InputError(f"preprocessor_config.json: rescale_factor = {scale!r} is not supported, only 1/255")
    size, crop = _size(json) if json.get("do_resize", True) else (None, 1.0)
    normal = json.get("do_normalize", True)
    return Preprocess(
        size=size,
        mean=tuple(json["image_mean"]) if normal else (0.0,),
        std=tuple(json["image_std"]) if normal else (1.0,),
        method=_METHODS[resample],  # type: ignore[arg-type]
        crop=crop,
    )


def _size(json: Json) -> tuple[tuple[int, int], float]:
    """The size of the result, and the share of the resized image that it is."""
    size: Any = json["size"]
    if json.get("do_center_crop"):
        inner: Any = json["crop_size"]
        inner = inner["height"] if isinstance(inner, dict) else inner
        outer = size if isinstance(size, int) else size.get("shortest_edge")
        if outer is None:
            raise InputError(
                f"preprocessor_config.json: do_center_crop with size = {size!r} is not supported, only shortest_edge"
            )
        return (inner, inner), inner / outer
    if "crop_pct" in json:  # of ConvNext's, which crops small images only
        size = size if isinstance(size, int) else size["shortest_edge"]
        return (size, size), json["crop_pct"] if size < 384 else 1.0
    return (size, size) if isinstance(size, int) else (size["height"], size["width"]), 1.0


def write(preprocess: Preprocess) -> dict[str, Any]:
    """The inverse of `read`."""
    numbers = {name: number for number, name in _METHODS.items()}
    channels = lambda values: list(values) if len(values) > 1 else list(values) * 3  # noqa: E731
    described: dict[str, Any] = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": channels(preprocess.mean),
        "image_std": channels(preprocess.std),
        "do_resize": preprocess.size is not None,
        "resample": numbers[preprocess.method],
    }
    if preprocess.size is None:
        return described | {"image_processor_type": "ViTImageProcessor"}
    height, width = preprocess.size
    if preprocess.crop == 1.0:
        return described | {"image_processor_type": "ViTImageProcessor", "size": {"height": height, "width": width}}
    if height != width:
        raise InputError(f"save_pretrained: crop={preprocess.crop} with size={preprocess.size}: only squares can be written")
    return described | {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": height},
        "crop_pct": preprocess.crop,
    }
