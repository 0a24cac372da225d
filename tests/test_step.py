"""The step beyond its hooks: precision, what moves and what stays, averages, metrics, seeds."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jkd import losses, optim, sharding, trees
from jkd import step as step_module
from jkd.config import Ema, StudentEma
from jkd.networks import models_of
from jkd.recipe import Recipe
from jkd.recipes import DKD, KD, FitNet, FunMatch, Supervised
from jkd.recipes.projectors import Linear
from jkd.state import init_state
from jkd.step import make_eval_step, make_step
from jkd.types import Term


def dtypes(tree):
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)}


@functools.cache
def plain():
    return tiny.Engine(tiny.run(), tiny.batch())


# --- precision ---------------------------------------------------------------------------------------------------------------

HALF = dict(compute_dtype="bfloat16", teacher_dtype="bfloat16", optimizer=optim.adamw(1e-3), ema=Ema(decay=0.9997))


@functools.cache
def half():
    return tiny.Engine(tiny.run(**HALF, student=tiny.student(norm="batch")))


def test_bfloat16_compute_keeps_parameters_optimizer_average_and_buffers_in_float32():
    made = half()
    assert dtypes(made.frozen["params"]) == {"bfloat16"}
    found = made.train(tiny.batches(2))
    assert dtypes(found.state) == {"float32"}
    assert {value.dtype.name for value in found.metrics[0].values()} == {"float32"}


def dots(jaxpr, found=None):
    """Operand dtypes of every matrix product in a jaxpr and the ones within."""
    found = [] if found is None else found
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append({var.aval.dtype.name for var in equation.invars})
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                dots(inner, found)
    return found


def jaxpr(made):
    return jax.make_jaxpr(made.step)(made.fresh(), made.frozen, made.put(tiny.batch())).jaxpr


def test_every_matrix_product_runs_in_the_compute_dtype():
    products = dots(jaxpr(half()))
    assert len(products) >= 7  # teacher 2, student 2, backward 3
    assert set().union(*products) == {"bfloat16"}
    assert set().union(*dots(jaxpr(plain()))) == {"float32"}


def test_an_average_with_a_decay_near_one_moves_by_what_it_should():
    found = half().train([tiny.batch()])
    moved = jax.tree.map(np.subtract, found.first.ema["student"]["params"], found.start.params["student"])
    wanted = jax.tree.map(lambda a, b: 3e-4 * (a - b), found.first.params["student"], found.start.params["student"])
    assert tiny.distance(moved, wanted) < 0.1  # rounding of float32; in bfloat16 nothing would have moved
    assert np.linalg.norm(moved["head"]["kernel"]) > 0


def test_bfloat16_follows_float32():
    full = tiny.Engine(
        tiny.run(**HALF | dict(compute_dtype="float32", teacher_dtype="float32"), student=tiny.student(norm="batch"))
    )
    rows = [tiny.batch()] * 5
    found, wanted = half().train(rows), full.train(rows)
    np.testing.assert_allclose(found.losses, wanted.losses, rtol=0.03)
    assert found.losses[-1] < found.losses[0]


def test_a_teacher_kept_in_bfloat16_answers_in_the_compute_dtype():
    made = tiny.Engine(tiny.run(teacher_dtype="bfloat16"))
    assert dtypes(made.frozen["params"]) == {"bfloat16"}
    measure = make_eval_step(made.ctx, lambda student, teacher, batch: teacher.logits)
    answer = measure(made.fresh(), made.frozen, made.put(tiny.batch()))
    assert answer.dtype == jnp.float32
    teacher = made.ctx.teacher
    assert tiny.distance(answer, teacher.apply(teacher.params, {}, tiny.batch())[0].logits) < 0.02


def test_uint8_images_reach_a_bfloat16_network_on_their_scale():
    rows = tiny.batch()
    image = np.random.default_rng(0).integers(0, 256, rows["image"].shape).astype(np.uint8)
    fields = dict(recipe=Supervised(), teacher=None, compute_dtype="bfloat16")
    found = tiny.Engine(tiny.run(**fields), rows | {"image": image}).train([rows | {"image": image}]).losses
    wanted = tiny.Engine(tiny.run(**fields)).train([rows | {"image": (image / 255).astype(np.float32)}]).losses
    np.testing.assert_allclose(found, wanted, rtol=0.02)


# --- what is recomputed, what moves ------------------------------------------------------------------------------------------


def test_remat_computes_the_students_forward_pass_again_and_gives_the_same_gradients():
    made = tiny.Engine(tiny.run(remat=jax.checkpoint_policies.nothing_saveable))
    assert len(dots(jaxpr(made))) > len(dots(jaxpr(plain())))
    kept = tiny.Engine(tiny.run(remat=jax.checkpoint_policies.everything_saveable))
    assert len(dots(jaxpr(kept))) == len(dots(jaxpr(plain())))
    rows = tiny.batches(2, ragged=True)
    assert tiny.distance(made.train(rows).state.params, plain().train(rows).state.params) < 1e-6


@pytest.mark.parametrize("patterns", [("*", "!body/*"), ("head/*",)])
def test_what_trainable_leaves_out_never_moves_and_has_no_optimizer_state(patterns):
    optimizer = optim.adamw(1e-2, weight_decay=0.1)
    made = tiny.Engine(tiny.run(trainable=patterns, optimizer=optimizer, ema=Ema(decay=0.5)), devices=8)
    found = made.train(tiny.batches(3))
    start, end = found.start.params["student"], found.state.params["student"]
    assert tiny.identical(start["body"], end["body"])
    assert not any((a == b).all() for a, b in zip(*map(jax.tree.leaves, (start["head"], end["head"])), strict=True))
    moments = [leaf for leaf in jax.tree.leaves(found.state.optimizer) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * trees.count(start["head"])
    moving, rest = step_module._partition(made.ctx, made.ctx.updates[0], found.start.params)
    assert set(moving["student"]) == {"head"}  # what is differentiated
    assert trees.count(moving) + trees.count(rest) == trees.count(found.start.params)


# --- averages ----------------------------------------------------------------------------------------------------------------


def test_the_average_follows_parameters_and_buffers():
    made = tiny.Engine(tiny.run(student=tiny.student(norm="batch"), ema=Ema(decay=0.9)))
    found = made.train(tiny.batches(1))
    for kind in ("params", "buffers"):
        old, new = getattr(found.start, kind)["student"], getattr(found.first, kind)["student"]
        wanted = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, old, new)
        assert tiny.distance(found.first.ema["student"][kind], wanted) < 1e-6


def test_a_warmed_up_average_begins_as_the_mean_of_what_it_saw():
    made = tiny.Engine(tiny.run(ema=Ema(decay=0.999, warmup=True)))
    state, seen = made.fresh(), []
    for rows in tiny.batches(4):
        state, _ = made.step(state, made.frozen, made.put(rows))
        seen.append(jax.device_get(state.params["student"]))
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, 0), *seen)
    assert tiny.distance(state.ema["student"]["params"], mean) < 1e-6


def test_evaluation_of_the_average_uses_its_weights_and_buffers():
    made = tiny.Engine(tiny.run(student=tiny.student(norm="batch"), ema=Ema(decay=0.5)))
    student, rows = made.ctx.student, tiny.batch()
    state, _ = made.step(made.fresh(), made.frozen, made.put(rows))
    for ema, tree in (
        (True, state.ema["student"]),
        (False, {"params": state.params["student"], "buffers": state.buffers["student"]}),
    ):
        measure = make_eval_step(made.ctx, lambda student, teacher, batch: student.logits, ema=ema)
        wanted = student.apply(tree["params"], tree["buffers"], rows)[0].logits
        assert tiny.distance(measure(state, made.frozen, made.put(rows)), wanted) < 1e-5
        product = made.ctx.recipe.deploy(models_of(made.ctx, state, made.frozen, ema=ema))
        assert tiny.identical(product.params, tree["params"])


@pytest.mark.parametrize(("devices", "fields"), [(1, {}), (8, {"mesh": tiny.FSDP})])
def test_the_students_average_as_its_teacher(devices, fields):
    optimizer = optim.sgd(2.0)  # far enough for the two to differ by more than rounding
    run = tiny.run(teacher=StudentEma(), ema=Ema(decay=0.9), recipe=KD(temperature=1.0), optimizer=optimizer, **fields)
    made = tiny.Engine(run, devices=devices)
    assert made.frozen == {"params": {}, "buffers": {}}
    rows, student = tiny.batches(2), made.ctx.student
    found = made.train(rows)
    assert abs(found.metrics[0]["term/kd"]) < 1e-6
    own, average = (
        student.apply(tree, {}, rows[1])[0].logits
        for tree in (found.first.params["student"], found.first.ema["student"]["params"])
    )
    np.testing.assert_allclose(found.metrics[1]["term/kd"], losses.forward_kl(own, average).mean(), rtol=1e-3)
    assert found.metrics[1]["term/kd"] > 1e-3


# --- metrics -----------------------------------------------------------------------------------------------------------------


def test_metrics_are_named_by_term_and_shares_sum_to_one():
    trained = plain().train([tiny.batch(ragged=True)])
    metrics = trained.metrics[0]
    named = {f"{what}/{term}" for what in ("term", "coef", "share") for term in ("task", "kd")}
    assert metrics.keys() == named | {"loss", "gradient_norm", "learning_rate"}
    np.testing.assert_allclose(metrics["share/task"] + metrics["share/kd"], 1, rtol=1e-6)
    parts = [metrics[f"coef/{term}"] * metrics[f"term/{term}"] for term in ("task", "kd")]
    np.testing.assert_allclose(metrics["loss"], sum(parts), rtol=1e-6)
    np.testing.assert_allclose(metrics["share/kd"], parts[1] / sum(parts), rtol=1e-6)
    assert metrics["coef/kd"] == np.float32(0.9)
    gradient = jax.tree.map(lambda a, b: (a - b) / 0.1, trained.start.params, trained.first.params)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(tiny._vector(gradient)), rtol=1e-4)


def test_terms_over_tokens_divide_by_the_tokens_weight():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Tokens(Recipe):
        needs_teacher = False

        def terms(self, vars, student, teacher, batch, *, clock, key):
            values = jnp.broadcast_to(student.logits[:, None, :], (*student.logits.shape[:1], 3, student.logits.shape[1]))
            weight = batch["weight"][:, None] * jnp.array([[0.0, 1.0, 2.0]])
            return {"tokens": Term(values * jnp.arange(3.0)[None, :, None], weight)}

    rows = tiny.batch(ragged=True)
    made = tiny.Engine(tiny.run(recipe=Tokens(), teacher=None, microbatches=2))
    logits = made.ctx.student.apply(made.ctx.student.params, {}, rows)[0].logits.mean(-1)
    weight = rows["weight"]
    wanted = (logits * weight * (1 * 1 + 2 * 2)).sum() / (3 * weight.sum())
    np.testing.assert_allclose(made.train([rows]).metrics[0]["term/tokens"], wanted, rtol=1e-5)


# --- the caller's arrays, seeds, compilations --------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "place"), [(1, 0), (1, 3), (8, 3)])
def test_the_callers_arrays_survive_donation_wherever_they_live(devices, place):
    home = jax.devices()[place]
    on_device = lambda model: model.with_weights(*jax.device_put((model.params, model.buffers), home))  # noqa: E731
    student, teacher = (on_device(make(norm="batch")) for make in (tiny.student, tiny.teacher))
    ctx = tiny.make_context(
        tiny.run(student=student, teacher=teacher, ema=Ema()), tiny.batch(), devices=jax.devices()[:devices]
    )
    state, frozen = init_state(ctx, jax.random.key(0))
    step = make_step(ctx)
    for rows in tiny.batches(2):
        old = state
        state, _ = step(state, frozen, sharding.put_batch(rows, ctx.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    for model, kept in ((student, tiny.student(norm="batch")), (teacher, tiny.teacher(norm="batch"))):
        assert tiny.identical((model.params, model.buffers), (kept.params, kept.buffers))
    assert tiny.identical(frozen["params"]["teacher"], teacher.params)


def test_a_co_trained_teachers_weights_survive_too():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Both(KD):
        @property
        def updates(self):
            from jkd.recipe import Update

            return (Update(groups=("student", "teacher")),)

    teacher = tiny.teacher()
    teacher = teacher.with_weights(*jax.tree.map(jnp.asarray, (teacher.params, teacher.buffers)))
    ctx = tiny.make_context(tiny.run(recipe=Both(), teacher=teacher), tiny.batch(), devices=jax.devices()[:1])
    state, frozen = init_state(ctx, jax.random.key(0))
    make_step(ctx)(state, frozen, sharding.put_batch(tiny.batch(), ctx.mesh))
    assert tiny.identical(teacher.params, tiny.teacher().params)


def test_a_seed_gives_the_same_run_and_another_seed_another():
    fields = dict(student=tiny.network(dropout=0.3), recipe=KD())
    first, second, other = (tiny.Engine(tiny.run(**fields), seed=seed).train(tiny.batches(2)) for seed in (0, 0, 1))
    assert tiny.identical(first.state, second.state)
    assert tiny.distance(first.start.params, other.start.params) > 0.1


def test_dropout_draws_anew_at_each_step_and_is_off_in_evaluation():
    made = tiny.Engine(tiny.run(student=tiny.student(dropout=0.5), optimizer=optim.sgd(0.0)))
    found = made.train([tiny.batch()] * 2)
    assert abs(found.losses[0] - found.losses[1]) > 1e-4
    measure = make_eval_step(made.ctx, lambda student, teacher, batch: student.logits)
    wanted = tiny.student().apply(made.start.params["student"], {}, tiny.batch())[0].logits
    assert tiny.distance(measure(made.fresh(), made.frozen, made.put(tiny.batch())), wanted) < 1e-5


@pytest.mark.parametrize("fields", [{}, {"mesh": tiny.FSDP, "microbatches": 2, "ema": Ema(), "optimizer": optim.adamw(1e-3)}])
def test_the_step_compiles_once(fields):
    made = tiny.Engine(tiny.run(**fields), devices=8 if fields else 1)
    state, _ = init_state(made.ctx, jax.random.key(0))
    for rows in tiny.batches(3):
        state, _ = made.step(state, made.frozen, made.put(rows))
    assert made.step._cache_size() == 1


FEATURES = dict(student_taps=("body",), teacher_taps=("body",))
RECIPES = {
    "Supervised": Supervised(label_smoothing=0.1),
    "KD": KD(),
    "FunMatch": FunMatch(),
    "DKD": DKD(),
    "FitNet": FitNet(projector=Linear(), weight=1.0, **FEATURES),
}


@pytest.mark.parametrize("name", RECIPES)
def test_each_first_recipe_lowers_its_own_loss(name):
    found = tiny.Engine(tiny.run(recipe=RECIPES[name], optimizer=optim.adamw(1e-2))).train([tiny.batch(ragged=True)] * 12)
    assert np.isfinite(found.losses).all()
    assert found.losses[-1] < 0.9 * found.losses[0]
