"""Several steps in a call: the same bits, whatever the calls' lengths, and nothing passed over."""

import dataclasses
import json

import numpy as np

import jkd
from jkd import calls, data, models, optim, recipes

STUDENT = models.mlp.Config(features=64, hidden=(8,), classes=10)
RUN = jkd.Run(
    student=STUDENT,
    recipe=recipes.Supervised(),
    optimizer=optim.adamw(3e-3),
    data=data.digits(),
    steps=11,
    batch_size=64,
    log_every=1,
    evaluate_every=0,
    checkpoint_every=5,
)


class Watch(jkd.Listener):
    def __init__(self):
        self.heard, self.evaluations = {}, []

    def stepped(self, name, step, steps, values, examples_per_s):
        assert step not in self.heard
        self.heard[step] = values

    def evaluated(self, name, step, values):
        self.evaluations.append(step)


def test_a_call_ends_at_every_period_and_at_the_end():
    length = calls.lengths(4, 11, (5, 0, 6))
    done, ends = 0, []
    while done < 11:
        done += length(done)
        ends.append(done)
    assert ends == [4, 5, 6, 10, 11]


def test_steps_in_one_call_give_the_bits_and_the_metrics_of_steps_by_themselves(tmp_path):
    single, several = Watch(), Watch()
    one = jkd.train(RUN, tmp_path / "one", listener=single)
    four = jkd.train(dataclasses.replace(RUN, steps_per_call=4), tmp_path / "four", listener=several)
    assert four.summary["student"]["params_sha256"] == one.summary["student"]["params_sha256"]
    assert list(several.heard) == list(range(1, 12))
    assert several.heard == single.heard
    assert several.evaluations == single.evaluations == [11]
    lines = [json.loads(line) for line in (tmp_path / "four" / "student" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 12))
    kept = sorted(int(path.name) for path in (tmp_path / "four" / "student" / "checkpoints").iterdir() if path.name.isdigit())
    assert kept == [10, 11]  # the last two of 5, 10 and 11: a call of four passes none of them
    np.testing.assert_array_equal(one.state.step, four.state.step)
