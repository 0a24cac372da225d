"""Writers: what is written can be read, and a resumed run leaves no line twice."""

import json
import math
import resource

from etils import epath

from jkd.metrics import JsonLines, TensorBoard, writers


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


def events(folder):
    """``{tag: [(step, value)]}`` of a folder's one event file."""
    from tensorboardX.proto import event_pb2

    (file,) = folder.glob("events.out.tfevents.*")
    content, found, at = file.read_bytes(), {}, 0
    while at < len(content):  # TFRecord: length, its checksum, the record, its checksum
        size = int.from_bytes(content[at : at + 8], "little")
        event = event_pb2.Event.FromString(content[at + 12 : at + 12 + size])
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
        at += 16 + size
    return found


def test_tensorboard_files_can_be_read(tmp_path):
    writer = writers(epath.Path(tmp_path), 0)
    writer.write(3, {"train/loss": 0.5})
    writer.close()
    assert events(tmp_path) == {"train/loss": [(3, 0.5)]}


def test_tensorboard_files_are_what_tensorboardx_writes(tmp_path):
    from tensorboardX.record_writer import RecordWriter

    TensorBoard(epath.Path(tmp_path), start=7).close()
    (file,) = tmp_path.glob("events.out.tfevents.*")
    records, at = [], 0
    while at < len(content := file.read_bytes()):
        size = int.from_bytes(content[at : at + 8], "little")
        records.append(content[at + 12 : at + 12 + size])
        at += 16 + size
    assert len(records) == 2  # the version, and that what is after step 7 is purged
    writer = RecordWriter(str(tmp_path / "other"))
    for record in records:
        writer.write(record)
    writer.close()
    assert (tmp_path / "other").read_bytes() == file.read_bytes()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    writer = writers(None, 0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())


def test_numbers_that_find_the_disk_full_are_written_when_it_is_not(tmp_path):
    """A limit on the size of files stands for the full disk."""
    writer, limits = writers(epath.Path(tmp_path), 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    writer.write(1, {"loss": 1.0})
    writer.flush()
    before = {file: file.stat().st_size for file in tmp_path.iterdir()}
    writer.write(2, {"loss": 2.0})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(before.values()) + 5, limits[1]))  # in the middle of a line
        writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file: file.stat().st_size for file in tmp_path.iterdir()} == before
    writer.write(3, {"loss": 3.0})
    writer.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [step for step, _ in events(tmp_path)["loss"]] == [1, 2, 3]
