"""The encoder: padding and documents, what its heads give, dropout under the scan, taps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import fill, jit

from jkd.errors import InputError
from jkd.models import encoder

TINY = functools.partial(encoder.Config, vocab=24, dim=16, depth=2, heads=4, hidden=24, length=12)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 10)))
MASK = jnp.ones_like(TOKENS).at[1, 6:].set(0)
TAPS = ("embed", "layers@0", "layers/attention/value@-1", "layers/mlp", "pool")


@pytest.fixture(scope="module")
def model():
    return fill(TINY(classes=3).build())


@pytest.fixture(scope="module")
def run(model):
    return jit(lambda batch: model.apply(model.params, {}, batch, taps=TAPS)[0])


def test_every_token_sees_all_real_ones_and_no_padding(run):
    found = run({"tokens": TOKENS, "mask": MASK})
    padding = run({"tokens": TOKENS.at[1, 8].set(21), "mask": MASK})
    np.testing.assert_array_equal(padding.hidden[1, :6], found.hidden[1, :6])
    last = run({"tokens": TOKENS.at[1, 5].set(21), "mask": MASK})
    assert (jnp.abs(last.hidden - found.hidden).max(-1)[1, :6] > 1e-5).all()
    np.testing.assert_array_equal(last.hidden[0], found.hidden[0])


def test_taps_and_heads(model, run):
    found = run({"tokens": TOKENS, "mask": MASK})
    shapes = [found.taps[path].shape for path in TAPS]
    assert shapes == [(2, 10, 16), (2, 10, 16), (2, 10, 4, 4), (2, 2, 10, 16), (2, 16)]
    pool, classifier = model.params["pool"]["linear"], model.params["classifier"]
    pooled = jnp.tanh(found.hidden[:, 0] @ pool["kernel"] + pool["bias"][None])
    np.testing.assert_allclose(found.heads["pooled"], pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logits, pooled @ classifier["kernel"] + classifier["bias"][None], rtol=1e-5, atol=1e-6)
    assert TINY().features == ("layers@0", "layers@1")


def test_masked_tokens_are_predicted_from_the_embedding():
    masked = TINY(masked=True, pool=False, tokens=20).build()
    outputs, _ = jax.eval_shape(lambda params: masked.apply(params, {}, {"tokens": TOKENS}), masked.params)
    assert outputs.logits_shape == (2, 10, 20)
    assert (outputs.hidden.shape, outputs.head.shape, outputs.bias.shape) == ((2, 10, 16), (16, 24), (24,))
    assert outputs.heads == {}
    assert "pool" not in masked.params


def test_dropout_acts_in_training_alone_and_in_every_layer(model):
    apply = functools.partial(model.apply, model.params, {}, {"tokens": TOKENS}, taps=("layers/mlp/dropout",), train=True)
    found = jit(lambda keys: jax.vmap(lambda key: apply(key=key)[0])(keys))(jax.random.split(jax.random.key(0), 2))
    dropped = found.taps["layers/mlp/dropout"] == 0
    assert 0.05 < dropped.mean() < 0.2
    first, second = dropped[0]
    assert (first != second).any()
    assert not np.allclose(*found.logits)


def test_bfloat16_all_the_way(model):
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.params)
    taps = tuple(path for path in model.paths({"tokens": TOKENS}) if ":" not in path)
    outputs, _ = jax.eval_shape(lambda params: model.apply(params, {}, {"tokens": TOKENS}, taps=taps), half)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TINY(heads=3), "dim=16: must be a multiple of heads=3"),
        (lambda: TINY(pool=False, classes=2), "classes=2: needs pool=True"),
        (lambda: TINY(tokens=25), "tokens=25: must be from 1 to vocab=24"),
        (lambda: apply_shapes({"image": TOKENS}), r"an encoder reads batch\['tokens'\]"),
        (
            lambda: apply_shapes({"tokens": jnp.zeros((1, 13), int)}),
            "rows of 13 tokens; this encoder has positions for length=12",
        ),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(InputError, match=message):
        make()


def apply_shapes(batch):
    model = TINY().build()
    return model.apply(model.params, {}, batch)
