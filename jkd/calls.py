"""What the host calls: one step, or several in one program (`Run.steps_per_call`) where the call would cost more than the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jkd import compiler
from jkd.config import Run
from jkd.context import Context
from jkd.state import Frozen, State, state_shardings, step_shapes
from jkd.step import Metrics, make_step
from jkd.types import Array, Batch

Call = Callable[[State, Frozen, Batch, int], tuple[State, Metrics]]


def make_call(ctx: Context) -> Call:
    """``call(state, frozen, batches, count) -> (state, metrics)``: ``count`` steps, one after the other; the state is donated.

    With ``steps_per_call`` 1 this is `jkd.step.make_step` on one batch. Else every leaf of ``batches`` is
    ``[steps_per_call, batch, ...]`` (`sharding.put_batches`), of which the first ``count`` are trained on, and each metric is
    ``[steps_per_call]``, its first ``count`` values filled. The count is an argument of the program: one serves a call that ends
    early too.
    """
    program = make_program(ctx)
    if ctx.run.steps_per_call == 1:
        return lambda state, frozen, batch, count: program(state, frozen, batch)
    return lambda state, frozen, batches, count: program(state, frozen, batches, jnp.int32(count))


def make_program(ctx: Context) -> Any:
    """The jitted program of a call: ``program(state, frozen, batch)``; of several steps ``program(state, frozen, batches, count)``."""
    step: Any = make_step(ctx)
    places = (state_shardings(ctx), None)
    if ctx.run.steps_per_call == 1:
        return compiler.jit(step, ctx.mesh, donate_argnums=0, out_shardings=places)
    shapes = step.eval_shape(*step_shapes(ctx))[1]

    def steps(state: State, frozen: Frozen, batches: Batch, count: Array) -> tuple[State, Metrics]:
        def one(place: Array, carry: tuple[State, Metrics]) -> tuple[State, Metrics]:
            state, metrics = carry
            state, values = step(state, frozen, _at(batches, place))
            return state, {name: metrics[name].at[place].set(value) for name, value in values.items()}

        metrics = {name: jnp.zeros(ctx.run.steps_per_call, shape.dtype) for name, shape in shapes.items()}
        return jax.lax.fori_loop(0, count, one, (state, metrics))

    return compiler.jit(steps, ctx.mesh, donate_argnums=0, out_shardings=places)


def lengths(most: int, steps: int, periods: Sequence[int]) -> Callable[[int], int]:
    """``length(done) -> count``: how many steps the next call makes, so that none passes the end or a multiple of a period.

    Args:
        most: at most so many.
        steps: of the run.
        periods: 0 stands for never.
    """
    return lambda done: min(most, steps - done, *(period - done % period for period in periods if period))


def last(run: Run, batches: Batch, count: int) -> Batch:
    """The batch of a call's last step."""
    return batches if run.steps_per_call == 1 else _LAST(batches, jnp.int32(count - 1))


def _at(batches: Batch, place: Array) -> Batch:
    return jax.tree.map(lambda rows: jax.lax.dynamic_index_in_dim(rows, place, keepdims=False), batches)


_LAST = jax.jit(_at)
