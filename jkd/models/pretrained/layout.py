"""How a tensor in a file becomes a parameter, said in one line: ``"(head k) dim -> dim head k"``.

Left the file's axes, right the parameter's; axes in brackets are one axis in the file, the first of them the slowest. Any block of
the parameter is read from the block of the file that holds it, so that no process reads more than its own part.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A tensor's axes in the file (each a group of named axes) and in the parameter."""

    file: tuple[tuple[str, ...], ...]
    parameter: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        left, right = text.split("->")
        groups = tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", left))
        return cls(groups, tuple(right.split()))

    def file_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The file's shape for a parameter of this shape."""
        sizes = dict(zip(self.parameter, shape, strict=True))
        return tuple(math.prod(sizes[axis] for axis in group) for group in self.file)

    def read(self, tensor: Any, shape: tuple[int, ...], block: Slices) -> np.ndarray:
        """A block of the parameter from ``tensor``, which is read where it is sliced."""
        sizes = dict(zip(self.parameter, shape, strict=True))
        bounds = {axis: part.indices(sizes[axis])[:2] for axis, part in zip(self.parameter, block, strict=True)}
        rows, unfolded, inner = [], [], []
        for first, *rest in self.file:
            start, stop = bounds[first]
            step = math.prod(sizes[axis] for axis in rest)
            rows.append(slice(start * step, stop * step))
            unfolded += [stop - start, *(sizes[axis] for axis in rest)]
            inner += [slice(None), *(slice(*bounds[axis]) for axis in rest)]
        found = tensor[tuple(rows)].reshape(unfolded)[tuple(inner)]
        return found.transpose([self._order.index(axis) for axis in self.parameter])

    def write(self, parameter: np.ndarray) -> np.ndarray:
        """The whole parameter as the file has it."""
        found = parameter.transpose([self.parameter.index(axis) for axis in self._order])
        return np.ascontiguousarray(found.reshape(self.file_shape(parameter.shape)))

    @property
    def _order(self) -> tuple[str, ...]:
        return tuple(axis for group in self.file for axis in group)
