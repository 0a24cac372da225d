"""The module that most adapter tests take apart, made once."""

import jax
import jax.numpy as jnp
import pytest
from quick import jit
from zoo import DIM, Net

from jkd import models


@pytest.fixture(scope="session")
def net():
    model = models.from_nnx(Net)
    params, buffers = jit(model.init)(jax.random.key(0))
    return model, params, buffers


@pytest.fixture
def batch():
    image = jax.random.normal(jax.random.key(7), (8, DIM))
    return {"image": image, "weight": jnp.ones(8)}
