"""Trackers by their offline or local modes: what was logged is there, and a resumed run goes on in the same one.

And trackers that are down, which are classes of the test's own.
"""

import importlib.util
import json
import os
import signal
import warnings

import numpy as np
import pytest
from etils import epath

import jkd
from jkd import data, metrics, models, optim, recipes, tracking
from jkd.errors import InputError


def test_none_unless_asked_for_and_a_typo_is_named(tmp_path, monkeypatch):
    folder = epath.Path(tmp_path) / "w" / "student"
    monkeypatch.delenv(tracking.VARIABLE, raising=False)
    assert tracking.writers(folder, 0, {}) == []
    assert not folder.exists()
    monkeypatch.setenv(tracking.VARIABLE, "wandb, mlflo")
    with pytest.raises(InputError, match="JKD_TRACK=wandb, mlflo: no tracker 'mlflo'; did you mean 'mlflow'"):
        tracking.writers(folder, 0, {})


def test_the_ids_of_a_folder_are_made_once(tmp_path):
    folder = epath.Path(tmp_path) / "w" / "student"
    first = tracking._ids(folder, ["wandb"])
    both = tracking._ids(folder, ["wandb", "mlflow"])
    assert both["wandb"] == first["wandb"] != both["mlflow"]
    assert tracking._ids(folder, ["mlflow"]) == both
    assert tracking._ids(folder.parent / "teacher", ["wandb"]) != first


def records(log):
    """What lies in a W&B file: LevelDB's log format (blocks of 32 KiB; checksum, size and kind before each piece)."""
    at, whole = 7, b""  # after their own header
    while at + 7 <= len(log):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        size, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        whole += log[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            yield whole
            whole = b""


def twice(tmp_path):
    """A run that is killed and goes on: steps 1 and 2, then from step 1 again."""
    folder = epath.Path(tmp_path) / "w" / "student"
    folder.mkdir(parents=True)
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        writer = metrics.writers(folder, start, {"steps": 3, "recipe": {"class": "KD", "temperature": 4.0}})
        for step in steps:
            writer.write(step, {"train/loss": 1.0 / step, "eval/kl": float("nan")})
        writer.flush()
        writer.close()
    return folder


@pytest.mark.filterwarnings("default")  # theirs
def test_mlflow_on_a_local_store(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an optional extra")
    store = f"sqlite:///{tmp_path}/tracked.db"
    monkeypatch.setenv(tracking.VARIABLE, "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    folder = twice(tmp_path)
    client = mlflow.MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("jkd").experiment_id])
    assert run.info.run_name == "w/student"
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe.temperature"] == "4.0"
    history = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(set(history)) == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert "eval/kl" not in run.data.metrics  # no number
    assert json.loads((folder / "tracking.json").read_text()).keys() == {"mlflow"}


@pytest.mark.filterwarnings("default")  # theirs
def test_wandb_in_an_offline_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an optional extra")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv(tracking.VARIABLE, "wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = twice(tmp_path)
    (identity,) = json.loads((folder / "tracking.json").read_text()).values()
    logged, names, runs = [], set(), sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2  # a folder each time; syncing joins them by the id
    for place in runs:
        (file,) = place.glob("*.wandb")
        for content in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            if record.WhichOneof("record_type") == "run":
                names.add((record.run.run_id, record.run.display_name))
            if record.WhichOneof("record_type") == "history":
                items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
                logged.append((items["jkd_step"], items["train/loss"]))
    assert names == {(identity, "w/student")}
    assert [step for step, _ in logged] == [1, 2, 2, 3]
    assert logged[-1][1] == pytest.approx(1 / 3)


# --- outages


class Down:
    """A tracker that nothing reaches until ``up``."""

    def __init__(self, *told):
        self.told, self.up, self.tries, self.steps, self.ended = told, False, 0, [], None

    def send(self, rows):
        self.tries += 1
        if not self.up:
            raise ConnectionError("no route\nto it")
        self.steps += [row.step for row in rows]

    def end(self, ended):
        if not self.up:
            raise ConnectionError("no route")
        self.ended = ended


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(tracking, "OFTEN", 0.0)
    monkeypatch.setattr(tracking, "PATIENCE", 0.0)
    monkeypatch.setattr(tracking, "TIMES", 0)


def test_an_outage_is_told_once_and_costs_no_row(impatient):
    tracker, told = Down(), []
    outbox = tracking.Outbox("there", lambda: tracker, told.append)
    for step in range(250):
        tracker.up = step >= 240
        outbox.write(step, {"loss": 1.0})
        outbox.flush()
    outbox.close("failed")
    assert told == ["there cannot be reached (no route); training goes on, and metrics.jsonl has what it misses"]
    assert tracker.steps == list(range(250))
    assert tracker.ended == "failed"


def test_a_tracker_that_cannot_be_opened_is_opened_later_and_a_mistake_is_raised_at_once(impatient):
    tracker, told, tries = Down(), [], []
    tracker.up = True

    def opens():
        tries.append(1)
        if len(tries) < 3:
            raise OSError("no such host")
        return tracker

    outbox = tracking.Outbox("there", opens, told.append)
    for step in range(5):
        outbox.write(step, {})
    outbox.close()
    assert len(tries) == 3
    assert (tracker.steps, tracker.ended, len(told)) == ([0, 1, 2, 3, 4], "finished", 1)

    def mistake():
        raise InputError("pip install it")

    with pytest.raises(InputError, match="pip install it"):
        tracking.Outbox("there", mistake, told.append)


def test_an_outage_costs_little_time_and_bounded_memory(monkeypatch):
    monkeypatch.setattr(tracking, "MOST", 7)
    tracker = Down()
    outbox = tracking.Outbox("there", lambda: tracker, lambda line: None)
    for step in range(300):
        outbox.write(step, {})
        outbox.flush()
    assert tracker.tries == 1  # the next is due in a minute
    outbox.close("stopped")
    assert tracker.tries == 1  # nor is a process held up that was told to stop
    tracker.up = True
    outbox.close()
    assert tracker.steps == list(range(293, 300))


# --- trainings: stopped while the tracker is down, ended by an error, finished


def run():
    mlp = models.mlp.Config(features=16, hidden=(), classes=3)
    rows = data.arrays(image=np.zeros((64, 4, 4, 1), np.uint8), label=np.arange(64) % 3, classes=3)
    return jkd.Run(
        student=mlp, data=rows, recipe=recipes.Supervised(), optimizer=optim.sgd(0.1), steps=12, batch_size=16, log_every=1
    )


class Ear(jkd.Listener):
    """Does something after a step, and keeps what it is told."""

    def __init__(self, at, action):
        self.at, self.action, self.messages = at, action, []

    def stepped(self, name, step, steps, values, examples_per_s):
        if step == self.at:
            self.action()

    def message(self, text):
        self.messages.append(text)


def fall():
    raise RuntimeError("somebody tripped over the cable")


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    """Of three: what was raised, what was told, the test's own tracker, and MLflow's word for how it ended."""
    folder, opened, found = tmp_path_factory.mktemp("tracked"), [], []
    installed = [name for name in ("mlflow", "wandb") if importlib.util.find_spec(name)]
    if "wandb" in installed:  # it goes on with the folder that an earlier test of this process gave it
        importlib.import_module("wandb").teardown()

    def opens(*told):
        opened.append(Down(*told))
        opened[-1].up = len(opened) > 1
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("default")  # theirs
        patch.setitem(tracking.TRACKERS, "mine", opens)
        store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/tracked.db", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        for name, value in (store | {tracking.VARIABLE: ",".join(["mine", *installed]), "WANDB_DIR": str(folder)}).items():
            patch.setenv(name, value)
        for at, action in ((5, lambda: os.kill(os.getpid(), signal.SIGINT)), (8, fall), (0, None)):
            ear, raised = Ear(at, action), None
            try:
                jkd.train(run(), folder / "digits" / "seed3", listener=ear)
            except (jkd.loop.Stopped, RuntimeError) as error:
                raised = error
            found.append((raised, ear.messages, opened[-1], _mlflow(store) if "mlflow" in installed else None))
    return folder, found


def _mlflow(store):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=store["MLFLOW_TRACKING_URI"])
    (run,) = client.search_runs([client.get_experiment_by_name("jkd").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    return run.info.run_name, run.info.status, sorted({one.step for one in history})


def test_a_tracker_that_is_down_changes_neither_how_a_training_stops_nor_what_it_saves(trainings):
    _, ((stopped, told, *_), (failed, *_), (raised, _, last, _)) = trainings
    assert isinstance(stopped, jkd.loop.Stopped)
    assert stopped.step == 6
    assert told == ["mine cannot be reached (no route); training goes on, and metrics.jsonl has what it misses"]
    assert str(failed) == "somebody tripped over the cable"
    assert raised is None
    assert [tracker.ended for _, _, tracker, _ in trainings[1]] == [None, "failed", "finished"]
    # one identity; the name says the experiment beside the seed; each begins where the one before was saved
    assert len({tracker.told[0] for _, _, tracker, _ in trainings[1]}) == 1
    assert [tracker.told[1:3] for _, _, tracker, _ in trainings[1]] == [("digits/seed3/student", start) for start in (0, 6, 6)]
    assert sorted(set(last.steps)) == list(range(7, 13))


def test_mlflow_goes_on_in_the_same_run_and_knows_how_it_ended(trainings):
    pytest.importorskip("mlflow", reason="mlflow is an optional extra")
    states = [mlflow for *_, mlflow in trainings[1]]
    assert [(name, status) for name, status, _ in states] == [
        ("digits/seed3/student", status) for status in ("KILLED", "FAILED", "FINISHED")
    ]
    assert [steps for *_, steps in states] == [[*range(1, 7)], [*range(1, 9)], [*range(1, 13)]]


def test_wandb_goes_on_in_the_same_run_and_knows_how_it_ended(trainings):
    pytest.importorskip("wandb", reason="wandb is an optional extra")
    from wandb.proto import wandb_internal_pb2

    identities, codes, preempted, steps = set(), [], [], []
    for place in sorted((trainings[0] / "wandb").glob("offline-run-*"), key=lambda place: place.stat().st_ctime):
        (file,) = place.glob("*.wandb")
        found = [wandb_internal_pb2.Record.FromString(content) for content in records(file.read_bytes())]
        kinds = [record.WhichOneof("record_type") for record in found]
        identities |= {record.run.run_id for record in found if record.WhichOneof("record_type") == "run"}
        codes += [record.exit.exit_code for record in found if record.WhichOneof("record_type") == "exit"]
        preempted.append("preempting" in kinds)
        histories = [record.history for record in found if record.WhichOneof("record_type") == "history"]
        told = [{item.key or item.nested_key[0]: item.value_json for item in one.item} for one in histories]
        steps.append(sorted({int(one["jkd_step"]) for one in told}))
    assert len(identities) == 1
    assert codes == [75, 1, 0]
    assert preempted == [True, False, False]
    assert steps == [[*range(1, 7)], [7, 8], [*range(7, 13)]]
