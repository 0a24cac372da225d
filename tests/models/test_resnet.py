"""Residual networks: the published sizes, what PyTorch's do, and what is tapped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import fill, jit

from jkd.errors import InputError
from jkd.models import resnet
from jkd.types import Preprocess

PUBLISHED = [
    (resnet.cifar("resnet20", classes=100), 278_324),
    (resnet.cifar("resnet56", classes=100), 861_620),
    (resnet.cifar("resnet8x4", classes=100), 1_233_540),
    (resnet.cifar("resnet32x4", classes=100), 7_433_860),
    (resnet.wrn(16, 2, classes=100), 703_284),
    (resnet.wrn(40, 1, classes=100), 569_780),
    (resnet.wrn(40, 2, classes=100), 2_255_156),
    (resnet.imagenet(18), 11_689_512),
    (resnet.imagenet(34), 21_797_672),
    (resnet.imagenet(50), 25_557_032),
]
TINY = functools.partial(resnet.Config, depths=(1, 1), widths=(8, 8, 16), classes=5)


def size(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def images(side=8, batch=2):
    return {"image": jnp.asarray(np.random.default_rng(0).random((batch, side, side, 3)), jnp.float32)}


@pytest.mark.parametrize(("config", "parameters"), PUBLISHED, ids=lambda value: getattr(value, "widths", value))
def test_published_parameter_counts(config, parameters):
    assert size(config.build().params) == parameters


@pytest.mark.parametrize(
    ("config", "layers"),
    [(resnet.cifar("resnet110", classes=10), 110), (resnet.wrn(28, 10, classes=10), 28), (resnet.imagenet(50), 50)],
)
def test_depth_is_the_number_in_the_name(config, layers):
    assert config.layers == layers


@pytest.mark.parametrize(
    ("config", "side", "shapes"),
    [
        (resnet.cifar("resnet8x4", classes=100), 32, [(32, 32), (32, 64), (16, 128), (8, 256)]),
        (resnet.wrn(16, 2, classes=100), 32, [(32, 16), (32, 32), (16, 64), (8, 128)]),
        (resnet.imagenet(18), 224, [(56, 64), (56, 64), (28, 128), (14, 256), (7, 512)]),
        (resnet.imagenet(50), 224, [(56, 64), (56, 256), (28, 512), (14, 1024), (7, 2048)]),
    ],
    ids=["resnet8x4", "wrn", "resnet18", "resnet50"],
)
def test_feature_maps(config, side, shapes):
    model = config.build()
    image = {"image": jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)}
    apply = functools.partial(model.apply, taps=config.features + config.preactivations + ("pool",))
    outputs, _ = jax.eval_shape(apply, model.params, model.buffers, image)
    assert [outputs.taps[path].shape for path in config.features] == [(1, s, s, width) for s, width in shapes]
    assert outputs.taps["pool"].shape == (1, shapes[-1][1])
    if config.block is not resnet.Wide:
        assert [outputs.taps[path].shape for path in config.preactivations] == [(1, s, s, width) for s, width in shapes]


@pytest.mark.parametrize("block", [resnet.Basic, resnet.Bottleneck, resnet.Wide])
def test_features_are_activated_preactivations_and_the_head_reads_the_pool(block):
    config = TINY(block=block)
    model = config.build()
    model = fill(model)
    taps = config.features + config.preactivations + ("pool",)
    outputs, _ = jit(functools.partial(model.apply, taps=taps))(model.params, model.buffers, images())
    last = jax.nn.relu(outputs.taps[config.preactivations[-1]])
    if block is not resnet.Wide:  # whose blocks begin with norm and relu: those of the last stage are the network's own
        np.testing.assert_array_equal(outputs.taps[config.features[-1]], last)
    np.testing.assert_allclose(outputs.taps["pool"], last.mean((1, 2)), rtol=1e-5, atol=1e-6)
    head = model.submodule("head")
    logits = head.apply(head.params, head.buffers, outputs.taps["pool"])[0].logits
    np.testing.assert_allclose(logits, outputs.logits, rtol=1e-5, atol=1e-6)


def test_initialisation_is_that_of_the_originals():
    params, buffers = jit(TINY(widths=(8, 8, 64)).build().init)(jax.random.key(0))
    kernel = params["stages"]["1"]["blocks"]["0"]["conv2"]["kernel"]
    np.testing.assert_allclose(kernel.std(), (2 / (9 * 64)) ** 0.5, rtol=0.02)  # kaiming_normal_, fan_out
    for leaf in jax.tree.leaves(params["head"]):  # torch.nn.Linear: both within ±1/sqrt(fan_in)
        assert 0.5 / 8 < jnp.abs(leaf).max() <= 1 / 8
    assert (params["stages"]["0"]["blocks"]["0"]["norm2"]["scale"] == 1).all()
    assert set(buffers) == {"stem", "stages"}
    wide, _ = jit(TINY(block=resnet.Wide, depths=(1,), widths=(4, 4)).build().init)(jax.random.key(0))
    assert (wide["head"]["bias"] == 0).all()


@pytest.mark.parametrize("block", [resnet.Basic, resnet.Bottleneck, resnet.Wide])
def test_zero_init_makes_blocks_the_identity(block):
    config = TINY(block=block, depths=(1,), widths=(4 * block.expansion, 4), zero_init=True)
    model = config.build()
    params, buffers = jit(model.init)(jax.random.key(0))
    apply = jit(functools.partial(model.apply, taps=("stem", "stages/0")))
    taps = apply(params, buffers, images())[0].taps
    np.testing.assert_allclose(taps["stages/0"], taps["stem"], atol=1e-6)


def test_strided_convolutions_are_aligned_as_in_pytorch():
    """With stride 2 and padding 1 the first output pixel reads input pixels -1, 0, 1; flax's SAME would read 0, 1, 2."""
    model = TINY(block=resnet.Wide).build()
    params = fill(model).params
    conv = model.submodule("stages/1/blocks/0/conv1")
    own = params["stages"]["1"]["blocks"]["0"]["conv1"]
    x = jnp.zeros((1, 8, 8, 8)).at[0, 0, 0].set(1.0)
    out = conv.apply(own, {}, x)[0].logits
    np.testing.assert_allclose(out[0, 0, 0], own["kernel"][1, 1].sum(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(out[0, 1:], 0)


def test_batch_statistics_move_by_a_tenth():
    model = TINY().build()
    assert model.couples_batch
    model = fill(model)
    params, buffers = model.params, jax.tree.map(jnp.ones_like, model.buffers)
    apply = jit(functools.partial(model.apply, taps=("stem/conv",), train=True))
    outputs, new = apply(params, buffers, images(), key=jax.random.key(0))
    conv = outputs.taps["stem/conv"]
    np.testing.assert_allclose(new["stem"]["norm"]["mean"], 0.9 + 0.1 * conv.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(new["stem"]["norm"]["var"], 0.9 + 0.1 * conv.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("norm", [resnet.GroupNorm(groups=4), resnet.LayerNorm()])
def test_without_batch_statistics_examples_are_independent(norm):
    model = TINY(norm=norm).build()
    params, buffers = (model := fill(model)).params, model.buffers
    assert not model.couples_batch
    assert buffers == {}
    batch = images(batch=4)
    apply = jit(lambda image: model.apply(params, buffers, {"image": image}, train=True, key=jax.random.key(0))[0].logits)
    np.testing.assert_allclose(apply(batch["image"])[1:2], apply(batch["image"][1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [resnet.BatchNorm(), resnet.GroupNorm(), resnet.LayerNorm()])
@pytest.mark.parametrize("block", [resnet.Basic, resnet.Bottleneck, resnet.Wide])
def test_bfloat16_all_the_way(norm, block):
    model = TINY(norm=norm, block=block, imagenet_stem=True, dropout=0.1).build()
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.params)
    batch = {"image": jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.bfloat16)}
    taps = tuple(path for path in model.paths(batch) if "norm" not in path)
    apply = functools.partial(model.apply, taps=taps, train=True)
    outputs, buffers = jax.eval_shape(apply, half, model.buffers, batch, key=jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs)} == {jnp.dtype(jnp.bfloat16)}
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(buffers))


def test_preprocess_and_changes():
    preprocess = Preprocess(mean=(0.5,), std=(0.25,))
    config = resnet.cifar("resnet8", classes=10, preprocess=preprocess, norm=resnet.GroupNorm(), channels=1)
    model = config.build()
    assert model.preprocess is preprocess
    assert model.params["stem"]["conv"]["kernel"].shape == (3, 3, 1, 16)
    assert model.name == "resnet8"
    assert config == resnet.cifar("resnet8", classes=10, preprocess=preprocess, norm=resnet.GroupNorm(), channels=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet.cifar("resnet8x5", classes=10), "did you mean 'resnet8x4'"),
        (lambda: resnet.wrn(41, 2, classes=10), r"wrn\(depth=41\): the depth must be 6n \+ 4"),
        (lambda: resnet.imagenet(101), "there are 18, 34, 50"),
        (lambda: TINY(widths=(8, 8)), r"resnet widths=\(8, 8\): give the stem's and one for each of the 2 stages"),
        (lambda: TINY(norm=resnet.GroupNorm(groups=3)).build(), "8 channels don't divide"),
    ],
)
def test_wrong_values(make, message):
    with pytest.raises(InputError, match=message):
        make()
