"""Trackers by their offline or local modes: what was logged is there, and a resumed run goes on in the same one."""

import json

import pytest
from etils import epath

from jkd import metrics, tracking
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
