"""What a step changes (`State`), what it does not (`Frozen`), and where on the mesh each leaf of them lives."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jkd import sharding, trees
from jkd.config import StudentEma
from jkd.context import Context
from jkd.errors import InputError
from jkd.recipe import Bank
from jkd.types import Array, Batch, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Everything that a step changes, and all that a checkpoint holds.

    Args:
        step: int32 scalar, updates done.
        params: ``{group: tree}``, float32.
        optimizer: ``{group: optax state}``, for the leaves that train.
        buffers: ``{group: tree}``.
        ema: ``{group: {"params": tree, "buffers": tree}}``.
        memory: the recipe's.
        key: uint32 key data of the run.
    """

    step: Array
    params: dict[str, Tree]
    optimizer: dict[str, Any]
    buffers: dict[str, Tree]
    ema: dict[str, Tree]
    memory: Tree
    key: Array


Frozen = dict[str, dict[str, Tree]]
"""``{"params": {group: tree}, "buffers": {group: tree}}`` of what no step changes; never donated, differentiated or saved."""


def init_state(ctx: Context, key: Array) -> tuple[State, Frozen]:
    """A run's first state and its frozen arrays, each leaf created in, or moved to, its place on the mesh.

    Weights that a Model holds are copied: the caller's stay alive though the step donates its state.

    Raises:
        InputError: the teacher holds no weights.
    """
    frozen = freeze(ctx)
    places = state_shardings(ctx)
    given = {
        side: sharding.put((network.params, network.buffers), (places.params[side], places.buffers[side]))
        for side in _networks_in_state(ctx)
        if (network := ctx.networks[side]).initialised
    }
    # run once: on CPU the time to optimise this program is many times what it takes to run
    options = {"xla_backend_optimization_level": 0} if ctx.mesh.devices.flat[0].platform == "cpu" else None
    init = jax.jit(lambda *args: _init(ctx, *args), out_shardings=places, compiler_options=options)
    return init(key, frozen, given), frozen


def freeze(ctx: Context) -> Frozen:
    """The frozen arrays of a run, in ``teacher_dtype`` and in their places.

    Raises:
        InputError: the teacher or the oracle holds no weights.
    """
    frozen: Frozen = {"params": {}, "buffers": {}}
    dtype = jnp.dtype(ctx.run.teacher_dtype)

    def cast(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    for side in frozen_sides(ctx):
        network = ctx.networks[side]
        if not network.initialised:
            raise InputError(
                f"{side} {network.name} holds no weights: train it first (an earlier run of the Experiment) or load it"
            )
        places = sharding.shardings(ctx.specs[side], ctx.mesh)
        frozen["params"][side] = sharding.put(jax.tree.map(cast, network.params), places)
        everywhere = jax.tree.map(lambda _: P(), network.buffers)
        frozen["buffers"][side] = sharding.put(network.buffers, sharding.shardings(everywhere, ctx.mesh))
    return frozen


def frozen_shapes(ctx: Context) -> Frozen:
    """Shapes of `freeze`; nothing is moved."""
    dtype = jnp.dtype(ctx.run.teacher_dtype)

    def cast(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype)

    params = {side: jax.tree.map(cast, ctx.params[side]) for side in frozen_sides(ctx)}
    return {"params": params, "buffers": {side: ctx.buffers[side] for side in params}}


def state_shapes(ctx: Context) -> State:
    """The state's shapes; nothing is computed."""
    # the networks' shapes are known: tracing their init again would take most of the time
    given = {side: (ctx.params[side], ctx.buffers[side]) for side in _networks_in_state(ctx)}
    return jax.eval_shape(lambda *args: _init(ctx, *args), jax.random.key(0), frozen_shapes(ctx), given)


def state_shardings(ctx: Context) -> State:
    """Where each leaf of the state lives: parameters by rule, optimizer and average like them, banks by rows."""
    shapes = state_shapes(ctx)
    params = {group: ctx.specs[group] for group in shapes.params}
    optimizer = {
        group: sharding.like_parameters(state, shapes.params[group], params[group]) for group, state in shapes.optimizer.items()
    }

    def everywhere(tree: Tree) -> Tree:
        return jax.tree.map(lambda _: P(), tree)

    def remembered(node: Any) -> Any:
        return Bank(sharding.BATCH) if isinstance(node, Bank) else P()  # type: ignore[arg-type]

    specs = State(
        step=P(),  # type: ignore[arg-type]
        params=params,
        optimizer=optimizer,
        buffers=everywhere(shapes.buffers),
        ema={group: {"params": params[group], "buffers": everywhere(tree["buffers"])} for group, tree in shapes.ema.items()},
        memory=jax.tree.map(remembered, shapes.memory, is_leaf=lambda node: isinstance(node, Bank)),
        key=P(),  # type: ignore[arg-type]
    )
    return sharding.shardings(specs, ctx.mesh)


def step_shapes(ctx: Context) -> tuple[State, Frozen, Batch]:
    """What a step is called with, as shapes in their places: enough to trace it, and to compile it ahead of time."""

    def placed(shapes: Tree, places: Tree) -> Tree:
        return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)

    frozen, batch = frozen_shapes(ctx), ctx.batch if ctx.prepares else ctx.raw_batch
    specs = {
        "params": {group: ctx.specs[group] for group in frozen["params"]},
        "buffers": jax.tree.map(lambda _: P(), frozen["buffers"]),
    }
    rows = jax.tree.map(lambda _: sharding.BATCH, batch)
    return (
        placed(state_shapes(ctx), state_shardings(ctx)),
        placed(frozen, sharding.shardings(specs, ctx.mesh)),
        placed(batch, sharding.shardings(rows, ctx.mesh)),
    )


def trainable(ctx: Context, group: str, params: Tree) -> tuple[Tree, Tree]:
    """A group's leaves that move, and those that `Run.trainable` leaves out."""
    return trees.split(params, lambda path: ctx.trains(group, path))


def frozen_sides(ctx: Context) -> tuple[str, ...]:
    """The networks whose weights no step changes."""
    moves = isinstance(ctx.run.teacher, StudentEma) or "teacher" in ctx.groups
    return tuple(side for side in ("teacher", "oracle") if side in ctx.networks and not (side == "teacher" and moves))


def _networks_in_state(ctx: Context) -> tuple[str, ...]:
    return tuple(side for side in ("student", "teacher") if side in ctx.groups and side in ctx.networks)


def run_key(key: Array) -> Array:
    """The steps' key in a state that is made from this one."""
    return _keys(key)[2]


def _keys(key: Array) -> Array:
    """Of the student, the recipe, the steps and the teacher."""
    # the order of these keys is part of what makes a seed reproducible: append, never reorder
    return jax.random.split(key, 4)


def _init(ctx: Context, key: Array, frozen: Frozen, given: dict[str, tuple[Tree, Tree]]) -> State:
    key_student, key_recipe, key_run, key_teacher = _keys(key)
    keys = {"student": key_student, "teacher": key_teacher}
    params, buffers = {}, {}
    for side in _networks_in_state(ctx):
        params[side], buffers[side] = given[side] if side in given else ctx.networks[side].init(keys[side])
    params = _float32(params)
    everything = {**frozen["params"], **params}, {**frozen["buffers"], **buffers}
    vars = ctx.recipe.init(key_recipe, dataclasses.replace(ctx, params=everything[0], buffers=everything[1]))
    params = {**params, **_float32(vars.params)}
    buffers = {**buffers, **vars.buffers}
    optimizer = {group: ctx.optimizer(group).init(trainable(ctx, group, params[group])[0]) for group in ctx.groups}
    ema = {}
    if ctx.run.ema is not None:
        for group in ctx.run.ema.groups:
            ema[group] = {"params": params[group], "buffers": buffers.get(group, {})}
    state = State(
        step=jnp.int32(0),
        params=params,
        optimizer=optimizer,
        buffers=buffers,
        ema=ema,
        memory=vars.memory,
        key=jax.random.key_data(key_run),
    )
    # Copies: an array that came in, or stands in two places, must own its buffer before the step donates the state.
    return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), state)


def _float32(tree: Tree) -> Tree:
    def cast(leaf: Any) -> Any:
        half = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return leaf.astype(jnp.float32) if half else leaf

    return jax.tree.map(cast, tree)
