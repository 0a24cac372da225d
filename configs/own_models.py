"""Networks of your own, unmodified: an NNX teacher and a Linen student, on scikit-learn's handwritten digits.

    jkd train configs/own_models.py

A minute and a half on a CPU core; a config to copy (`jkd configs own_models > mine.py`) and put your own networks and data into. An
NNX class takes `rngs`, a Linen module is given as it is; both see the preprocessed images unless `inputs=` says otherwise.
docs/your-model.md is the guide, with plain functions and Equinox. Measured on a CPU, one seed: teacher 98.6 % (56,394 parameters),
control 92.5 %, student 95.8 % (2,410 parameters), with 10 % of the labels.
"""

import jax
from flax import linen, nnx

from jkd import Experiment, Run, data, models, optim, recipes, schedules


class Convolutions(nnx.Module):
    """An NNX network: three convolutions, mean, classes."""

    def __init__(self, width, classes, rngs):
        sizes = (1, width, 2 * width, 2 * width)
        pairs = zip(sizes[:-1], sizes[1:], strict=True)
        self.layers = nnx.List([nnx.Conv(one, two, (3, 3), rngs=rngs) for one, two in pairs])
        self.head = nnx.Linear(sizes[-1], classes, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(x.mean((1, 2)))


class Perceptron(linen.Module):
    """A Linen network: one hidden layer."""

    width: int
    classes: int

    @linen.compact
    def __call__(self, x):
        x = jax.nn.relu(linen.Dense(self.width)(x.reshape(x.shape[0], -1)))
        return linen.Dense(self.classes)(x)


def config(*, seed=0, steps=1000, batch_size=128, labelled=0.1, width=32, hidden=32, temperature=4.0):
    digits, few = data.digits(), data.digits(labelled=labelled, seed=seed)
    teacher = models.from_nnx(lambda rngs: Convolutions(width, 10, rngs), name="convolutions")
    student = models.from_linen(Perceptron(width=hidden, classes=10), example=digits.spec(2))
    adam = optim.adamw(schedules.WarmupCosine(3e-3), weight_decay=1e-2)
    shared = dict(steps=steps, batch_size=batch_size, optimizer=adam, seed=seed)
    return Experiment(
        teacher=Run(student=teacher, recipe=recipes.Supervised(), data=digits, **shared),
        control=Run(student=student, teacher="teacher", recipe=recipes.Supervised(), data=few, **shared),
        student=Run(student=student, teacher="teacher", recipe=recipes.KD(temperature=temperature), data=few, **shared),
    )
