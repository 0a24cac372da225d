"""The codec of sparse teachers: the likeliest classes of every token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from jkd.cache import bits, codec
from jkd.cache.codec import Answer, Per, Shapes
from jkd.errors import InputError

_DEEPEST = 40.0
"""uint8 values end here: exp(-40) of the top's probability is below the resolution of any softmax in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """The likeliest classes, their log-probabilities, and exactly how much is left for all the others.

    An answer is ``ids`` int ``[..., k]`` without repeats, ``log_probs`` ``[..., k]`` (natural logarithms, over the whole vocabulary,
    temperature 1) and ``leftover`` ``[...]``, the probability of all other classes together; where it is not given, 1 -
    sum(exp(log_probs)) is taken. It comes back in falling order, with sum(exp(log_probs)) + leftover = 1.

    An id takes ceil(log2 vocab) bits. A value is kept as a distance: from the one above it (float16) or from the top one (uint8);
    as the sum is known, the top itself need not be kept.

    Args:
        k: classes kept.
        vocab: classes there are.
        values: ``float16``: 15 bits a value (a falling step needs no sign), about 1e-9 nats of KL lost a token. ``uint8``: 8 bits
            a value and 2 bytes a token for their scale, about 1e-5 nats; what is smaller than exp(-40) of the top counts as that.
        per: whether an answer belongs to each token, ``[time, k]``, or to the example, ``[k]``.
    """

    k: int
    vocab: int
    values: Literal["float16", "uint8"] = "float16"
    per: Per = "token"

    def __post_init__(self):
        codec.check_vocab(self)
        codec.check_per(self)
        if not 1 <= self.k <= self.vocab:
            raise InputError(f"TopK.k = {self.k}: give 1 to vocab = {self.vocab}")
        if self.values not in ("float16", "uint8"):
            raise InputError(f"TopK.values = {self.values!r}: give 'float16' or 'uint8'")

    @property
    def size(self) -> int | None:
        return self._ends(1)[-1] if self.per == "example" else None

    def of(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """The answer in whole logits ``[..., vocab]``, in NumPy."""
        log_probs = codec.log_softmax(logits)
        ids = np.argpartition(-log_probs, self.k - 1, axis=-1)[..., : self.k]
        others = np.exp(log_probs)
        np.put_along_axis(others, ids, 0, axis=-1)
        return {"ids": ids, "log_probs": np.take_along_axis(log_probs, ids, -1), "leftover": others.sum(-1)}

    def encode(self, answer: Answer) -> bytes:
        ids, log_probs = codec.field(self, answer, "ids"), codec.field(self, answer, "log_probs", np.float64)
        codec.check_ids(self, ids, self.k)
        if log_probs.shape != ids.shape:
            raise InputError(f"TopK: log_probs are {list(log_probs.shape)}, ids {list(ids.shape)}; give one for each")
        kept = np.exp(log_probs).sum(-1)
        leftover = np.asarray(answer["leftover"], np.float64) if "leftover" in answer else np.maximum(1 - kept, 0)
        if leftover.shape != kept.shape:
            raise InputError(f"TopK: leftover is {list(leftover.shape)}; one number for each of {list(kept.shape)} is needed")
        if not (np.all(kept > 0) and np.all(leftover >= 0) and np.all(np.abs(kept + leftover - 1) < 0.01)):  # nan too
            raise InputError(
                "TopK: the kept probabilities and leftover do not add up to 1; log_probs must be log-probabilities over the whole "
                "vocabulary at temperature 1 (TopK.of makes them from logits)"
            )
        # whichever mass is the smaller is kept (that of the classes with its sign turned), so that both are exact to float32
        mass = np.where(leftover <= 0.5, leftover, -kept)
        ids, log_probs = ids.reshape(-1, self.k), log_probs.reshape(-1, self.k)
        if np.any(np.diff(np.sort(ids, axis=-1), axis=-1) == 0):
            raise InputError("TopK: an id appears twice among those of one token")
        order = np.argsort(-log_probs, axis=-1, kind="stable")
        log_probs = np.take_along_axis(log_probs, order, -1)
        below = log_probs[:, :1] - log_probs
        values = _steps(below) if self.values == "float16" else _scaled(below)
        packed = bits.pack(np.take_along_axis(ids, order, -1), codec.id_bits(self.vocab))
        return codec.count_bytes(len(ids)) + packed + mass.astype("<f4").tobytes() + values

    def decode(self, payloads: np.ndarray | Sequence[bytes]) -> dict[str, np.ndarray]:
        rows = codec.stacked(payloads)
        count = codec.count_of(rows)
        ids_end, mass_end, values_end, end = self._ends(count)
        if rows.shape[1] != end:
            raise ValueError(f"an answer of {rows.shape[1]} bytes: {count} positions take {end}")
        lead = (len(rows), count) if self.per == "token" else (len(rows),)
        many = count * self.k
        ids = bits.unpack(rows[:, 4:ids_end], codec.id_bits(self.vocab), many).view(np.int32)
        mass = codec.column(rows[:, ids_end:mass_end], "<f4").astype(np.float32, copy=False).reshape(lead)
        values = rows[:, mass_end:values_end]
        if self.values == "float16":
            below = np.cumsum(_from_half(bits.unpack(values, 15, many)).reshape(*lead, self.k), axis=-1)
        else:
            scale = codec.column(rows[:, values_end:], "<f2").astype(np.float32)
            below = values.reshape(*lead, self.k) * scale.reshape(*lead, 1)
        small = mass >= 0
        kept = np.where(small, 1 - mass, -mass)
        top = np.log(kept) - np.log(np.exp(-below).sum(-1))
        np.subtract(top[..., None], below, out=below)
        return {"ids": ids.reshape(*lead, self.k), "log_probs": below, "leftover": np.where(small, mass, 1 + mass)}

    def shapes(self, time: int | None) -> Shapes:
        lead = codec.lead(self, time)
        return {"ids": ((*lead, self.k), np.int32), "log_probs": ((*lead, self.k), np.float32), "leftover": (lead, np.float32)}

    def _ends(self, count: int) -> tuple[int, int, int, int]:
        """Where ids, masses, values and scales of ``count`` positions end."""
        ids = 4 + bits.packed_size(count * self.k, codec.id_bits(self.vocab))
        mass = ids + 4 * count
        if self.values == "uint8":
            return ids, mass, mass + count * self.k, mass + count * (self.k + 2)
        values = mass + bits.packed_size(count * self.k, 15)
        return ids, mass, values, values


def _steps(below: np.ndarray) -> bytes:
    """From each value to the next in float16, rounded against what the steps before it add up to: errors do not add up."""
    steps, reached = np.zeros(below.shape, np.float16), np.zeros(len(below), np.float32)
    for place in range(1, below.shape[1]):
        steps[:, place] = np.clip(below[:, place] - reached, 0, 60000)  # past which a probability is 0 in any float
        reached = reached + steps[:, place].astype(np.float32)
    return bits.pack(steps.view(np.uint16), 15)


def _from_half(codes: np.ndarray) -> np.ndarray:
    """Bits of float16 without a sign as float32. The exponent moves by 112: that is exact, and faster than a conversion."""
    return (codes << 13).view(np.float32) * np.float32(2.0**112)


def _scaled(below: np.ndarray) -> bytes:
    """Multiples of a scale, float16, that reaches the lowest value."""
    below = np.minimum(below, _DEEPEST)
    wanted = below.max(-1, keepdims=True) / 255
    scale = wanted.astype("<f2")
    scale = np.where(scale < wanted, np.nextafter(scale, np.float16(np.inf)), scale).astype("<f2")
    codes = np.rint(below / np.where(scale > 0, scale, 1).astype(np.float64))
    return codes.astype(np.uint8).tobytes() + scale.tobytes()
