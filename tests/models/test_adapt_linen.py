"""Linen modules that know nothing of jkd, through `models.from_linen`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from quick import jit

from jkd import models
from jkd.errors import InputError
from jkd.types import Outputs

DIM = 4
EXAMPLE = {"image": jax.ShapeDtypeStruct((1, DIM), jnp.float32)}


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(DIM)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, rng_collection="weird", deterministic=not train)(x)
        return nn.Dense(3)(x)


class Setup(nn.Module):
    """Lists, a dict, a layer called twice, a method of its own."""

    deterministic: bool | None = None

    def setup(self):
        self.encoder = [nn.Dense(DIM) for _ in range(2)]
        self.named = {"first": nn.Dense(DIM)}
        self.drop = nn.Dropout(0.5)
        self.head = nn.Dense(3)

    def features(self, x):
        for layer in self.encoder:
            x = nn.tanh(layer(x))
        return self.named["first"](self.named["first"](x))

    def __call__(self, x):
        return self.head(self.drop(self.features(x), deterministic=self.deterministic))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(DIM)(x), None


class Scanned(nn.Module):
    shown: bool = True

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0, "intermediates": 0} if self.shown else {"params": 0}
        layers = nn.scan(nn.remat(Layer), variable_axes=axes, split_rngs={"params": True}, length=3)
        return layers(name="layers")(x, None)[0]


@pytest.fixture
def batch():
    return {"image": jax.random.normal(jax.random.key(7), (8, DIM)), "weight": jnp.ones(8)}


@pytest.fixture(scope="module")
def setup():
    model = models.from_linen(Setup(), example=EXAMPLE)
    return model.with_weights(*jit(model.init)(jax.random.key(0)))


@pytest.fixture(scope="module")
def compact():
    model = models.from_linen(Compact(), example=EXAMPLE)
    return model.with_weights(*jit(model.init)(jax.random.key(0)))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), a, b)


def test_collections_become_params_and_buffers(compact, batch):
    assert set(compact.params) == {"Dense_0", "Dense_1", "BatchNorm_0"}
    assert set(compact.buffers["BatchNorm_0"]) == {"batch_stats:mean", "batch_stats:var"}
    assert compact.couples_batch
    module = Compact()
    statistics = {name.removeprefix("batch_stats:"): value for name, value in compact.buffers["BatchNorm_0"].items()}
    variables = {"params": compact.params, "batch_stats": {"BatchNorm_0": statistics}}
    close(compact.apply(compact.params, compact.buffers, batch)[0].logits, module.apply(variables, batch["image"], train=False))


def test_training_draws_from_the_key_and_moves_statistics(compact, batch):
    apply = jit(lambda key: compact.apply(compact.params, compact.buffers, batch, taps=("Dropout_0",), train=True, key=key))
    outputs, new = apply(jax.random.key(0))
    same(outputs, apply(jax.random.PRNGKey(0))[0])
    assert (outputs.taps["Dropout_0"] == 0).any()
    assert not np.array_equal(outputs.logits, apply(jax.random.key(1))[0].logits)
    assert jax.tree.structure(new) == jax.tree.structure(compact.buffers)
    assert not np.allclose(new["BatchNorm_0"]["batch_stats:mean"], 0)
    assert compact.apply(compact.params, compact.buffers, batch)[1] is compact.buffers
    with pytest.raises(InputError, match="Compact: apply needs key="):
        compact.apply(compact.params, compact.buffers, batch, train=True)


def test_under_grad_and_scan(compact, batch):
    def step(carry, key):
        def loss(params, buffers):
            outputs, buffers = compact.apply(params, buffers, batch, train=True, key=key)
            return outputs.logits.sum(), buffers

        params, buffers = carry
        grads, buffers = jax.grad(loss, has_aux=True)(params, buffers)
        return (jax.tree.map(jnp.subtract, params, grads), buffers), None

    keys = jax.random.split(jax.random.key(0), 2)
    carry, _ = jit(lambda carry: jax.lax.scan(step, carry, keys))((compact.params, compact.buffers))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(carry))


def test_paths_are_what_is_captured(setup, batch):
    paths = setup.paths(batch)
    assert set(paths) == {":__call__", ":features", "encoder_0", "encoder_1", "named_first#0", "named_first#1", "drop", "head"}
    outputs, _ = setup.apply(setup.params, setup.buffers, batch, taps=tuple(paths))
    assert {path: tap.shape for path, tap in outputs.taps.items()} == {path: shape.shape for path, shape in paths.items()}
    same(outputs.taps["head"], outputs.logits)


def test_field_sets_the_mode(setup, batch):
    outputs, _ = setup.apply(setup.params, {}, batch, taps=("drop",), train=True, key=jax.random.key(0))
    assert (outputs.taps["drop"] == 0).any()


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("heads", "Setup computes nothing under this path; did you mean 'head'"),
        ("named_first", "called 2 times; choose one of 'named_first#0', 'named_first#1'"),
        ("encoder_0@0", "one layer, not a stack"),
    ],
)
def test_wrong_taps(setup, batch, tap, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(functools.partial(setup.apply, taps=(tap,)), setup.params, {}, batch)


def test_scanned_layers(batch):
    model = models.from_linen(Scanned(), example=EXAMPLE)
    params, _ = jit(model.init)(jax.random.key(0))
    assert params["layers"]["Dense_0"]["kernel"].shape == (3, DIM, DIM)
    assert model.paths(batch)["layers/Dense_0"].shape == (3, 8, DIM)
    outputs = jit(lambda p: model.apply(p, {}, batch, taps=("layers/Dense_0@2", "layers/Dense_0"))[0])(params)
    same(outputs.taps["layers/Dense_0@2"], outputs.logits)
    hidden = models.from_linen(Scanned(shown=False), example=EXAMPLE)
    assert "layers/Dense_0" not in hidden.paths(batch)


def test_parts_of_setup_modules(setup, compact, batch):
    outputs, _ = setup.apply(setup.params, {}, batch, taps=(":features", "encoder_0"))
    head = setup.submodule("head")
    same(head.params, setup.params["head"])
    close(head.apply(head.params, {}, outputs.taps[":features"])[0].logits, outputs.logits)
    layer = setup.submodule("encoder_0")
    close(layer.apply(layer.params, {}, batch["image"])[0].logits, outputs.taps["encoder_0"])
    assert setup.submodule("named_first").params.keys() == {"kernel", "bias"}
    for model, path in ((compact, "Dense_1"), (setup, "heads"), (setup, "encoder_7")):
        with pytest.raises(InputError, match=rf"submodule\('{path}'\): .* defines no such part in setup\(\)"):
            model.submodule(path)


def test_a_part_keeps_its_statistics_under_other_weights(batch):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool = False):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(DIM)(x))

    class Net(nn.Module):
        def setup(self):
            self.block = Block()
            self.head = nn.Dense(3)

        def __call__(self, x, train: bool = False):
            return self.head(self.block(x, train))

    model = models.from_linen(Net(), example=batch)
    params, buffers = model.init(jax.random.key(0))
    buffers = jax.tree.map(lambda leaf: leaf + 0.5, buffers)
    outputs, _ = model.apply(params, buffers, batch, taps=("block",))
    part = model.with_weights(params, buffers).submodule("block")
    same(part.buffers, buffers["block"])
    close(part.apply(part.params, part.buffers, batch["image"])[0].logits, outputs.taps["block"])


def test_instances_hold_weights(batch):
    module = Setup(deterministic=True)
    variables = module.init(jax.random.key(0), batch["image"])
    bound, given = models.from_linen(module.bind(variables)), models.from_linen(module, variables, name="mine")
    assert bound.initialised
    assert given.name == "mine"
    logits = module.apply(variables, batch["image"])
    for model in (bound, given):
        same(model.init(jax.random.key(1))[0], variables["params"])
        close(model.apply(model.params, model.buffers, batch)[0].logits, logits)


def test_inputs_and_output(batch):
    class Tokens(nn.Module):
        @nn.compact
        def __call__(self, tokens, scale=1.0):
            kernel = nn.with_partitioning(nn.initializers.normal(), (None, "model"))
            return {"hidden": nn.Embed(5, DIM, embedding_init=kernel)(tokens) * scale}

    example = {"tokens": jnp.zeros((2, 3), int)}
    model = models.from_linen(
        Tokens(),
        example=example,
        inputs=lambda b: (b["tokens"], 2.0),
        output=lambda r: Outputs(heads={"embedding": r["hidden"]}),
    )
    params, buffers = model.init(jax.random.key(0))
    outputs, _ = model.apply(params, buffers, example)
    same(outputs.heads["embedding"][0, 0], 2 * params["Embed_0"]["embedding"][0])


def test_wrong_arguments():
    with pytest.raises(InputError, match="pass variables=, or example=batch"):
        models.from_linen(Compact())
    with pytest.raises(InputError, match="is no Linen module"):
        models.from_linen(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(InputError, match="pass Linen modules to from_linen"):
        models.from_nnx(Compact())
