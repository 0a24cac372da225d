"""Recipes that need more than a batch of images, trained by `jkd.train` from a data source to an evaluation."""

from __future__ import annotations

import claims
import jax
import pytest

import jkd
from jkd import data, optim
from jkd.config import Ema, StudentEma
from jkd.recipes import DHO, FST, MLLD, MPL, FixMatch, FlexMatch, MeanTeacher, View

DIGITS = data.digits(labelled=0.1)
JOINED = data.join(data.labelled_only(DIGITS), unlabelled=(DIGITS, 2))
CROP = data.Crop(1)
TEACHER = claims.mlp(64, 16, 10)


def teacher():
    return TEACHER.with_weights(*TEACHER.init(jax.random.key(0)))


def unlabelled(name: str) -> tuple:
    return data.At("unlabelled", View(name, CROP)), CROP, data.At("unlabelled", CROP)


RUNS = {
    "FixMatch": dict(recipe=FixMatch(), data=JOINED, augment=unlabelled("strong")),
    "FlexMatch": dict(recipe=FlexMatch(), data=JOINED, augment=unlabelled("strong")),
    "MeanTeacher": dict(
        recipe=MeanTeacher(),
        data=JOINED,
        augment=unlabelled("second"),
        teacher=StudentEma(),
        ema=Ema(decay=0.9),
        evaluate_ema=True,
    ),
    "MeanTeacher on one stream": dict(
        recipe=MeanTeacher(), data=DIGITS, augment=(View("second", CROP), CROP), teacher=StudentEma(), ema=Ema(decay=0.9)
    ),
    "FST": dict(
        recipe=FST(ahead=1), data=JOINED, augment=unlabelled("strong"), teacher=StudentEma(), ema=Ema(decay=0.9, warmup=True)
    ),
    "MPL": dict(recipe=MPL(uda_weight=1.0), data=JOINED, augment=unlabelled("strong"), teacher=claims.mlp(64, 64, 10)),
    "DHO": dict(recipe=DHO(student_taps=("body",)), data=JOINED, teacher=teacher),
    "MLLD": dict(recipe=MLLD(), data=data.digits(), augment=(View("strong", CROP),), teacher=teacher),
}


SLOW = ("FST", "MPL")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in RUNS])
def test_it_trains_from_data_to_evaluation(name):
    fields = {key: value() if value is teacher else value for key, value in RUNS[name].items()}
    run = jkd.Run(student=claims.mlp(64, 64, 10), optimizer=optim.adamw(3e-3), steps=100, batch_size=32, **fields)
    found = jkd.train(run).summary["student"]
    # the teacher is not trained: who learns from it most of all can only agree with it
    assert found["agreement" if name == "MLLD" else "accuracy"] > 0.4, found
