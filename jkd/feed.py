"""The batches of a run, one ahead of the step that trains on them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jkd import sharding
from jkd.context import Context
from jkd.data.batch import check_batch
from jkd.errors import InputError
from jkd.prepare import make_prepare
from jkd.recipe import Recipe
from jkd.state import Frozen, State
from jkd.types import Batch


class Feed:
    """Reads, places and prepares batches, and asks the recipe which examples to draw.

    Args:
        ctx: the run.
        process: (index, count) of this host.
        start: global batches trained on already.
        weights: sampling weights ``[train examples]`` in force, or None.

    Attributes:
        period: steps between readings of `Recipe.sampling`; 0 where it says nothing.
        waited: seconds that went by until batches were read: 0 where they always lay ready.
    """

    def __init__(self, ctx: Context, process: tuple[int, int], start: int, weights: np.ndarray | None):
        if ctx.run.data is None:
            raise InputError("Run.data = None: train() needs data; feed batches by hand to jkd.make_step instead")
        self._ctx, self._data, self._process = ctx, ctx.run.data, process
        self.weights = None if weights is None else np.asarray(weights)
        self._prepare = make_prepare(ctx)
        self.period = ctx.run.sample_every if type(ctx.recipe).sampling is not Recipe.sampling else 0
        self._ready: Batch | None = None
        self.waited = 0.0
        self._open(start)

    def _open(self, start: int) -> None:
        run = self._ctx.run
        self._rows: Iterator[Batch] = self._data.batches(
            run.batch_size, seed=run.seed, start=start, process=self._process, weights=self.weights
        )

    def _read(self, state: State, frozen: Frozen, step: int, count: int) -> Batch:
        start, most = time.perf_counter(), self._ctx.run.steps_per_call
        rows = [next(self._rows) for _ in range(count)]
        self.waited += time.perf_counter() - start
        for each in rows:
            check_batch(each, self._ctx.classes)  # data need not say how many there are
        if most > 1:
            return sharding.put_batches(rows + rows[-1:] * (most - count), self._ctx.mesh)
        batch = sharding.put_batch(rows[0], self._ctx.mesh)
        if self._prepare is not None and self._prepare[1]:
            batch = self._prepare[0](state, frozen, batch, jnp.int32(step))
        return batch

    def read_ahead(self, state: State, frozen: Frozen, step: int, count: int = 1) -> None:
        """Reads what `next` will answer, and prepares it where that needs nothing that training changes."""
        if not self.resamples(step):  # else the batch depends on what the recipe says once the memory of this step is there
            self._ready = self._read(state, frozen, step, count)

    def next(self, state: State, frozen: Frozen, step: int, count: int = 1) -> Batch:
        """The batch of a step; with `Run.steps_per_call` those of ``count`` steps from it on, stacked (`jkd.calls`)."""
        batch = self._read(state, frozen, step, count) if self._ready is None else self._ready
        self._ready = None
        if self._prepare is not None and not self._prepare[1]:
            batch = self._prepare[0](state, frozen, batch, jnp.int32(step))
        return batch

    def resamples(self, step: int) -> bool:
        """Whether the recipe is asked for sampling weights before this step."""
        return self.period > 0 and step > 0 and step % self.period == 0

    def resample(self, state: State, step: int) -> None:
        """Asks the recipe which examples to draw from this step on."""
        weights = self._ctx.recipe.sampling(sharding.whole(state.memory))
        if weights is not None:
            self.weights = np.asarray(weights)
            self.close()
            self._open(step)

    def close(self) -> None:
        close: Any = getattr(self._rows, "close", None)
        if close is not None:
            close()
