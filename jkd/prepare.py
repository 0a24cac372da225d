"""`Recipe.prepare` as a program of its own, and whether it may run one batch ahead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jkd import compiler
from jkd.context import Context, explained
from jkd.networks import augmented, models_at
from jkd.state import Frozen, State, frozen_shapes, state_shapes
from jkd.types import Array, Batch


def make_prepare(ctx: Context) -> tuple[Callable[[State, Frozen, Batch, Array], Batch], bool] | None:
    """The recipe's `Recipe.prepare` as ``prepare(state, frozen, batch, step) -> batch``, jitted, and whether it may run ahead.

    It may where it reads nothing of the state that training changes: then batch n+1 is prepared while step n runs. None where the
    recipe prepares nothing.
    """
    if not ctx.prepares:
        return None
    return compiler.jit(prepare_of(ctx), ctx.mesh), not _reads_training(ctx)


def prepared_shapes(ctx: Context) -> Batch:
    """Shapes of the batch that the recipe prepares; nothing is computed."""
    with explained(f"{type(ctx.recipe).__name__}.prepare"):
        return jax.eval_shape(prepare_of(ctx), *_prepare_shapes(ctx))


def prepare_of(ctx: Context) -> Callable[[State, Frozen, Batch, Array], Batch]:
    """The same as a plain function, for programs of which it is a part and for tracing."""

    def prepare(state: State, frozen: Frozen, batch: Batch, step: Array) -> Batch:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), step)
        models = models_at(ctx, state, frozen, ctx.clock(step))
        return ctx.recipe.prepare(models, augmented(ctx, batch, key), jax.random.fold_in(key, len(ctx.updates) + 1))

    return prepare


def _prepare_shapes(ctx: Context) -> tuple[State, Frozen, Batch, Any]:
    return state_shapes(ctx), frozen_shapes(ctx), ctx.raw_batch, jax.ShapeDtypeStruct((), jnp.int32)


def _reads_training(ctx: Context) -> bool:
    """Whether `Recipe.prepare` reads parameters, averages, memory or anything else that a step changes (the key does not)."""
    args = _prepare_shapes(ctx)
    jaxpr = jax.make_jaxpr(prepare_of(ctx))(*args).jaxpr
    used = {id(var) for equation in jaxpr.eqns for var in equation.invars} | {id(var) for var in jaxpr.outvars}
    leaves = jax.tree_util.tree_flatten_with_path(args[0])[0]
    return any(
        id(var) in used and getattr(keys[0], "name", "") != "key" for (keys, _), var in zip(leaves, jaxpr.invars, strict=False)
    )
