"""The codec of whole answers: logits of few classes, features, heads."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jkd.cache import codec
from jkd.cache.codec import Answer, Shapes
from jkd.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """Whole arrays: the logits of an image classifier, features, further heads.

    An answer is ``logits`` ``[classes]`` where there are classes, ``taps/<path>`` and ``heads/<name>``, each in its shape. It comes
    back as float32.

    Args:
        classes: of the logits; None to keep none.
        taps: ``{module path: shape}`` of features of one example, without the batch axis.
        heads: ``{name: shape}``.
        dtype: what is kept of each number: ``float16`` (11 bits; at most 65504) or ``float32`` (all).
    """

    classes: int | None = None
    taps: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    heads: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self):
        if self.dtype not in ("float16", "float32"):
            raise InputError(f"Dense.dtype = {self.dtype!r}: give 'float16' or 'float32'")
        for name in ("taps", "heads"):
            object.__setattr__(self, name, {path: tuple(shape) for path, shape in getattr(self, name).items()})
        if not self._named:
            raise InputError("Dense keeps nothing: give classes=, taps= or heads=")

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self._named.values()) * np.dtype(self.dtype).itemsize

    def encode(self, answer: Answer) -> bytes:
        parts = []
        for name, shape in self._named.items():
            array = codec.field(self, answer, name, np.float32)
            if array.shape != shape:
                raise InputError(f"Dense: {name} is {list(array.shape)}; the codec says {list(shape)}")
            with np.errstate(over="ignore"):  # told below
                kept = array.astype("<" + np.dtype(self.dtype).str[1:])
            if not np.isfinite(kept).all():
                what = "is not finite" if not np.isfinite(array).all() else "passes 65504, the largest float16; use float32"
                raise InputError(f"Dense: {name} {what}")
            parts.append(kept.tobytes())
        return b"".join(parts)

    def decode(self, payloads: np.ndarray | Sequence[bytes]) -> dict[str, np.ndarray]:
        rows = codec.stacked(payloads)
        if rows.shape[1] != self.size:
            raise ValueError(f"an answer of {rows.shape[1]} bytes: it should have {self.size}")
        flat = codec.column(rows, "<" + np.dtype(self.dtype).str[1:]).astype(np.float32)
        found, start = {}, 0
        for name, shape in self._named.items():
            end = start + math.prod(shape)
            found[name] = flat[:, start:end].reshape(len(rows), *shape)
            start = end
        return found

    def shapes(self, time: int | None) -> Shapes:
        return {name: (shape, np.float32) for name, shape in self._named.items()}

    @property
    def _named(self) -> dict[str, tuple[int, ...]]:
        logits = {} if self.classes is None else {"logits": (self.classes,)}
        parts = {f"{kind}/{name}": shape for kind in ("taps", "heads") for name, shape in sorted(getattr(self, kind).items())}
        return logits | parts
