"""Where arrays live: meshes, rules on paths, the default, and batches split over data and fsdp."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import sharding
from jkd.errors import InputError
from jkd.sharding import MeshShape


@pytest.mark.parametrize(
    ("shape", "devices", "sizes"),
    [
        (MeshShape(), 8, (8, 1, 1)),
        (MeshShape(fsdp=4), 8, (2, 4, 1)),
        (MeshShape(data=1, fsdp=-1), 8, (1, 8, 1)),
        (MeshShape(data=2, fsdp=2, tensor=2), 8, (2, 2, 2)),
        (MeshShape(), 3, (3, 1, 1)),
    ],
)
def test_one_axis_takes_what_the_others_leave(shape, devices, sizes):
    assert tuple(shape.build(jax.devices()[:devices]).shape.values()) == sizes


@pytest.mark.parametrize(
    "shape",
    [
        MeshShape(data=3),
        MeshShape(fsdp=3),
        MeshShape(data=-1, fsdp=-1),
        MeshShape(data=0),
        MeshShape(data=-2),
        MeshShape(data=2),
    ],
)
def test_sizes_that_do_not_give_the_devices_are_refused(shape):
    with pytest.raises(InputError, match="mesh MeshShape"):
        shape.build()


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((64, 32), P("fsdp")),
        ((32, 64), P(None, "fsdp")),
        ((64, 64), P(None, "fsdp")),
        ((3, 3, 16, 64), P(None, None, None, "fsdp")),
        ((1000, 33), P("fsdp")),
        ((33, 35), P()),
        ((8,), P()),
        ((), P()),
        ((2048,), P("fsdp")),
        ((16, 16), P()),  # too small to be worth a gather
    ],
)
def test_the_largest_axis_that_divides_goes_over_fsdp(shape, spec):
    assert sharding.parameter_spec("kernel", shape, MeshShape(data=1, fsdp=8).build()) == spec
    assert sharding.parameter_spec("kernel", shape, MeshShape().build()) == P()


MESH = dict(data=2, fsdp=2, tensor=2)


def test_the_first_rule_that_matches_wins_and_the_rest_get_the_default():
    mesh = MeshShape(**MESH).build()
    rules = (("*/head/kernel", P("tensor")), ("*kernel", P("fsdp", "tensor")))
    tree = {
        "a": {"head": {"kernel": jnp.zeros((64, 64))}, "body": {"kernel": jnp.zeros((64, 64))}, "table": jnp.zeros((64, 32))}
    }
    found = sharding.parameter_specs(tree, mesh, rules)
    assert found["a"] == {"head": {"kernel": P("tensor")}, "body": {"kernel": P("fsdp", "tensor")}, "table": P("fsdp")}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P(None, None, "fsdp"), "names 3 axes, the parameter has 2"),
        (P("model"), "no mesh axis 'model'; there are data, fsdp, tensor"),
        (P("fsdp"), "63 does not divide"),
        (P(None, ("fsdp", "tensor")), "66 does not divide"),
    ],
)
def test_a_rule_that_cannot_hold_is_refused_with_rule_path_and_shape(spec, message):
    with pytest.raises(InputError, match=rf"sharding rule '\*' -> .* for a/kernel \(63, 66\): .*{message}"):
        sharding.parameter_spec("a/kernel", (63, 66), MeshShape(**MESH).build(), (("*", spec),))


@pytest.mark.parametrize(
    ("spec", "used"),
    [
        (P("fsdp"), P(None)),
        (P("tensor", "fsdp"), P("tensor", None)),
        (P(("fsdp", "tensor"), None), P(("tensor",), None)),
        (P(("data", "fsdp")), P(("data",))),
        (P(), P()),
    ],
)
def test_a_parameter_in_use_is_whole_along_fsdp_alone(spec, used):
    assert sharding.without_fsdp(spec) == used


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-3), optax.adafactor(1e-3), optax.adam(optax.linear_schedule(1, 0, 9))],
)
def test_optimizer_leaves_live_with_the_parameter_of_their_path_and_shape(optimizer):
    params = {"a": {"kernel": jnp.zeros((256, 256)), "bias": jnp.zeros(256)}, "b": {"kernel": jnp.zeros((256, 8))}}
    specs = {"a": {"kernel": P(None, "fsdp"), "bias": P()}, "b": {"kernel": P("fsdp")}}
    state = jax.eval_shape(optimizer.init, params)
    found = sharding.like_parameters(state, params, specs)
    assert jax.tree.structure(found, is_leaf=lambda node: isinstance(node, P)) == jax.tree.structure(state)
    for (path, leaf), spec in zip(
        jax.tree_util.tree_leaves_with_path(state),
        jax.tree.leaves(found, is_leaf=lambda node: isinstance(node, P)),
        strict=True,
    ):
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        own = {(256, 256): P(None, "fsdp"), (256, 8): P("fsdp")}
        assert spec == (own.get(leaf.shape, P()) if text.endswith("kernel") else P()), text


def test_rows_of_a_batch_go_over_data_and_fsdp():
    mesh = MeshShape(**MESH).build()
    batch = {"image": np.arange(16.0), "unlabelled": {"image": np.arange(8)}}
    placed = sharding.put_batch(batch, mesh)
    assert placed["image"].sharding == NamedSharding(mesh, P(("data", "fsdp")))
    assert {shard.data.shape for shard in placed["image"].addressable_shards} == {(4,)}
    np.testing.assert_array_equal(placed["unlabelled"]["image"], np.arange(8))


def test_gathering_casts_first_and_gradients_come_back_in_float32():
    mesh, specs = MeshShape(data=1, fsdp=8).build(), {"kernel": P("fsdp"), "count": P()}
    stored = {"kernel": jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("fsdp"))), "count": jnp.int32(3)}

    def use(kernel):
        used = sharding.at_use({**stored, "kernel": kernel}, specs, mesh, jnp.bfloat16)
        assert used["kernel"].dtype == jnp.bfloat16
        assert used["count"].dtype == jnp.int32
        return used["kernel"].sum().astype(jnp.float32)

    gradient = jax.jit(jax.grad(use))(stored["kernel"])
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 1)
