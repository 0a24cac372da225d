"""The jitted step: teacher forward, student forward, terms, backward and update as one sharded program.

`make_step` runs the recipe's updates in order; `_gradients` cuts the batch into microbatches; `objective` turns terms into the
number that is differentiated. All means are taken there: each term over its global weight sum, whatever the number of
microbatches, devices and hosts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jkd import schedules, sharding, trees
from jkd.config import StudentEma
from jkd.context import Context, explained, to_compute
from jkd.errors import InputError
from jkd.networks import averages, gathered, models_at, models_of, moved, seen, step_key
from jkd.recipe import Models, Update, Vars
from jkd.schedules import Clock
from jkd.state import Frozen, State, state_shardings, step_shapes, trainable
from jkd.types import Array, Batch, Model, Term, Tree, quotient

Metrics = dict[str, Array]


def make_step(ctx: Context) -> Callable[[State, Frozen, Batch], tuple[State, Metrics]]:
    """``step(state, frozen, batch) -> (state, metrics)``, jitted; the state that goes in is donated.

    ``batch`` is global (`sharding.put_batch`). Metrics are float32 scalars: ``loss``, ``gradient_norm``, ``learning_rate``, and
    for each term ``term/name`` (its mean), ``coef/name`` and ``share/name`` (of the summed magnitudes of ``coef * mean``); beside
    them ``ran/name`` for terms of an update that does not run at every step: where it is 0 it did not, and its numbers mean
    nothing.
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

            runs = _runs(ctx, update, start, clock)
            if runs is None:
                state, means, norm = run(state)
            else:
                idle = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(run, state)[1:])
                state, means, norm = jax.lax.cond(runs, run, lambda state, idle=idle: (state, *idle), state)
            more = {f"{update.name}.{name}" if update.name else name: mean for name, mean in means.items()}
            if twice := terms.keys() & more.keys():
                raise InputError(
                    f"{type(ctx.recipe).__name__}: two updates have the same term {min(twice)!r}; give one an Update.name"
                )
            terms |= more
            if runs is not None:
                ran |= {f"ran/{name}": runs.astype(jnp.float32) for name in more}
            norms.append(norm)
        state = dataclasses.replace(state, step=start.step + 1, ema=_average(ctx, state, clock))
        return state, _report(ctx, terms, norms, clock) | ran

    made = jax.jit(step, donate_argnums=0, out_shardings=(state_shardings(ctx), None))
    # mistakes in a recipe's hooks are told now; the first call finds this trace
    shapes = step_shapes(ctx)
    made.eval_shape(*shapes)
    jax.eval_shape(lambda state, frozen: deployed(ctx, models_of(ctx, state, frozen)).params, *shapes[:2])
    return made


def make_eval_step(ctx: Context, measure: Callable[..., Tree], *, ema: bool = False) -> Callable[[State, Frozen, Batch], Tree]:
    """``eval_step(state, frozen, batch) -> measure(student, teacher, batch)``, jitted, for the product that the recipe deploys.

    Args:
        measure: takes the Outputs of the product and of the teacher (None without one) and the batch; where the run has an oracle,
            its Outputs too (``oracle=``).
        ema: whether the average stands in the student's place.
    """

    def eval_step(state: State, frozen: Frozen, batch: Batch) -> Tree:
        models = models_of(ctx, state, frozen, ema=ema)
        product = deployed(ctx, dataclasses.replace(models, params=gathered(ctx, models.params)))
        batch = sharding.constrain_batch(batch, ctx.mesh)
        with jax.sharding.use_abstract_mesh(ctx.mesh.abstract_mesh):
            student, _ = product.apply(to_compute(ctx.run, product.params), product.buffers, to_compute(ctx.run, batch))
        # answers that come with the training batches are not there for other examples
        elsewhere = "teacher" in ctx.raw_batch and "teacher" not in batch
        teacher = None if elsewhere else models.teacher(batch, taps=())
        oracle = {"oracle": models.apply("oracle", batch, taps=())[0]} if "oracle" in ctx.networks else {}
        return measure(student, teacher, batch, **oracle)

    return jax.jit(eval_step)


def deployed(ctx: Context, models: Models) -> Model:
    """What the recipe makes of the networks.

    Raises:
        InputError: its `deploy` gives no Model.
    """
    with explained(f"{type(ctx.recipe).__name__}.deploy"):
        product = ctx.recipe.deploy(models)
    if not isinstance(product, Model):
        raise InputError(f"{type(ctx.recipe).__name__}.deploy gave {type(product).__name__}; give a Model (models.model(…))")
    return product


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
            own = jax.random.fold_in(key, place + 1)
            names = _term_names(ctx, update, state, frozen, batch, clock, own)
            # one after the other, so that no two need be held
            found = {name: _gradients(ctx, update, state, frozen, batch, clock, own, apart=(name,))[0][name] for name in names}
            prefix = f"{update.name}." if update.name else ""
            metrics |= {f"norm/{prefix}{name}": optax.tree.norm(gradient) for name, gradient in found.items()}
            if "task" in found and "student" in (update.groups or ()):
                task = found["task"]["student"]
                others = [name for name in names if name != "task"]
                metrics |= {f"cosine/{prefix}{name}": _cosine(found[name]["student"], task) for name in others}
        return metrics

    return jax.jit(gradients)


def make_gradients(ctx: Context) -> Callable[[State, Frozen, Batch], Tree]:
    """``f(state, frozen, batch) -> [gradients, …]`` of every update, all from the same state, jitted: a step that moves nothing."""

    def gradients(state: State, frozen: Frozen, batch: Batch) -> Tree:
        clock, key = ctx.clock(state.step), step_key(state)
        batch = seen(ctx, batch, key)
        keys = [jax.random.fold_in(key, place + 1) for place in range(len(ctx.updates))]
        return [
            _gradients(ctx, update, state, frozen, batch, clock, own)[0] for update, own in zip(ctx.updates, keys, strict=True)
        ]

    return jax.jit(gradients)


def _update(
    ctx: Context, update: Update, state: State, start: State, frozen: Frozen, batch: Batch, clock: Clock, key: Array
) -> tuple[State, dict[str, Metrics], Array]:
    """One update: gradients of its groups, the optimizers' steps, and what the recipe remembers."""
    reads = dataclasses.replace(state, memory=start.memory)  # the memory as it stood at the step's start
    apart = None if update.combine is None else _term_names(ctx, update, reads, frozen, batch, clock, key)
    gradients, means, kept, observed = _gradients(ctx, update, reads, frozen, batch, clock, key, apart)
    if update.combine is not None:
        gradients = _combined(ctx, update, gradients, clock, jax.random.fold_in(jax.random.fold_in(key, 1), 1))
    params, optimizer = dict(state.params), dict(state.optimizer)
    for group, gradient in gradients.items():
        params[group], optimizer[group] = moved(ctx, group, params[group], gradient, optimizer[group], start.step)
    terms = {name: mean["term"] for name, mean in means.items()}
    with explained(f"{type(ctx.recipe).__name__}.remember"):
        key = jax.random.fold_in(key, 1)
        memory = update.remember(state.memory, observed, batch, terms=terms, clock=clock, key=key)  # type: ignore[misc]
    memory = _same_kind(ctx, jax.tree.map(jnp.asarray, memory), state.memory)
    state = dataclasses.replace(state, params=params, optimizer=optimizer, memory=memory, **kept)
    return state, means, optax.tree.norm(gradients)


def _runs(ctx: Context, update: Update, start: State, clock: Clock) -> Array | None:
    """Whether an update runs at this step; None where it always does."""
    if update.every == 1 and update.when is None:
        return None
    runs = start.step % update.every == 0
    if update.when is not None:
        with explained(f"{type(ctx.recipe).__name__}: Update.when"):
            answer = jnp.asarray(update.when(start.memory, clock))
        if answer.shape != () or answer.dtype != bool:
            raise InputError(f"{type(ctx.recipe).__name__}: Update.when gave {answer.dtype}{list(answer.shape)}; give one bool")
        runs &= answer
    return runs


def _combined(ctx: Context, update: Update, apart: Mapping[str, Tree], clock: Clock, key: Array) -> Tree:
    """One gradient from those of the terms, as the update says."""
    with explained(f"{type(ctx.recipe).__name__}: Update.combine"):
        gradient = update.combine(apart, clock=clock, key=key)  # type: ignore[misc]
    one, like = (jax.tree.map(jnp.shape, tree) for tree in (gradient, next(iter(apart.values()))))
    if one != like:
        raise InputError(f"{type(ctx.recipe).__name__}: Update.combine gave a tree {one}; a gradient is like {like}")
    return _stored(ctx, gradient)


def _term_names(
    ctx: Context, update: Update, state: State, frozen: Frozen, batch: Batch, clock: Clock, key: Array
) -> tuple[str, ...]:
    return tuple(jax.eval_shape(lambda: _gradients(ctx, update, state, frozen, batch, clock, key, ())[1]))


def _gradients(
    ctx: Context,
    update: Update,
    state: State,
    frozen: Frozen,
    batch: Batch,
    clock: Clock,
    key: Array,
    apart: Sequence[str] | None = None,
) -> tuple[Tree, dict[str, Metrics], dict[str, Tree], Tree]:
    """``(gradients, means, kept, observed)`` of an update over the whole batch, in as many pieces as the run says.

    Gradients are of the terms' sum; with ``apart`` ``{term: gradients}`` of these terms. ``kept`` are the State's fields that
    forward passes change.
    """
    moving, rest = _partition(ctx, update, state.params)
    count = ctx.run.microbatches
    before: dict[str, Tree] = {"buffers": state.buffers}
    if isinstance(ctx.run.teacher, StudentEma):
        before["ema"] = state.ema

    def share(moving: Tree, kept: dict[str, Tree], batch: Batch, key: Array, totals: Any):
        params = _join(moving, rest)
        models = models_at(ctx, dataclasses.replace(state, params=params, **kept), frozen, clock)
        parts, (means, totals, models, observed) = objective(ctx, update, models, batch, key, totals)
        return parts, (means, totals, _left(models, kept), observed)

    def differentiate(*given: Any):
        parts, pull, aux = jax.vjp(lambda moving: share(moving, *given), moving, has_aux=True)

        def gradient(*names: str) -> Tree:
            return pull({name: jnp.float32(name in names) for name in parts})[0]

        return gradient(*parts) if apart is None else {name: gradient(name) for name in apart}, aux

    def placed(gradients: Tree) -> Tree:
        return _stored(ctx, gradients) if apart is None else {name: _stored(ctx, one) for name, one in gradients.items()}

    if count == 1:
        gradients, (means, _, kept, observed) = differentiate(before, batch, key, None)
        return placed(gradients), means, kept, observed

    pieces = jax.tree.map(lambda rows: cut(rows, count), batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))

    def weigh(kept: dict[str, Tree], piece: tuple[Batch, Array]):
        # Weights rarely depend on a forward pass; where they do not, XLA drops the passes from this scan.
        _, (_, totals, kept, _) = share(moving, kept, *piece, None)
        return kept, totals

    totals = jax.tree.map(lambda sums: sums.sum(0), jax.lax.scan(weigh, before, (pieces, keys))[1])

    def accumulate(carry, piece: tuple[Batch, Array]):
        gradients, kept = carry
        more, (means, _, kept, observed) = differentiate(kept, *piece, totals)
        return (placed(jax.tree.map(jnp.add, gradients, more)), kept), (means, observed)

    zeros = jax.tree.map(jnp.zeros_like, moving)
    zeros = placed(zeros if apart is None else dict.fromkeys(apart, zeros))
    (gradients, kept), (means, observed) = jax.lax.scan(accumulate, (zeros, before), (pieces, keys))
    means = {name: {"term": mean["term"].sum(0), "coef": mean["coef"][-1]} for name, mean in means.items()}
    return gradients, means, kept, jax.tree.map(_joined, observed)


def _left(models: Models, before: dict[str, Tree]) -> dict[str, Tree]:
    """What a forward pass leaves for the next one, fields of the State: buffers, and the average where that is the teacher."""
    left: dict[str, Tree] = {"buffers": {group: models.buffers[group] for group in before["buffers"]}}
    if "ema" in before:
        average = {"params": models.params["teacher"], "buffers": models.buffers["teacher"]}
        left["ema"] = {**before["ema"], "student": average}
    return left


def cut(rows: Array, count: int) -> Array:
    """``[batch, …]`` in ``count`` microbatches, ``[count, batch / count, …]``."""
    # Row i goes to piece i % count: cutting into runs of rows instead would make every device compute every row.
    return rows.reshape(-1, count, *rows.shape[1:]).swapaxes(0, 1)


def _joined(pieces: Array) -> Array:
    return pieces.swapaxes(0, 1).reshape(-1, *pieces.shape[2:])


def objective(
    ctx: Context,
    update: Update,
    models: Models,
    batch: Batch,
    key: Array,
    totals: Mapping[str, Array] | None,
):
    """``(parts, (means, totals, models, observed))`` of a piece of the batch; ``parts`` are ``{term: coef * mean}``.

    ``totals`` are the global weight sums; None takes the piece's own, which then is the whole. With them, means and parts are the
    piece's share, so that shares add up.
    """
    key_forward, key_terms = jax.random.split(key)
    with explained(f"{type(ctx.recipe).__name__}.forward"):
        student, teacher, models = update.forward(models, batch, key_forward)  # type: ignore[misc]
    vars = Vars(params=gathered(ctx, models.params), memory=models.memory, buffers=dict(models.buffers))
    with explained(f"{type(ctx.recipe).__name__}.terms"):
        terms = update.terms(vars, student, teacher, batch, clock=models.clock, key=key_terms)  # type: ignore[misc]
    if not isinstance(terms, Mapping) or not terms:
        found = "no term" if isinstance(terms, Mapping) else type(terms).__name__
        raise InputError(f"{type(ctx.recipe).__name__}.terms gave {found}; give {{name: Term(values, weight)}}")
    sums = {name: _sums(name, term) for name, term in terms.items()}
    observed = jax.lax.stop_gradient(update.observe(vars, student, teacher, batch))  # type: ignore[misc]
    _check_observed(ctx, observed, batch)
    weights = {name: weight for name, (_, weight) in sums.items()}
    totals = weights if totals is None else totals
    parts, means = {}, {}
    for name, (total, _) in sums.items():
        mean, coef = quotient(total, totals[name]), jnp.asarray(terms[name].coef, jnp.float32)
        means[name] = {"term": jax.lax.stop_gradient(mean), "coef": jax.lax.stop_gradient(coef)}
        parts[name] = coef * mean
    return parts, (means, weights, models, observed)


def _sums(name: str, term: Term) -> tuple[Array, Array]:
    if not isinstance(term, Term):
        kind = "an array" if isinstance(term, jax.Array) else type(term).__name__
        raise InputError(f"term {name!r} is no Term(values, weight, coef) but {kind}")
    try:
        return term.sums()
    except InputError as error:
        raise InputError(f"term {name!r}: {error}") from None


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
    now = {group: {"params": state.params[group], "buffers": state.buffers.get(group, {})} for group in state.ema}
    return averages(ctx, clock, state.ema, now)


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
