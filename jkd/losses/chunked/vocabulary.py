"""Blocks of the vocabulary: a few columns of all tokens' logits at a time, computed again in every sweep.

Nothing of the size of the head is held beside the head and its gradient, and a token's weight may come as late as it likes; the
price is that logits are computed two or three times.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from jkd.losses.chunked import sweeps
from jkd.losses.chunked.heads import Side, Windows, loop
from jkd.losses.chunked.parts import Each
from jkd.losses.chunked.places import VOCAB, split, token_axes
from jkd.losses.chunked.sweeps import Norms, Problem, Totals


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Walk the vocabulary.

    Args:
        columns: of the head in a block.
    """

    columns: int

    def values(self, problem: Problem) -> tuple[Any, tuple[Norms, Totals]]:
        """``[parts, tokens]``, and the sums over the vocabulary that a backward pass starts from."""
        columns = _Columns(problem, self.columns)
        norms = sweeps.statistics(problem, columns.windows, columns.logits)
        totals = sweeps.totals(problem, columns.windows, columns.logits, norms)
        found = sweeps.values(problem, totals)
        return jnp.stack([found[k] for k in range(len(problem.parts))]), (norms, totals)

    def gradients(
        self,
        problem: Problem,
        kept: tuple[Norms, Totals] | None,
        coefs: Any,
        wants: tuple[Side, ...],
        *,
        onto: tuple[Side, ...] | None = None,
        unless: Any = False,
    ) -> tuple[Any, tuple[Side, ...]]:
        """What `values` gives, and the gradient of ``sum(coefs * values)`` by what is wanted; see `Tokens.gradients`."""
        values, (norms, totals) = (None, kept) if kept is not None else self.values(problem)
        columns, active = _Columns(problem, self.columns), sweeps.active(wants)
        windows = columns.windows

        def window(j: Any, carry: list[dict[str, Any]]) -> list[dict[str, Any]]:
            found = sweeps.slopes(problem, windows, columns.logits, norms, totals, coefs, j, active)
            return [columns.added(*each, j) for each in zip(range(active), found, carry, strict=True)]

        starts = onto or tuple(Side(None) for _ in wants)
        sums = [columns.start(i, wants[i], starts[i]) for i in range(active)]
        turns = windows.count if unless is False else jnp.where(unless, 0, windows.count)
        sums = loop(turns, window, sums)
        found = [Side(**{name: x if name == "hidden" else windows.flat(x) for name, x in some.items()}) for some in sums]
        return (values, (norms, totals)), tuple(found + [Side()] * (len(wants) - active))

    def finished(self, gradients: tuple[Side, ...]) -> tuple[Side, ...]:
        """What `gradients` gives; those by hidden ``[lanes, tokens, dim]`` are summed over the devices that hold the vocabulary."""
        return tuple(
            side if side.hidden is None else dataclasses.replace(side, hidden=side.hidden.sum(0)) for side in gradients
        )


class _Columns:
    """Both heads, laid out in windows."""

    def __init__(self, problem: Problem, columns: int):
        if any(isinstance(part, Each) for part in problem.parts):
            raise ValueError(
                "schedule=Vocabulary(…) walks sums over classes; an Each reads whole logits: give Tokens(…), or None"
            )
        vocab = problem.student.kernel.shape[-1]
        self.problem = problem
        self.windows = Windows.of(problem.classes, vocab, columns, lanes=problem.lanes)
        self.kernels = [self.windows.lay(side.kernel) for side in problem.sides]
        self.biases = [None if side.bias is None else self.windows.lay(side.bias) for side in problem.sides]

    def logits(self, j: Any) -> list[Any]:
        """Of window j, by side."""
        found = []
        for side, kernel, bias in zip(self.problem.sides, self.kernels, self.biases, strict=True):
            some = None if bias is None else self.windows.read(bias, j)
            found.append(side.logits(some, self.windows.read(kernel, j)))
        return found

    def start(self, place: int, want: Side, onto: Side) -> dict[str, Any]:
        """Where gradients are summed: by hidden, for each device that holds some of the vocabulary; by kernel and bias, laid out."""
        side, lanes, found = self.problem.sides[place], self.windows.lanes, {}
        if want.hidden:
            first = jnp.zeros((lanes, *side.hidden.shape), side.dtype) if onto.hidden is None else onto.hidden
            found["hidden"] = split(first, self.problem.mesh, (VOCAB,))
        kernel, shards = side.kernel.shape, self.problem.shards
        # a column is written once, so it needs no more digits than the kernel has, unless it is yet to be summed
        for name, shape, dtype in (
            ("kernel", kernel, side.kernel.dtype),
            ("collects", (shards, *kernel), side.dtype),
            ("bias", kernel[1:], side.dtype),
        ):
            if getattr(want, name):
                first = getattr(onto, name)
                start = jnp.zeros(shape, dtype) if first is None else first
                if name == "collects":
                    start = split(start, self.problem.mesh, token_axes(self.problem.mesh))
                found[name] = self.windows.lay(start)
        return found

    def added(self, place: int, gradient: Any, sums: dict[str, Any], j: Any) -> dict[str, Any]:
        """The sums with the gradient by window j's logits in them."""
        side, found = self.problem.sides[place], dict(sums)
        for name in sums.keys() - {"hidden"}:
            more = side.by_head(gradient, self.problem.shards if name == "collects" else 1)[name]
            found[name] = self.windows.write(sums[name], more if name == "collects" else more[0], j, add=True)
        if "hidden" in sums:
            kernel = self.windows.read(self.kernels[place], j)
            found["hidden"] = sums["hidden"] + side.by_hidden(gradient, kernel, lanes=self.windows.lanes)
        return found
