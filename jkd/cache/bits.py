"""Unsigned integers of a few bits each, packed without gaps: little-endian, the lowest bit first."""

from __future__ import annotations

import math

import numpy as np

WIDEST = 24
"""Bits of the widest number: one and the seven that its place may add then lie in four bytes."""


def packed_size(count: int, bits: int) -> int:
    """Bytes of ``count`` numbers: whole groups, a group being the fewest numbers that end with a byte."""
    group = _group(bits)
    return -(-count // group) * group * bits // 8


def pack(values: np.ndarray, bits: int) -> bytes:
    """``values`` (ints of any shape, below ``2 ** bits``) as `packed_size` bytes."""
    group = _group(bits)
    flat = np.zeros(-(-values.size // group) * group, np.uint32)
    flat[: values.size] = values.reshape(-1)
    groups = flat.reshape(-1, group)
    out = np.zeros((len(groups), group * bits // 8), np.uint8)
    for place in range(group):
        first, shift = divmod(place * bits, 8)
        number = groups[:, place] << shift
        for byte in range(-(-(shift + bits) // 8)):
            out[:, first + byte] |= (number >> (8 * byte)).astype(np.uint8)
    return out.tobytes()


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The numbers of each row, uint32 ``[rows, count]``.

    Args:
        packed: uint8 ``[rows, packed_size(count, bits)]``.
        bits: as they were packed.
        count: numbers of a row.
    """
    group = _group(bits)
    width = group * bits // 8
    # the last numbers are read as four bytes too
    flat = np.concatenate([packed.reshape(-1), np.zeros(4, np.uint8)])
    groups = packed.size // width
    out = np.empty((groups, group), np.uint32)
    for place in range(group):
        first, shift = divmod(place * bits, 8)
        words = np.ndarray((groups,), "<u4", flat, first, (width,))  # overlapping, unaligned: numpy reads them as they are
        np.bitwise_and(words >> shift, (1 << bits) - 1, out=out[:, place])
    return out.reshape(len(packed), -1)[:, :count]


def _group(bits: int) -> int:
    return 8 // math.gcd(bits, 8)
