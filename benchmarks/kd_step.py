"""A distillation step by jkd's engine, or as one writes it by hand: workers of benchmarks/pair.py, which times the two in turn.

    python benchmarks/pair.py "python benchmarks/kd_step.py vision jkd" "python benchmarks/kd_step.py vision plain"
    python benchmarks/pair.py "python benchmarks/kd_step.py lm jkd" "python benchmarks/kd_step.py lm plain"

vision: ResNet32x4 to ResNet8x4, batch 64 of 32x32 images, 100 classes, KD (T 4, 0.9 and 0.1), SGD with momentum; the same work as
benchmarks/peers/torch_kd_step.py. lm: the decoders, text and optimizer of configs/lm_stdlib.py, batch 16 of 128 bytes. By hand means
one jitted function: teacher, student, losses on whole logits, optax. The networks are jkd's in both. `--cached` (vision, jkd) reads
the teacher's logits from the batch in place of running it. `--tiny` tries whether it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from pair import blocked, serve

from jkd import Experiment, Preprocess, Run, compiler, configfile, data, models, optim, recipes
from jkd.bench import measure
from jkd.bench.workload import Workload
from jkd.types import Batch, Model, Outputs

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cached(recipes.KD):
    """With the teacher's logits among the columns of the data."""

    needs_teacher: ClassVar[bool] = False

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return super().terms(vars, student, Outputs(logits=batch["answers"]), batch, clock=clock, key=key)


def vision(tiny: bool) -> Run:
    size, batch, names = (8, 4, ("resnet8", "resnet8")) if tiny else (32, 64, ("resnet32x4", "resnet8x4"))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8 * batch, size, size, 3)).astype(np.uint8)
    answers = rng.normal(size=(8 * batch, 100)).astype(np.float32)
    pixels = Preprocess(mean=MEAN, std=STD)
    teacher, student = (models.resnet.cifar(name, classes=100, preprocess=pixels) for name in names)
    shared = dict(
        data=data.arrays(image=images, label=rng.integers(0, 100, 8 * batch), answers=answers, classes=100),
        steps=1000,
        batch_size=batch,
        optimizer=optim.sgd(0.05, momentum=0.9, weight_decay=5e-4),
    )
    return measure.runs_of(
        Experiment(
            teacher=Run(student=teacher, recipe=recipes.Supervised(), **shared),
            kd=Run(student=student, teacher="teacher", recipe=recipes.KD(), **shared),
        ),
        "kd",
    )["kd"]


def lm(tiny: bool) -> Run:
    sets = ["length=16", "batch_size=4"] if tiny else []
    return measure.runs_of(configfile.resolve(configfile.load("lm_stdlib"), sets), "student")["student"]


def vision_loss(student: Model, teacher: Model, teacher_weights, params, buffers, batch: Batch):
    logits, buffers = student.apply(params, buffers, batch, train=True)
    answers = jax.lax.stop_gradient(teacher.apply(*teacher_weights, batch)[0].logits) / 4
    target = jax.nn.log_softmax(answers)
    soft = 16 * jnp.sum(jnp.exp(target) * (target - jax.nn.log_softmax(logits.logits / 4)), -1)
    hard = optax.softmax_cross_entropy_with_integer_labels(logits.logits, batch["label"])
    return jnp.mean(0.9 * soft + 0.1 * hard), buffers


def lm_loss(student: Model, teacher: Model, teacher_weights, params, buffers, batch: Batch):
    outputs, buffers = student.apply(params, buffers, batch, train=True)
    answers = jax.lax.stop_gradient(teacher.apply(*teacher_weights, batch)[0].logits)
    mine, target = jax.nn.log_softmax(outputs.logits[:, :-1]), jax.nn.log_softmax(answers[:, :-1])
    soft = jnp.sum(jnp.exp(target) * (target - mine), -1)
    hard = -jnp.take_along_axis(mine, batch["tokens"][:, 1:, None], -1)[..., 0]
    counted = batch["mask"][:, 1:] * batch["mask"][:, :-1]
    return jnp.sum(counted * (0.9 * soft + 0.1 * hard)) / jnp.sum(counted), buffers


def by_hand(what: str, work: Workload) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The step in one jitted function, and what it is called with: networks, weights and a batch of the run.

    The first three arguments are donated, and come back as the first three results.
    """
    student, teacher = work.ctx.networks["student"], work.ctx.networks["teacher"]
    params, buffers = work.state.params["student"], work.state.buffers["student"]
    weights, batch = (teacher.params, teacher.buffers), work.batch
    if what == "vision":
        optimizer, loss = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.05, momentum=0.9)), vision_loss
    else:
        steps = work.ctx.run.steps
        rate = optax.warmup_cosine_decay_schedule(0.0, 4e-3, steps // 20, steps)
        optimizer, loss = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.1)), lm_loss

    @functools.partial(compiler.jit, mesh=work.ctx.mesh, donate_argnums=(0, 1, 2))  # told what the engine tells XLA
    def step(params, buffers, memory, weights, batch):
        objective = functools.partial(loss, student, teacher, weights)
        (value, buffers), gradient = jax.value_and_grad(objective, has_aux=True)(params, buffers, batch)
        updates, memory = optimizer.update(gradient, memory, params)
        return optax.apply_updates(params, updates), buffers, memory, value

    return step, (params, buffers, optimizer.init(params), weights, batch)


def plain(what: str, run: Run) -> Callable[[], Any]:
    """Calls of the step by hand; each gives the next weights and the loss."""
    step, arguments = by_hand(what, Workload(what, run))

    def call() -> Any:
        nonlocal arguments
        *state, value = step(*arguments)
        arguments = (*state, *arguments[3:])
        return state, value

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("vision", "lm"))
    parser.add_argument("engine", choices=("jkd", "plain"))
    parser.add_argument("--cached", action="store_true")
    parser.add_argument("--untold", action="store_true", help="XLA chooses its library for convolutions by itself")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.untold:
        compiler.options = lambda *_: None
    run = {"vision": vision, "lm": lm}[arguments.what](arguments.tiny)
    if arguments.cached:
        run = dataclasses.replace(run, teacher=None, recipe=Cached())
    serve(Workload("kd", run) if arguments.engine == "jkd" else blocked(plain(arguments.what, run)))


if __name__ == "__main__":
    main()
