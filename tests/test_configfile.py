"""Config files and --set: what is found, what is refused, and in which words."""

import dataclasses
import re
import sys
import textwrap

import cloudpickle as pickle
import pytest
import tiny

from jkd import configfile, data, models, optim, recipes, schedules
from jkd.config import Ema, Experiment, Run, StudentEma
from jkd.errors import InputError, MissingExtra
from jkd.sharding import MeshShape

HEAD = '"""First line.\n\nMore."""\nfrom jkd import Experiment, Run, data, models, optim, recipes\n\n\n'


def write(folder, body, name="mine.py"):
    path = folder / name
    path.write_text(HEAD + textwrap.dedent(body))
    return path


def config(*, seed=0, steps=100, temperature=4.0, name="x", fast=False, sizes=(8,), bound=None, optimizer=None):
    shared = dict(optimizer=optim.adamw(3e-3), steps=steps, seed=seed, batch_size=32)
    student = models.mlp.Config(features=64, hidden=sizes, classes=10)
    return Experiment(
        teacher=Run(student=tiny.network(), recipe=recipes.Supervised(), **shared),
        half=lambda teacher: teacher,
        student=Run(student=student, teacher="teacher", recipe=recipes.KD(temperature=temperature), **shared),
        both=Run(
            student=student,
            teacher=StudentEma(),
            ema=Ema(),
            recipe=recipes.Combine(recipes=(recipes.KD(task_weight=0.0), recipes.Supervised())),
            **shared | dict(optimizer={"*": optim.sgd(schedules.Linear(0.1, 0.0))}),
        ),
    )


# --- load ---


def test_loads_a_path_and_a_name(tmp_path):
    path = write(tmp_path, "def config():\n    return 1\n")
    assert configfile.load(path)() == 1
    assert configfile.load(str(path))() == 1
    assert configfile.load("digits").__code__.co_filename == str(configfile.names()["digits"])
    assert configfile.summary(path) == "First line."


def test_a_config_may_import_what_lies_beside_it_and_define_dataclasses(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "beside_it.py").write_text("VALUE = 7\n")
    body = """
        from __future__ import annotations
        import dataclasses
        from typing import ClassVar
        import beside_it

        @dataclasses.dataclass(frozen=True)
        class Mine:
            x: int = beside_it.VALUE
            y: ClassVar[str] = "not a field"

        def config():
            return Mine()
    """
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(body))
    assert [field.name for field in dataclasses.fields(configfile.load(path)())] == ["x"]


def test_what_a_config_defines_travels_to_processes_that_cannot_import_it(tmp_path, monkeypatch):
    function = configfile.load(write(tmp_path, "def view(x):\n    return x + 1\n\n\ndef config():\n    return view\n"))
    sent = pickle.dumps(function())
    monkeypatch.delitem(sys.modules, function.__module__)
    assert pickle.loads(sent)(1) == 2


def test_an_edited_file_is_read_again(tmp_path):
    for value in (1, 2):
        assert configfile.load(write(tmp_path, f"def config():\n    return {value}\n"))() == value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "digitz",
            "config 'digitz': no such file, and jkd has no config of that name; did you mean 'digits' or 'digits_cached' or "
            "'digits_methods'?",
        ),
        ("{tmp}/mime.py", "config {tmp}/mime.py: no such file; did you mean 'mine.py'?"),
        (
            "{tmp}/digits.py",
            "config {tmp}/digits.py: no such file; did you mean 'mine.py'? (jkd has a config of that name: digits)",
        ),
        ("{tmp}", "config {tmp}: is a folder; give one of its files; there are: mine.py"),
    ],
)
def test_a_missing_file_is_one_line_with_the_nearest(tmp_path, given, message):
    write(tmp_path, "")
    with pytest.raises(InputError) as error:
        configfile.load(given.format(tmp=tmp_path))
    assert str(error.value) == message.format(tmp=tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "defines no function config(); write: def config(*, seed=0): return Run(…)"),
        ("def konfig(): pass\n", "defines no function config(); did you mean 'konfig'?"),
        ("config = 3\n", "defines no function config()"),
        ("x = 1\ny = x +\n", "line 8: invalid syntax"),
        ("def f():\n    raise KeyError('gone')\n\n\nf()\n", "line 11: KeyError: 'gone'"),
        ("import no_such_module\n", "line 7: ModuleNotFoundError: No module named 'no_such_module'"),
        ("recipes.KD(temprature=2)\n", "line 7: TypeError: "),
    ],
)
def test_a_file_that_does_not_work_is_one_line_with_its_place(tmp_path, body, message):
    path = write(tmp_path, body)
    # the deepest line of the file itself counts: the call in line 11 fails in line 8
    message = message.replace("line 11: KeyError", "line 8: KeyError")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        configfile.load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_a_missing_package_of_jkds_own_stays_what_it_is(tmp_path):
    body = "from jkd.errors import MissingExtra\nraise MissingExtra(\"needs x: pip install 'jkd[train]'\")\n"
    with pytest.raises(MissingExtra, match=r"line 8: needs x: pip install 'jkd\[train\]'"):
        configfile.load(write(tmp_path, body))


# --- resolve ---


def test_a_run_becomes_the_node_student_and_what_is_set_is_derived_from():
    run = Run(student=tiny.network(), recipe=recipes.Supervised(), optimizer=optim.sgd(0.1), steps=1)
    assert configfile.resolve(lambda: run) == Experiment(student=run)
    found = configfile.resolve(config, ["steps=7", "temperature=2"])
    assert [node.steps for node in found.nodes.values() if isinstance(node, Run)] == [7, 7, 7]
    assert found.nodes["student"].recipe.temperature == 2.0
    assert isinstance(found.nodes["student"].recipe.temperature, float)


SETS = [
    ("steps=7", "student.steps", 7),
    ("temperature=2", "student.recipe.temperature", 2.0),
    ("sizes=(4, 4)", "student.student.hidden", (4, 4)),
    ("sizes=[4]", "student.student.hidden", (4,)),
    ("student.steps=50", "student.steps", 50),
    ("*.steps=50", "teacher.steps", 50),
    ("*.steps = 50", "both.steps", 50),
    ("student.recipe.temperature=2", "student.recipe.temperature", 2.0),
    ("both.recipe.recipes.0.weight=0.5", "both.recipe.recipes.0.weight", 0.5),
    ("both.optimizer.*.learning_rate.start=0.3", "both.optimizer.*.learning_rate.start", 0.3),
    ("student.optimizer.learning_rate=1e-4", "student.optimizer.learning_rate", 1e-4),
    ("student.compute_dtype=bfloat16", "student.compute_dtype", "bfloat16"),
    ("student.compute_dtype='bfloat16'", "student.compute_dtype", "bfloat16"),
    ("student.evaluate_every=50", "student.evaluate_every", 50),
    ("student.evaluate_every=0.5", "student.evaluate_every", 0.5),
    ("both.evaluate_ema=true", "both.evaluate_ema", True),
    ("student.best=-nll", "student.best", "-nll"),
    ("student.best=None", "student.best", None),
    ("student.require_teacher_accuracy=1", "student.require_teacher_accuracy", 1.0),
    ("student.trainable=('head/*', '!head/bias')", "student.trainable", ("head/*", "!head/bias")),
    ("student.mesh.fsdp=2", "student.mesh.fsdp", 2),
    ("student.teacher=None", "student.teacher", None),
]


@pytest.mark.parametrize(("text", "path", "value"), SETS, ids=[text for text, *_ in SETS])
def test_set_changes_one_value(text, path, value):
    name, *fields = path.split(".")
    found = configfile.resolve(config, [text]).nodes[name]
    for field in fields:
        found = found[int(field)] if field.isdigit() else found[field] if isinstance(found, dict) else getattr(found, field)
    assert found == value
    assert type(found) is type(value)


def test_sets_apply_from_left_to_right():
    found = configfile.resolve(config, ["*.steps=5", "student.steps=6", "steps=7"])
    assert (found.nodes["teacher"].steps, found.nodes["student"].steps) == (5, 6)


REFUSED = [
    ("steps", "write name=value"),
    ("=3", "write name=value"),
    ("student..steps=3", "write name=value"),
    ("stepz=3", "config() has no parameter 'stepz'; did you mean 'steps'?"),
    ("batch_size=3", "(a field of one run is node.batch_size=…, of all runs '*.batch_size=…')"),
    ("steps=many", "steps takes int, not 'many' (as its default, 100)"),
    ("steps=3.5", "steps takes int, not 3.5 (as its default, 100)"),
    ("steps=True", "steps takes int, not True"),
    ("temperature=hot", "temperature takes float, not 'hot'"),
    ("fast=1", "fast takes bool, not 1"),
    ("sizes=8", "sizes takes tuple, not 8"),
    ("studnt.steps=3", "the experiment has no node 'studnt'; did you mean 'student'?"),
    (
        "half.steps=3",
        "half is a function and has no fields to set; change it in the config, or set a run's (teacher, student, both)",
    ),
    ("student.stepz=3", "student (Run) has no field 'stepz'; did you mean 'steps'"),
    ("student.recipe.temprature=3", "student.recipe (KD) has no field 'temprature'; did you mean 'temperature'?"),
    ("*.recipe.temperature=3", "teacher.recipe (Supervised) has no field 'temperature'"),
    ("student.steps.x=3", "student.steps is 100, which has no fields to set"),
    ("teacher.student.name=x", "which has no fields to set"),
    ("both.recipe.recipes.2.weight=1", "both.recipe.recipes (tuple) has no field '2'"),
    ("student.steps=0", "Run.steps = 0: give at least 1"),
    ("student.steps=0.5", "student.steps takes int, not 0.5"),
    ("student.compute_dtype=float64", "student.compute_dtype takes 'float32' or 'bfloat16', not 'float64'"),
    (
        "student.recipe=KD",
        "student.recipe takes Recipe: change it in the config, or set its fields (student.recipe.{student_taps,",
    ),
    ("student.remat=dots", "student.remat takes Callable[..., Any] or None, not 'dots'"),
    ("student.trainable=head", "student.trainable takes tuple[str, ...], not 'head'"),
    ("student.teacher=nobody", "student: no earlier node is called 'nobody'"),
    (
        "student.mesh=2",
        "student.mesh takes MeshShape: change it in the config, or set its fields (student.mesh.{data, fsdp, tensor})",
    ),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text for text, _ in REFUSED])
def test_set_refuses_in_one_line(text, message):
    with pytest.raises(InputError, match=re.escape(message)) as error:
        configfile.resolve(config, [text])
    assert str(error.value).startswith(f"--set {text}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "sets", "message"),
    [
        (lambda: {"student": 1}, [], "returned dict; return a jkd.Run or a jkd.Experiment"),
        (lambda: None, [], "returned NoneType"),
        (lambda *, width: None, [], "config() needs a value for 'width': --set width=…"),
        (lambda: lambda: 3, ["*.steps=3"], "returned function"),
        (lambda: Experiment(f=lambda: 3), ["*.steps=3"], "--set *.steps=3: the experiment has no Run"),
    ],
)
def test_what_a_config_returns_is_checked(function, sets, message):
    with pytest.raises(InputError, match=re.escape(message)):
        configfile.resolve(function, sets)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return Run(steps=0)\n", "line 8: TypeError: "),
        ("raise RuntimeError('two\\nlines')\n", "line 8: RuntimeError: two"),
        ("raise RuntimeError\n", "line 8: RuntimeError"),
        (
            "return Run(student=models.mlp.Config(features=1, classes=2), recipe=recipes.Supervised(), steps=0,\n"
            "        optimizer=optim.sgd(0.1))\n",
            "line 8: Run.steps = 0: give at least 1",
        ),
        ("return data.digits(labelled=3)\n", "line 8: labelled=3: must be a fraction"),
    ],
)
def test_a_config_that_raises_is_one_line_with_its_place(tmp_path, body, message):
    path = write(tmp_path, f"def config():\n    {body}")
    with pytest.raises(InputError, match=re.escape(message)) as error:
        configfile.resolve(configfile.load(path))
    assert str(error.value).startswith(f"{path}, line 8")
    assert "\n" not in str(error.value)


def test_open_ended_configs_take_any_name():
    seen = {}

    def config(**given):
        seen.update(given)
        return Run(student=tiny.network(), recipe=recipes.Supervised(), optimizer=optim.sgd(0.1), steps=1)

    configfile.resolve(config, ["a=1", "b=word"])
    assert seen == {"a": 1, "b": "word"}


# --- shrink ---


def test_shrink_keeps_the_method_and_makes_the_rest_small():
    digits = data.digits(labelled=0.5)
    run = Run(
        student=tiny.network(),
        recipe=recipes.KD(temperature=3.0),
        optimizer=optim.adamw(schedules.WarmupCosine(1e-3)),
        steps=1000,
        data=digits,
        batch_size=512,
        microbatches=4,
        mesh=MeshShape(fsdp=64),
        evaluate_every=100,
        checkpoint_every=0.5,
        require_teacher_accuracy=0.9,
        compute_dtype="bfloat16",
        teacher="first",
    )
    first = dataclasses.replace(run, recipe=recipes.Supervised(), teacher=None, microbatches=1, steps=1)
    experiment = Experiment(first=first, f=lambda first: first, second=run)
    small = configfile.shrink(experiment)
    one, two = small.nodes["first"], small.nodes["second"]
    assert (one.steps, two.steps) == (1, 2)
    assert (one.batch_size, two.batch_size, two.microbatches) == (8, 16, 2)
    assert (two.evaluate_every, two.checkpoint_every, two.log_every) == (2, 0.5, 2)
    assert two.mesh == MeshShape()
    assert two.require_teacher_accuracy is None
    assert one.data is two.data
    assert (two.data.train_size, two.data.eval_size, two.data.classes) == (32, 8, 10)
    kept = ("student", "recipe", "optimizer", "compute_dtype", "teacher")
    assert all(getattr(two, name) == getattr(run, name) for name in kept)
    assert small.nodes["f"] is experiment.nodes["f"]
    assert run.data.spec(8).keys() == two.data.spec(8).keys()


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("recipes.KD(temprature=3)", "did you mean 'temperature'"),
        ("models.mlp.Config(features=64, hiden=(8,), classes=10)", "did you mean 'hidden'"),
        ("Run(stepz=3)", "did you mean 'steps'"),
        ("recipes.KDD()", "did you mean 'KD'"),
        ("models.mpl", "did you mean 'mlp'"),
    ],
)
def test_a_misspelt_field_in_a_config_names_the_nearest(tmp_path, line, meant):
    file = tmp_path / "wrong.py"
    file.write_text(f"from jkd import Run, models, recipes\n\n\ndef config():\n    return {line}\n")
    with pytest.raises(InputError, match=meant):
        configfile.resolve(configfile.load(file))
