"""Each hook of a recipe, with the smallest recipe that needs it, against the same arithmetic written by hand."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import RATE, close, down, logits, nll

from jkd import losses, optim
from jkd.config import Ema, StudentEma
from jkd.errors import InputError
from jkd.prepare import make_prepare
from jkd.recipe import Recipe, Update, Vars
from jkd.recipes import KD, Combine, Supervised
from jkd.recipes.logits import task
from jkd.schedules import Linear
from jkd.step import make_eval_step, make_term_gradients
from jkd.types import Model, Outputs, Term

# --- forward -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoViews(Recipe):
    """The student sees the images and their mirror image; the teacher labels a stream of another size."""

    def forward(self, models, batch, key):
        mirrored = {**batch, "image": batch["image"][:, :, ::-1]}
        first, models = models.student(batch, key=key)
        second, models = models.student(mirrored, key=key)
        third, models = models.student(batch["unlabelled"], key=key)
        return (first, second, third), models.teacher(batch["unlabelled"]), models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        first, second, third = student
        kl = losses.forward_kl(third.logits, teacher.logits)
        return {
            "task": task(first, batch),
            "consistency": Term(jnp.square(first.logits - second.logits), batch["weight"]),
            "kd": Term(kl, batch["unlabelled"]["weight"]),
        }


def test_forward_may_take_several_views_and_streams_and_buffers_pass_from_call_to_call():
    student = tiny.student(norm="batch")
    rows = tiny.batch(16) | {"unlabelled": tiny.batch(48, seed=9)}
    made = tiny.Engine(tiny.run(student=student, recipe=TwoViews(), batch_size=16), rows, devices=8)
    found = made.train([rows])
    buffers = student.buffers
    for view in (rows, rows | {"image": rows["image"][:, :, ::-1]}, rows["unlabelled"]):
        _, buffers = student.apply(student.params, buffers, view, train=True)
    close(found.first.buffers["student"], buffers)
    assert {"term/task", "term/consistency", "term/kd"} < found.metrics[0].keys()


def test_streams_of_two_sizes_are_cut_into_as_many_microbatches():
    rows = tiny.batch(16, ragged=True) | {"unlabelled": tiny.batch(48, seed=9, ragged=True)}
    whole, cut = (
        tiny.Engine(tiny.run(recipe=TwoViews(), batch_size=16, optimizer=tiny.UNIT, microbatches=n), rows) for n in (1, 4)
    )
    assert tiny.distance(cut.gradient(rows), whole.gradient(rows)) < 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetaTeacher(Recipe):
    """Meta pseudo labels: the teacher learns what makes a student better after one step on its labels."""

    @property
    def updates(self):
        return (Update(groups=("teacher",), forward=self.look_ahead, terms=self.after),)

    def look_ahead(self, models, batch, key):
        soft, _ = models.apply("teacher", batch["unlabelled"])

        def imitation(own):
            answer, _ = models.with_params(student=own).student(batch["unlabelled"])
            return losses.forward_kl(answer.logits, soft.logits).mean()

        ahead = models.virtual("student", jax.grad(imitation)(models.params["student"]))
        return ahead.student(batch)[0], None, models

    def after(self, vars, student, teacher, batch, *, clock, key):
        return {"task": task(student, batch)}


def test_virtual_gives_the_one_step_meta_gradient_and_changes_nothing():
    rows = tiny.batch() | {"unlabelled": tiny.batch(seed=5)}
    optimizers = {"student": optim.sgd(RATE, momentum=0.9), "teacher": tiny.UNIT}
    made = tiny.Engine(tiny.run(recipe=MetaTeacher(), optimizer=optimizers), rows)
    student, teacher = made.ctx.student, made.ctx.teacher

    def meta(weights):
        soft = logits(teacher, weights, rows["unlabelled"])
        imitation = lambda own: losses.forward_kl(logits(student, own, rows["unlabelled"]), soft).mean()  # noqa: E731
        return nll(logits(student, down(student.params, jax.grad(imitation)(student.params)), rows), rows)

    found = made.train([rows])
    close(jax.tree.map(np.subtract, found.start.params, found.first.params)["teacher"], jax.grad(meta)(teacher.params), 1e-4)
    assert tiny.identical(found.start.params["student"], found.first.params["student"])
    assert tiny.identical(found.start.optimizer["student"], found.first.optimizer["student"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookAhead(Recipe):
    """The average follows two virtual students, is kept, and teaches the real one."""

    def forward(self, models, batch, key):
        ahead = models
        for _ in range(2):
            gradient = jax.grad(lambda own, at=ahead: task(at.with_params(student=own).student(batch)[0], batch).mean())
            ahead = ahead.virtual("student", gradient(models.params["student"])).averaged()
        models = models.with_params(teacher=ahead.params["teacher"])
        return models.student(batch)[0], models.teacher(batch), models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return {"square": Term(jnp.square(student.logits - teacher.logits).mean(-1), batch["weight"])}


def test_the_average_may_follow_virtual_students_whose_optimizer_moves_along():
    rows, decay = tiny.batch(), 0.6
    run = tiny.run(recipe=LookAhead(), teacher=StudentEma(), ema=Ema(decay=decay), optimizer=optim.sgd(RATE, momentum=0.9))
    made = tiny.Engine(run)
    start, student = made.start.params["student"], made.ctx.student
    found = made.train([rows])

    def average(old, new):
        return jax.tree.map(lambda a, b: decay * a + (1 - decay) * b, old, new)

    ahead, teacher, trace = start, start, jax.tree.map(np.zeros_like, start)
    for _ in range(2):
        gradient = jax.grad(lambda own: nll(logits(student, own, rows), rows))(start)
        trace = jax.tree.map(lambda t, g: 0.9 * t + g, trace, gradient)
        ahead = down(ahead, trace)
        teacher = average(teacher, ahead)
    answers = logits(student, teacher, rows)
    real = down(start, jax.grad(lambda own: jnp.square(logits(student, own, rows) - answers).mean())(start))
    close(found.first.params["student"], real)
    close(found.first.ema["student"]["params"], average(teacher, real))


def test_an_average_that_is_not_there_cannot_follow():
    with pytest.raises(InputError, match=r"LookAhead moves the student's average: it needs Run.teacher = StudentEma\(\)"):
        tiny.Engine(tiny.run(recipe=LookAhead()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noisy(tiny.Plain):
    """A number for each example, drawn anew at every step."""

    def forward(self, models, batch, key):
        student, models = models.student(batch)
        return (student, jax.vmap(jax.random.normal)(models.keys(batch))), None, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        student, noise = student
        return {"noise": Term(noise * student.logits[:, 0], batch["weight"])}


def test_draws_by_example_depend_on_seed_step_and_example_alone():
    rows = tiny.batch()
    engines = [tiny.Engine(tiny.run(recipe=Noisy(), microbatches=n), devices=d) for n, d in ((1, 1), (4, 8))]
    first, second = (engine.train([rows, rows]).metrics for engine in engines)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_allclose(one["term/noise"], other["term/noise"], rtol=1e-5)
    assert abs(first[0]["term/noise"] - first[1]["term/noise"]) > 1e-3
    with pytest.raises(InputError, match="draws by example need batch\\['index'\\]"):
        tiny.Engine(tiny.run(recipe=Noisy()), {k: v for k, v in rows.items() if k != "index"})


# --- parts, gradients through the teacher, the product -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReusedHead(Recipe):
    """The teacher's own head reads the student's projected features (SimKD); the three together are the product."""

    through: bool = True
    student_taps: tuple[str, ...] = ("body",)
    teacher_taps: tuple[str, ...] = ("body",)

    @property
    def teacher_gradient(self):  # type: ignore[override]
        return "through" if self.through else "stop"

    def init(self, key, ctx):
        width = (ctx.student_outputs.taps["body"].shape[-1], ctx.teacher_outputs.taps["body"].shape[-1])
        return Vars(params={"projector": {"kernel": jax.random.normal(key, width) / 8}})

    def forward(self, models, batch, key):
        student, models = models.student(batch, key=key)
        features = student.taps["body"] @ models.params["projector"]["kernel"]
        answer, models = models.apply("teacher", features, part="head")
        return answer, models.teacher(batch), models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return {"match": Term(losses.forward_kl(student.logits, teacher.logits), batch["weight"])}

    def deploy(self, models):
        body, head = models.networks["student"], models.networks["teacher"].submodule("head")
        params = {
            "student": models.params["student"],
            "projector": models.params["projector"],
            "head": models.params["teacher"]["head"],
        }

        def apply(params, buffers, batch, *, taps=(), train=False, key=None):
            features = body.apply(params["student"], {}, batch, taps=("body",))[0].taps["body"]
            return head.apply(params["head"], {}, features @ params["projector"]["kernel"])[0], buffers

        return Model(
            init=lambda key: (params, {}), apply=apply, params=params, buffers={}, name="student with the teacher's head"
        )


def test_through_passes_the_gradient_of_the_teachers_part_to_the_student():
    made = tiny.Engine(tiny.run(recipe=ReusedHead(), optimizer=tiny.UNIT))
    rows, start, teacher = tiny.batch(), made.start.params, made.ctx.teacher

    def objective(params):
        features = made.ctx.student.apply(params["student"], {}, rows, taps=("body",))[0].taps["body"]
        head = teacher.params["head"]
        answer = features @ params["projector"]["kernel"] @ head["kernel"] + head["bias"][None]
        return losses.forward_kl(answer, logits(teacher, teacher.params, rows)).mean()

    close(made.gradient(rows), jax.grad(objective)(start))


def test_stop_gives_the_student_a_gradient_of_exactly_zero():
    made = tiny.Engine(tiny.run(recipe=ReusedHead(through=False), optimizer=tiny.UNIT))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(made.gradient(tiny.batch())))


@pytest.mark.parametrize(("devices", "mesh"), [(1, {}), (8, {"mesh": tiny.FSDP})])
def test_what_deploy_gives_is_what_is_evaluated(devices, mesh):
    made = tiny.Engine(tiny.run(recipe=ReusedHead(), **mesh), devices=devices)
    rows = tiny.batch()
    measure = make_eval_step(made.ctx, lambda student, teacher, batch: (student.logits, teacher.logits))
    student, teacher = measure(made.fresh(), made.frozen, made.put(rows))
    params, head = made.start.params, made.ctx.teacher.params["head"]
    features = made.ctx.student.apply(params["student"], {}, rows, taps=("body",))[0].taps["body"]
    close(student, features @ params["projector"]["kernel"] @ head["kernel"] + head["bias"][None])
    close(teacher, logits(made.ctx.teacher, made.ctx.teacher.params, rows))


def test_the_default_product_is_the_student():
    made = tiny.Engine(tiny.run())
    measure = make_eval_step(made.ctx, lambda student, teacher, batch: student.logits)
    close(
        measure(made.fresh(), made.frozen, made.put(tiny.batch())),
        logits(made.ctx.student, made.ctx.student.params, tiny.batch()),
    )


# --- prepare -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(KD):
    """The teacher answers before the step."""

    source: str = "teacher"

    def prepare(self, models, batch, key):
        answer = models.apply(self.source, batch)[0]
        return {**batch, "teacher": Outputs(answer.logits)}


@pytest.mark.parametrize(("source", "ahead"), [("teacher", True), ("student", False)])
def test_prepare_may_run_ahead_where_it_reads_nothing_that_training_changes(source, ahead):
    made = tiny.Engine(tiny.run(recipe=Prepared(source=source)))
    prepare, may_run_ahead = make_prepare(made.ctx)
    assert may_run_ahead == ahead
    rows = prepare(made.fresh(), made.frozen, made.put(tiny.batch()), jnp.int32(0))
    network = made.ctx.networks[source]
    close(rows["teacher"].logits, logits(network, network.params, tiny.batch()))


def test_a_prepared_answer_gives_the_same_update_as_the_teacher_in_the_step():
    prepared, inside = (tiny.Engine(tiny.run(recipe=recipe, optimizer=tiny.UNIT)) for recipe in (Prepared(), KD()))
    prepare, _ = make_prepare(prepared.ctx)
    state, rows = prepared.fresh(), prepared.put(tiny.batch(ragged=True))
    after, _ = prepared.step(state, prepared.frozen, prepare(prepared.fresh(), prepared.frozen, rows, state.step))
    wanted = inside.train([tiny.batch(ragged=True)]).first
    assert tiny.distance(after.params, wanted.params) < 1e-6


def test_a_recipe_without_prepare_has_no_program_for_it():
    assert make_prepare(tiny.Engine(tiny.run()).ctx) is None


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (8, 2)])
def test_answers_that_come_with_the_batch_need_no_teacher_weights(devices, microbatches):
    from jkd import models

    teacher = tiny.teacher()
    answered = [rows | {"teacher": Outputs(logits(teacher, teacher.params, rows))} for rows in tiny.batches(2, ragged=True)]
    fields = dict(optimizer=optim.sgd(0.1), microbatches=microbatches)
    made = tiny.Engine(tiny.run(teacher=models.prepared(), **fields), answered[0], devices=devices)
    assert tiny.distance(made.train(answered).state.params, plain().train(tiny.batches(2, ragged=True)).state.params) < 1e-6


# --- hyperparameters that move, and gradients by term ------------------------------------------------------------------------


def plain():
    return tiny.Engine(tiny.run())


def test_a_schedule_as_a_hyperparameter_moves_without_compiling_again():
    recipe = KD(weight=Linear(0.0, 1.0), temperature=Linear(1.0, 5.0))
    made = tiny.Engine(tiny.run(recipe=recipe, steps=4))
    found = made.train(tiny.batches(4))
    np.testing.assert_allclose([m["coef/kd"] for m in found.metrics], [0, 0.25, 0.5, 0.75], atol=1e-7)
    assert made.step._cache_size() == 1


def test_gradient_norms_and_cosines_of_terms_are_those_of_the_terms_by_themselves():
    recipe = KD(weight=0.7, task_weight=0.3, temperature=2.0)
    made = tiny.Engine(tiny.run(recipe=recipe))
    rows, teacher = tiny.batch(), made.ctx.teacher
    answers = logits(teacher, teacher.params, rows)

    def kd(own):
        return 0.7 * losses.forward_kl(logits(made.ctx.student, own, rows), answers, temperature=2.0).mean()

    task = jax.grad(lambda own: 0.3 * nll(logits(made.ctx.student, own, rows), rows))(made.start.params["student"])
    other = jax.grad(kd)(made.start.params["student"])
    first, second = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for tree in (task, other))
    found = jax.device_get(make_term_gradients(made.ctx)(made.fresh(), made.frozen, made.put(rows)))
    assert found.keys() == {"norm/task", "norm/kd", "cosine/kd"}
    np.testing.assert_allclose(found["norm/task"], np.linalg.norm(first), rtol=1e-5)
    np.testing.assert_allclose(found["norm/kd"], np.linalg.norm(second), rtol=1e-5)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    np.testing.assert_allclose(found["cosine/kd"], cosine, atol=1e-5)


def test_combine_adds_its_members_terms_and_gradients():
    parts = [KD(task_weight=0.0), Supervised()]
    both, *each = (tiny.Engine(tiny.run(recipe=r, optimizer=tiny.UNIT)) for r in (Combine(recipes=tuple(parts)), *parts))
    rows = tiny.batch(ragged=True)
    wanted = jax.tree.map(np.add, *(one.gradient(rows) for one in each))
    close(both.gradient(rows), wanted)


def test_an_error_in_a_recipes_forward_names_the_hook():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Wrong(KD):
        def forward(self, models, batch, key):
            raise TypeError("no such thing\nsecond line")

    with pytest.raises(InputError, match="^Wrong.forward: no such thing"):
        tiny.Engine(tiny.run(recipe=Wrong()))
