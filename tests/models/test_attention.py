"""Attention: the mask of every option against one written out, the TPU's kernel against XLA, and which kernel is for what."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from quick import jit

from jkd import topology
from jkd.models import attention

numbers = np.random.default_rng(0)


def heads(count, time=12, dim=8, batch=2):
    return jnp.asarray(numbers.normal(size=(batch, time, count, dim)), jnp.float32)


def reference(query, key, value, where, *, scale, softcap=None):
    """One query at a time, in float64."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    out = np.zeros(query.shape)
    for row, place, head in np.ndindex(*query.shape[:3]):
        own = head * key.shape[2] // query.shape[2]
        scores = scale * key[row, :, own] @ query[row, place, head]
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        weights = np.where(where[row, place], np.exp(scores - scores.max()), 0)
        out[row, place, head] = weights / weights.sum() @ value[row, :, own]
    return out


OPTIONS = [
    dict(causal=True),
    dict(causal=False),
    dict(causal=True, window=4),
    dict(causal=False, window=3),
    dict(causal=True, window=4, softcap=1.5, scale=0.7),
    dict(causal=False, softcap=1.5),
]


def test_every_option_with_grouped_heads():
    query, key, value = heads(4), heads(2), heads(2)
    segment = jnp.asarray([[0] * 5 + [1] * 7, [2] * 12])
    options = [options | dict(segment=own) for options in OPTIONS for own in (None, segment)]
    found = jit(lambda *args: [attention.attend(*args, **one) for one in options])(query, key, value)
    behind = np.arange(12)[:, None] - np.arange(12)[None]
    for one, out in zip(options, found, strict=True):
        where = np.ones((2, 12, 12), bool) & ((behind >= 0) | (not one["causal"]))
        where &= np.abs(behind) < one.get("window", 12)
        if one["segment"] is not None:
            where &= np.asarray(segment)[:, :, None] == np.asarray(segment)[:, None]
        expected = reference(query, key, value, where, scale=one.get("scale", 8**-0.5), softcap=one.get("softcap"))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5, err_msg=str(one))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_few_queries_against_more_keys(softcap):
    query, key, value = heads(4, time=2), heads(2), heads(2)
    where = numbers.random((2, 1, 2, 12)) < 0.5
    where[..., 0] = True
    found = attention.attend_where(query, key, value, jnp.asarray(where), softcap=softcap)
    expected = reference(query, key, value, where[:, 0], scale=8**-0.5, softcap=softcap)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_kernel_of_tpus_on_every_devices_own_rows_and_heads():
    """Interpreted, over a mesh of eight."""
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    query, key, value = (heads(count, time=256, dim=64, batch=4) for count in (4, 2, 2))
    segment = jnp.asarray(np.repeat([[0, 1, 1, 2]], 64, axis=1).repeat(4, axis=0).reshape(4, 256))
    options = dict(causal=True, window=50, softcap=5.0, scale=0.1)

    def run(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return attention._splash(*args, segment, interpret=True, **options)

    found = jit(run)(*jax.device_put((query, key, value), NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))))
    expected = attention.attend(query, key, value, segment=segment, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow  # the interpreted backward kernels
def test_the_kernel_of_tpus_has_the_same_gradients():
    query, key, value = (heads(count, time=128, dim=64) for count in (4, 2, 2))
    options = dict(causal=True, window=50, scale=0.1)

    def gradients(run):
        return jit(jax.grad(lambda *args: (run(*args) * query).sum(), (0, 1, 2)))(query, key, value)

    kernel = functools.partial(attention._splash, segment=None, softcap=None, interpret=True, **options)
    for found, expected in zip(gradients(kernel), gradients(functools.partial(attention.attend, **options)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler is not installed: jkd[tpu]")
def test_the_tpus_compiler_takes_its_kernels_each_device_its_own_rows_and_heads():
    """Four chips that are not here: one kernel forward and two backward, no key or value from another chip; 100 places are XLA's."""
    devices = np.array(topology.of("v5e:2x2").devices).reshape(2, 1, 2)
    mesh = Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows = jax.P(("data", "fsdp"))

    def shape(*sizes, dtype=jnp.bfloat16, spec=rows):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

    def loss(query, key, value, segment):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            said = attention.attend(query, key, value, segment=segment, causal=True, window=50, softcap=5.0)
        return jnp.square(said.astype(jnp.float32)).sum()

    def program(time):
        split = jax.P(("data", "fsdp"), None, "tensor")
        sides = (shape(4, time, count, 64, spec=split) for count in (4, 2, 2))
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*sides, shape(4, time, dtype=jnp.int32))
        return lowered.compile().as_text()

    text = program(256)
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "splash_mha_fwd" in text
    assert "all-gather" not in text
    assert "tpu_custom_call" not in program(100)


@pytest.mark.skipif(importlib.util.find_spec("nvidia") is not None, reason="cuDNN may be installed")
def test_a_gpus_mesh_asks_for_cudnn():
    """JAX says that it is not here; in float32, which it does not cover, nothing is asked for."""
    mesh = AbstractMesh((1,), ("data",), abstract_device=AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu"))
    half = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)

    def traced(side):
        with jax.sharding.use_abstract_mesh(mesh):
            return jax.eval_shape(functools.partial(attention.attend, causal=True), side, side, side)

    with pytest.raises(RuntimeError, match="cuDNN is not detected"):
        traced(half)
    assert traced(half.update(dtype=jnp.float32)).shape == half.shape


def test_what_the_kernels_cover():
    half, full = heads(2, time=128, dim=64).astype(jnp.bfloat16), heads(2, time=128, dim=64)
    segment = jnp.zeros((2, 128), jnp.int32)
    assert attention._cudnn_fits(half, True, 4, None)
    assert attention._cudnn_fits(half, False, None, segment)
    assert not attention._cudnn_fits(half, True, 4, segment)
    assert not attention._cudnn_fits(full, True, None, None)
    assert not attention._cudnn_fits(half, False, 4, None)
    assert not attention._cudnn_fits(half[:, :127], True, None, None)
    assert attention._splash_fits(full)
    assert not attention._splash_fits(full[:, :100])
    assert not attention._splash_fits(full[..., :40])
    assert attention._platform() == "cpu"
