"""The command line: exit codes, one line for every mistake, and what a training prints and leaves."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from jkd import catalogue, commands, configfile, recipes
from jkd.cli import main
from jkd.recipe import Recipe

HEAD = """
import os, signal
import jax, numpy as np
import jax.numpy as jnp
from jkd import Experiment, Run, data, models, optim, recipes
from jkd.loop import Failed, Stopped

def run(steps=2, seed=0, **fields):
    mlp = models.mlp.Config(features=64, hidden=(4,), classes=10)
    shared = dict(student=mlp, recipe=recipes.Supervised(), data=data.digits(labelled=0.1), optimizer=optim.sgd(0.1),
                  steps=steps, batch_size=32, seed=seed, evaluate_every=0, checkpoint_every=0)
    return Run(**shared | fields)
"""
PLAIN = "def config(*, seed=0, steps=2):\n    return run(steps, seed)\n"


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JKD_TRACEBACK", raising=False)


def write(body, name="mine.py"):
    Path(name).write_text(HEAD + textwrap.dedent(body))
    return name


def one_line(capsys):
    """The one line on stderr; stdout stays empty."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jkd: ")
    assert err.count("\n") == 1, err
    return err.removeprefix("jkd: ").rstrip("\n")


# --- reading arguments ---


@pytest.mark.parametrize(
    "command",
    ["", "train", "cache", "eval", "report", "export", "debug", "data", "describe", "plan", "bench", "recipes", "configs"],
)
def test_every_help_shows_examples(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:\n  jkd " in out
    assert max(map(len, out.splitlines())) <= 128


def test_help_loads_nothing_heavy():
    script = "import sys; from jkd.cli import main; main(['--help']); print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    assert not {"jax", "numpy", "rich", "importlib.metadata"} & set(done.stdout.splitlines()[-1].split())


def environment(**more):
    flags = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "XLA_FLAGS": flags} | more


def test_version(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"jkd \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: COMMAND (jkd --help shows examples)"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: CONFIG (jkd train --help shows examples)"),
        (["train", "digits", "--seeds", "many"], "argument --seeds: invalid int value: 'many'"),
        (["train", "digits", "--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["train", "digts"], "config 'digts': no such file, and jkd has no config of that name; did you mean 'digits'"),
        (["train", "mime.py"], "config mime.py: no such file; did you mean 'mine.py'?"),
        (["train", "mine.py", "--set", "stepz=3"], "--set stepz=3: config() has no parameter 'stepz'; did you mean 'steps'?"),
        (["train", "mine.py", "--set", "student.stepz=3"], "has no field 'stepz'; did you mean 'steps'"),
        (["train", "mine.py", "--set", "steps=few"], "steps takes int, not 'few'"),
        (["describe", "mine.py", "--set", "steps=0"], "mine.py, line 12: Run.steps = 0: give at least 1"),
        (["train", "mine.py", "--seeds", "0"], "--seeds 0: give at least 1"),
        (["train", "mine.py", "--seeds", "2", "--set", "seed=1"], "--seeds 2 gives the seeds; leave out --set seed=…"),
        (["train", "seedless.py", "--seeds", "2"], "--seeds 2: config() of seedless.py has no parameter 'seed'"),
        (["train", "mine.py", "--device", "tpu"], "--device tpu: jax finds no TPU, its backend is cpu; pip install 'jkd[tpu]'"),
        (["train", "mine.py", "--workdir", "mine.py/x"], "workdir mine.py/x cannot be used: "),
        (
            ["train", "mine.py", "--workdir", "what://x"],
            "workdir what://x cannot be used: no file system is known for 'what://'",
        ),
        (["eval", "mine.py"], "is not there: nothing was trained with this config; jkd train makes it"),
        (["eval", "."], ". holds no config that jkd train recorded"),
        (["eval", ".", "--set", "steps=3"], "--set changes a config; . is a folder with a config of its own"),
        (["configs", "digts"], "did you mean 'digits'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line_and_exit_code_2(argv, message, capsys):
    write(PLAIN)
    write("def config():\n    return run()\n", "seedless.py")
    assert main(argv) == 2
    assert message in one_line(capsys)
    assert not Path("runs").exists()


def recipe(hook, answer):
    """A config whose recipe's hook gives this answer."""
    return (
        f"class Mine(recipes.Supervised):\n    def {hook}(self, *args, **options):\n        return {answer}\n"
        "def config():\n    return run(recipe=Mine())"
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('at import')", "mine.py, line 13: ValueError: at import"),
        ("def config():\n    return 3", "mine.py: config() returned int; return a jkd.Run or a jkd.Experiment"),
        ("def config():\n    return run(batch_size=36)", "has 36 rows, which do not divide by 8 devices"),
        (
            "def config():\n    return run(recipe=recipes.Match(student_taps=('layrs/0',), teacher_taps=('head',)),\n"
            "               teacher=models.mlp.Config(features=64, classes=10))",
            "tap 'layrs/0': mlp computes nothing under this path; did you mean 'layers/0'",
        ),
        (
            "def config():\n    return run(recipe=recipes.KD(), teacher=models.mlp.Config(features=64, classes=7))",
            "the teacher has 7 classes, the student 10",
        ),
        (
            "def config():\n    return run(student=models.mlp.Config(features=9, classes=10))",
            "student mlp on a batch image",
        ),
        (
            "def config():\n    return run(student=models.mlp.Config(features=64, classes=3))",
            "student mlp has 3 classes, the data 10",
        ),
        ("def config():\n    return run(data=data.arrays(image=np.zeros((0, 8, 8, 1))))", "the data set is empty"),
        ("def config():\n    return run(recipe=recipes.KD())", "Run.teacher = None: KD needs a teacher"),
        ("raise SystemExit(0)", "mine.py, line 13: SystemExit: 0"),
        ("def config():\n    return run(trainable=('!*',))", "no parameter is left to train"),
        ("def config():\n    return run(recipe=recipes.KD(temperature='4'))", "KD.temperature = '4' is text; give a number"),
        (
            "def config():\n    return run(recipe=recipes.KD(temperature=-1.0))",
            "KD.temperature = -1.0: a temperature must be above 0",
        ),
        (recipe("terms", "[]"), "Mine.terms gave list; give {name: Term(values, weight)}"),
        (recipe("terms", "{}"), "Mine.terms gave no term; give {name: Term(values, weight)}"),
        (recipe("init", "{}"), "Mine.init gave dict; give Vars(params, memory)"),
        (recipe("deploy", "3"), "Mine.deploy gave int; give a Model"),
        (
            "class Broken:\n    def __len__(self):\n        return 32\n    def __getitem__(self, i):\n        return 1 / 0\n"
            "def config():\n    return run(data=data.source(Broken()))",
            "record 0 of Broken: ZeroDivisionError: division by zero",
        ),
        (
            "def config():\n    image = np.full((32, 8, 8, 1), 16.0, np.float32)\n"
            "    return run(data=data.arrays(image=image, label=np.zeros(32, int)))",
            "holds whole numbers up to 16 as floats: floats are meant to lie in 0..1",
        ),
    ],
    ids=lambda value: value[-40:],
)
def test_bad_configs_are_one_line_and_exit_code_2(body, message, capsys):
    write(f"{body}\n")
    assert main(["train", "mine.py", "--workdir", "w"]) == 2
    assert message in one_line(capsys)


@pytest.mark.parametrize("data", ["data.arrays(image=np.zeros((32, 8, 8, 1)), classes=10)", "data.digits(labelled=0.0)"])
def test_a_training_without_anything_to_learn_from_stops(data, capsys):
    write(f"def config():\n    return run(30, data={data})\n")
    assert main(["train", "mine.py", "--set", "student.batch_size=16"]) == 2
    assert "the first 10 steps had neither loss nor gradient: nothing counts for Supervised" in one_line(capsys)


@pytest.mark.parametrize("classes", [", classes=10", ""])  # data that do not say are held to the student's
def test_a_label_outside_the_classes_is_found_while_training(classes, capsys):
    bad = f"data.source([dict(image=np.zeros((8, 8, 1), np.float32), label=i) for i in range(16)]{classes})"
    write(f"def config():\n    return run(data={bad}, batch_size=16)\n")
    assert main(["train", "mine.py"]) == 2
    assert re.search(r"label 1\d of example \d+ is outside 0\.\.9 \(10 classes\)", one_line(capsys))


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (
            "raise Failed('student: step 3 is not finite')",
            1,
            "failed: student: step 3 is not finite; JKD_TRACEBACK=1 shows where",
        ),
        ("raise RuntimeError('two\\nlines')", 1, "failed: RuntimeError: two; JKD_TRACEBACK=1 shows where"),
        ("raise RuntimeError", 1, "failed: RuntimeError; JKD_TRACEBACK=1 shows where"),
        ("raise KeyboardInterrupt", 1, "interrupted; what came after the last checkpoint is lost"),
        # a function has nothing to save
        (
            "os.kill(os.getpid(), signal.SIGTERM)",
            75,
            "stopped where nothing was to be saved; to go on: jkd train mine.py --workdir w",
        ),
        (
            "os.kill(os.getpid(), signal.SIGINT)",
            75,
            "stopped where nothing was to be saved; to go on: jkd train mine.py --workdir w",
        ),
        (
            "raise Stopped('student', 3, None)",
            75,
            "stopped student at step 3, saved in w; to go on: jkd train mine.py --workdir w",
        ),
        ("jnp.zeros(2**60)", 1, "failed: out of device memory"),
    ],
)
def test_exit_codes_of_what_happens_in_a_training(raised, code, line, capsys):
    write(f"def node():\n    {raised}\n\n\ndef config():\n    return Experiment(node=node)\n")
    assert main(["train", "mine.py", "--workdir", "w"]) == code
    assert one_line(capsys).startswith(line)


@pytest.mark.parametrize(("command", "code"), [("train", 75), ("cache", 75), ("describe", -signal.SIGTERM)])
def test_a_notice_before_anything_began_is_one_of_a_command_that_goes_on(command, code):
    """It comes while the config is read; the process of a command that has nothing to go on with dies of it."""
    Path("early.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    done = subprocess.run(
        [sys.executable, "-m", "jkd", command, "early.py"], capture_output=True, text=True, env=environment(JAX_PLATFORMS="cpu")
    )
    assert done.returncode == code, done.stderr
    if code == 75:
        assert done.stderr == f"jkd: stopped where nothing was to be saved; to go on: jkd {command} early.py\n"


@pytest.mark.parametrize("how", ["--traceback", "JKD_TRACEBACK"])
def test_the_traceback_is_there_for_those_who_ask(how, monkeypatch, capsys):
    write("def node():\n    return 1 / 0\n\n\ndef config():\n    return Experiment(node=node)\n")
    if how.startswith("JKD"):
        monkeypatch.setenv(how, "1")
    assert main(["train", "mine.py", *([how] if how.startswith("--") else [])]) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert err.endswith("jkd: failed: ZeroDivisionError: division by zero\n")


def test_missing_packages_are_named_with_the_command(monkeypatch, capsys):
    monkeypatch.setitem(commands._PACKAGES, "no_such_module", "no-such-package")
    for command in ("train", "eval", "describe"):
        assert main([command, "digits"]) == 2
        assert one_line(capsys) == "training needs no-such-package: pip install 'jkd[train]'"


# --- training ---


def test_seeds_are_trained_in_turn_once_and_summed_up(capsys):
    write(PLAIN)
    command = ["train", "mine.py", "--seeds", "2"]
    assert main(command) == 0
    out, err = capsys.readouterr()
    (folder,) = Path("runs").iterdir()
    assert re.fullmatch(r"mine-[0-9a-f]{8}-seeds", folder.name)
    each = [json.loads((folder / f"seed{seed}" / "summary.json").read_text())["student"] for seed in range(2)]
    assert each[0]["params_sha256"] != each[1]["params_sha256"]
    found = json.loads((folder / "summary.json").read_text())
    assert found["seeds"] == [0, 1]
    accuracies = [one["accuracy"] for one in each]
    assert found["runs"]["student"]["accuracy"] == pytest.approx(
        {"mean": np.mean(accuracies), "std": np.std(accuracies, ddof=1)}
    )
    assert "params_sha256" not in found["runs"]["student"]
    for text in ("seed 0", "seed 1", "mean ± standard deviation over 2 seeds", "run", "parameters", "NLL", "ECE", "examples/s"):
        assert text in out
    assert re.search(rf"student +310 +{np.mean(accuracies):.4f} ± {np.std(accuracies, ddof=1):.4f}", out)
    assert err.splitlines()[0].startswith("student: accuracy ")  # no bar where there is no terminal

    assert main(command) == 0
    again = capsys.readouterr()
    assert again.out == out
    assert all(line.startswith("student: was finished before: accuracy ") for line in again.err.splitlines())

    assert main(["eval", str(folder / "seed1")]) == 0
    assert re.search(rf"student +310 +{accuracies[1]:.4f} +{each[1]['nll']:.4f}", capsys.readouterr().out)
    assert main(["eval", str(folder)]) == 2
    assert f"evaluate one of {folder}/seed0, {folder}/seed1" in one_line(capsys)

    assert main(["train", "mine.py", "--set", "steps=3", "--workdir", str(folder / "seed0")]) == 2
    assert one_line(capsys).endswith("holds another config (student.steps: 2 -> 3); give another --workdir")
    # the folder keeps its own record, and says so when that comes to mean something else
    record = folder / "seed0" / "config.py"
    record.write_text(record.read_text().replace("labelled=0.1", "labelled=0.2"))
    assert main(["eval", str(folder / "seed0")]) == 2
    assert "its config means something else now (student.data.train.labelled: 0.1 -> 0.2" in one_line(capsys)


def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(capsys):
    body = """
        def stop(record, rng):
            if not os.path.exists("stopped"):
                open("stopped", "w").close()
                os.kill(os.getpid(), signal.SIGTERM)
            return record

        def config():
            return run(200, data=data.digits(train_maps=(stop,)))
    """
    write(body)
    command = ["train", "mine.py", "--workdir", "a folder"]
    assert main(command) == 75
    found = re.fullmatch(r"stopped student at step (\d+), saved in a folder; to go on: (.*)", one_line(capsys))
    assert found
    assert found[2] == "jkd train mine.py --workdir 'a folder'"
    assert 0 < int(found[1]) < 200
    assert main(["eval", "a folder"]) == 0
    assert f"student: stands at step {found[1]} of 200" in capsys.readouterr().err
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert f"student: goes on after step {found[1]}" in err
    assert re.search(r"student +310 +0\.\d{4}", out)


def test_a_mended_config_may_use_the_folder_that_its_mistake_claimed(capsys):
    for steps, batch_size, code in ((2, 36, 2), (2, 32, 0), (3, 32, 2)):
        write(f"def config():\n    return run({steps}, batch_size={batch_size})\n")
        assert main(["train", "mine.py", "--workdir", "w"]) == code
    assert "holds another config (student.steps: 2 -> 3)" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_exit_code_1(capsys):
    write("def config():\n    return run(20, optimizer=optim.sgd(1e30))\n")
    assert main(["train", "mine.py"]) == 1
    assert re.match(r"failed: student: step \d+ is not finite: ", one_line(capsys))


def test_what_does_not_fit_in_a_training_names_what_is_large_and_what_to_try(capsys):
    body = """
        class Huge(recipes.Supervised):
            def sampling(self, memory):
                return jnp.zeros(2**60)

        def config():
            return run(4, recipe=Huge(), sample_every=2)
    """
    write(body)
    assert main(["train", "mine.py"]) == 1
    line = one_line(capsys)
    assert re.match(
        r"failed: out of device memory in student \(\d+ bytes more were wanted\); largest parts of the state on ", line
    )
    assert "params student 0.0 MiB" in line
    assert "try batch_size below 32, microbatches above 1, remat, mesh=MeshShape(fsdp=…)" in line


def test_describe_prints_and_makes_no_folder(capsys):
    write(PLAIN)
    assert main(["describe", "mine.py", "--set", "student.batch_size=64"]) == 0
    out = capsys.readouterr().out
    assert "batch_size: 64" in out
    assert "memory of the state, MiB" in out
    assert os.listdir() == ["mine.py"]


@pytest.mark.slow
def test_two_processes_find_each_other_and_one_speaks():
    write(PLAIN)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "jkd", "train", "mine.py", "--workdir", "w"],
            env=environment(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    (out, err), other = (process.communicate(timeout=240) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], (err, other)
    assert "student" in out
    assert "student: accuracy" in err
    assert not [line for line in other[0].splitlines() if not line.startswith("[Gloo]")]  # that library greets on its own
    assert "accuracy" not in other[1]


# --- lists ---


def test_recipes_are_listed_with_what_they_need(capsys):
    assert main(["recipes", "--json"]) == 0
    found = {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}
    public = {name for name, value in vars(recipes).items() if isinstance(value, type) and issubclass(value, Recipe)}
    assert set(found) == public
    assert all(entry["citation"] and entry["family"] and entry["evidence"] for entry in found.values())
    needs = {name: (entry["teacher"], entry["taps"], entry["labels"]) for name, entry in found.items()}
    assert needs["Supervised"] == (False, False, "needed")
    assert needs["KD"] == (True, False, "optional")
    assert needs["DKD"] == (True, False, "needed")
    assert needs["FunMatch"] == (True, False, "none")
    assert needs["FitNet"] == (True, True, "optional")
    assert found["KD"]["fields"]["temperature"] == "4.0"
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", out, re.M) for name in public)
    assert max(map(len, out.splitlines())) <= 128


def test_configs_are_listed_and_copied(capsys):
    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines()} == set(configfile.names())
    assert main(["configs", "digits"]) == 0
    assert capsys.readouterr().out == configfile.names()["digits"].read_text()


def test_every_entry_says_its_needs_in_words():
    needs = {entry.name: entry.needs for entry in catalogue.entries()}
    assert (needs["Supervised"], needs["KD"], needs["FitNet"]) == ("labels", "teacher, (labels)", "teacher, taps, (labels)")


SAYS = {
    "DeiT": "distillation_token",
    "SimKD": "teacher_head.*pooling",
    "SRRL": "teacher_head.*pooling",
    "LELP": "split by with_subclasses",
    "KnowledgeConcentration": "Ensemble",
    "MEALV2": "Ensemble",
    "MeanTeacher": "StudentEma",
    "FST": "StudentEma.*unlabelled.*strong",
    "MPL": "unlabelled.*strong",
    "FixMatch": "unlabelled.*strong",
    "FlexMatch": "unlabelled.*strong",
    "MLLD": "strong view",
    "MarginMSE": "negative",
    "ULD": "another vocabulary",
    "SwingKD": "privacy",
    "LAD": "reads the labels",
    "GKD": "generates",
}


def test_what_a_method_needs_beyond_two_networks_and_a_batch_is_listed(capsys):
    found = {entry.name: entry for entry in catalogue.entries()}
    assert found["KD"].requires == found["FitNet"].requires == ""
    for name, said in SAYS.items():
        assert re.search(said, found[name].requires), name
    assert main(["recipes"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"+ {entry.requires}" in out for entry in found.values() if entry.requires)
