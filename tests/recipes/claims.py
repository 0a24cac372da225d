"""Data and a network on which a method's claim shows in seconds, and a loop over seeds with one compiled step."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jkd import sharding
from jkd.config import Run
from jkd.data.augment import as_float
from jkd.networks import models_of
from jkd.resolve import make_context
from jkd.state import init_state, state_shardings
from jkd.step import make_step
from jkd.types import Model, Outputs


def mlp(inputs: int, hidden: int, classes: int) -> Model:
    """Flattened image -> dense -> relu -> dense -> relu (tap ``body``) -> dense ``head``, weights He-normal."""
    widths = {"first": (inputs, hidden), "body": (hidden, hidden), "head": (hidden, classes)}

    def init(key):
        params = {}
        for place, (name, shape) in enumerate(widths.items()):
            spread = np.sqrt((1 if name == "head" else 2) / shape[0])
            kernel = spread * jax.random.normal(jax.random.fold_in(key, place), shape)
            params[name] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
        return params, {}

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        x = as_float(batch["image"]).reshape(batch["image"].shape[0], -1)
        x = jax.nn.relu(tiny.dense(params["first"], x))
        x = jax.nn.relu(tiny.dense(params["body"], x))
        return Outputs(tiny.dense(params["head"], x), taps=dict.fromkeys(taps, x)), buffers

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    return Model(init=init, apply=apply, params=params, buffers=buffers, name="mlp")


def clusters(examples: int, *, seed: int, classes: int = 5, dim: int = 10, spread: float = 1.0, centres: int = 0):
    """``(image [examples, 1, 1, dim], label)``: Gaussian clouds around the corners that ``centres`` draws."""
    middle = np.random.default_rng(centres).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, examples).astype(np.int32)
    image = middle[label] + spread * rng.normal(size=(examples, dim))
    return image.reshape(examples, 1, 1, dim).astype(np.float32), label


def moons(examples: int, *, seed: int, noise: float = 0.1):
    """``(image [examples, 1, 1, 2], label)``: two half-circles that reach into each other, in turn."""
    rng = np.random.default_rng(seed)
    label = (np.arange(examples) % 2).astype(np.int32)
    angle = np.pi * rng.random(examples)
    place = np.stack([np.cos(angle), np.sin(angle)], -1)
    place[label == 1] = np.array([1.0, 0.5]) - place[label == 1]
    place = place + noise * rng.normal(size=place.shape) - np.array([0.5, 0.25])
    return place.reshape(examples, 1, 1, 2).astype(np.float32), label


def rows(image, label, index) -> dict:
    """A batch of these examples."""
    ones = np.ones(len(index), np.float32)
    return {"image": image[index], "label": label[index], "index": np.asarray(index, np.int32), "weight": ones}


def epochs(size: int, batch_size: int, count: int, seed: int):
    """Indices of batches, each epoch in an order of its own."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        order = rng.permutation(size)
        yield from (order[start : start + batch_size] for start in range(0, size - batch_size + 1, batch_size))


class Trial:
    """A run compiled once; `student` trains it from the weights of a seed, or from ``params``, and gives the student's parameters
    (or their average)."""

    def __init__(self, run: Run, example: dict, *, train_size: int | None = None):
        self.ctx = make_context(run, example, train_size=train_size, devices=jax.devices()[:1])
        state, self.frozen = init_state(self.ctx, jax.random.key(0))
        self.start, self.step = jax.device_get(state), make_step(self.ctx)

    def trained(self, batches, *, seed: int = 0, params=None):
        """The state after these batches."""
        params = jax.device_get(self.ctx.student.init(jax.random.key(seed))[0]) if params is None else params
        start = dataclasses.replace(self.start, params={**self.start.params, "student": params})
        if start.ema:
            start = dataclasses.replace(start, ema={"student": {"params": params, "buffers": {}}})
        state = sharding.put(start, state_shardings(self.ctx))
        for batch in batches:
            state, _ = self.step(state, self.frozen, sharding.put_batch(batch, self.ctx.mesh))
        return state

    def student(self, batches, *, average: bool = False, **start):
        state = self.trained(batches, **start)
        return jax.device_get(state.ema["student"]["params"] if average else state.params["student"])

    def product(self, batches, **start) -> Model:
        """What the recipe deploys after these batches."""
        return self.ctx.recipe.deploy(models_of(self.ctx, self.trained(batches, **start), self.frozen))

    def answers(self, params, image) -> np.ndarray:
        """Probabilities."""
        return np.asarray(jax.nn.softmax(self.ctx.student.apply(params, {}, {"image": image})[0].logits))


def ece(answers: np.ndarray, label: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error over bins of equal width."""
    confidence, right = answers.max(-1), answers.argmax(-1) == label
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [np.abs(np.sum(confidence[place == b]) - np.sum(right[place == b])) for b in range(bins)]
    return float(np.sum(gaps) / len(label))
