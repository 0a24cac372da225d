"""What a user can get wrong is told before anything compiles: the value, the field, the fix, in one line."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jkd import models, optim
from jkd.config import Ema, Ensemble, StudentEma
from jkd.errors import InputError
from jkd.recipe import Bank, Recipe, Update, Vars
from jkd.recipes import KD, FitNet, Supervised
from jkd.recipes.projectors import Linear
from jkd.resolve import make_context
from jkd.sharding import MeshShape
from jkd.state import init_state
from jkd.step import make_step
from jkd.types import Model, Outputs, Term


def build(rows=None, devices=1, train_size=None, **fields):
    """All that happens before the first batch."""
    rows = tiny.batch(fields.get("batch_size", tiny.ROWS)) if rows is None else rows
    ctx = make_context(tiny.run(**fields), rows, train_size=train_size, devices=jax.devices()[:devices])
    init_state(ctx, jax.random.key(0))
    return make_step(ctx)


def recipe(**hooks):
    """A recipe made of these hooks."""
    defaults = {"needs_teacher": False, "terms": tiny.Plain.terms}
    return dataclasses.make_dataclass("Mine", [], bases=(Recipe,), frozen=True, kw_only=True, namespace=defaults | hooks)()


def one_update(**fields):
    return recipe(updates=property(lambda self: (Update(**fields),)))


def terms_of(make):
    return recipe(terms=lambda self, vars, student, teacher, batch, *, clock, key: make(vars, student, teacher, batch))


def remembering(init, remember=None, observe=None):
    hooks = {"init": lambda self, key, ctx: Vars(memory=init(ctx))}
    if remember:
        hooks["remember"] = lambda self, memory, observed, batch, *, terms, clock, key: remember(memory)
    if observe:
        hooks["observe"] = lambda self, vars, student, teacher, batch: observe(student, batch)
    return recipe(**hooks)


def headless():
    model = tiny.student()

    def apply(params, buffers, batch, **options):
        outputs, buffers = model.apply(params, buffers, batch, **options)
        return Outputs(heads={"embedding": outputs.logits}), buffers

    return dataclasses.replace(model, apply=apply, name="embedder")


def silent(rows):
    return {name: value for name, value in rows.items() if name != "weight"}


PERCEPTRON = models.mlp.Config(features=32, hidden=(16, 16), classes=5)
HINT = dict(projector=Linear(), weight=1.0)
WRONG = {
    "student tap": (
        dict(student=PERCEPTRON, recipe=FitNet(student_taps=("layers/9",), teacher_taps=("body",), **HINT)),
        r"student mlp on a batch|tap 'layers/9'.*layers/1",
    ),
    "teacher tap": (dict(recipe=FitNet(student_taps=("body",), teacher_taps=("bdoy",), **HINT)), "teacher.*'bdoy'.*body"),
    "image of another size": (
        dict(rows=tiny.batch() | {"image": np.zeros((tiny.ROWS, 8, 8, 2), np.float32)}),
        r"student student on a batch image \(32, 8, 8, 2\).*: .*shape",
    ),
    "batch without what the student reads": (
        dict(rows={name: value for name, value in tiny.batch().items() if name != "image"}),
        "student student on a batch.*no 'image'",
    ),
    "teacher with other classes": (
        dict(teacher=tiny.teacher(classes=7)),
        "teacher has 7 classes, the student 5: KD .*same classes",
    ),
    "no logits": (dict(student=headless()), "KD.terms: these Outputs hold no logits"),
    "no teacher": (dict(teacher=None), "Run.teacher = None: KD needs a teacher"),
    "teacher without weights": (dict(teacher=tiny.network(name="raw")), "teacher raw holds no weights.*train it first"),
    "teacher by a name": (dict(teacher="elder"), "'elder'.*Experiment"),
    "student that is no model": (
        dict(student=dataclasses.replace(tiny.student(), params={}), teacher=3),
        "3 is neither a Model",
    ),
    "no weight": (dict(rows=silent(tiny.batch())), "needs 'weight'"),
    "rows and mesh": (dict(rows=tiny.batch(20), devices=8), r"has 20 rows.* 8 devices .* 1 microbatches"),
    "rows and microbatches": (dict(rows=tiny.batch(20), microbatches=8), "has 20 rows.* 1 devices .* 8 microbatches"),
    "rows of a second stream": (
        dict(rows=tiny.batch() | {"unlabelled": tiny.batch(20)}, devices=8),
        "batch\\['unlabelled/image'\\] has 20 rows",
    ),
    "mesh and devices": (dict(devices=8, mesh=MeshShape(data=3)), "does not fit 8 devices"),
    "mesh with two unknowns": (dict(devices=8, mesh=MeshShape(fsdp=-1)), "at most one of them -1"),
    "examples coupled by the model": (
        dict(student=tiny.student(norm="batch"), microbatches=2),
        "microbatches = 2: student couples",
    ),
    "unknown group of an update": (dict(recipe=one_update(groups=("studnet",))), "Mine: no parameter group 'studnet'"),
    "teacher's group without one": (dict(recipe=one_update(groups=("teacher",)), teacher=None), "no parameter group 'teacher'"),
    "period of zero": (dict(recipe=one_update(every=0)), "Update.every = 0; give at least 1"),
    "two updates, one term": (
        dict(recipe=recipe(updates=property(lambda self: (Update(), Update())))),
        "Mine: two updates have the same term 'square'.*name",
    ),
    "optimizer for too few groups": (
        dict(
            recipe=recipe(init=lambda self, key, ctx: Vars(params={"scale": {"kernel": jnp.ones(1)}})),
            optimizer={"student": optim.sgd(0.1)},
        ),
        "no optimizer for the group 'scale'",
    ),
    "optimizer for a group that is not there": (
        dict(optimizer={"*": optim.sgd(0.1), "projectr": optim.sgd(0.1)}),
        "no parameter group 'projectr'",
    ),
    "average of a group that is not there": (dict(ema=Ema(groups=("studnet",))), "no parameter group 'studnet'.*'student'"),
    "pattern that matches nothing": (dict(trainable=("*", "!boddy/*")), "Run.trainable: '!boddy/\\*' matches no parameter"),
    "no terms": (dict(recipe=recipe(terms=Recipe.terms)), "Mine defines no terms"),
    "term reduced to a number": (
        dict(recipe=terms_of(lambda vars, student, teacher, batch: {"t": Term(student.logits.mean(), batch["weight"])})),
        r"term 't': values \(\) do not begin with the weight's shape \(32,\).*unreduced",
    ),
    "term with a number as weight": (
        dict(recipe=terms_of(lambda vars, student, teacher, batch: {"t": Term(student.logits, jnp.float32(1))})),
        r"term 't': values \(32, 5\)",
    ),
    "terms that fail": (
        dict(recipe=terms_of(lambda vars, student, teacher, batch: {"t": student.taps["body"]})),
        "Mine.terms: no 'body'",
    ),
    "terms that are no dict of Terms": (
        dict(recipe=terms_of(lambda vars, student, teacher, batch: {"t": student.logits})),
        "term 't' is no Term",
    ),
    "init that fails": (dict(recipe=remembering(lambda ctx: ctx.student_outputs.taps["body"])), "Mine.init: no 'body'"),
    "memory that grows": (
        dict(recipe=remembering(lambda ctx: {"m": jnp.zeros(2)}, lambda memory: {"m": jnp.zeros(3)})),
        r"Mine.remember changed the memory",
    ),
    "memory of another dtype": (
        dict(recipe=remembering(lambda ctx: {"m": jnp.zeros(2)}, lambda memory: {"m": jnp.zeros(2, jnp.int32)})),
        r"Mine.remember changed the memory",
    ),
    "memory of another structure": (
        dict(recipe=remembering(lambda ctx: {"m": jnp.zeros(2)}, lambda memory: {"n": jnp.zeros(2)})),
        r"Mine.remember changed the memory",
    ),
    "observed and reduced": (
        dict(recipe=remembering(lambda ctx: {}, observe=lambda student, batch: {"o": student.logits.mean()})),
        "Mine.observe: a leaf has shape \\(\\); give one row for each of the 32 examples",
    ),
    "parameters that are no dict": (
        dict(recipe=recipe(init=lambda self, key, ctx: Vars(params={"scale": jnp.ones(3)}))),
        "parameters of 'scale' are nested dicts of arrays; this is one array",
    ),
    "parameters in a list": (
        dict(recipe=recipe(init=lambda self, key, ctx: Vars(params={"scale": {"layers": [jnp.ones(3)]}}))),
        "parameters of 'scale' are nested dicts of arrays; this is list",
    ),
    "bank for data of unknown size": (
        dict(recipe=remembering(lambda ctx: {"b": Bank.full(ctx)})),
        "Mine keeps a row for each example: the run needs data of known size",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_told_in_one_line_before_the_first_batch(name):
    fields, message = WRONG[name]
    with pytest.raises(InputError, match=message) as caught:
        build(**fields)
    assert len(str(caught.value).split("\n--------")[0].splitlines()) == 1


def test_what_is_right_is_accepted():
    build(recipe=recipe(), teacher=None)
    build(teacher=None, recipe=Supervised())


def test_data_with_more_classes_than_the_student_is_refused():
    class Data:
        classes = 9
        train_size = 100

        def spec(self, size):
            return jax.eval_shape(lambda: tiny.batch(size))

    with pytest.raises(InputError, match="student student has 5 classes, the data 9"):
        make_context(tiny.run(data=Data()))


def test_no_data_and_no_batch_is_refused():
    with pytest.raises(InputError, match="Run.data = None"):
        make_context(tiny.run())


def test_recipes_that_compare_no_classes_take_teachers_with_others():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Hint(FitNet):
        same_classes: ClassVar[bool] = False

    build(teacher=tiny.teacher(classes=7), recipe=Hint(student_taps=("body",), teacher_taps=("body",), **HINT))


def test_sizes_come_from_shapes_and_the_clock_from_the_data():
    ctx = make_context(tiny.run(), tiny.batch(), train_size=100, devices=jax.devices())
    assert ctx.classes == tiny.CLASSES
    assert ctx.bank_rows == 104
    assert ctx.steps_per_epoch == 100 / 32
    assert float(ctx.clock(50).epoch) == pytest.approx(16)
    assert float(make_context(tiny.run(), tiny.batch()).clock(3).epoch) == 3
    assert ctx.student_outputs.logits_shape == (tiny.ROWS, tiny.CLASSES)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((ctx.params, ctx.batch, ctx.student_outputs)))


def test_a_shape_is_enough_to_make_a_context_and_a_step():
    spec = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tiny.batch()))
    make_step(make_context(tiny.run(student=tiny.network(), teacher=tiny.network()), spec))


def test_a_models_config_stands_for_the_model():
    build(student=PERCEPTRON, recipe=Supervised(), teacher=None)


def test_an_ensemble_of_models_is_a_teacher():
    members = (tiny.teacher(), tiny.weights(tiny.network(width=24), seed=11))
    made = tiny.Engine(tiny.run(teacher=Ensemble(members, mean="logits"), recipe=KD(task_weight=0.0), optimizer=tiny.UNIT))
    rows = tiny.batch()
    answers = [member.apply(member.params, {}, rows)[0].logits for member in members]
    answered = rows | {"teacher": Outputs(jnp.stack(answers).mean(0))}
    prepared = tiny.Engine(tiny.run(teacher=None, recipe=recipe_reading_batch(), optimizer=tiny.UNIT), answered)
    assert tiny.distance(made.gradient(rows), prepared.gradient(answered)) < 1e-6


def recipe_reading_batch():
    def terms(self, vars, student, teacher, batch, *, clock, key):
        return KD(task_weight=0.0).terms(vars, student, batch["teacher"], batch, clock=clock, key=key)

    return recipe(terms=terms)


def test_a_teacher_that_is_the_students_average_needs_an_average():
    with pytest.raises(InputError, match="needs Run.ema"):
        tiny.run(teacher=StudentEma())


def test_models_are_left_alone():
    model = tiny.student()
    assert isinstance(model, Model)
    before = jax.tree.map(np.copy, model.params)
    build(train_size=10)
    assert tiny.identical(before, model.params)
