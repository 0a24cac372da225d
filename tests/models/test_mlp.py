"""The perceptron."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import fill

from jkd.models import mlp
from jkd.types import Preprocess


@pytest.mark.parametrize(
    ("norm", "parameters"), [(False, 12 * 8 + 8 + 8 * 6 + 6 + 6 * 5 + 5), (True, 12 * 8 + 2 * 8 + 8 + 8 * 6 + 3 * 6 + 35)]
)
def test_parameter_counts(norm, parameters):
    model = mlp.Config(features=12, hidden=(8, 6), classes=5, norm=norm).build()
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.params)) == parameters
    assert not model.couples_batch


def test_images_and_vectors_alike():
    model = mlp.Config(features=12, hidden=(8,), classes=5).build()
    params, buffers = (model := fill(model)).params, model.buffers
    image = jnp.asarray(np.random.default_rng(0).random((3, 2, 2, 3)), jnp.float32)
    outputs, _ = model.apply(params, buffers, {"image": image}, taps=("layers/0", "layers/0/linear", "head"))
    np.testing.assert_array_equal(outputs.taps["layers/0"], jax.nn.relu(outputs.taps["layers/0/linear"]))
    flat, _ = model.apply(params, buffers, {"image": image.reshape(3, 12)})
    np.testing.assert_array_equal(flat.logits, outputs.logits)


def test_preprocess_dropout_and_bfloat16():
    model = mlp.Config(features=12, hidden=(8,), classes=5, norm=True, dropout=0.5, preprocess=Preprocess(mean=(0.5,))).build()
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.params)
    batch = {"image": jax.ShapeDtypeStruct((3, 12), jnp.bfloat16)}
    outputs, _ = jax.eval_shape(functools.partial(model.apply, train=True), half, {}, batch, key=jax.random.key(0))
    assert outputs.logits.dtype == jnp.bfloat16
    params = fill(model).params
    batch = {"image": jnp.ones((3, 12))}
    outputs, _ = model.apply(params, {}, batch, taps=("layers/0/dropout",), train=True, key=jax.random.key(0))
    assert (outputs.taps["layers/0/dropout"] == 0).any()
