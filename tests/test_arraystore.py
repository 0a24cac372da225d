"""Where arrays are kept: an object store, and stores that are out of reach."""

from __future__ import annotations

import json

import fsspec
import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from stored import Kept, assert_same, saved, shapes, state

import jkd
from jkd import data, models, optim, recipes, trees
from jkd.checkpoint import Checkpoints
from jkd.errors import InputError


class ObjectStore(MemoryFileSystem):
    """Files in memory, under ``s3://``; as in a bucket, a folder is there as long as something is in it."""

    protocol = "s3"
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).replace("s3://", "memory://"))

    def mkdir(self, path, create_parents=True, **options):
        pass

    makedirs = mkdir


@pytest.fixture
def bucket():
    fsspec.register_implementation("s3", ObjectStore, clobber=True)
    ObjectStore.store.clear()
    return ObjectStore.store


def test_an_object_store(bucket):
    with Kept("s3://bucket/run/checkpoints", keep=1) as checkpoints:
        assert checkpoints.restore(shapes(state())) is None
        saved(checkpoints, 1, 2)
        found, meta, step = checkpoints.restore(shapes(state()))
        assert (step, meta) == (2, {"position": 2})
        assert_same(found, state(seed=2))
        assert {name.split("/")[4] for name in bucket} == {"2"}
        checkpoints.save(3, state(seed=3), {})
        checkpoints.wait()
        name = next(name for name in bucket if name.endswith("leaves.json"))
        ObjectStore().pipe_file(name, b"{}")
        with pytest.raises(InputError, match="checkpoint 3: leaves.json has 2 bytes"):
            checkpoints.restore(shapes(state()))
    assert checkpoints.lines == []


def test_a_whole_training_lives_in_an_object_store(bucket):
    """Config, metrics, checkpoints and results; what was finished there is known, and the product comes from there."""
    student = models.mlp.Config(features=64, hidden=(4,), classes=10)
    run = dict(student=student, recipe=recipes.Supervised(), data=data.digits(), optimizer=optim.sgd(0.1), batch_size=32)
    first = jkd.train(jkd.Run(**run, steps=3), "s3://bucket/run")
    files = {name.partition("bucket/run/")[2] for name in bucket}
    assert {"config.json", "summary.json", "student/result.json", "student/metrics.jsonl"} <= files
    assert any(name.startswith("student/checkpoints/3/") for name in files)
    lines = [json.loads(line) for line in epath.Path("s3://bucket/run/student/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3

    class Watch(jkd.Listener):
        def stepped(self, *step):
            raise AssertionError("it was finished")

    again = jkd.train(jkd.Run(**run, steps=3), "s3://bucket/run", listener=Watch())
    assert again.summary == first.summary
    assert trees.sha256(again.student.params) == first.summary["student"]["params_sha256"]
    with pytest.raises(InputError, match="steps: 3 -> 4"):
        jkd.train(jkd.Run(**run, steps=4), "s3://bucket/run")


def test_a_store_that_cannot_be_reached_is_named():
    with pytest.raises(InputError, match="cannot write checkpoints to gs://bucket/run: .*gcsfs"):
        Checkpoints("gs://bucket/run")
