"""The jitted step: teacher forward, student forward, terms, backward and update as one sharded program.

`make_step` runs the recipe's updates in order; `_gradients` cuts the batch into microbatches; `_objective` turns terms into the
number that is differentiated. All means are taken there: each term over its global weight sum, whatever the number of
microbatches, devices and hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jkd import schedules, sharding, trees
from jkd.context import Context, explained, to_compute
from jkd.errors import InputError
from jkd.networks import gathered, models_at, models_of, moved, seen, step_key
from jkd.recipe import Models, Update, Vars
from jkd.schedules import Clock
from jkd.state import Frozen, State, state_shardings, step_shapes, trainable
from jkd.types import Array, Batch, Term, Tree

Metrics = dict[str, Array]


def make_step(ctx: Context) -> Callable[[State, Frozen, Batch], tuple[State, Metrics]]:
    """``step(state, frozen, batch) -> (state, metrics)``, jitted; the state that goes in is donated.

    ``batch`` is global (`sharding.put_batch`). Metrics are float32 scalars: ``loss``, ``gradient_norm``, ``learning_rate``, and
    for each term ``term/name`` (its mean), ``coef/name`` and ``share/name`` (of the summed magnitudes of ``coef * mean``); beside
    them ``ran/name`` for terms of an update with a period: where it is 0 the update did not run and its numbers mean nothing.
    """

    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, Metrics]:
        clock, key = ctx.clock(state.step), step_key(state)
        batch = seen(ctx, batch, key)
        start = state
        terms: dict[str, Metrics] = {}
        ran: dict[str, Array] = {}
        norms: list[Array] = []
        for place, update in enumerate(ctx.updates):

            def run(state: State, place: int = place, update: Update = update):
                return _update(ctx, update, state, start, frozen, batch, clock, jax.random.fold_in(key, place + 1))

            if update.every == 1:
                state, means, norm = run(state)
            else:
                idle = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, state)[1:])
                runs = start.step % update.every == 0
                state, means, norm = jax.lax.cond(runs, run, lambda state, idle=idle: (state, *idle), state)
            more = {f"{update.name}.{name}" if update.name else name: mean for name, mean in means.items()}
            if twice := terms.keys() & more.keys():
                raise InputError(
                    f"{type(ctx.recipe).__name__}: two updates have the same term {min(twice)!r}; give one an Update.name"
                )
            terms |= more
            if update.every > 1:
                ran |= {f"ran/{name}": runs.astype(jnp.float32) for name in more}
            norms.append(norm)
        state = dataclasses.replace(state, step=start.step + 1, ema=_average(ctx, state, clock))
        return state, _report(ctx, terms, norms, clock) | ran

    made = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(ctx), None))
    # mistakes in a recipe's hooks are told now; the first call finds this trace
    made.eval_shape(*step_shapes(ctx))
    return made


def make_eval_step(ctx: Context, measure: Callable[..., Tree], *, ema: bool = False) -> Callable[[State, Frozen, Batch], Tree]:
    """``eval_step(state, frozen, batch) -> measure(student, teacher, batch)``, jitted, for the product that the recipe deploys.

    Args:
        measure: takes the Outputs of the product and of the teacher (None without one) and the batch.
        ema: whether the average stands in the student's place.
    """

    def eval_step(state: State, frozen: Frozen, batch: Batch) -> Tree:
        models = models_of(ctx, state, frozen, ema=ema)
        product = ctx.recipe.deploy(dataclasses.replace(models, params=gathered(ctx, models.params)))
        batch = sharding.constrain_batch(batch, ctx.mesh)
        student, _ = product.apply(to_compute(ctx.run, product.params), product.buffers, to_compute(ctx.run, batch))
        # answers that come with the training batches are not there for other examples
        elsewhere = "teacher" in ctx.raw_batch and "teacher" not in batch
        teacher = None if elsewhere else models.teacher(batch, taps=())
        return measure(student, teacher, batch)

    return jax.jit(eval_step)


def make_term_gradients(ctx: Context) -> Callable[[State, Frozen, Batch], Metrics]:
    """``f(state, frozen, batch) -> {"norm/term": …, "cosine/term": …}``: each term's gradient by itself, jitted.

    ``norm`` is of the gradient of ``coef * mean`` over the update's groups, of the batch cut as the step cuts it; ``cosine`` is to
    the gradient of the term called ``task``, over the parameters of the student, where there is such a term.
    """

    def gradients(state: State, frozen: Frozen, batch: Batch) -> Metrics:
        clock, key = ctx.clock(state.step), step_key(state)
        batch = seen(ctx, batch, key)
        metrics: Metrics = {}
        for place, update in enumerate(ctx.updates):

            def one(name: str | None, place: int = place, update: Update = update) -> tuple[Tree, dict[str, Metrics]]:
                own = jax.random.fold_in(key, place + 1)
                return _gradients(ctx, update, state, frozen, batch, clock, own, only=name)[:2]

            names = sorted(jax.eval_shape(lambda one=one: one(None))[1])
            found = {name: one(name)[0] for name in names}
            prefix = f"{update.name}." if update.name else ""
            metrics |= {f"norm/{prefix}{name}": optax.tree.norm(gradient) for name, gradient in found.items()}
            if "task" in found and "student" in (update.groups or ()):
                task = found["task"]["student"]
                others = [name for name in names if name != "task"]
                metrics |= {f"cosine/{prefix}{name}": _cosine(found[name]["student"], task) for name in others}
        return metrics

    return jax.jit(gradients)


def _update(
    ctx: Context, update: Update, state: State, start: State, frozen: Frozen, batch: Batch, clock: Clock, key: Array
) -> tuple[State, dict[str, Metrics], Array]:
    """One update: gradients of its groups, the optimizers' steps, and what the recipe remembers."""
    reads = dataclasses.replace(state, memory=start.memory)  # the memory as it stood at the step's start
    gradients, means, buffers, observed = _gradients(ctx, update, reads, frozen, batch, clock, key)
    params, optimizer = dict(state.params), dict(state.optimizer)
    for group, gradient in gradients.items():
        params[group], optimizer[group] = moved(ctx, group, params[group], gradient, optimizer[group])
    terms = {name: mean["term"] for name, mean in means.items()}
    with explained(f"{type(ctx.recipe).__name__}.remember"):
        key = jax.random.fold_in(key, 1)
        memory = update.remember(state.memory, observed, batch, terms=terms, clock=clock, key=key)  # type: ignore[misc]
    memory = _same_kind(ctx, jax.tree.map(jnp.asarray, memory), state.memory)
    state = dataclasses.replace(state, params=params, optimizer=optimizer, buffers=buffers, memory=memory)
    return state, means, optax.tree.norm(gradients)


def _gradients(
    ctx: Context,
    update: Update,
    state: State,
    frozen: Frozen,
    batch: Batch,
    clock: Clock,
    key: Array,
    only: str | None = None,
) -> tuple[Tree, dict[str, Metrics], dict[str, Tree], Tree]:
    """``(gradients, means, buffers, observed)`` of an update over the whole batch, in as many pieces as the run says.

    ``only`` leaves the other terms out of what is differentiated.
    """
    moving, rest = _partition(ctx, update, state.params)
    count = ctx.run.microbatches

    def objective(moving: Tree, buffers: Tree, batch: Batch, key: Array, totals: Any):
        params = _join(moving, rest)
        models = models_at(ctx, dataclasses.replace(state, params=params, buffers=buffers), frozen, clock)
        loss, (means, totals, left, observed) = _objective(ctx, update, models, batch, key, totals, only)
        return loss, (means, totals, {group: left[group] for group in buffers}, observed)

    differentiate = jax.grad(objective, has_aux=True)
    if count == 1:
        gradients, (means, _, buffers, observed) = differentiate(moving, state.buffers, batch, key, None)
        return _stored(ctx, gradients), means, buffers, observed

    pieces = jax.tree.map(lambda rows: _cut(rows, count), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))

    def weigh(buffers: Tree, piece: tuple[Batch, Array]):
        # Weights rarely depend on a forward pass; where they do not, XLA drops the passes from this scan.
        _, (_, totals, buffers, _) = objective(moving, buffers, *piece, None)
        return buffers, totals

    totals = jax.tree.map(lambda sums: sums.sum(0), jax.lax.scan(weigh, state.buffers, (pieces, keys))[1])

    def accumulate(carry, piece: tuple[Batch, Array]):
        gradients, buffers = carry
        more, (means, _, buffers, observed) = differentiate(moving, buffers, *piece, totals)
        return (_stored(ctx, jax.tree.map(jnp.add, gradients, more)), buffers), (means, observed)

    zeros = _stored(ctx, jax.tree.map(jnp.zeros_like, moving))
    (gradients, buffers), (means, observed) = jax.lax.scan(accumulate, (zeros, state.buffers), (pieces, keys))
    means = {name: {"term": mean["term"].sum(0), "coef": mean["coef"][-1]} for name, mean in means.items()}
    return gradients, means, buffers, jax.tree.map(_joined, observed)


def _cut(rows: Array, count: int) -> Array:
    # Row i goes to piece i % count: cutting into runs of rows instead would make every device compute every row.
    return rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1)


def _joined(pieces: Array) -> Array:
    return pieces.swapaxes(0, 1).reshape(-1, *pieces.shape[2:])


def _objective(
    ctx: Context,
    update: Update,
    models: Models,
    batch: Batch,
    key: Array,
    totals: Mapping[str, Array] | None,
    only: str | None = None,
):
    """``(loss, (means, totals, buffers, observed))`` of a piece of the batch.

    ``totals`` are the global weight sums; None takes the piece's own, which then is the whole. With them, means and loss are the
    piece's share, so that shares add up. ``only`` leaves the other terms out of the loss.
    """
    key_forward, key_terms = jax.random.split(key)
    with explained(f"{type(ctx.recipe).__name__}.forward"):
        student, teacher, models = update.forward(models, batch, key_forward)  # type: ignore[misc]
    vars = Vars(params=gathered(ctx, models.params), memory=models.memory, buffers=dict(models.buffers))
    with explained(f"{type(ctx.recipe).__name__}.terms"):
        terms = update.terms(vars, student, teacher, batch, clock=models.clock, key=key_terms)  # type: ignore[misc]
    sums = {name: _sums(name, term) for name, term in terms.items()}
    observed = jax.lax.stop_gradient(update.observe(vars, student, teacher, batch))  # type: ignore[misc]
    _check_observed(ctx, observed, batch)
    weights = {name: weight for name, (_, weight) in sums.items()}
    totals = weights if totals is None else totals
    loss, means = jnp.float32(0), {}
    for name, (total, _) in sums.items():
        weight = totals[name]
        mean = jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
        coef = jnp.asarray(terms[name].coef, jnp.float32)
        means[name] = {"term": jax.lax.stop_gradient(mean), "coef": jax.lax.stop_gradient(coef)}
        if only is None or only == name:
            loss = loss + coef * mean
    return loss, (means, weights, models.buffers, observed)


def _sums(name: str, term: Term) -> tuple[Array, Array]:
    """``(sum of values * weight, sum of weight)``; trailing axes of the values beyond the weight's are averaged."""
    if not isinstance(term, Term):
        raise InputError(f"term {name!r} is no Term(values, weight, coef) but {type(term).__name__}")
    values, weight = jnp.asarray(term.values, jnp.float32), jax.lax.stop_gradient(jnp.asarray(term.weight, jnp.float32))
    if weight.ndim == 0 or values.shape[: weight.ndim] != weight.shape:
        raise InputError(
            f"term {name!r}: values {values.shape} do not begin with the weight's shape {weight.shape}; hand over what the loss "
            "returned, unreduced"
        )
    values = values.mean(tuple(range(weight.ndim, values.ndim)))
    # Rows of weight 0 are padding and may hold anything; 0 * nan would reach the sum.
    return jnp.sum(jnp.where(weight == 0, 0, values) * weight), jnp.sum(weight)


def _check_observed(ctx: Context, observed: Tree, batch: Batch) -> None:
    rows = batch["weight"].shape[0]
    for leaf in jax.tree.leaves(observed):
        if leaf.ndim == 0 or leaf.shape[0] != rows:
            raise InputError(
                f"{type(ctx.recipe).__name__}.observe: a leaf has shape {leaf.shape}; give one row for each of the {rows} examples"
            )


def _same_kind(ctx: Context, memory: Tree, before: Tree) -> Tree:
    """The new memory, if it has the shapes, dtypes and structure of the old: a step that changed them would compile again."""
    new, old = (jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree) for tree in (memory, before))
    if new != old:
        raise InputError(f"{type(ctx.recipe).__name__}.remember changed the memory from {old} to {new}")
    return jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), memory)  # a weak type would compile again too


def _partition(ctx: Context, update: Update, params: Mapping[str, Tree]) -> tuple[Tree, Tree]:
    """The leaves that an update differentiates, and all others, each by group."""
    halves = {group: trainable(ctx, group, tree) for group, tree in params.items()}
    moving = {group: halves[group][0] for group in update.groups or ()}
    rest = {group: tree if group not in moving else halves[group][1] for group, tree in params.items()}
    return moving, rest


def _join(moving: Tree, rest: Tree) -> dict[str, Tree]:
    return {group: trees.merge(moving[group], tree) if group in moving else tree for group, tree in rest.items()}


def _stored(ctx: Context, gradients: Tree) -> Tree:
    """Gradients in the places of their parameters, so that sums over devices are scattered rather than repeated."""
    places = {group: trainable(ctx, group, ctx.specs[group])[0] for group in gradients}
    return jax.tree.map(jax.lax.with_sharding_constraint, gradients, sharding.shardings(places, ctx.mesh))


def _average(ctx: Context, state: State, clock: Clock) -> dict[str, Tree]:
    if ctx.run.ema is None:
        return state.ema
    decay = schedules.at(ctx.run.ema.decay, clock)
    if ctx.run.ema.warmup:
        decay = jnp.minimum(decay, 1 - 1 / (jnp.asarray(clock.step, jnp.float32) + 1))

    def blend(old: Array, new: Array) -> Array:
        if not jnp.issubdtype(old.dtype, jnp.floating):
            return new
        return (decay * old + (1 - decay) * new).astype(old.dtype)

    now = {group: {"params": state.params[group], "buffers": state.buffers.get(group, {})} for group in state.ema}
    return jax.tree.map(blend, state.ema, now)


def _report(ctx: Context, terms: dict[str, Metrics], norms: list[Array], clock: Clock) -> Metrics:
    parts = {name: mean["coef"] * mean["term"] for name, mean in terms.items()}
    size = sum((jnp.abs(part) for part in parts.values()), jnp.float32(0))
    metrics = {
        "loss": sum(parts.values(), jnp.float32(0)),
        "gradient_norm": jnp.sqrt(sum((norm**2 for norm in norms), jnp.float32(0))),
        "learning_rate": schedules.at(ctx.optimizer_config("student").learning_rate, clock),
    }
    for name, mean in terms.items():
        metrics[f"term/{name}"] = mean["term"]
        metrics[f"coef/{name}"] = mean["coef"]
        metrics[f"share/{name}"] = jnp.where(size > 0, jnp.abs(parts[name]) / jnp.where(size > 0, size, 1), 0)
    return metrics


def _cosine(first: Tree, second: Tree) -> Array:
    dot = sum(jnp.vdot(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))
    size = optax.tree.norm(first) * optax.tree.norm(second)
    return jnp.where(size > 0, dot / jnp.where(size > 0, size, 1), 0)
