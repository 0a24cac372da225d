"""Blocks of tokens: all logits of a few tokens at a time, and their gradient while they are there.

Where it is known what a token weighs in the sum, every logit is computed once. Where it is not, the backward pass computes them
again.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jkd.losses.chunked import sweeps
from jkd.losses.chunked.heads import Side, Windows, loop
from jkd.losses.chunked.parts import Each
from jkd.losses.chunked.places import split, token_axes
from jkd.losses.chunked.sweeps import Problem


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Walk the tokens.

    Args:
        rows: tokens in a block, on each device.
        columns: how much of the vocabulary a block's arithmetic takes at a time; None: all of it.
    """

    rows: int
    columns: int | None = None

    def values(self, problem: Problem) -> tuple[Any, None]:
        """``[parts, tokens]``, and nothing that a backward pass could start from."""
        cut = _Cut(problem, self.rows)

        def block(_: None, rows: Any) -> tuple[None, Any]:
            return None, _Block(problem.with_rows(rows), self.columns).values.T

        return cut.together(jax.lax.scan(block, None, jax.tree.map(cut.apart, problem.by_row))[1]).T, None

    def gradients(
        self,
        problem: Problem,
        kept: None,
        coefs: Any,
        wants: tuple[Side, ...],
        *,
        onto: tuple[Side, ...] | None = None,
        unless: Any = False,
    ) -> tuple[Any, tuple[Side, ...]]:
        """What `values` gives, and the gradient of ``sum(coefs * values)`` by what is wanted of each side, as every device finds it.

        Sums are in float32; those by kernel and bias ``[shards, …]`` are of each device's own tokens, until they are `finished`.

        Args:
            problem, kept: what, and what `values` left of it.
            coefs: ``[parts, tokens]``.
            wants: of each side, whether its arrays' gradients are wanted.
            onto: gradients, not finished, that these are added to.
            unless: a truth value, traced: nothing is walked, the values are 0 and the gradients ``onto`` alone.
        """
        cut = _Cut(problem, self.rows)
        coefs = jnp.pad(coefs, ((0, 0), (0, cut.padding)))  # what pads counts for nothing
        pieces = jax.tree.map(cut.apart, problem.by_row), cut.laid(coefs.T)
        starts = onto or tuple(Side(None) for _ in problem.sides)
        hidden, sums = zip(*(_start(*side, cut) for side in zip(problem.sides, wants, starts, strict=True)), strict=True)

        def block(i: Any, carry: Any) -> Any:
            values, hidden, sums = carry
            rows, coefs = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), pieces)
            here = _Block(problem.with_rows(rows), self.columns)
            by_hidden, sums = here.gradients(coefs.T, wants, sums)
            hidden = [x if new is None else _add_at(x, new, i) for x, new in zip(hidden, by_hidden, strict=True)]
            return _add_at(values, here.values.T, i), hidden, sums

        values = jnp.zeros((cut.count, cut.shards * cut.rows, len(problem.parts)), problem.student.dtype)
        turns = cut.count if unless is False else jnp.where(unless, 0, cut.count)
        values, hidden, sums = jax.lax.fori_loop(0, turns, block, (values, list(hidden), list(sums)))
        whole = [x if x is None else cut.together(x) for x in hidden]
        return (cut.together(values).T, None), tuple(Side(x, **some) for x, some in zip(whole, sums, strict=True))

    def finished(self, gradients: tuple[Side, ...]) -> tuple[Side, ...]:
        """What `gradients` gives, summed over devices: once, however many of them were added up before."""
        summed = [
            {name: x if x is None else x.sum(0) for name, x in (("kernel", g.kernel), ("bias", g.bias))} for g in gradients
        ]
        return tuple(dataclasses.replace(side, **some) for side, some in zip(gradients, summed, strict=True))


def _add_at(x: Any, new: Any, i: Any) -> Any:
    return jax.lax.dynamic_update_index_in_dim(x, jax.lax.dynamic_index_in_dim(x, i, keepdims=False) + new, i, 0)


def _start(side: Side, want: Side, onto: Side, cut: _Cut) -> tuple[Any, dict[str, Any]]:
    """Where gradients are summed: by hidden ``[blocks, rows, dim]``; by kernel and bias, for each device that holds some tokens."""
    hidden = None
    if want.hidden:
        zeros = jnp.zeros((cut.count, cut.shards * cut.rows, side.hidden.shape[1]), side.dtype)
        hidden = zeros if onto.hidden is None else cut.apart(onto.hidden)
    sums = {}
    kernel = side.kernel.shape
    for name, shape in (("kernel", kernel), ("collects", kernel), ("bias", kernel[1:])):
        if getattr(want, name):
            first = getattr(onto, name)
            start = jnp.zeros((cut.shards, *shape), side.dtype) if first is None else first
            sums[name] = split(start, cut.mesh, token_axes(cut.mesh))
    return hidden, sums


class _Cut:
    """Tokens in blocks; a block has as many tokens of every device as of any other."""

    def __init__(self, problem: Problem, rows: int):
        self.tokens, self.shards, self.mesh = problem.tokens, problem.shards, problem.mesh
        self.count = max(1, -(-self.tokens // (self.shards * rows)))
        self.rows = -(-self.tokens // (self.shards * self.count))
        self.padding = self.shards * self.rows * self.count - self.tokens

    def apart(self, x: Any) -> Any:
        """``[tokens, …]`` as ``[blocks, tokens of a block, …]``; padded by copies of the last token, whose logits are as good."""
        if self.padding:
            x = jnp.pad(x, ((0, self.padding), *((0, 0),) * (x.ndim - 1)), mode="edge")
        return self.laid(x)

    def laid(self, x: Any) -> Any:
        """The same of what is padded."""
        x = x.reshape(self.shards, self.count, self.rows, *x.shape[1:])
        return x.swapaxes(0, 1).reshape(self.count, self.shards * self.rows, *x.shape[3:])

    def together(self, x: Any) -> Any:
        """`apart` undone."""
        x = x.reshape(self.count, self.shards, self.rows, *x.shape[2:])
        return x.swapaxes(0, 1).reshape(-1, *x.shape[3:])[: self.tokens]


class _Block:
    """Some tokens with all their logits."""

    def __init__(self, problem: Problem, columns: int | None):
        self.problem = problem
        self.logits = [side.logits() for side in problem.sides]
        vocab = self.logits[0].shape[-1]
        self.windows = windows = Windows.of(problem.classes, vocab, columns or vocab, lanes=problem.lanes)
        self.laid = [windows.lay(x) for x in self.logits]
        self.norms = sweeps.statistics(problem, windows, self._read(self.laid))
        self.totals = sweeps.totals(problem, windows, self._read(self.laid), self.norms)
        found = sweeps.values(problem, self.totals)
        self.pullbacks = {}
        for k, part in enumerate(problem.parts):
            if isinstance(part, Each):
                read = self.logits if part.teacher else self.logits[:1]
                found[k], self.pullbacks[k] = jax.vjp(problem.each(k), *(x[:, : problem.classes] for x in read))
        self.values = jnp.stack([found[k].astype(self.logits[0].dtype) for k in range(len(problem.parts))])

    def _read(self, laid: list[Any]) -> sweeps.Read:
        return lambda j: [self.windows.read(x, j) for x in laid]

    def gradients(self, coefs: Any, wants: tuple[Side, ...], sums: Any) -> tuple[list[Any], list[Any]]:
        """By hidden, or None; and the sums with this block's gradients by kernel and bias added."""
        problem, windows = self.problem, self.windows
        active = sweeps.active(wants)
        whole = self._whole(coefs, active)

        def window(j: Any, carry: Any) -> Any:
            laid, sums = carry
            read = self._read([*laid, *self.laid[active:]])
            found = sweeps.slopes(problem, windows, read, self.norms, self.totals, coefs, j, active)
            for place in range(active):
                if whole is not None:
                    found[place] += windows.fresh(windows.read(whole[place], j), 0, j)
            added = [self._added(*each, j) for each in zip(problem.sides, sums, found, strict=False)]
            # this window's logits have been read for the last time: the gradient takes their place
            old = read(j)
            return [windows.write(laid[i], windows.fresh(found[i], old[i], j), j) for i in range(active)], added

        lay = [{name: windows.lay(x) for name, x in some.items()} for some in sums[:active]]
        laid, lay = loop(windows.count, window, (self.laid[:active], lay))
        hidden = [
            side.by_hidden(windows.flat(x), side.kernel, lanes=1)[0] if want.hidden else None
            for side, want, x in zip(problem.sides, wants, laid, strict=False)
        ]
        flat = [{name: windows.flat(x) for name, x in some.items()} for some in lay]
        return hidden + [None] * (len(wants) - active), [*flat, *sums[active:]]

    def _added(self, side: Side, sums: dict[str, Any], gradient: Any, j: Any) -> dict[str, Any]:
        more = side.by_head(gradient, self.problem.shards)
        return {name: self.windows.write(x, more[name], j, add=True) for name, x in sums.items()}

    def _whole(self, coefs: Any, active: int) -> list[Any] | None:
        """The gradient of the parts that read whole logits, laid out; None where there are none."""
        if not self.pullbacks:
            return None
        found = [jnp.zeros_like(x) for x in self.logits[:active]]
        for k, pullback in self.pullbacks.items():
            for place, gradient in enumerate(pullback(coefs[k])[:active]):
                padded = jnp.pad(gradient, ((0, 0), (0, found[place].shape[1] - gradient.shape[1])))
                found[place] += self.problem.sides[place].uncapped(padded, self.logits[place])
        return [self.windows.lay(x) for x in found]
