"""The config that tests start, kill and start again: a small network, every kind of state, and a count of the examples it saw.

PAUSE (seconds for each record, no part of the config) makes it last long enough to be hit.
"""

import dataclasses
import os
import time

import jax.numpy as jnp
import numpy as np

import jkd
from jkd import data, models, optim, recipes

ROWS, CLASSES = 500, 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(recipes.Supervised):
    """Counts how often each example was trained on: whole numbers, which no order of summing changes."""

    def init(self, key, ctx):
        return jkd.Vars(memory=jkd.Bank.full(ctx, (), fill=0.0))

    def observe(self, vars, student, teacher, batch):
        return jnp.ones_like(batch["weight"])

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return memory.write(batch["index"], memory[batch["index"]] + observed, batch["weight"])


def pause(record, rng):
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return record


def rows():
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, ROWS)
    image = (rng.normal(size=(ROWS, 4, 4, 1)) + label[:, None, None, None] / CLASSES).astype(np.float32)
    return data.source(
        [{"image": one, "label": int(what)} for one, what in zip(image, label, strict=True)],
        classes=CLASSES,
        train_maps=(pause,),
        threads=1,
    )


def config(*, steps=120, every=10):
    return jkd.Experiment(
        student=jkd.Run(
            student=models.mlp.Config(features=16, hidden=(16,), classes=CLASSES),
            recipe=Counting(),
            optimizer=optim.sgd(0.05, momentum=0.9),
            ema=jkd.Ema(decay=0.9),
            data=rows(),
            batch_size=32,
            steps=steps,
            checkpoint_every=every,
            evaluate_every=0,
            log_every=1,
        )
    )
