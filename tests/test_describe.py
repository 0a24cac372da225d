"""What describe says of shapes, terms and memory, and that every packaged config can be described."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jkd import configfile, data, models, optim, recipes, schedules, trees
from jkd.config import Ema, Ensemble, Experiment, Run, StudentEma
from jkd.describe import describe, memory, terms
from jkd.errors import InputError
from jkd.recipe import Recipe, Update, Vars
from jkd.recipes.projectors import Linear
from jkd.resolve import make_context
from jkd.schedules import Clock
from jkd.sharding import MeshShape
from jkd.state import init_state
from jkd.types import Term


def run(**fields):
    shared = dict(
        student=models.mlp.Config(features=64, hidden=(8,), classes=10),
        recipe=recipes.Supervised(),
        optimizer=optim.adamw(3e-3),
        data=data.digits(),
        batch_size=32,
        steps=90,
    )
    return Run(**shared | fields)


WIDE = models.mlp.Config(features=64, hidden=(16, 16), classes=10)


def test_says_what_a_run_is():
    hint = recipes.FitNet(student_taps=("layers/0",), teacher_taps=("layers/1",), projector=Linear())
    text = describe(
        Experiment(
            teacher=run(student=WIDE),
            cache=lambda teacher: teacher,
            student=run(teacher="teacher", recipe=hint, ema=Ema(), microbatches=2, batch_size=64, evaluate_every=10),
            later=run(teacher="cache", recipe=recipes.KD()),
        )
    )
    teacher, cache, student, later = re.split(r"\n(?=cache: |student\n|later\n)", text)
    for line in (
        "student: Config(features=64, hidden=[16, 16], classes=10, norm=False, dropout=0.0, preprocess=None)",
        "steps: 90",
        "student: mlp, 1,482 parameters",
        "steps: 90 (2.0 epochs of 1,437); evaluate every 23, checkpoint every 23",
        "mesh: data 8, fsdp 1, tensor 1 (8 cpu devices); microbatches: 1",
        "  task  coefficient 1",
    ):
        assert line in teacher.splitlines(), line
    assert re.search(r"^cache: a function, .*<lambda>; its result is known when it has run$", cache, re.M)
    assert "recipe: FitNet(" in student
    assert "teacher: mlp, 1,482 parameters" in student
    assert "microbatches: 2" in student
    assert "evaluate every 10, checkpoint every 23" in student
    # what is tapped has a star, on either side; both sides stand in one line
    assert re.search(r"^  \*  layers/0 +float32\[64, 8\] +layers/0 +float32\[64, 16\]$", student, re.M)
    assert re.search(r"\*  layers/1 +float32\[64, 16\]$", student, re.M)
    assert re.search(r"^  projector/0/kernel +float32\[8, 16\]$", student, re.M)
    assert re.search(r"^  match +coefficient 100$", student, re.M)
    assert re.search(r"^  ema student +0\.00", student, re.M)
    assert "teacher: what the node 'cache' gives; shapes are known when it has run" in later
    assert "terms" not in later


def test_ensembles_of_earlier_runs_and_averages_of_the_student():
    ensemble = Ensemble(members=("one", tiny.teacher(width=8)))
    image = np.zeros((64, *tiny.IMAGE), np.float32)
    examples = data.arrays(image=image, label=np.arange(64) % 5)
    one = run(student=tiny.network(), data=examples)
    both = describe(
        Experiment(
            one=one,
            two=dataclasses.replace(one, teacher=ensemble, recipe=recipes.KD()),
            three=dataclasses.replace(one, teacher=StudentEma(), ema=Ema(), recipe=recipes.KD()),
        )
    )
    assert "teacher: ensemble of 2" in both
    assert "teacher: the average of the student" in both


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary(Recipe):
    """Two updates; coefficients from a number, from schedules, from jitted code, from the batch and from parameters."""

    needs_teacher = False

    @property
    def updates(self):
        return (Update(groups=("student",)), Update(groups=("critic",), terms=self.critic, every=2, name="critic"))

    def init(self, key, ctx):
        return Vars(params={"critic": {"scale": jnp.ones(3)}})

    def terms(self, vars, student, teacher, batch, *, clock, key):
        values, weight = jnp.square(student.logits).mean(-1), batch["weight"]
        return {
            "number": Term(values, weight, 0.25),
            "constant": Term(values, weight),
            "linear": Term(values, weight, schedules.Linear(0.0, 9.0)(clock)),
            "epochs": Term(values, weight, schedules.Epochs(1.0, 2.0)(clock)),
            "jitted": Term(values, weight, jax.jit(lambda step: jnp.where(step > 4, 2.0, 1.0))(clock.step)),
            "batch": Term(values, weight, batch["weight"].mean()),
            "params": Term(values, weight, vars.params["critic"]["scale"].sum()),
        }

    def critic(self, vars, student, teacher, batch, *, clock, key):
        return {"wide": Term(jnp.square(student.logits).mean(-1) * vars.params["critic"]["scale"][0], batch["weight"], 3.0)}


def test_coefficients_come_from_the_clock_alone():
    ctx = make_context(tiny.run(recipe=Adversary(), teacher=None, steps=10), tiny.batch(), train_size=160)
    clock = Clock(9, 10, 9 / 5)
    found = terms(ctx)
    assert found.pop("linear") == (0.0, pytest.approx(float(schedules.Linear(0.0, 9.0)(clock))))
    assert found == {
        "number": (0.25, 0.25),
        "constant": (1.0, 1.0),
        "epochs": (0.5, 1.0),
        "jitted": (1.0, 2.0),
        "batch": (None, None),
        "params": (None, None),
        "critic.wide": (3.0, 3.0),
    }


@pytest.mark.parametrize("mesh", [MeshShape(), MeshShape(data=1, fsdp=8), MeshShape(data=2, fsdp=4)], ids=str)
def test_memory_is_what_the_state_then_takes(mesh):
    run = tiny.run(mesh=mesh, ema=Ema(), teacher_dtype="bfloat16", teacher=tiny.teacher(norm="batch"), student=tiny.network())
    ctx = make_context(run, tiny.batch())
    parts = {part.name: part for part in memory(ctx)}
    state, frozen = init_state(ctx, jax.random.key(0))

    def real(tree):
        leaves = jax.tree.leaves(tree)
        return trees.nbytes(tree), sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    for name, tree in {
        "params student": state.params["student"],
        "optimizer student": state.optimizer["student"],
        "ema student": state.ema["student"],
        "params teacher (frozen)": frozen["params"]["teacher"],
        "buffers teacher (frozen)": frozen["buffers"]["teacher"],
    }.items():
        assert (parts[name].total, parts[name].per_device) == real(tree), name
    assert parts["batch"].per_device * 8 == parts["batch"].total


def test_mistakes_that_shapes_show_are_told():
    wrong = run(recipe=recipes.FitNet(student_taps=("layers/7",), teacher_taps=("layers/0",)), teacher="teacher")
    with pytest.raises(InputError, match=r"tap 'layers/7': mlp computes nothing under this path; did you mean 'layers/0'"):
        describe(Experiment(teacher=run(student=WIDE), student=wrong))


# their networks take long to trace, and test_configs traces them
LARGE = ("cifar100_resnet32x4_resnet8x4", "cifar100_table", "imagenet_funmatch_resnet50", "vit_folder")


@pytest.mark.parametrize("name", sorted(set(configfile.names()) - set(LARGE)))
def test_packaged_configs_can_be_described(name):
    function = configfile.load(name)
    few = ['methods=("kd", "ab")'] if "methods" in configfile.parameters(function) else []  # all are traced in test_configs
    experiment = configfile.resolve(function, few)
    text = describe(configfile.shrink(experiment))
    runs = [name for name, node in experiment.nodes.items() if isinstance(node, Run)]
    for name in experiment.nodes:
        assert re.search(rf"^{name}\n=+$" if name in runs else rf"^{name}: a function, ", text, re.M)
    assert text.count("memory of the state, MiB") == len(runs)
