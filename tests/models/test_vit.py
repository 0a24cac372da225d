"""Vision transformers: DeiT's sizes, taps and tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import fill, jit

from jkd.errors import InputError
from jkd.models import vit

TINY = functools.partial(vit.Config, size=(8, 12), patch=4, dim=16, depth=2, heads=2, classes=5)


def size(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.fixture
def batch():
    return {"image": jnp.asarray(np.random.default_rng(0).random((3, 8, 12, 3)), jnp.float32)}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (vit.tiny(), 5_717_416),
        (vit.small(), 22_050_664),
        (vit.base(), 86_567_656),
        (vit.tiny(distillation_token=True), 5_910_800),
    ],
)
def test_published_parameter_counts(config, parameters):
    model = config.build()
    assert size(model.params) == parameters
    assert model.preprocess.size == (224, 224)
    assert not model.couples_batch


def test_taps(batch):
    config = TINY()
    model = config.build()
    params, buffers = (model := fill(model)).params, model.buffers
    paths = model.paths(batch)
    for name in ("query", "key", "value"):
        assert paths[f"blocks/1/attention/{name}"].shape == (3, 7, 2, 8)
    assert {paths[path].shape for path in (*config.features, "blocks/0/attention", "blocks/0/mlp", "norm")} == {(3, 7, 16)}
    taps = ("blocks/0/attention/query", "blocks/0/attention/key", "blocks/0/attention/value", "blocks/0/attention", "norm")
    outputs, _ = jit(functools.partial(model.apply, taps=taps))(params, buffers, batch)
    q, k, v = (outputs.taps[path] for path in taps[:3])
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 8**0.5)
    out = params["blocks"]["0"]["attention"]["out"]
    attended = jnp.einsum("bhqk,bkhd,hde->bqe", weights, v, out["kernel"]) + out["bias"][None, None]
    np.testing.assert_allclose(outputs.taps["blocks/0/attention"], attended, rtol=1e-3, atol=1e-5)
    head = model.submodule("head")
    logits = head.apply(params["head"], {}, outputs.taps["norm"][:, 0])[0].logits
    np.testing.assert_allclose(logits, outputs.logits, rtol=1e-5, atol=1e-6)


def test_distillation_token_has_its_own_head(batch):
    model = TINY(distillation_token=True).build()
    params, buffers = (model := fill(model)).params, model.buffers
    outputs, _ = jit(functools.partial(model.apply, taps=("norm",)))(params, buffers, batch)
    assert outputs.taps["norm"].shape == (3, 8, 16)
    own = params["distillation_head"]
    expected = outputs.taps["norm"][:, 1] @ own["kernel"] + own["bias"][None]
    np.testing.assert_allclose(outputs.heads["distillation"], expected, rtol=1e-5, atol=1e-6)
    assert not np.allclose(outputs.heads["distillation"], outputs.logits)


def test_dropout_and_stochastic_depth_act_in_training_alone(batch):
    plain, random = TINY().build(), TINY(dropout=0.1, stochastic_depth=0.5).build()
    params = fill(plain).params
    assert plain.buffers == random.buffers == {}
    evaluate = jit(lambda p: (plain.apply(p, {}, batch)[0].logits, random.apply(p, {}, batch)[0].logits))
    np.testing.assert_array_equal(*evaluate(params))
    train = jit(lambda key: random.apply(params, {}, batch, taps=("blocks/1/skip#0",), train=True, key=key)[0])
    outputs = train(jax.random.key(0))
    assert not np.allclose(outputs.logits, train(jax.random.key(1)).logits)
    skipped = (outputs.taps["blocks/1/skip#0"] == 0).mean((1, 2))  # all of an example's branch, or what dropout took
    assert set(np.round(np.asarray(skipped)).tolist()) <= {0.0, 1.0}


def test_bfloat16_all_the_way(batch):
    model = TINY(distillation_token=True).build()
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.params)
    batch = {"image": batch["image"].astype(jnp.bfloat16)}
    outputs, _ = jax.eval_shape(functools.partial(model.apply, taps=tuple(model.paths(batch))[1:]), half, {}, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"size": (8, 10)}, "multiples of patch=4"), ({"heads": 3}, "dim=16: must be a multiple of heads=3")],
)
def test_wrong_values(changes, message):
    with pytest.raises(InputError, match=message):
        TINY(**changes)
