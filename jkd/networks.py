"""The networks as a step runs them: with a state's weights, cast, gathered and rematerialised, a stopped teacher stopped."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jkd import schedules, sharding, tokens, trees
from jkd.config import Run, StudentEma
from jkd.context import Context, augment, to_compute
from jkd.errors import InputError
from jkd.recipe import Models
from jkd.schedules import Clock
from jkd.state import Frozen, State, trainable
from jkd.types import Array, Batch, Model, Outputs, Tree, subtree


def step_key(state: State) -> Array:
    """The key of the step that comes next."""
    return jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)


def seen(ctx: Context, batch: Batch, key: Array) -> Batch:
    """The global batch as the step with this key sees it: augmented, unless that happened where it was prepared."""
    return sharding.constrain_batch(batch, ctx.mesh) if ctx.prepares else augmented(ctx, batch, key)


def augmented(ctx: Context, batch: Batch, key: Array) -> Batch:
    """The run's augmentations on the global batch, its rows in their places before and after."""
    return sharding.constrain_batch(
        augment(ctx.run, sharding.constrain_batch(batch, ctx.mesh), jax.random.fold_in(key, 0)), ctx.mesh
    )


def models_of(ctx: Context, state: State, frozen: Frozen, *, ema: bool = False) -> Models:
    """The networks with the weights of a state; with ``ema``, averaged groups in place of the trained ones."""
    if ema:
        average = {group: tree["params"] for group, tree in state.ema.items()}
        buffers = {group: tree["buffers"] for group, tree in state.ema.items() if group in state.buffers}
        state = dataclasses.replace(state, params={**state.params, **average}, buffers={**state.buffers, **buffers})
    return models_at(ctx, state, frozen, ctx.clock(state.step))


def models_at(ctx: Context, state: State, frozen: Frozen, clock: Clock) -> Models:
    """What a recipe's hooks get: the networks with these weights, and how the engine runs and moves them."""
    params = {**frozen["params"], **state.params}
    buffers = {**frozen["buffers"], **state.buffers}
    if isinstance(ctx.run.teacher, StudentEma):
        params["teacher"], buffers["teacher"] = state.ema["student"]["params"], state.ema["student"]["buffers"]

    def move(models: Models, group: str, gradients: Tree) -> tuple[Tree, Any]:
        moving = trainable(ctx, group, gradients)[0]
        return moved(ctx, group, models.params[group], moving, models.optimizer[group], clock.step)

    return Models(
        networks=ctx.networks,
        params=params,
        buffers=buffers,
        memory=state.memory,
        clock=clock,
        optimizer=state.optimizer,
        seed=state.key,
        call=lambda *args: _call(ctx, *args),
        move=move,
        follow=lambda models: _followed(ctx, models),
    )


def _call(
    ctx: Context, models: Models, network: str | Model, group: str, part: str, batch: Any, taps: Any, train: bool, key: Any
) -> tuple[Outputs, Tree]:
    """Runs a network: weights cast and gathered at use, the student rematerialised, a stopped teacher stopped."""
    side = network if isinstance(network, str) else ""
    if side == "teacher" and not part:
        batch = tokens.for_teacher(batch)
    model = network if isinstance(network, Model) else ctx.networks[network]
    own = {"student": ctx.recipe.student_taps, "teacher": ctx.recipe.teacher_taps}
    taps = own.get(side, ()) if taps is None and not part else taps or ()
    params, buffers = models.params[group], models.buffers.get(group, {})
    specs = _specs(ctx, group, params)
    if part:
        model = model.with_weights(params, buffers).submodule(part)
        params, buffers, specs = model.params, model.buffers, subtree(specs, part)

    def run(params: Tree, buffers: Tree, batch: Any) -> tuple[Outputs, Tree]:
        outputs, new = applied(
            model, params, buffers, batch, run=ctx.run, specs=specs, mesh=ctx.mesh, taps=taps, train=train, key=key
        )
        return outputs, jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), new, buffers)

    if ctx.run.remat is not None and train:
        run = jax.checkpoint(run, policy=ctx.run.remat)  # gathers again in the backward pass rather than keep whole weights
    with jax.named_scope(group):  # a compiled program says whose its operations are
        outputs, buffers = run(params, buffers, batch)
    if group == "teacher" and ctx.recipe.teacher_gradient == "stop" and "teacher" not in ctx.groups:
        outputs = jax.lax.stop_gradient(outputs)
    return outputs, models.buffers.get(group, {}) if part else buffers


def applied(
    model: Model, params: Tree, buffers: Tree, batch: Any, *, run: Run, specs: Tree, mesh: Mesh, **options: Any
) -> tuple[Outputs, Tree]:
    """``model.apply`` as every program of a run calls it: weights cast and gathered at use, stacked layers one at a time.

    Args:
        specs: where the parameters are stored on the mesh.
        **options: of ``apply``.
    """
    later = tuple(f"{stack}/*" for stack in model.stacked)
    params = sharding.at_use(params, specs, mesh, jnp.dtype(run.compute_dtype), later=later)
    # the mesh is for kernels that XLA cannot split
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), sharding.storing(specs, mesh):
        return model.apply(params, buffers, to_compute(run, batch), **options)


def gathered(ctx: Context, params: Mapping[str, Tree]) -> dict[str, Tree]:
    """Every group as a recipe's own arithmetic needs it; what it does not read is dead code."""
    return {group: sharding.at_use(tree, _specs(ctx, group, tree), ctx.mesh) for group, tree in params.items()}


def _specs(ctx: Context, group: str, params: Tree) -> Tree:
    """Where a group's parameters are stored; of one that a recipe made up during the step, nothing is split."""
    return ctx.specs[group] if group in ctx.specs else jax.tree.map(lambda _: P(), params)


def averages(ctx: Context, clock: Clock, before: Tree, now: Tree) -> Tree:
    """The run's moving average, one update on; leaves that are no floats are taken as they are now."""
    assert ctx.run.ema is not None
    decay = schedules.at(ctx.run.ema.decay, clock)
    if ctx.run.ema.warmup:
        decay = jnp.minimum(decay, 1 - 1 / (jnp.asarray(clock.step, jnp.float32) + 1))

    def blend(old: Array, new: Array) -> Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        return (decay * old + (1 - decay) * new).astype(old.dtype)

    return jax.tree.map(blend, before, now)


def _followed(ctx: Context, models: Models) -> Models:
    if not isinstance(ctx.run.teacher, StudentEma):
        raise InputError(f"{type(ctx.recipe).__name__} moves the student's average: it needs Run.teacher = StudentEma()")
    before, now = (
        jax.lax.stop_gradient((models.params[group], models.buffers.get(group, {}))) for group in ("teacher", "student")
    )
    params, buffers = averages(ctx, models.clock, before, now)
    return dataclasses.replace(
        models, params={**models.params, "teacher": params}, buffers={**models.buffers, "teacher": buffers}
    )


def moved(ctx: Context, group: str, params: Tree, gradient: Tree, optimizer: Any, step: Array | int) -> tuple[Tree, Any]:
    """A group after one step of its optimizer, and the optimizer's state; ``gradient`` has the leaves that train."""
    moving, rest = trainable(ctx, group, params)
    change, optimizer = ctx.optimizer(group, step).update(gradient, optimizer, moving)
    return trees.merge(optax.apply_updates(moving, change), rest), optimizer
