"""A run with every kind of state (memory, average, buffers, schedules, mixing), for tests that kill it: resumable.py WORKDIR.

Prints a line for each step that has arrived, and the digest of the final parameters.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

import jkd
from jkd import data, losses, models, optim, recipes, schedules

STEPS = 120


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembering(recipes.KD):
    """KD that pulls towards the mean of earlier answers and draws hard examples more often."""

    def init(self, key, ctx):
        return jkd.Vars(memory=jkd.Bank.full(ctx, (ctx.classes,), fill=1 / ctx.classes))

    def terms(self, vars, student, teacher, batch, *, clock, key):
        earlier = jnp.log(vars.memory[batch["index"]] + 1e-6)
        pull = jkd.Term(losses.forward_kl(student.logits, earlier), batch["weight"], clock.fraction)
        return super().terms(vars, student, teacher, batch, clock=clock, key=key) | {"pull": pull}

    def observe(self, vars, student, teacher, batch):
        return jax.nn.softmax(student.logits)

    def remember(self, memory, observed, batch, *, terms, clock, key):
        blend = 0.5 * memory[batch["index"]] + 0.5 * observed
        return memory.write(batch["index"], blend, batch["weight"])

    def sampling(self, memory):
        rows = np.asarray(memory.rows)[:1437]
        return 1.1 - rows.max(-1)


class Say(jkd.Listener):
    def run_started(self, name, ctx, start):
        print("start", name, start, flush=True)

    def stepped(self, name, step, steps, values, examples_per_s):
        print("step", name, step, flush=True)

    def message(self, text):
        print("message", text, flush=True)


def experiment():
    digits = data.digits(labelled=0.1)
    norm = models.resnet.Config(depths=(1,), widths=(4, 4), channels=1, classes=10)  # BatchNorm: buffers
    teacher = models.mlp.Config(features=64, hidden=(16,), classes=10)
    shared = dict(data=digits, batch_size=64, optimizer=optim.adamw(schedules.WarmupCosine(3e-3)), log_every=1)
    return jkd.Experiment(
        teacher=jkd.Run(student=teacher, recipe=recipes.Supervised(), steps=20, **shared),
        student=jkd.Run(
            student=norm,
            teacher="teacher",
            recipe=Remembering(temperature=schedules.Linear(4.0, 2.0)),
            steps=STEPS,
            ema=jkd.Ema(decay=0.9),
            augment=(data.Mixup(0.8, classes=10, probability=0.5),),
            sample_every=30,
            checkpoint_every=10,
            evaluate_every=0,
            **shared,
        ),
    )


if __name__ == "__main__":
    result = jkd.train(experiment(), sys.argv[1], listener=Say())
    state = jax.device_get(dataclasses.replace(result.state, memory=result.state.memory.rows))
    print("digest", result.summary["student"]["params_sha256"], jkd.trees.sha256(state.ema["student"]["params"]), flush=True)
