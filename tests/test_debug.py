"""A step that is not finite: what is kept of it, and that the replay finds where it begins."""

import json
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from jkd import debug, replay
from jkd.cli import main
from jkd.replay import experiment_of

CONFIG = '''
import dataclasses
import jax, jax.numpy as jnp, numpy as np
from jkd import Run, data, losses, optim
from jkd.recipe import Recipe
from jkd.types import Model, Outputs, Term

@dataclasses.dataclass(frozen=True, kw_only=True)
class Fragile(Recipe):
    """A term that is well, and one whose {where} is not where an example's first pixel is 1."""
    needs_teacher = False

    def terms(self, vars, student, teacher, batch, *, clock, key):
        x = batch["image"].reshape(batch["image"].shape[0], -1)[:, 0]
        task = losses.cross_entropy(student.logits, batch["label"])
        return {{"task": Term(task, batch["weight"]), "odd": Term({term}, batch["weight"])}}

def network():
    def init(key):
        return {{"first": {{"kernel": jnp.ones((4, 3))}}, "last": {{"kernel": jnp.ones((3, 2))}}}}, {{}}

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        x = batch["image"].reshape(batch["image"].shape[0], -1)
        first = x @ params["first"]["kernel"]
        last = {tap}
        logits = last @ params["last"]["kernel"]
        found = {{"first": first, "last": last}}
        return Outputs(logits, taps={{path: found[path] for path in taps}}), buffers

    shapes = jax.eval_shape(init, jax.random.key(0))
    paths = lambda batch: {{"last": jax.ShapeDtypeStruct((8, 3), jnp.float32), "first": jax.ShapeDtypeStruct((8, 3), jnp.float32)}}
    return Model(init=init, apply=apply, params=shapes[0], buffers=shapes[1], paths=paths)

def config():
    image = np.zeros((64, 2, 2, 1), np.float32)
    image[:, 0, 0, 0] = np.where(np.arange(64) == 37, 1, 0.5)
    examples = data.arrays(image=image, label=np.arange(64) % 2, classes=2)
    return Run(student=network(), recipe=Fragile(), data=examples, optimizer=optim.sgd(0.01), steps=40, batch_size=8,
               evaluate_every=0, checkpoint_every={every})
'''
PLAIN = {"term": "x * 0", "tap": "first", "where": "value"}


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def broken(capsys, every=0, **parts):
    """Trains until the step breaks, and gives the lines of `jkd debug`."""
    Path("mine.py").write_text(CONFIG.format(**PLAIN | parts, every=every))
    assert main(["train", "mine.py", "--workdir", "w"]) == 1
    assert "jkd debug w says where it begins" in capsys.readouterr().err
    assert main(["debug", "w"]) == 0
    return capsys.readouterr()


def test_a_tap_is_named_with_its_rows_and_the_batch_and_key_are_those_of_the_step(capsys):
    # the checkpoint before is where the replay begins
    lines = broken(capsys, every=2, tap="jnp.where(x[:, :1] == 1, jnp.inf, first)")
    record = json.loads(Path("w/student/nonfinite.json").read_text())
    rows = np.load("w/student/nonfinite-0.npz")
    (place,) = np.flatnonzero(rows["index"] == 37)
    experiment = experiment_of(epath.Path("w"))
    kept = next(experiment.nodes["student"].data.batches(8, seed=0, start=record["step"]))
    np.testing.assert_array_equal(kept["index"], rows["index"])
    out = lines.out.splitlines()
    assert out[0].startswith(f"student: step {record['step'] + 1} was not finite: the term 'task' is nan")
    assert out[1] == "the batch: finite, largest 1 in image"
    assert out[2].startswith("weights: finite, largest ")
    # first, though the network lists it last
    assert out[3] == (
        "taps of the student: first that is not finite: last: 3 of 24 values (inf), "
        f"in rows {place} of the batch; 2 of 3 in all"
    )
    assert out[4] == "terms: first that is not finite: task = nan"
    assert out[5].startswith("gradient of odd: finite")
    assert out[6].startswith("gradient of task: first that is not finite: student last/kernel: ")
    assert not any("its key is not the one" in line for line in out)
    if record["step"] > 2:
        assert (
            f"student: replays steps {record['step'] // 2 * 2 + 1} to {record['step']}" in lines.err or record["step"] % 2 == 0
        )


def test_rows_that_two_processes_kept_are_replayed_by_one(capsys):
    lines = broken(capsys, tap="jnp.where(x[:, :1] == 1, jnp.inf, first)").out.splitlines()
    record = json.loads(Path("w/student/nonfinite.json").read_text())
    here = replay.stand(experiment_of(epath.Path("w")), epath.Path("w"), None, print, fresh=True)
    Path("w/student/nonfinite-0.npz").unlink()
    for process in range(2):
        debug.keep(epath.Path("w/student"), here.ctx, record["step"], record["cause"], None, (process, 2))
    assert len(np.load("w/student/nonfinite-1.npz")["index"]) == 4
    capsys.readouterr()
    assert main(["debug", "w"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    Path("w/student/nonfinite-1.npz").unlink()
    assert main(["debug", "w"]) == 2
    assert "the rows of process 1 of 2 are not there" in capsys.readouterr().err


def test_a_gradient_alone_is_named_by_its_term(capsys):
    # the root of 0 is finite, its slope is not
    odd = "jnp.sqrt(jnp.where(x == 1, student.logits[:, 0] * 0, 1.0))"
    out = broken(capsys, term=odd, where="slope").out.splitlines()
    assert "every term is finite, a gradient is not" in out[0]
    assert out[3].startswith("taps of the student: finite")
    assert out[4].startswith("terms: ")
    assert "not finite" not in out[4]
    assert out[5].startswith("gradient of odd: first that is not finite: student last/kernel: ")
    assert "(nan)" in out[5]
    assert out[6].startswith("gradient of task: finite")


def test_there_is_nothing_to_replay_where_all_is_well(capsys):
    Path("mine.py").write_text(CONFIG.format(**PLAIN, every=0).replace("steps=40", "steps=1"))
    assert main(["train", "mine.py", "--workdir", "w"]) == 0
    capsys.readouterr()
    assert main(["debug", "w"]) == 2
    assert "no run has kept a step that was not finite" in capsys.readouterr().err
