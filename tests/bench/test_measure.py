"""What `jkd bench` measures: its JSON, one program for each run, numbers that follow from others. No test looks at a time."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import pytest

import jkd
from jkd import data, models, optim, recipes
from jkd.bench import measure, table
from jkd.bench.workload import Workload, made_up
from jkd.cli import main
from jkd.errors import InputError
from jkd.recipe import Update

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
        "prepare": NUMBER,
        "augment": NUMBER,
        "teacher_forward": NUMBER,
        "student_forward_backward": NUMBER,
        "update": NUMBER,
        "host_wait_for_data": MAYBE,
    },
    "flops": {"teacher": NUMBER, "student": NUMBER, "other": NUMBER, "prepare": NUMBER, "executed": NUMBER, "xla": MAYBE},
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


CONFIG = """
import jax
from jkd import Experiment, Run, data, models, optim, recipes


def config():
    shared = dict(optimizer=optim.sgd(0.1), data=data.digits(), steps=9, batch_size=16)
    student = models.mlp.Config(features=64, hidden=(8,), classes=10)
    return Experiment(
        teacher=Run(student=student, recipe=recipes.Supervised(), **shared),
        made=lambda teacher: teacher,
        student=Run(
            student=student,
            teacher="teacher",
            recipe=recipes.KD(),
            microbatches=2,
            remat=jax.checkpoint_policies.everything_saveable,
            **shared,
        ),
    )
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rolled(recipes.KD):
    """The teacher's answers come from a program of their own, and every second step has a second update."""

    @property
    def updates(self):
        return (Update(), Update(every=2, name="again"))

    def prepare(self, models, batch, key):
        return batch | {"teacher": models.teacher(batch)}


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


def test_every_byte_of_the_state_is_donated(work, found):
    state = sum(leaf.nbytes for leaf in jax.tree.leaves(work.state))
    assert found["memory"]["aliased"] == state < found["memory"]["outputs"]  # the metrics are new


def test_the_table_says_what_the_json_says(found):
    text = table.text(found)
    assert f"{found['flops']['teacher']:.3e}" in text
    assert "compilations: 1" in text
    assert "nan" not in text.split()


def test_the_page_of_benchmarks_says_what_accelerators_reached(found):
    spec = importlib.util.spec_from_file_location("page", Path(__file__).parents[2] / "benchmarks" / "page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.accelerators([]) == "Accelerators: **not measured**."
    where = {
        "device": "NVIDIA H100",
        "date": "2026-01-01",
        "command": "python benchmarks/accelerator.py",
        "versions": {"jax": "0.10"},
    }
    losses = [{"head": "js", "ms": 2.0, "whole_logits_ms": 4.0, "ratio": 0.5, "ratio_range": [0.4, 0.6]}]
    losses[0] |= {"temp_bytes": 2**30, "whole_logits_temp_bytes": 2**34}
    run, head = (
        page.accelerators([where | {"what": what, "goal": 0.45, "measured": measured}]).splitlines()[-1]
        for what, measured in (("vit", found), ("head", {"losses": losses}))
    )
    assert f"**{found['mfu']['probed']:.3f}** of the probed peak" in run  # a CPU has no other
    assert "images/s" in run
    assert "**0.50** (0.40 to 0.60) | 2.0 ms, whole 4.0 ms | 1.00 GiB, whole 16.00 GiB" in head
    assert all("2026-01-01, NVIDIA H100, jax 0.10, `python benchmarks/accelerator.py`" in row for row in (run, head))


def test_made_up_batches_fit_the_step(work):
    rows = made_up(work.ctx, 0)
    assert {name: rows[name].shape for name in rows} == {name: leaf.shape for name, leaf in work.ctx.raw_batch.items()}
    assert rows["label"].max() < 10


def test_two_runs_in_turn(work):
    found = measure.paired(work, work, rounds=3)
    assert found["ratio"]["rounds"] == 3
    assert found["ratio"]["low"] <= found["ratio"]["median"] <= found["ratio"]["high"]


def test_functions_are_left_out_and_the_runs_that_they_teach():
    student = EXPERIMENT.nodes["student"]
    mixed = jkd.Experiment(
        **EXPERIMENT.nodes, made=lambda student: student, taught=dataclasses.replace(student, teacher="made")
    )
    runs = measure.runs_of(mixed)
    assert list(runs) == ["teacher", "student"]
    assert list(measure.skipped(mixed, runs)) == ["made", "taught"]
    with pytest.raises(InputError, match="--run made: it is a function of earlier nodes"):
        measure.runs_of(mixed, "made")


@pytest.mark.slow
def test_rollouts_and_updates_now_and_then():
    """Times of a step are means over its period, with rollouts; parts and operations likewise."""
    run = dataclasses.replace(measure.runs_of(EXPERIMENT, "student")["student"], recipe=Rolled())
    work = Workload("student", run)
    assert work.calls % 2 == 0
    found = measure.measure(work, steps=4)
    conforms(found, SCHEMA)
    assert found["split"]["prepare"] > 0
    teacher, student = 2 * 32 * (64 * 16 + 16 * 10), 2 * 32 * (2 * 64 * 8 + 3 * 8 * 10)
    assert (found["flops"]["prepare"], found["flops"]["teacher"]) == (teacher, 0)
    assert found["flops"]["student"] == 1.5 * student
    assert found["flops"]["executed"] == teacher + 1.5 * student
    assert found["mfu"] == found["hfu"]


@pytest.mark.slow
def test_the_command_line(tmp_path, capsys):
    """A run's own choices in the sweep, traces apart, a pair, and a file of all that."""
    config, lines, traces = tmp_path / "tiny.py", tmp_path / "found.jsonl", tmp_path / "traces"
    config.write_text(CONFIG)
    bench = ["bench", str(config), "--json", str(lines)]
    held = sum(array.nbytes for array in jax.live_arrays())
    assert main([*bench, "--run", "student", "--sweep"]) == 0
    assert sum(array.nbytes for array in jax.live_arrays()) <= held  # no row's arrays stay
    assert main([*bench, "--steps", "1", "--profile", str(traces)]) == 0
    assert main(["bench", "--ab", str(config), f"{config} --run teacher", "--steps", "2", "--json", str(lines)]) == 0
    told = capsys.readouterr().out
    assert "made is left out: it is a function" in told
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [(row["microbatches"], row["remat"], row["own"]) for row in rows[:4]] == [
        (2, "everything_saveable", True),
        (2, "", False),
        (2, "nothing_saveable", False),
        (1, "everything_saveable", False),
    ]
    assert len(rows) == 4 * 3 + 2 + 1
    assert "own" not in rows[-1]
    assert rows[-1]["ratio"]["rounds"] == 2
    assert {trace.relative_to(traces).parts[0] for trace in traces.rglob("*.xplane.pb")} == {"teacher", "student"}


def test_a_file_that_cannot_be_written_is_told_first(tmp_path, capsys):
    assert main(["bench", "digits", "--json", str(tmp_path / "none" / "found.jsonl")]) == 2
    said = capsys.readouterr()
    assert "cannot be written" in said.err
    assert not said.out


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
