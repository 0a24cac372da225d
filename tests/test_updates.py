"""Updates with named groups and periods: adversaries, fake scores, co-trained teachers, peers, networks of a recipe's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tiny import SGD, close, down, logits, nll

from jkd import losses, optim, schedules
from jkd.errors import InputError
from jkd.recipe import Recipe, Update, Vars
from jkd.recipes import KD
from jkd.recipes.logits import task
from jkd.types import Model, Term


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary(Recipe):
    """A discriminator tells teacher from student; the student fools the discriminator that the first update left."""

    every: int = 1

    @property
    def updates(self):
        first = Update(groups=("discriminator",), terms=self.tell, every=self.every, name="discriminator")
        return (first, Update(groups=("student",), terms=self.fool))

    def init(self, key, ctx):
        classes = ctx.classes
        return Vars(params={"discriminator": {"kernel": jax.random.normal(key, (classes,))}})

    def tell(self, vars, student, teacher, batch, *, clock, key):
        score = vars.params["discriminator"]["kernel"]
        values = jax.nn.softplus(student.logits @ score) + jax.nn.softplus(-(teacher.logits @ score))
        return {"tell": Term(values, batch["weight"])}

    def fool(self, vars, student, teacher, batch, *, clock, key):
        return {"fool": Term(jax.nn.softplus(-(student.logits @ vars.params["discriminator"]["kernel"])), batch["weight"])}


def test_updates_run_in_order_and_each_moves_its_own_groups_only():
    made = tiny.Engine(tiny.run(recipe=Adversary(), optimizer=SGD))
    rows, params = tiny.batch(), made.start.params
    student, teacher = made.ctx.student, made.ctx.teacher
    answers = logits(teacher, teacher.params, rows)

    def tell(discriminator, own):
        score = discriminator["kernel"]
        return (jax.nn.softplus(logits(student, own, rows) @ score) + jax.nn.softplus(-(answers @ score))).mean()

    def fool(own, discriminator):
        return jax.nn.softplus(-(logits(student, own, rows) @ discriminator["kernel"])).mean()

    judge = down(params["discriminator"], jax.grad(tell)(params["discriminator"], params["student"]))
    fooler = down(params["student"], jax.grad(fool)(params["student"], judge))
    found = made.train([rows])
    close(found.first.params, {"discriminator": judge, "student": fooler})
    np.testing.assert_allclose(found.metrics[0]["term/fool"], fool(params["student"], judge), rtol=1e-5)
    assert "term/discriminator.tell" in found.metrics[0]


def test_an_update_with_a_period_runs_at_multiples_of_it_and_leaves_no_trace_between():
    made = tiny.Engine(tiny.run(recipe=Adversary(every=3), optimizer=optim.adamw(0.1)))
    state, seen = made.fresh(), []
    for rows in tiny.batches(5):
        before = jax.device_get(state)
        state, metrics = made.step(state, made.frozen, made.put(rows))
        after = jax.device_get(state)
        still = tiny.identical(before.params["discriminator"], after.params["discriminator"])
        assert still == tiny.identical(before.optimizer["discriminator"], after.optimizer["discriminator"])
        assert not tiny.identical(before.params["student"], after.params["student"])
        seen.append((not still, float(metrics["coef/discriminator.tell"]), float(metrics["share/discriminator.tell"]) > 0))
    assert seen == [(step % 3 == 0, float(step % 3 == 0), step % 3 == 0) for step in range(5)]
    assert made.step._cache_size() == 1


def test_a_groups_schedule_follows_the_runs_steps_however_often_it_moves():
    rate = schedules.Piecewise(1.0, {3 / 5: 0.0})  # nothing from step 3 on
    made = tiny.Engine(
        tiny.run(recipe=Adversary(every=3), optimizer={"*": SGD, "discriminator": optim.sgd(rate, momentum=0.0)})
    )
    found = made.train(tiny.batches(4))
    assert tiny.identical(found.first.params["discriminator"], found.state.params["discriminator"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FakeScore(Recipe):
    """A copy of the teacher learns the student's answers (distribution matching); the student follows their difference."""

    every: int = 1

    @property
    def updates(self):
        return (
            Update(groups=("fake",), forward=self.look, terms=self.copy, every=self.every, name="fake"),
            Update(groups=("student",), forward=self.look, terms=self.match),
        )

    def init(self, key, ctx):
        return Vars(params={"fake": ctx.params["teacher"]})

    def look(self, models, batch, key):
        fake, models = models.apply("teacher", batch, group="fake")
        student, models = models.student(batch, key=key)
        return (student, fake), models.teacher(batch), models

    def copy(self, vars, student, teacher, batch, *, clock, key):
        student, fake = student
        return {"copy": Term(jnp.square(fake.logits - jax.lax.stop_gradient(student.logits)), batch["weight"])}

    def match(self, vars, student, teacher, batch, *, clock, key):
        student, fake = student
        direction = jax.lax.stop_gradient(fake.logits - teacher.logits)
        return {"match": Term(student.logits * direction, batch["weight"])}


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_fake_score_starts_as_the_teacher_and_has_its_own_optimizer(microbatches):
    optimizers = {"fake": optim.sgd(0.1, momentum=0.5), "student": SGD}
    made = tiny.Engine(tiny.run(recipe=FakeScore(), optimizer=optimizers, microbatches=microbatches))
    rows, params = tiny.batch(), made.start.params
    student, teacher = made.ctx.student, made.ctx.teacher
    assert tiny.identical(params["fake"], teacher.params)
    answers = logits(student, params["student"], rows)

    gradient = jax.grad(lambda fake: jnp.square(logits(teacher, fake, rows) - answers).mean())(params["fake"])
    fake = down(params["fake"], gradient, 0.1)
    direction = logits(teacher, fake, rows) - logits(teacher, teacher.params, rows)
    gradient = jax.grad(lambda own: (logits(student, own, rows) * direction).mean())(params["student"])
    found = made.train([rows, rows])
    close(found.first.params, {"fake": fake, "student": down(params["student"], gradient)})
    assert not tiny.identical(found.first.params["fake"], found.state.params["fake"])
    assert tiny.identical(jax.device_get(made.frozen["params"]["teacher"]), teacher.params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoTrained(Recipe):
    """Student and teacher both learn from labels, the student from the teacher too."""

    @property
    def updates(self):
        return (Update(groups=("student", "teacher")),)

    def terms(self, vars, student, teacher, batch, *, clock, key):
        kl = losses.forward_kl(student.logits, jax.lax.stop_gradient(teacher.logits))
        return {
            "task": task(student, batch),
            "teacher": task(teacher, batch),
            "kd": Term(kl, batch["weight"]),
        }


def test_a_teacher_that_an_update_names_is_trained_from_its_own_weights():
    made = tiny.Engine(tiny.run(recipe=CoTrained(), optimizer=SGD))
    rows, teacher = tiny.batch(), made.ctx.teacher
    assert made.frozen == {"params": {}, "buffers": {}}
    assert tiny.identical(made.start.params["teacher"], teacher.params)
    wanted = down(teacher.params, jax.grad(lambda own: nll(logits(teacher, own, rows), rows))(teacher.params))
    close(made.train([rows]).first.params["teacher"], wanted)


def test_a_co_trained_teacher_needs_no_weights():
    made = tiny.Engine(tiny.run(recipe=CoTrained(), teacher=tiny.network(name="fresh")))
    found = made.train([tiny.batch()])
    assert not tiny.identical(found.start.params["teacher"], found.first.params["teacher"])
    assert tiny.distance(found.start.params["teacher"], found.start.params["student"]) > 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peers(Recipe):
    """Two students of one architecture teach each other; the peer's BatchNorm buffers are the recipe's."""

    needs_teacher: ClassVar[bool] = False

    def init(self, key, ctx):
        params, buffers = ctx.student.init(key)
        return Vars(params={"peer": params}, buffers={"peer": buffers})

    def forward(self, models, batch, key):
        first, models = models.student(batch, key=key)
        second, models = models.student(batch, key=key, group="peer")
        return first, second, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return {
            "task": task(student, batch),
            "peer": task(teacher, batch),
            "student": Term(losses.forward_kl(student.logits, jax.lax.stop_gradient(teacher.logits)), batch["weight"]),
        }


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_peers_have_their_own_weights_buffers_and_optimizer_state(norm):
    student = tiny.student(norm=norm)
    made = tiny.Engine(tiny.run(student=student, teacher=None, recipe=Peers(), optimizer=SGD))
    rows, peer = tiny.batch(), made.start.params["peer"]
    found = made.train([rows])

    def objective(own):
        outputs, buffers = student.apply(own, made.start.buffers["peer"], rows, train=True)
        return nll(outputs.logits, rows), buffers

    gradient, buffers = jax.grad(objective, has_aux=True)(peer)
    close(found.first.params["peer"], down(peer, gradient))
    if norm == "batch":
        close(found.first.buffers["peer"], buffers)
    assert tiny.distance(found.first.params["peer"], found.first.params["student"]) > 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Undeclared(Recipe):
    """A network of the recipe's own with weights but no buffers: nothing needs to be declared for it."""

    needs_teacher: ClassVar[bool] = False
    critic: Model = dataclasses.field(default_factory=lambda: tiny.network(width=8, name="critic"))

    def init(self, key, ctx):
        return Vars(params={"critic": self.critic.init(key)[0]})

    def forward(self, models, batch, key):
        judged, models = models.apply(self.critic, batch, group="critic", train=True, key=key)
        student, models = models.student(batch, key=key)
        return student, judged, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return {"square": Term(jnp.square(student.logits - teacher.logits), batch["weight"])}


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_network_of_the_recipes_own_runs_with_a_groups_weights(microbatches):
    recipe = Undeclared()
    made = tiny.Engine(tiny.run(teacher=None, recipe=recipe, optimizer=SGD, microbatches=microbatches))
    rows, params = tiny.batch(), made.start.params
    answers = logits(made.ctx.student, params["student"], rows)
    gradient = jax.grad(lambda own: jnp.square(answers - logits(recipe.critic, own, rows)).mean())(params["critic"])
    close(made.train(tiny.batches(2)).first.params["critic"], down(params["critic"], gradient))


# --- gradients of the terms put together in another way, and players that wait for each other


def alike(gradients, *, clock, key):
    """The gradient of ``task``, and that of ``kd`` scaled to its length."""
    task, kd = gradients["task"], gradients["kd"]
    return optax.tree.add(task, optax.tree.scale(optax.tree.norm(task) / optax.tree.norm(kd), kd))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alike(KD):
    """KD whose two terms pull equally hard."""

    combine: Callable = alike

    @property
    def updates(self):
        return (Update(combine=self.combine),)


def test_an_update_may_combine_its_terms_gradients_however_the_batch_is_cut_and_stored():
    made = tiny.Engine(tiny.run(recipe=Alike(), optimizer=tiny.UNIT))
    cut = tiny.Engine(tiny.run(recipe=Alike(), optimizer=tiny.UNIT, microbatches=4, mesh=tiny.FSDP), devices=8)
    rows, params = tiny.batch(ragged=True), made.start.params["student"]
    answers = logits(made.ctx.teacher, made.ctx.teacher.params, rows)
    weights = {"task": rows["weight"] * rows["labelled"], "kd": rows["weight"]}

    def term(own, name):
        own = logits(made.ctx.student, own, rows)
        task, kd = losses.cross_entropy(own, rows["label"]), losses.forward_kl(own, answers, temperature=4.0)
        values = 0.1 * task if name == "task" else 0.9 * kd
        return (values * weights[name]).sum() / weights[name].sum()

    task, kd = (jax.jit(jax.grad(term), static_argnums=1)(params, name) for name in ("task", "kd"))
    wanted = optax.tree.add(task, optax.tree.scale(optax.tree.norm(task) / optax.tree.norm(kd), kd))
    for engine in (made, cut):
        found = engine.train([rows])
        close(jax.tree.map(np.subtract, params, found.first.params["student"]), wanted)
        np.testing.assert_allclose(found.metrics[0]["gradient_norm"], optax.tree.norm(wanted), rtol=1e-5)
        np.testing.assert_allclose(found.metrics[0]["loss"], term(params, "task") + term(params, "kd"), rtol=1e-5)


def test_a_combination_that_is_no_gradient_is_told():
    with pytest.raises(InputError, match="Alike: Update.combine gave a tree .*; a gradient is like"):
        tiny.Engine(tiny.run(recipe=Alike(combine=lambda gradients, *, clock, key: gradients["task"]["student"]["head"])))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turns(Adversary):
    """The two players of `Adversary` take turns of two steps; the memory counts those that the student has had."""

    when: Callable = lambda memory, clock: memory["turns"] % 4 < 2

    @property
    def updates(self):
        tell, fool = super().updates
        return (
            dataclasses.replace(tell, when=self.when, remember=self.count),
            dataclasses.replace(fool, when=lambda memory, clock: ~self.when(memory, clock), remember=self.count),
        )

    def init(self, key, ctx):
        return dataclasses.replace(super().init(key, ctx), memory={"turns": jnp.int32(0)})

    def count(self, memory, observed, batch, *, terms, clock, key):
        return {"turns": memory["turns"] + 1}


def test_an_update_may_wait_for_what_the_memory_says():
    made = tiny.Engine(tiny.run(recipe=Turns(), optimizer=optim.adamw(0.1)))
    state, moved = made.fresh(), []
    for rows in tiny.batches(5):
        before = jax.device_get(state)
        state, metrics = made.step(state, made.frozen, made.put(rows))
        groups = ("discriminator", "student")
        still = [tiny.identical(before.optimizer[g], jax.device_get(state.optimizer[g])) for g in groups]
        assert still == [tiny.identical(before.params[g], jax.device_get(state.params[g])) for g in groups]
        assert [metrics["ran/discriminator.tell"], metrics["ran/fool"]] == [not s for s in still]
        moved.append(groups[still.index(False)])
    assert moved == ["discriminator"] * 2 + ["student"] * 2 + ["discriminator"]
    assert state.memory["turns"] == 5


def test_a_condition_that_is_no_bool_is_told():
    with pytest.raises(InputError, match=r"Turns: Update.when gave int32\[\]; give one bool"):
        tiny.Engine(tiny.run(recipe=Turns(when=lambda memory, clock: memory["turns"])))
