"""The loop: what it keeps, when it stops, and that a kill at any moment changes nothing."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import launch
import numpy as np
import pytest

import jkd
from jkd import data, models, optim, recipes
from jkd.loop import Failed, Stopped
from jkd.recipe import Bank, Vars

PROGRAM = Path(__file__).parent / "programs" / "resumable.py"
STUDENT = models.mlp.Config(features=64, hidden=(8,), classes=10)


def run(**changes):
    given = dict(student=STUDENT, recipe=recipes.Supervised(), optimizer=optim.adamw(3e-3), data=data.digits(), steps=12)
    return jkd.Run(**given | dict(batch_size=64, log_every=1) | changes)


class Watch(jkd.Listener):
    def __init__(self):
        self.steps, self.evaluations, self.messages, self.started, self.skipped_runs = [], [], [], [], []

    def run_started(self, name, ctx, start):
        self.started.append((name, start))

    def stepped(self, name, step, steps, values, examples_per_s):
        self.steps.append((step, values))

    def evaluated(self, name, step, values):
        self.evaluations.append((step, values))

    def message(self, text):
        self.messages.append(text)

    def skipped(self, name, summary):
        self.skipped_runs.append(name)


@pytest.fixture(scope="module")
def teacher():
    return jkd.train(run(steps=60)).student


def test_every_step_is_heard_once_and_evaluations_come_at_fractions():
    watch = Watch()
    result = jkd.train(run(evaluate_every=0.5), listener=watch)
    assert [step for step, _ in watch.steps] == list(range(1, 13))
    assert [step for step, _ in watch.evaluations] == [6, 12]
    assert result.metrics == watch.evaluations[-1][1]
    assert result.summary["student"]["steps"] == 12
    assert int(result.state.step) == 12


def test_the_files_of_a_run(tmp_path, teacher):
    result = jkd.train(run(teacher=teacher, recipe=recipes.KD(), evaluate_every=6), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    evaluated = [line for line in lines if "eval/accuracy" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    assert {"train/term/kd", "train/coef/kd", "train/share/kd", "train/term/task", "train/learning_rate"} <= trained[0].keys()
    assert trained[0]["train/share/kd"] + trained[0]["train/share/task"] == pytest.approx(1, abs=1e-5)
    assert [line["step"] for line in evaluated] == [6, 12]
    wanted = {
        "eval/agreement",
        "eval/kl",
        "eval/teacher_accuracy",
        "eval/teacher_nll",
        "gradient/norm/kd",
        "gradient/cosine/kd",
    }
    assert wanted <= evaluated[0].keys()
    assert list((tmp_path / "student").glob("events.out.tfevents.*"))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary == {"student": result.summary["student"]}
    assert {"parameters", "accuracy", "nll", "ece", "agreement", "examples_per_s", "steps", "params_sha256"} <= summary[
        "student"
    ].keys()
    assert json.loads((tmp_path / "config.json").read_text())


def test_a_finished_run_is_not_trained_again_and_still_teaches(tmp_path):
    experiment = jkd.Experiment(
        teacher=run(steps=20), student=run(teacher="teacher", recipe=recipes.KD(), data=data.digits(labelled=0.1))
    )
    first = jkd.train(experiment, tmp_path)
    (tmp_path / "student" / "result.json").unlink()  # as if the second run had been killed at its very end
    watch = Watch()
    second = jkd.train(experiment, tmp_path, listener=watch)
    assert watch.skipped_runs == ["teacher"]
    assert watch.started == [("student", 12)]
    assert second.summary["student"]["params_sha256"] == first.summary["student"]["params_sha256"]
    np.testing.assert_array_equal(
        jax.tree.leaves(first.artifacts["teacher"].params)[0], jax.tree.leaves(second.artifacts["teacher"].params)[0]
    )


def test_a_workdir_that_holds_another_config_is_refused_with_the_difference(tmp_path):
    jkd.train(run(steps=2), tmp_path)
    with pytest.raises(jkd.InputError, match=r"another config .*steps: 2 -> 3"):
        jkd.train(run(steps=3), tmp_path)


def test_a_node_may_be_a_function_of_earlier_ones():
    experiment = jkd.Experiment(
        big=run(steps=4),
        size=lambda big: jkd.trees.count(big.params),
        small=lambda big, size: run(teacher=big, recipe=recipes.KD(), steps=size // 100),
        named=lambda size: run(teacher="big", recipe=recipes.KD(), steps=2),
    )
    result = jkd.train(experiment)
    assert result.summary["named"]["agreement"] is not None
    assert result.artifacts["size"] == 64 * 8 + 8 + 8 * 10 + 10
    assert result.summary["small"]["steps"] == 6


def test_an_unknown_node_is_named():
    with pytest.raises(jkd.InputError, match=r"student: no earlier node is called 'techer'; did you mean 'teacher'\?"):
        jkd.Experiment(teacher=run(), student=run(teacher="techer", recipe=recipes.KD()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explodes(recipes.Supervised):
    at: int = 7

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = super().terms(vars, student, teacher, batch, clock=clock, key=key)
        bang = jax.numpy.where(clock.step == self.at, jax.numpy.nan, 0.0) * batch["weight"]
        return terms | {"bang": jkd.Term(bang, batch["weight"])}


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_term_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(Failed, match=r"step 8 is not finite: the term 'bang' is nan; the last good checkpoint is step 6"):
        jkd.train(run(recipe=Explodes(), checkpoint_every=3), tmp_path)
    (tmp_path / "other" / "student" / "nonfinite-0.npz").mkdir(parents=True)  # no file can be written there
    unkept = r"step 9 is not finite.*last good checkpoint is step 6; its batch could not be kept: .*Is a directory"  # no save of step 9
    with pytest.raises(Failed, match=unkept):
        jkd.train(run(recipe=Explodes(at=8), checkpoint_every=3), tmp_path / "other")


def test_the_device_is_one_step_ahead_of_the_host():
    """Metrics of step n are looked at after step n+1 was dispatched."""
    order = []

    class Order(jkd.Listener):
        def stepped(self, name, step, steps, values, examples_per_s):
            order.append(("heard", step))

    class Data:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def batches(self, *args, **kwargs):
            for number, batch in enumerate(self.inner.batches(*args, **kwargs)):
                order.append(("read", number + 1))
                yield batch

    jkd.train(run(data=Data(data.digits()), steps=6, evaluate_every=0), listener=Order())
    assert order.index(("heard", 2)) > order.index(("read", 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(require_teacher_accuracy=0.9999), r"the teacher's accuracy is 0\.\d+; Run.require_teacher_accuracy = 0.9999"),
        (dict(data=None), r"Run.data = None"),
    ],
)
def test_mistakes_are_told_before_training(teacher, changes, message):
    with pytest.raises(jkd.InputError, match=message):
        jkd.train(run(teacher=teacher, recipe=recipes.KD(), **changes))


def test_a_teacher_that_returns_probabilities_is_refused(teacher):
    def probabilities(params, batch):
        outputs, _ = teacher.apply(params, {}, batch)
        return jax.nn.softmax(outputs.logits)

    wrong = models.from_function(probabilities, teacher.params, inputs=lambda batch: (batch,))
    with pytest.raises(jkd.InputError, match=r"returns probabilities where logits are wanted"):
        jkd.train(run(teacher=wrong, recipe=recipes.KD()))


def test_a_label_outside_the_classes_is_refused_where_it_counts():
    image, label = np.zeros((64, 8, 8, 1), np.uint8), np.zeros(64, np.int32)
    label[5] = 10
    with pytest.raises(jkd.InputError, match=r"label"):
        jkd.train(run(data=data.arrays(image=image, label=label, classes=10)))
    labelled = np.arange(64) != 5
    jkd.train(run(data=data.arrays(image=image, label=label, classes=10, labelled=labelled), steps=2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elsewhere(recipes.KD):
    """KD whose teacher answers in a program of its own, before the step."""

    def prepare(self, models, batch, key):
        return {**batch, "teacher": models.teacher(batch)}


def test_answers_prepared_before_the_step_give_the_same_training(teacher):
    here = jkd.train(run(teacher=teacher, recipe=recipes.KD()))
    there = jkd.train(run(teacher=teacher, recipe=Elsewhere()))
    for mine, theirs in zip(jax.tree.leaves(here.student.params), jax.tree.leaves(there.student.params), strict=True):
        # two programs round differently, and Adam's g/sqrt(v) amplifies that; 12 steps of 3e-3 move a parameter by up to 0.036
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlyThese(recipes.Supervised):
    """Asks for examples 0 to 63 alone from the first reading on: what its bank says, whose rows are split over the devices."""

    def init(self, key, ctx):
        return Vars(memory=Bank((jnp.arange(ctx.bank_rows) < 64).astype(jnp.float32)))

    def sampling(self, memory):
        assert memory.rows.shape == (1440,)  # 1,437 examples, rounded up to eight devices
        return memory.rows[:1437]


def test_sampling_weights_are_read_at_fixed_steps_only():
    seen = []

    class Data:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def batches(self, *args, start=0, **kwargs):
            for number, batch in enumerate(self.inner.batches(*args, start=start, **kwargs)):
                seen.append((start + number, batch["index"]))
                yield batch

    jkd.train(run(data=Data(data.digits()), recipe=OnlyThese(), sample_every=5))
    before = [index.max() for step, index in seen if step < 5]
    after = [index.max() for step, index in seen if step >= 5]
    assert min(before) >= 64
    assert len(after) >= 7
    assert max(after) < 64


def start(workdir, **kwargs):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | launch.programs(workdir.parent)
    return subprocess.Popen(
        [sys.executable, PROGRAM, workdir],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        **kwargs,
    )


def finish(workdir):
    process = start(workdir)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def digest(out):
    return next(line for line in out.splitlines() if line.startswith("digest"))


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits_as_one_that_never_was(tmp_path):
    whole = digest(finish(tmp_path / "whole"))
    rng = random.Random()  # every run of the tests kills at other steps; a failure names them
    killed = tmp_path / "killed"
    steps = [rng.randint(15, 60), rng.randint(61, 110)]
    for step in steps:
        process = start(killed)
        for line in process.stdout:
            if line.split()[:2] == ["step", "student"] and int(line.split()[2]) >= step:
                process.send_signal(signal.SIGKILL)
                break
        process.communicate(timeout=60)
    out = finish(killed)
    resumed = next(line for line in out.splitlines() if line.startswith("start student"))
    assert int(resumed.split()[2]) >= 10, "it did not resume but start anew"
    assert digest(out) == whole, f"killed at {steps}"


@pytest.mark.slow
def test_sigterm_saves_says_so_and_resumes(tmp_path):
    process = start(tmp_path)
    out = []
    for line in process.stdout:
        out.append(line)
        if line.startswith("step student") and int(line.split()[2]) == 33:
            process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    stopped = int(next(line for line in out if "Stopped: stopped student at step" in line).split()[-1])
    assert 33 <= stopped <= 36
    assert f"start student {stopped}\n" in finish(tmp_path)


def test_stopped_knows_where(tmp_path):
    class Stop(jkd.Listener):
        def stepped(self, name, step, steps, values, examples_per_s):
            if step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped) as stopped:
        jkd.train(run(), tmp_path, listener=Stop())
    assert (stopped.value.run, stopped.value.step) == ("student", 6)
    assert str(stopped.value.workdir).endswith("student")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    watch = Watch()
    jkd.train(run(), tmp_path, listener=watch)
    assert watch.started == [("student", 6)]


def test_a_kill_between_the_last_checkpoint_and_the_result_loses_no_number(tmp_path):
    first = jkd.train(run(), tmp_path).summary["student"]
    (tmp_path / "student" / "result.json").unlink()
    again = jkd.train(run(), tmp_path).summary["student"]
    assert again | {"examples_per_s": None} == first | {"examples_per_s": None}


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_trained_to_its_end_again(tmp_path):
    experiment = jkd.Experiment(teacher=run(checkpoint_every=6), student=run(teacher="teacher", recipe=recipes.KD()))
    first = jkd.train(experiment, tmp_path)
    shutil.rmtree(tmp_path / "student")
    leaves = tmp_path / "teacher" / "checkpoints" / "12" / "leaves.json"
    leaves.write_bytes(bytes([leaves.read_bytes()[0] ^ 1]) + leaves.read_bytes()[1:])
    watch = Watch()
    second = jkd.train(experiment, tmp_path, listener=watch)
    assert any("leaves.json" in message for message in watch.messages)
    assert watch.started == [("teacher", 6), ("student", 0)]
    assert second.summary["student"]["params_sha256"] == first.summary["student"]["params_sha256"]


def test_a_mistake_in_the_last_run_is_told_before_the_first_trains():
    watch = Watch()
    wrong = recipes.FitNet(student_taps=("nowhere",), teacher_taps=("head",))
    with pytest.raises(jkd.InputError, match=r"student: tap 'nowhere'"):
        jkd.train(jkd.Experiment(teacher=run(), student=run(teacher="teacher", recipe=wrong)), listener=watch)
    assert watch.started == []


def test_a_teacher_without_parameters_is_looked_at_too():
    wrong = models.from_function(lambda params, image: jax.nn.softmax(image.reshape(len(image), -1)[:, :10]), {})
    with pytest.raises(jkd.InputError, match=r"returns probabilities where logits are wanted"):
        jkd.train(run(teacher=wrong, recipe=recipes.KD()))


def test_a_floor_that_cannot_be_measured_is_refused(teacher):
    silent = dataclasses.replace(data.digits(), eval=None)
    with pytest.raises(jkd.InputError, match=r"require_teacher_accuracy = 0.5: nothing to measure it on"):
        jkd.train(run(teacher=teacher, recipe=recipes.KD(), data=silent, require_teacher_accuracy=0.5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternating(recipes.Supervised):
    """A second update every third step."""

    @property
    def updates(self):
        return (jkd.Update(), jkd.Update(terms=self.smooth, every=3, name="second"))

    def smooth(self, vars, student, teacher, batch, *, clock, key):
        return {"size": jkd.Term(jax.numpy.square(student.logits).mean(-1), batch["weight"], 1e-3)}


def test_terms_of_periodic_updates_are_in_every_logged_line_and_every_evaluation(tmp_path):
    jkd.train(run(recipe=Alternating(), log_every=2), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "train/loss" in line]
    assert all("train/term/second.size" in line and "train/share/second.size" in line for line in trained)
    assert not any(name.startswith("train/ran") for line in trained for name in line)
    known = [line["train/term/second.size"] for line in trained]  # steps 1, 2, 4, 6, 8, 10, 12; it ran at 1, 4, 7, 10
    assert known[0] == known[1] != known[2] == known[3]
    assert all("gradient/norm/second.size" in line for line in lines if "eval/accuracy" in line)


def test_a_coefficient_of_zero_is_logged_as_zero(tmp_path, teacher):
    jkd.train(run(teacher=teacher, recipe=recipes.KD(weight=jkd.schedules.Linear(0.0, 1.0))), tmp_path)
    first = json.loads((tmp_path / "student" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/coef/kd"] == 0
    assert first["train/term/kd"] > 0
