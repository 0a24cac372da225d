"""Plain functions through `models.from_function`, and what the adapters share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from jkd import models
from jkd.errors import InputError
from jkd.types import Outputs, Preprocess

BATCH = {"image": jnp.arange(6.0).reshape(2, 3), "weight": jnp.ones(2)}


def linear(params, x):
    return x @ params["kernel"]


def make(key):
    return {"kernel": jax.random.normal(key, (3, 2))}


def test_weights_or_a_function_of_a_key():
    weights = make(jax.random.key(0))
    held, made = models.from_function(linear, weights), models.from_function(linear, make)
    assert held.initialised
    assert not made.initialised
    assert (held.name, made.name) == ("linear", "linear")
    assert held.buffers == {}
    np.testing.assert_array_equal(held.init(jax.random.key(5))[0]["kernel"], weights["kernel"])
    params, buffers = jit(made.init)(jax.random.key(0))
    outputs, new = made.apply(params, buffers, BATCH)
    np.testing.assert_allclose(outputs.logits, BATCH["image"] @ params["kernel"], rtol=1e-6)
    assert new == buffers == {}


def test_buffers_mode_and_key():
    def network(params, buffers, x, *, training, key):
        noise = jax.random.normal(key, x.shape) if training else 0.0
        return params["scale"] * (x + noise), {"calls": buffers["calls"] + 1}

    model = models.from_function(network, {"scale": jnp.ones(())}, {"calls": jnp.zeros((), int)}, couples_batch=True)
    assert model.couples_batch
    outputs, buffers = model.apply(model.params, model.buffers, BATCH)
    np.testing.assert_array_equal(outputs.logits, BATCH["image"])
    assert buffers["calls"] == 0  # evaluation changes nothing
    outputs, buffers = model.apply(model.params, model.buffers, BATCH, train=True, key=jax.random.key(0))
    assert buffers["calls"] == 1
    assert not np.allclose(outputs.logits, BATCH["image"])


def test_taps_are_what_the_function_gives():
    def network(params, x):
        return Outputs(x, taps={"middle": 2 * x, "early": x})

    model = models.from_function(network, {})
    assert {path: s.shape for path, s in model.paths(BATCH).items()} == {"middle": (2, 3), "early": (2, 3)}
    assert list(model.apply({}, {}, BATCH, taps=("middle",))[0].taps) == ["middle"]
    assert model.apply({}, {}, BATCH)[0].taps == {}
    with pytest.raises(InputError, match="tap 'midle': network has no such output; did you mean 'middle'"):
        model.apply({}, {}, BATCH, taps=("midle",))
    with pytest.raises(InputError, match="cannot be cut into parts"):
        model.submodule("middle")


def test_inputs_and_output():
    model = models.from_function(
        lambda params, x, *, shift: (x + shift, "words"),
        {},
        inputs=lambda batch: {"x": batch["tokens"], "shift": 1},
        output=lambda result: Outputs(result[0]),
        name="shifted",
    )
    np.testing.assert_array_equal(model.apply({}, {}, {"tokens": jnp.zeros((1, 2), int)})[0].logits, jnp.ones((1, 2), int))
    assert model.name == "shifted"


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, jnp.bfloat16])
def test_preprocess(shape, dtype):
    """``(x - mean) / std`` of 0..1, for images and plain vectors, under strict rank promotion; a float dtype is kept."""
    numbers = np.random.default_rng(0).integers(0, 256, shape)
    image = numbers.astype(np.uint8) if dtype is np.uint8 else jnp.asarray(numbers / 255, dtype)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.6, 0.7])
    got = Preprocess(mean=tuple(mean), std=tuple(std))(image)
    tolerance = 5e-2 if dtype is jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(np.asarray(got, np.float32), (numbers / 255 - mean) / std, atol=tolerance)
    assert got.dtype == (jnp.float32 if dtype is np.uint8 else dtype)


def test_teacher_and_student_want_different_sizes():
    model = models.from_function(lambda params, x: x.mean((1, 2)), {}, preprocess=Preprocess(size=(2, 2), mean=(1.0,)))
    outputs, _ = jit(functools.partial(model.apply, {}, {}))({"image": jnp.full((1, 4, 4, 3), 0.25)})
    np.testing.assert_allclose(outputs.logits, np.full((1, 3), -0.75), rtol=1e-6)
