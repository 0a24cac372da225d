"""Modules that know nothing of jkd, written as others write them, through `models.from_nnx`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from quick import jit
from zoo import DIM, Block, Net, Small, close, same

from jkd import models
from jkd.errors import InputError
from jkd.types import Outputs, Preprocess


def test_trees_are_plain_and_hold_no_random_state(net):
    model, params, buffers = net
    assert model.couples_batch
    assert not model.initialised
    assert model.with_weights(params, buffers).initialised
    assert set(params) == {"blocks", "named", "data", "stack", "head"}
    assert set(params["blocks"]) == {"0", "1"}
    assert params["stack"]["linear"]["kernel"].shape == (3, DIM, DIM)
    assert set(buffers) == {"blocks", "named", "data", "stack", "offset"}
    leaves = jax.tree.leaves((params, buffers))
    assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, model.params)


def test_eval_keeps_buffers_and_needs_no_key(net, batch):
    model, params, buffers = net
    logits = jit(lambda key: model.apply(params, buffers, batch, key=key)[0].logits)
    same(logits(None), logits(jax.random.key(3)))
    assert jax.eval_shape(lambda: model.apply(params, buffers, batch)[0]).logits.shape == (8, 3)
    _, new = model.submodule("head").apply(params["head"], {}, batch["image"])
    assert new == {}


def test_training_draws_from_the_key_alone(net, batch):
    model, params, buffers = net
    apply = jit(lambda key: model.apply(params, buffers, batch, train=True, key=key))
    first, new = apply(jax.random.key(1))
    same(first.logits, apply(jax.random.key(1))[0].logits)
    assert not np.allclose(first.logits, apply(jax.random.key(2))[0].logits)
    assert jax.tree.structure(new) == jax.tree.structure(buffers)
    assert not np.allclose(new["stack"]["norm"]["mean"], buffers["stack"]["norm"]["mean"])
    same(new["offset"], buffers["offset"])
    # A key made by PRNGKey draws the same.
    same(first.logits, apply(jax.random.PRNGKey(1))[0].logits)
    with pytest.raises(InputError, match=r"Net: apply\(train=True\) needs key="):
        model.apply(params, buffers, batch, train=True)


def test_stacked_layers_draw_different_masks(net, batch):
    model, params, buffers = net
    run = jit(lambda p: model.apply(p, buffers, batch, taps=("stack/drop",), train=True, key=jax.random.key(0))[0])
    outputs = run(params)
    dropped = np.asarray(outputs.taps["stack/drop"] == 0)
    assert dropped.shape == (3, 8, DIM)
    assert (dropped[0] != dropped[1]).any()
    assert (dropped[1] != dropped[2]).any()


def test_same_answer_as_the_module_itself(batch):
    module = Net(rngs=nnx.Rngs(0))
    model = models.from_nnx(module)
    assert model.initialised
    module.eval()
    outputs, _ = jit(model.apply)(model.params, model.buffers, batch)
    close(outputs.logits, nnx.jit(lambda module, x: module(x))(module, batch["image"]))


@pytest.mark.parametrize("train", [False, True])
def test_instance_is_never_mutated(batch, train):
    module = Net(rngs=nnx.Rngs(0))
    module.eval()
    methods = {cls: dict(vars(cls)) for cls in (Net, Block, nnx.Linear, nnx.Dropout, nnx.BatchNorm)}
    graph, state = nnx.split(module)
    before = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else np.array(x), nnx.to_pure_dict(state))
    model = models.from_nnx(module)
    taps = ("stack@0", "blocks/0")
    key = jax.random.key(1)
    loss = lambda p: model.apply(p, model.buffers, batch, taps=taps, train=train, key=key)[0].logits.sum()  # noqa: E731
    jax.eval_shape(jax.grad(loss), model.params)
    if train:
        loss(model.params)  # outside of any trace, where Variables hold arrays
    model.paths(batch)
    after_graph, after = nnx.split(module)
    assert graph == after_graph
    keys = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    same(jax.tree.map(keys, before), jax.tree.map(keys, nnx.to_pure_dict(after)))
    assert methods == {cls: dict(vars(cls)) for cls in methods}
    nnx.eval_shape(lambda module: module(batch["image"]), module)  # and it still works


def test_under_jit_grad_scan_and_remat(net, batch):
    model, params, buffers = net

    def loss(params, buffers, key):
        outputs, buffers = model.apply(params, buffers, batch, taps=("stack@1",), train=True, key=key)
        return outputs.logits.sum() + outputs.taps["stack@1"].sum(), buffers

    @jax.jit
    def train(params, buffers):
        def step(carry, key):
            params, buffers = carry
            grads, buffers = jax.grad(jax.checkpoint(loss), has_aux=True)(params, buffers, key)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), buffers), None

        return jax.lax.scan(step, (params, buffers), jax.random.split(jax.random.key(0), 3))[0]

    new, _ = train(params, buffers)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    # Where gradients flow: to the head from logits, to the stack from the tap too.
    assert not np.allclose(new["head"]["bias"], params["head"]["bias"])


# --- parts -----------------------------------------------------------------------------------------------------------------


def test_head_on_tapped_features_gives_the_logits(net, batch):
    model, params, buffers = net
    model = model.with_weights(params, buffers)
    outputs = jit(lambda p: model.apply(p, buffers, batch, taps=(":features", "blocks/0:twice"))[0])(params)
    head = model.submodule("head")
    same(head.params, params["head"])
    assert head.buffers == {}
    close(head.apply(head.params, {}, outputs.taps[":features"])[0].logits, outputs.logits)
    # Several arguments are a tuple, a part has parts and taps, and is made as in the whole.
    block = model.submodule("stack")
    close(jit(block.init)(jax.random.key(0))[0], params["stack"])
    first = model.submodule("blocks/0")
    assert first.couples_batch
    assert "linear#1" in first.paths((batch["image"],))
    assert first.submodule("linear").params.keys() == {"kernel", "bias"}
    twice = model.submodule("blocks/0:twice")
    close(twice.apply(params["blocks"]["0"], buffers["blocks"]["0"], batch["image"])[0].logits, outputs.taps["blocks/0:twice"])


@pytest.mark.parametrize(
    ("path", "message"),
    [("heed", "did you mean 'head'"), ("blocks/0:thrice", "Block has no method 'thrice'"), ("stack@1", "no such module")],
)
def test_wrong_parts(net, path, message):
    with pytest.raises(InputError, match=message):
        net[0].submodule(path)


def test_tied_weights():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(5, DIM, rngs=rngs)
            self.head = nnx.Linear(DIM, 5, use_bias=False, rngs=rngs)
            self.head.kernel = self.embed.embedding

        def __call__(self, tokens):
            return self.embed(tokens) @ self.head.kernel[...].T

    model = models.from_nnx(Tied)
    params, buffers = model.init(jax.random.key(0))
    assert list(params) == ["embed"]
    assert model.apply(params, buffers, {"tokens": jnp.zeros((2, 3), int)})[0].logits.shape == (2, 3, 5)
    with pytest.raises(InputError, match="'head/kernel' is shared with another part of Tied"):
        model.submodule("head")


# --- construction, inputs, outputs, modes ----------------------------------------------------------------------------------


def test_sharded_init_gives_the_same_values():
    class Annotated(nnx.Module):
        def __init__(self, rngs):
            init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
            self.linear = nnx.Linear(8, 16, kernel_init=init, rngs=rngs)
            self.block = Small(rngs)

        def __call__(self, x):
            return self.linear(x)

    model = models.from_nnx(Annotated)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = lambda leaf: PartitionSpec("fsdp") if leaf.ndim and leaf.shape[0] % 8 == 0 else PartitionSpec()  # noqa: E731
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf)), (model.params, model.buffers))
    params, buffers = jit(model.init, out_shardings=shardings)(jax.random.key(0))
    assert params["linear"]["kernel"].sharding.spec == PartitionSpec("fsdp")
    assert len(params["linear"]["kernel"].addressable_shards) == 8
    close((params, buffers), jit(model.init)(jax.random.key(0)))
    outputs, _ = jit(lambda p: model.apply(p, buffers, {"image": jnp.ones((2, 8))}))(params)
    assert outputs.logits.shape == (2, 16)


def test_constructors_take_rngs_as_they_like(batch):
    class Named(nnx.Module):
        def __init__(self, width, *, rngs, scale=1.0):
            self.linear = nnx.Linear(DIM, width, rngs=rngs)

        def __call__(self, x):
            return self.linear(x)

    by_name = models.from_nnx(functools.partial(Named, 3, scale=2.0))
    by_place = models.from_nnx(lambda r: Named(3, rngs=r))
    same(by_name.init(jax.random.key(0)), by_place.init(jax.random.PRNGKey(0)))
    assert (by_name.name, by_place.name) == ("Named", "Named")


def test_mode_as_an_argument_of_call(batch):
    class Argument(nnx.Module):
        def __init__(self, rngs):
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, deterministic):
            return self.drop(x, deterministic=deterministic)

    class Attribute(nnx.Module):
        def __init__(self, rngs):
            self.training = False
            self.rngs = rngs

        def __call__(self, x):
            return x * self.rngs.noise.bernoulli(shape=x.shape) if self.training else x

    for constructor in (Argument, Attribute):
        model = models.from_nnx(constructor)
        assert model.init(jax.random.key(0)) == ({}, {})
        same(model.apply({}, {}, batch)[0].logits, batch["image"])
        assert (model.apply({}, {}, batch, train=True, key=jax.random.key(0))[0].logits == 0).any()


def test_inputs_and_output(batch):
    class Pair(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(DIM, 3, rngs=rngs)

        def __call__(self, x, scale, *, shift=0.0):
            return {"answer": self.linear(x) * scale + shift, "kind": "words"}

    answer = lambda result: Outputs(result["answer"])  # noqa: E731
    key = jax.random.key(0)
    positional = models.from_nnx(Pair, inputs=lambda batch: (batch["image"], 2.0), output=answer)
    named = models.from_nnx(Pair, inputs=lambda b: {"x": b["image"], "scale": 2.0, "shift": 1.0}, output=answer, name="pair")
    params, buffers = named.init(key)
    a, b = (model.apply(params, buffers, batch)[0].logits for model in (positional, named))
    close(a + 1, b)
    assert named.name == "pair"
    with pytest.raises(InputError, match="Pair returns dict; pass output="):
        models.from_nnx(Pair, inputs=lambda batch: (batch["image"], 2.0)).apply(params, buffers, batch)
    with pytest.raises(InputError, match="output= gave dict; it must give jkd.Outputs"):
        models.from_nnx(Pair, inputs=lambda b: (b["image"], 2.0), output=lambda r: r).apply(params, buffers, batch)
    default = models.from_nnx(Pair, output=answer)
    with pytest.raises(InputError, match="neither 'image' nor 'tokens' but"):
        default.apply(params, buffers, {"weight": jnp.ones(2)})


@pytest.mark.parametrize(
    ("module", "message"),
    [(3, "int is neither an nnx.Module nor a constructor"), (lambda rngs: 3, "the constructor gave int")],
)
def test_not_a_module(module, message):
    with pytest.raises(InputError, match=message):
        models.from_nnx(module)
    with pytest.raises(InputError, match="holds shapes"):
        models.from_nnx(nnx.eval_shape(lambda: Small(nnx.Rngs(0))))


def test_preprocess_of_bytes_and_floats():
    class Mean(nnx.Module):
        def __init__(self, rngs):
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, image):
            assert image.shape[1:3] == (4, 6)
            return self.head(image.mean((1, 2)))

    preprocess = Preprocess(size=(4, 6), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    model = models.from_nnx(Mean, preprocess=preprocess)
    assert model.preprocess is preprocess
    params, buffers = model.init(jax.random.key(0))
    image = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3)).astype(np.uint8)
    apply = jit(lambda image: model.apply(params, buffers, {"image": image})[0].logits)
    bytes_, floats = apply(image), apply(image.astype(np.float32) / 255)
    close(bytes_, floats)


def test_bfloat16_in_bfloat16_out(net, batch):
    model = models.from_nnx(
        lambda rngs: nnx.Sequential(nnx.Linear(DIM, DIM, rngs=rngs), nnx.relu, nnx.Linear(DIM, 3, rngs=rngs))
    )
    params, buffers = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.init(jax.random.key(0)))
    apply = functools.partial(model.apply, taps=("layers/0",))
    outputs, _ = jax.eval_shape(apply, params, buffers, {"image": batch["image"].astype(jnp.bfloat16)})
    assert outputs.logits.dtype == outputs.taps["layers/0"].dtype == jnp.bfloat16
    # Buffers keep their dtype, or they could not be carried through a scan.
    small = models.from_nnx(Small)
    params, buffers = jax.eval_shape(small.init, jax.random.key(0))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    image = batch["image"].astype(jnp.bfloat16)
    _, new = jax.eval_shape(functools.partial(small.apply, train=True), half, buffers, {"image": image}, key=jax.random.key(0))
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, buffers)
