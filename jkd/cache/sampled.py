"""The codec of unbiased sparse teachers: classes drawn from the teacher's distribution."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jkd.cache import bits, codec
from jkd.cache.codec import Answer, Per, Shapes
from jkd.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """Classes drawn from the teacher: the mean over the draws, of any function of a class, is unbiased.

    An answer is ``ids`` int ``[..., draws]``, drawn with replacement from the teacher's distribution at temperature 1. It comes
    back in rising order.

    A token takes ceil(log2 vocab) bits for each different id and one bit a draw, which tells whether its id is another one than
    that of the draw before. Fifty draws of a language model are about twelve different ids.

    Args:
        draws: for each token (or example).
        vocab: classes there are.
        per: whether an answer belongs to each token, ``[time, draws]``, or to the example, ``[draws]``.

    Source:
        Anshumann et al., "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", ACL 2025, arXiv:2503.16870.
    """

    draws: int
    vocab: int
    per: Per = "token"

    size = None  # it depends on how many ids are different

    def __post_init__(self):
        codec.check_vocab(self)
        codec.check_per(self)
        if self.draws < 1:
            raise InputError(f"Sampled.draws = {self.draws}: give at least 1")

    def of(self, logits: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """An answer drawn from whole logits ``[..., vocab]``, in NumPy."""
        cumulative = np.cumsum(np.exp(codec.log_softmax(logits)), axis=-1)
        uniform = rng.random((*cumulative.shape[:-1], self.draws)) * cumulative[..., -1:]
        rows, wanted = cumulative.reshape(-1, self.vocab), uniform.reshape(-1, self.draws)
        ids = np.stack([np.searchsorted(row, one, side="right") for row, one in zip(rows, wanted, strict=True)])
        return {"ids": ids.reshape(uniform.shape)}

    def encode(self, answer: Answer) -> bytes:
        ids = codec.field(self, answer, "ids")
        codec.check_ids(self, ids, self.draws)
        ids = np.sort(ids.reshape(-1, self.draws), axis=-1)
        another = np.diff(ids, axis=-1, prepend=-1) > 0
        flags = np.packbits(another[:, 1:]).tobytes()
        return codec.count_bytes(len(ids)) + flags + bits.pack(ids[another], codec.id_bits(self.vocab))

    def decode(self, payloads: np.ndarray | Sequence[bytes]) -> dict[str, np.ndarray]:
        found = [self._one(np.frombuffer(payload, np.uint8)[None]) for payload in payloads]
        if len({len(ids) for ids in found}) != 1:
            raise ValueError("the answers of a batch differ in length: all its rows need as many tokens")
        ids = np.stack(found)
        return {"ids": ids if self.per == "token" else ids[:, 0]}

    def shapes(self, time: int | None) -> Shapes:
        return {"ids": ((*codec.lead(self, time), self.draws), np.int32)}

    def _one(self, row: np.ndarray) -> np.ndarray:
        """The ids ``[positions, draws]`` of one example, uint8 ``[1, bytes]``."""
        positions = codec.count_of(row)
        flags = positions * (self.draws - 1)
        start = 4 + -(-flags // 8)
        another = np.ones((positions, self.draws), np.uint8)
        if row.shape[1] >= start:
            another[:, 1:] = np.unpackbits(row[0, 4:start], count=flags).reshape(positions, -1)
        total = int(another.sum())
        end = start + bits.packed_size(total, codec.id_bits(self.vocab))
        if row.shape[1] != end:
            raise ValueError(f"an answer of {row.shape[1]} bytes: it should have {end}")
        different = bits.unpack(row[:, start:], codec.id_bits(self.vocab), total)[0].astype(np.int32)
        return different[np.cumsum(another, dtype=np.int64) - 1].reshape(another.shape)
