"""The fingerprint: equal for equal configs in every process, different for every difference, and told in words."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jkd import configfile, data, losses, models, optim, recipes, schedules
from jkd.config import Ema, Experiment, Run
from jkd.fingerprint import differences, digest, to_json
from jkd.recipe import Recipe


def run(**fields):
    student = models.mlp.Config(features=64, hidden=(8,), classes=10)
    shared = dict(student=student, recipe=recipes.KD(), optimizer=optim.adamw(3e-3), steps=50, teacher=tiny.teacher())
    return Run(**shared | fields)


def plain(batch, key):
    return batch


VALUES = {
    "float": 1.0,
    "int": 1,
    "bool": True,
    "none": None,
    "text": "1",
    "inf": float("inf"),
    "tuple": (1, 2),
    "nested": ((1,), 2),
    "numpy scalar": np.float32(0.5),
    "array": np.arange(3),
    "array of another dtype": np.arange(3.0),
    "array of another shape": np.arange(3)[None],
    "jax array": jnp.arange(3.0) + 1,
    "key": jax.random.key(0),
    "dtype": np.dtype(np.float32),
    "spec": jax.P("data", None),
    "another spec": jax.P(None, "data"),
    "mapping with numbers": {0.5: 0.1},
    "set": {"b", "a"},
    "function": plain,
    "library function": losses.mse,
    "partial": functools.partial(losses.mse),
    "partial with more": functools.partial(losses.forward_kl, temperature=2.0),
    "class": recipes.KD,
    "builtin": len,
    "jitted": jax.jit(plain),
    "method": "x".join,
    "policy": jax.checkpoint_policies.dots_saveable,
    "another policy": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "policy function": jax.checkpoint_policies.nothing_saveable,
    "named policy": jax.checkpoint_policies.save_only_these_names("a", "b"),
    "model": tiny.network(),
    "model with weights": tiny.teacher(),
    "model with other weights": tiny.weights(tiny.network(), seed=8),
    "model of other shapes": tiny.network(width=32),
    "recipe": recipes.KD(),
    "schedule": schedules.Piecewise(0.1, {0.5: 0.1}),
    "ema": Ema(),
    "data": data.digits(labelled=0.1),
    "other data": data.digits(labelled=0.2),
    "arrays": data.arrays(image=np.zeros((4, 2, 2, 1), np.uint8), label=np.zeros(4, int)),
    "other arrays": data.arrays(image=np.ones((4, 2, 2, 1), np.uint8), label=np.zeros(4, int)),
}


def test_every_value_is_json_with_a_digest_of_its_own():
    for name, value in VALUES.items():
        found = to_json(value)
        assert json.loads(json.dumps(found)) == found, name
        assert found == to_json(value), name
        assert "0x" not in json.dumps(found), name
    digests = {name: digest(value) for name, value in VALUES.items()}
    assert len(set(digests.values())) == len(digests), digests


@pytest.mark.parametrize("name", ["set", "mapping with numbers", "model with weights", "arrays", "recipe"])
def test_equal_values_have_equal_digests(name):
    again = {
        "set": {"a", "b"},
        "mapping with numbers": {0.5: 0.1},
        "model with weights": tiny.weights(tiny.network(width=48, name="teacher")),
        "arrays": data.arrays(image=np.zeros((4, 2, 2, 1), np.uint8), label=np.zeros(4, int)),
        "recipe": recipes.KD(temperature=4.0),
    }
    assert digest(VALUES[name]) == digest(again[name])


def test_lambdas_and_local_functions_count_by_code_and_closure():
    def make(factor):
        def local(batch, key):
            return factor

        return local

    assert digest(make(1)) == digest(make(1))
    assert digest(make(1)) != digest(make(2))
    assert digest(lambda x: x + 1) != digest(lambda x: x + 2)
    one, two = (lambda x: x + 1), (lambda x: x * 1)  # two on a line: told apart by their bytecode
    assert digest(one) != digest(two)


CONFIG = '''
import dataclasses
from jkd import Run, models, optim, recipes, Recipe
SCALE = 2.0
def helper(x):
    """Helps."""
    return x * SCALE
@dataclasses.dataclass(frozen=True, kw_only=True)
class Base(Recipe):
    def observe(self, vars, student, teacher, batch):
        return {}
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(Base):
    needs_teacher = False
    weight: float = 1.0
    def terms(self, vars, student, teacher, batch, *, clock, key):
        return helper(student) in {"one", "two"}  # a comment
def view(batch, key):
    return batch
def config(steps=5):
    unrelated = 1
    return Run(student=models.mlp.Config(features=1, classes=2), recipe=Mine(), steps=steps, optimizer=optim.sgd(0.1),
               augment=(view, lambda batch, key: helper(batch)))
'''


def of(text, folder, name="mine"):
    path = folder / f"{name}.py"
    path.write_text(text)
    return to_json(configfile.resolve(configfile.load(path)))


def test_what_a_config_file_defines_counts_by_what_it_does(tmp_path):
    start = of(CONFIG, tmp_path)
    # the name of the file, comments, layout, docstrings and what no node reaches do not count
    assert of(CONFIG, tmp_path, "copy") == start
    kept = (("  # a comment", ""), ('    """Helps."""\n', ""), ("unrelated = 1", "unrelated = 2"), ("SCALE\n@", "SCALE\n\n\n@"))
    for old, new in kept:
        assert old in CONFIG
        assert of(CONFIG.replace(old, new), tmp_path) == start, (old, new)
    edits = {
        "return helper(student) in": ("return helper(teacher) in", ["student.recipe.code"]),
        "x * SCALE": ("x + SCALE", ["student.recipe.code", "student.augment.1.code"]),
        "SCALE = 2.0": ("SCALE = 3.0", ["student.recipe.code", "student.augment.1.code"]),
        "return {}": ("return {'a': 1}", ["student.recipe.code"]),
        "    return batch\n": ("    return {**batch}\n", ["student.augment.0.code"]),
        "helper(batch)": ("helper(key)", ["student.augment.1.code"]),
        "weight: float = 1.0": ("weight: float = 2.0", ["student.recipe.code", "student.recipe.weight"]),
    }
    for old, (new, places) in edits.items():
        found = differences(start, of(CONFIG.replace(old, new), tmp_path))
        assert sorted(line.partition(":")[0] for line in found) == sorted(places), old


def test_another_process_finds_the_same(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CONFIG)
    script = f"""
        from jkd import configfile, fingerprint
        for config in ("digits", {str(path)!r}):
            print(fingerprint.digest(configfile.resolve(configfile.load(config))))
    """
    environment = os.environ | {"PYTHONHASHSEED": "1", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == [digest(configfile.resolve(configfile.load(config))) for config in ("digits", path)]


def test_differences_are_lines_that_name_the_place():
    before = Experiment(teacher=run(teacher=None, recipe=recipes.Supervised()), student=run(teacher="teacher"))
    nodes = before.nodes
    assert differences(to_json(before), to_json(before)) == []
    changed = dataclasses.replace(nodes["student"], steps=60, recipe=recipes.KD(temperature=2.0), seed=1)
    assert differences(to_json(before), to_json(Experiment(**nodes | {"student": changed}))) == [
        "student.recipe.temperature: 4.0 -> 2.0",
        "student.steps: 50 -> 60",
        "student.seed: 0 -> 1",
    ]
    other = dataclasses.replace(nodes["student"], recipe=recipes.FunMatch(), trainable=("a", "b"))
    assert differences(to_json(before), to_json(Experiment(teacher=nodes["teacher"], student=other, more=other))) == [
        "student.recipe: KD -> FunMatch",
        'student.trainable: ["*"] -> ["a", "b"]',
        "more: absent -> Run",
    ]
    assert differences(to_json(1), to_json(1.0)) == [": 1 -> 1.0"]


def test_a_name_holds_eight_digits():
    assert len(digest(run())) == 8
    assert int(digest(run()), 16) >= 0


class Outside(Recipe):
    """Importable: its package's revision stands for its code."""


def test_what_an_import_reaches_counts_by_its_name():
    assert to_json(Outside()) == {"class": f"{__name__}:Outside", "student_taps": [], "teacher_taps": []}
    assert to_json(plain) == {"class": f"{__name__}:plain"}
