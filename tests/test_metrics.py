"""Writers: what is written can be read, and a resumed run leaves no line twice."""

import json
import math

from etils import epath

from jkd.metrics import JsonLines, writers


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_are_numbers_and_null(tmp_path):
    writer = JsonLines(epath.Path(tmp_path) / "metrics.jsonl")
    writer.write(1, {"loss": 2.5, "bad": math.nan})
    writer.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5, "bad": None}]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    writer = JsonLines(epath.Path(path), start=1)
    writer.write(2, {"loss": 20.0})
    writer.close()
    assert [line["step"] for line in lines(path)] == [1, 2]
    assert lines(path)[1]["loss"] == 20.0


def test_tensorboard_files_can_be_read(tmp_path):
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format's writer; read below by hand)

    writer = writers(epath.Path(tmp_path), 0)
    writer.write(3, {"train/loss": 0.5})
    writer.close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    content, found, at = file.read_bytes(), {}, 0
    while at < len(content):  # TFRecord: length, its checksum, the record, its checksum
        size = int.from_bytes(content[at : at + 8], "little")
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        at += 16 + size
    assert found["train/loss"] == (3, 0.5)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = writers(None, 0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())
