"""What `jkd bench` measures: its JSON, one program for each run, numbers that follow from others. No test looks at a time."""

import json

import pytest

import jkd
from jkd import data, models, optim, recipes
from jkd.bench import measure, table
from jkd.bench.workload import Workload, made_up
from jkd.cli import main
from jkd.errors import InputError

NUMBER, MAYBE = (int, float), (int, float, type(None))
SCHEMA = {
    "run": str,
    "method": str,
    "date": str,
    "device": {"platform": str, "kind": str, "count": int},
    "versions": dict,
    "revision": str,
    "dtypes": {"compute": str, "teacher": str},
    "shapes": dict,
    "batch_size": int,
    "microbatches": int,
    "steps_per_call": int,
    "made_up_batches": (str, type(None)),
    "time_per_step": {"min": NUMBER, "median": NUMBER, "p90": NUMBER, "steps": int, "in_loop": MAYBE},
    "examples_per_s": NUMBER,
    "tokens_per_s": MAYBE,
    "split": {
        "augment": NUMBER,
        "teacher_forward": NUMBER,
        "student_forward_backward": NUMBER,
        "update": NUMBER,
        "host_wait_for_data": MAYBE,
    },
    "flops": {"teacher": NUMBER, "student": NUMBER, "other": NUMBER, "executed": NUMBER, "xla": MAYBE},
    "peaks": {
        "datasheet_flops_per_s": MAYBE,
        "datasheet_bytes_per_s": MAYBE,
        "probed_flops_per_s": NUMBER,
        "probed_bytes_per_s": NUMBER,
    },
    "mfu": {"datasheet": MAYBE, "probed": NUMBER},
    "hfu": {"datasheet": MAYBE, "probed": NUMBER},
    "bound": {"seconds": NUMBER, "binding": str, "terms": {"flops": NUMBER, "bytes": NUMBER, "cache": MAYBE}},
    "fraction_of_bound": NUMBER,
    "memory": {
        "arguments": int,
        "outputs": int,
        "aliased": int,
        "temporaries": int,
        "peak": int,
        "peak_of": str,
        "examples_by_classes": list,
    },
    "compile": {
        "trace": NUMBER,
        "lower": NUMBER,
        "compile": NUMBER,
        "persistent_cache_hit": bool,
        "compilations": int,
    },
}
SHARED = dict(optimizer=optim.sgd(0.1), data=data.digits(), steps=9, batch_size=32)
EXPERIMENT = jkd.Experiment(
    teacher=jkd.Run(student=models.mlp.Config(features=64, hidden=(16,), classes=10), recipe=recipes.Supervised(), **SHARED),
    student=jkd.Run(
        student=models.mlp.Config(features=64, hidden=(8,), classes=10), teacher="teacher", recipe=recipes.KD(), **SHARED
    ),
)


def conforms(found, schema, where="$"):
    if not isinstance(schema, dict):
        assert isinstance(found, schema), where
        return
    assert found.keys() == schema.keys(), where
    for name, inner in schema.items():
        conforms(found[name], inner, f"{where}.{name}")


@pytest.fixture(scope="module")
def work():
    return Workload("student", measure.runs_of(EXPERIMENT, "student")["student"])


@pytest.fixture(scope="module")
def found(work):
    return json.loads(json.dumps(measure.measure(work, steps=3)))


def test_the_json_has_these_keys_and_no_others(found):
    conforms(found, SCHEMA)


def test_a_run_compiles_its_step_once(work, found):
    assert found["compile"]["compilations"] == 1
    assert work.heard.of("step") == 1


def test_numbers_that_follow_from_each_other(found):
    times, peak = found["time_per_step"], found["peaks"]["probed_flops_per_s"]
    assert times["min"] <= times["median"] <= times["p90"]
    assert found["examples_per_s"] == pytest.approx(32 / times["median"])
    assert found["flops"]["teacher"] == 2 * 32 * (64 * 16 + 16 * 10)
    assert found["flops"]["student"] == 2 * 32 * (2 * 64 * 8 + 3 * 8 * 10)  # no gradient of the images
    assert found["flops"]["executed"] == found["flops"]["teacher"] + found["flops"]["student"]
    useful = found["flops"]["teacher"] + found["flops"]["student"]
    assert found["mfu"]["probed"] == pytest.approx(useful / (times["median"] * 8 * peak))
    assert found["bound"]["seconds"] == max(seconds or 0 for seconds in found["bound"]["terms"].values())
    assert found["fraction_of_bound"] == pytest.approx(found["bound"]["seconds"] / times["median"])
    assert found["peaks"]["datasheet_flops_per_s"] is None  # a CPU has no datasheet
    assert 0 < found["memory"]["aliased"] <= found["memory"]["outputs"]  # the state is donated


def test_the_table_says_what_the_json_says(found):
    text = table.text(found)
    assert f"{found['flops']['teacher']:.3e}" in text
    assert "compilations: 1" in text
    assert "nan" not in text.split()


def test_made_up_batches_fit_the_step(work):
    rows = made_up(work.ctx, 0)
    assert {name: rows[name].shape for name in rows} == {name: leaf.shape for name, leaf in work.ctx.raw_batch.items()}
    assert rows["label"].max() < 10


def test_two_runs_in_turn(work):
    found = measure.paired(work, work, rounds=3)
    assert found["ratio"]["rounds"] == 3
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]


def test_a_run_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"--run studnt: there is no such run; did you mean 'student'"):
        measure.runs_of(EXPERIMENT, "studnt")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench"], "give a CONFIG, or --ab A B"),
        (["bench", "digits", "--ab", "digits", "digits"], "give a CONFIG, or --ab A B"),
        (["bench", "--ab", "digits", "digits", "--sweep"], "--sweep and --profile are for one CONFIG"),
        (["bench", "--ab", "digits", "digits --sett a=1"], "--sett is no option here; --set NAME=VALUE and --run NAME are"),
        (["bench", "digits", "--steps", "0"], "--steps 0: give at least 1"),
        (["bench", "digits", "--run", "studnt"], "there is no such run; did you mean 'student'"),
    ],
)
def test_arguments_that_make_no_sense(argv, message, capsys):
    assert main(argv) == 2
    assert message in capsys.readouterr().err
