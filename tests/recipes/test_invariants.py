"""What holds for every recipe, whatever its maths. `ROWS` has one row for each."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small
import tiny
from rows import ROWS

from jkd import optim, recipes
from jkd.checkpoint import Checkpoints
from jkd.config import Run, StudentEma
from jkd.context import augment
from jkd.errors import InputError
from jkd.recipe import Recipe
from jkd.resolve import make_context
from jkd.step import make_step
from jkd.types import Term

STEPS = 50
GRADIENT = 2e-5
# the teacher is the student's own average: in the state, and not among what is frozen
AVERAGED = [name for name, row in ROWS.items() if isinstance(row.run.get("teacher"), StudentEma)]
# of the others the teacher is trained, or there is none
FROZEN = [name for name, row in ROWS.items() if row.make().needs_teacher and name not in ("MPL", *AVERAGED)]
UNCOUPLED = [name for name, row in ROWS.items() if row.independent is not None]
# one of each kind (a projector, relations, a bank, several updates, a stream, text, rollouts); the others are marked slow
QUICK = ("KD", "FitNet", "RKD", "PSKD", "CTKD", "FlexMatch", "TokenKD", "GKD")


def each(names):
    """A recipe's checks follow each other (that is what the scope is for) and share what `engine` compiles."""
    marked = [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names]
    return pytest.mark.parametrize("name", marked, scope="module")


def recorded() -> optax.GradientTransformation:
    """Adam that keeps the gradient it was given, so that one compiled step shows both."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda gradient, state, params=None: (gradient, gradient)
    )
    return optax.chain(keep, optax.scale_by_adam())


def run_of(name: str, recipe: Recipe, **fields) -> Run:
    row = ROWS[name]
    defaults = dict(
        recipe=recipe,
        student=small.student(**row.student),
        teacher=small.teacher(**row.teacher) if recipe.needs_teacher else None,
        optimizer=optim.from_optax(row.rate, recorded),
        steps=STEPS,
    )
    return tiny.run(**defaults | row.run | fields)


@functools.lru_cache(maxsize=4)
def engine(name: str, *, devices: int = 1, microbatches: int = 1, uncoupled: bool = False) -> tiny.Engine:
    row = ROWS[name]
    recipe = row.make(**(row.independent or {}) if uncoupled else {})
    run = run_of(name, recipe, microbatches=microbatches)
    return tiny.Engine(run, devices=devices, train_size=tiny.ROWS)


def first_step(made: tiny.Engine, rows: dict):
    """``(gradient, memory, metrics)`` of the first step."""
    found = made.train([rows])
    gradient = {group: state[0][0] for group, state in found.first.optimizer.items()}
    return gradient, found.first.memory, found.metrics[0]


def test_every_public_recipe_has_its_row():
    public = {name for name, value in vars(recipes).items() if isinstance(value, type) and issubclass(value, Recipe)}
    assert set(ROWS) == public


def test_every_recipe_says_where_it_comes_from():
    for name in ROWS:
        kind = getattr(recipes, name)
        assert kind.citation, name
        assert kind.family != "other", name
        assert kind.evidence in ("golden", "formula", "mechanism"), name


@each(ROWS)
def test_the_update_does_not_depend_on_devices_and_microbatches(name):
    """Four microbatches on eight devices against one device; whole on eight where examples are coupled, and then refused."""
    recipe = ROWS[name].make()
    if recipe.couples_batch:
        with pytest.raises(InputError, match=f"microbatches = 4.*{name}.*microbatch_statistics='local'"):
            make_context(run_of(name, recipe, microbatches=4), tiny.batch(), train_size=32, devices=jax.devices()[:1])
    cut = engine(name, devices=8, microbatches=1 if recipe.couples_batch else 4)
    compare(cut, engine(name))


@pytest.mark.slow
@each(UNCOUPLED)
def test_without_its_coupled_part_a_recipe_may_be_cut(name):
    compare(engine(name, devices=8, microbatches=4, uncoupled=True), engine(name, uncoupled=True))


def compare(cut: tiny.Engine, whole: tiny.Engine) -> None:
    rows = tiny.batch(ragged=True)
    assert tiny.identical(cut.start.params, whole.start.params)
    gradient, memory, metrics = first_step(cut, rows)
    wanted, wanted_memory, wanted_metrics = first_step(whole, rows)
    assert tiny.distance(gradient, wanted) < GRADIENT
    for mine, theirs in zip(jax.tree.leaves(memory), jax.tree.leaves(wanted_memory), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    for metric, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[metric], value, rtol=1e-4, atol=1e-6, err_msg=metric)


@each(ROWS)
def test_it_may_compute_in_bfloat16(name):
    run = run_of(name, ROWS[name].make(), compute_dtype="bfloat16")
    ctx = make_context(run, tiny.batch(), train_size=tiny.ROWS, devices=jax.devices()[:1])
    make_step(ctx)  # traced: parameters, buffers and memory keep their dtype, or this raises


@each(ROWS)
def test_rows_of_weight_zero_change_nothing(name):
    rows = tiny.batch(ragged=True)
    empty = rows["weight"] == 0
    image = np.where(empty[:, None, None, None], 50 * rows["image"] + 7, rows["image"]).astype(np.float32)
    other = rows | {"image": image, "label": np.where(empty, -1, rows["label"]).astype(np.int32)}
    made = engine(name)
    (found, memory, _), (wanted, wanted_memory, _) = (first_step(made, one) for one in (other, rows))
    assert tiny.distance(found, wanted) < 1e-6
    for mine, theirs in zip(jax.tree.leaves(memory), jax.tree.leaves(wanted_memory), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


@each(FROZEN + AVERAGED)
def test_no_gradient_reaches_the_teacher_unless_declared(name):
    recipe = ROWS[name].make()
    made = engine(name)
    rows = augment(made.ctx.run, tiny.batch(), jax.random.key(2))
    if made.ctx.prepares:
        rows = made.prepare(made.fresh(), made.frozen, made.put(tiny.batch()), 0)

    def loss(params, state, frozen):
        if name in AVERAGED:
            state = dataclasses.replace(state, ema={"student": {**state.ema["student"], "params": params}})
        else:
            frozen = {**frozen, "params": {"teacher": params}}
        terms = small.evaluate(made.ctx, state, frozen, rows)
        return sum((coef * Term(values, weight).mean() for values, weight, coef in terms.values()), jnp.float32(0))

    state = made.fresh()
    teacher = state.ema["student"]["params"] if name in AVERAGED else made.frozen["params"]["teacher"]
    gradient = jax.jit(jax.grad(loss))(teacher, state, made.frozen)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(gradient))])
    assert (flat == 0).all() == (recipe.teacher_gradient == "stop")


@each(ROWS)
def test_the_loss_falls_and_what_was_learned_is_kept(name, tmp_path):
    made = engine(name)
    found = made.train([tiny.batch()] * STEPS)
    start, end = found.losses[0], found.losses[-5:].mean()
    assert np.isfinite(found.losses).all()
    assert end < start - 0.05 * abs(start)
    shapes = [
        [(np.shape(leaf), np.asarray(leaf).dtype) for leaf in jax.tree.leaves(one.memory)] for one in (found.start, found.state)
    ]
    assert shapes[0] == shapes[1]
    if set(found.state.params) == {"student"} and not jax.tree.leaves(found.state.memory):
        return  # nothing of its own: the engine's tests cover the rest
    state = made.fresh()
    rows = made.prepare(state, made.frozen, made.put(tiny.batch()), 0)
    state, _ = made.step(state, made.frozen, rows)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _, step = checkpoints.restore(state)
    assert step == 1
    assert tiny.identical(restored, state)
