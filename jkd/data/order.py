"""Which example every global row holds, and every host-side random draw: functions of (seed, position) and of nothing else.

All of it rests on the raw output of Philox, a counter-based generator: any position is reached without replaying what came
before, and NumPy keeps the raw streams of its bit generators unchanged between versions (the methods of ``Generator`` it may
change, so the order of the examples does not use them).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib

import numpy as np

from jkd.errors import InputError

_EPOCH, _RECORD, _DRAW, _SPLIT = range(4)
"""Streams that must never coincide, although seed and position do."""


def _philox(seed: int, stream: int, key: int = 0, counter: int = 0) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed * 8 + stream, key], np.uint64), counter=counter)


def check_seed(seed: int) -> int:
    """The seed as an int of 0 <= seed < 2**60.

    Raises:
        InputError: it is anything else.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**60:
        raise InputError(f"seed={seed!r}: must be an integer from 0 to 2**60 - 1")
    return int(seed)


def seed_of(seed: int, name: str) -> int:
    """A seed of its own for a stream with this name."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "little")


def generator(seed: int, row: int) -> np.random.Generator:
    """What the random maps of global row ``row`` draw from."""
    return np.random.Generator(_philox(seed, _RECORD, row))


@functools.lru_cache(maxsize=8)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``size`` examples in one epoch, ``[size]`` int64, read-only; cached, for several batches at once."""
    order = np.argsort(_philox(seed, _EPOCH, epoch).random_raw(size), kind="stable")
    order.flags.writeable = False
    return order


@dataclasses.dataclass(frozen=True, eq=False)
class Order:
    """The example of every global row of an endless stream.

    Args:
        size: number of examples.
        seed: of the stream.
        weights: ``[size]`` sampling weights, not normalised: rows are then independent draws with replacement. None: a
            permutation for each epoch; batches run on across the ends of epochs, so that no example is dropped.

    Raises:
        InputError: weights of another shape, negative, not finite, or all zero.
    """

    size: int
    seed: int
    weights: np.ndarray | None = None

    def __post_init__(self):
        if self.weights is None:
            return
        weights = np.asarray(self.weights, np.float64)
        if weights.shape != (self.size,):
            raise InputError(f"sampling weights have shape {list(weights.shape)}: there are {self.size} examples")
        bad = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
        if bad.size:
            raise InputError(f"sampling weight of example {bad[0]} is {weights[bad[0]]}: must be finite and not negative")
        if not weights.any():
            raise InputError("sampling weights are all 0: at least one example must have a positive weight")
        # Cumulative sums in float64, once: a draw is then a binary search.
        object.__setattr__(self, "_cumulative", np.cumsum(weights))
        object.__setattr__(self, "_last", int(np.flatnonzero(weights)[-1]))

    def examples(self, first: int, count: int) -> np.ndarray:
        """The examples of global rows ``first … first + count - 1``, ``[count]`` int64."""
        if self.weights is not None:
            # One counter value of Philox gives four words; a row uses the first, so that row r needs counter r alone.
            words = _philox(self.seed, _DRAW, counter=first).random_raw(4 * count)[::4]
            uniform = (words >> np.uint64(11)) * 2.0**-53
            cumulative = self._cumulative  # type: ignore[attr-defined]
            found = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
            return np.minimum(found, self._last)  # type: ignore[attr-defined]  # uniform * total may round up to total
        parts = []
        while count > 0:
            epoch, offset = divmod(first, self.size)
            taken = min(count, self.size - offset)
            parts.append(permutation(self.size, self.seed, epoch)[offset : offset + taken])
            first, count = first + taken, count - taken
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def choose(groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """A random mask ``[examples]`` with exactly ``count`` True, in proportion to the sizes of the groups.

    Args:
        groups: ``[examples]`` int: the class of each (all zeros: not stratified).
        count: 0 <= count <= examples. What the proportions leave over goes to the largest remainders, ties to the lower group.
        seed: of the choice within each group.
    """
    values, members = np.unique(groups, return_inverse=True)
    share = np.bincount(members, minlength=len(values)) * count / max(len(groups), 1)
    quota = np.floor(share).astype(int)
    over = np.argsort(-(share - quota), kind="stable")[: count - quota.sum()]
    quota[over] += 1
    mask = np.zeros(len(groups), bool)
    key = _philox(seed, _SPLIT).random_raw(len(groups))
    for group, wanted in enumerate(quota):
        inside = np.flatnonzero(members == group)
        mask[inside[np.argsort(key[inside], kind="stable")[:wanted]]] = True
    return mask
