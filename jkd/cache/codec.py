"""How a teacher's answer to one example becomes bytes and comes back: what `TopK`, `Sampled` and `Dense` have in common.

A codec is a frozen dataclass: what a config writes, what the manifest records, and the code. An answer is arrays by name, for one
example, without a batch axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np

from jkd.cache import bits
from jkd.errors import InputError

Answer = Mapping[str, Any]
Shapes = dict[str, tuple[tuple[int, ...], type]]
"""By name: shape without the batch axis, and dtype."""
Per = Literal["token", "example"]


class Codec(Protocol):
    """What the three have in common."""

    @property
    def size(self) -> int | None:
        """Bytes of an example's payload, where every example has as many; else None."""
        ...

    def encode(self, answer: Answer) -> bytes:
        """The payload of one example.

        Raises:
            InputError: the answer is not what the codec says.
        """
        ...

    def decode(self, payloads: np.ndarray | Sequence[bytes]) -> dict[str, np.ndarray]:
        """The answers of several examples of one length, each array ``[examples, ...]``.

        Args:
            payloads: bytes of each, or uint8 ``[examples, size]``.

        Raises:
            ValueError: a payload is not what `encode` made, or the examples differ in length.
        """
        ...

    def shapes(self, time: int | None) -> Shapes:
        """What `decode` gives for an example of ``time`` tokens (None: one that has no tokens)."""
        ...


def field(codec: Any, answer: Answer, name: str, dtype: Any = None) -> np.ndarray:
    """An array of an answer."""
    if name not in answer:
        raise InputError(f"{type(codec).__name__}: the answer has no {name!r} but {sorted(answer)}")
    return np.asarray(answer[name], dtype)


def check_per(codec: Any) -> None:
    if codec.per not in ("token", "example"):
        raise InputError(f"{type(codec).__name__}.per = {codec.per!r}: give 'token' or 'example'")


def check_vocab(codec: Any) -> None:
    if not 2 <= codec.vocab <= 1 << bits.WIDEST:
        raise InputError(f"{type(codec).__name__}.vocab = {codec.vocab}: give 2 to {1 << bits.WIDEST}")


def check_ids(codec: Any, ids: np.ndarray, many: int) -> None:
    """Class numbers of one example: ``[many]`` or ``[time, many]``, whole, in the vocabulary."""
    kind, axes = type(codec).__name__, (2 if codec.per == "token" else 1)
    wanted = f"[time, {many}]" if axes == 2 else f"[{many}]"
    if ids.ndim != axes or ids.shape[-1] != many or not ids.size or ids.dtype.kind not in "iu":
        raise InputError(f"{kind}: ids are {ids.dtype}{list(ids.shape)} where int {wanted} is needed (per={codec.per!r})")
    if ids.min() < 0 or ids.max() >= codec.vocab:
        bad = ids[(ids < 0) | (ids >= codec.vocab)][0]
        raise InputError(f"{kind}: id {bad} is outside 0..{codec.vocab - 1} (vocab = {codec.vocab})")


def lead(codec: Any, time: int | None) -> tuple[int, ...]:
    """The leading axes of an answer's arrays."""
    if codec.per == "example":
        return ()
    if time is None:
        raise InputError(f"{type(codec).__name__}.per = 'token', but the batch has no tokens; give per='example'")
    return (time,)


def id_bits(vocab: int) -> int:
    return (vocab - 1).bit_length()


def stacked(payloads: np.ndarray | Sequence[bytes]) -> np.ndarray:
    """uint8 ``[examples, bytes]``.

    Raises:
        ValueError: they differ in length.
    """
    if isinstance(payloads, np.ndarray):
        return payloads
    if len({len(payload) for payload in payloads}) != 1:
        raise ValueError("the answers of a batch differ in length: all its rows need as many tokens")
    return np.frombuffer(b"".join(payloads), np.uint8).reshape(len(payloads), -1)


def column(rows: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of each row as numbers, ``[examples, numbers]``."""
    return np.ascontiguousarray(rows).view(dtype)


def count_bytes(count: int) -> bytes:
    """What a payload begins with: how many positions it holds."""
    return np.uint32(count).astype("<u4").tobytes()


def count_of(rows: np.ndarray) -> int:
    """The same count in all rows.

    Raises:
        ValueError: it differs, or there is none.
    """
    if rows.shape[1] < 4:
        raise ValueError("an answer of fewer than 4 bytes")
    counts = column(rows[:, :4], "<u4")
    if (counts != counts[0]).any():
        raise ValueError("the answers of a batch differ in length: all its rows need as many tokens")
    return int(counts[0, 0])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """In float64, along the last axis."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
