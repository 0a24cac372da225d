"""Every check of every row of the table (`table.Case`)."""

from __future__ import annotations

import functools

import cases_features
import cases_logits
import cases_relations
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
from jaxtyping import config as jaxtyping_config
from table import Case, cast, common_extremes, is_float

from jkd import losses

CASES: list[Case] = [*cases_logits.CASES, *cases_features.CASES, *cases_relations.CASES]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def device(inputs):
    return {name: jnp.asarray(value) for name, value in inputs.items()}


def split(case, inputs):
    """What gradients are taken for, and the rest."""
    moved = {name: inputs[name] for name in case.gradient_of}
    return moved, {name: value for name, value in inputs.items() if name not in moved}


@functools.cache
def value_and_gradient(case_id):
    """Jitted ``inputs -> (value, gradient of its sum)``; one compilation for each shape and dtype."""
    case = CASES[case_id]

    @jax.jit
    def run(inputs):
        def total(moved):
            value = case.call(inputs | moved)
            return jnp.sum(value), value

        moved, _ = split(case, inputs)
        (_, value), gradient = jax.value_and_grad(total, has_aux=True)(moved)
        return value, gradient

    return run


@functools.cache
def jitted(case_id):
    """The loss, compiled once for each shape and dtype (a call outside jit compiles every operation by itself)."""
    return jax.jit(CASES[case_id].call)


def value_of(case, inputs):
    return jitted(CASES.index(case))(device(inputs))


def run(case, inputs):
    return value_and_gradient(CASES.index(case))(device(inputs))


def close(actual, expected, *, rtol, scale=None):
    """Equal to ``rtol`` of the largest value: an entry whose terms cancel has no relative accuracy of its own."""
    expected = np.asarray(expected, np.float64)
    size = np.max(np.abs(expected), initial=0.0) if scale is None else scale
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=rtol * max(size, 1e-3))


def test_every_public_loss_has_a_row():
    named = {case.name.split("/")[0] for case in CASES}
    assert set(losses.__all__) <= named


def test_rows_have_names_of_their_own():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


@every
def test_formula(case):
    """float64 against float64: 1e-9 leaves room for cancellation and for nothing else."""
    with jax.enable_x64(True):
        for leading in case.leading:
            inputs = case.draw(leading)
            expected = case.expected(inputs)
            value = value_of(case, inputs)
            assert value.shape == expected.shape
            close(value, expected, rtol=1e-9)


@every
def test_gradient_is_the_slope(case):
    """Automatic against numerical differentiation in float64 (central differences: an error of about 1e-6)."""
    if not case.smooth:
        pytest.skip("has kinks or stopped gradients: the gradient is held by golden values or a test of its own")
    with jax.enable_x64(True):
        inputs = device(case.draw())
        moved, _ = split(case, inputs)

        def loss(moved):
            return case.call(inputs | moved)

        check_grads(loss, (moved,), order=1, modes=("rev",), atol=1e-5, rtol=1e-5)


@every
def test_dtypes(case):
    """float32 at least, float64 stays, and a low-precision input is first promoted: the value is that of the promoted input."""
    inputs = case.draw()
    with jax.enable_x64(True):
        reference = value_of(case, cast(inputs, np.float64))
        assert reference.dtype == jnp.float64
        single = value_of(case, cast(inputs, np.float32))
        assert single.dtype == jnp.float32  # and not float64, although 64 bits are allowed
        close(single, reference, rtol=2e-5)  # a few hundred roundings of 6e-8
        for dtype in (ml_dtypes.bfloat16, np.float16):
            low = cast(inputs, dtype)
            value = value_of(case, low)
            assert value.dtype == jnp.float32
            close(value, value_of(case, cast(low, np.float32)), rtol=1e-6)


@every
def test_extreme_values(case):
    """Finite value and finite gradient, in float32 and bfloat16."""
    for meaning, change in common_extremes(case).items():
        inputs = change(case.rng(1), case.draw())
        for dtype in (np.float32, ml_dtypes.bfloat16):
            value, gradient = run(case, cast(inputs, dtype))
            assert np.all(np.isfinite(value)), (meaning, dtype, value)
            for name, array in gradient.items():
                assert np.all(np.isfinite(array)), (meaning, dtype, name, array)


@every
def test_student_equal_to_teacher(case):
    if case.twins is None:
        pytest.skip("the loss has no zero there")
    inputs = case.draw()
    inputs |= {student: inputs[teacher] for student, teacher in case.twins.items()}
    with jax.enable_x64(True):
        value, gradient = run(case, inputs)
        atol = case.twins_tolerance
        np.testing.assert_allclose(value, np.full(value.shape, case.at_twins), rtol=0, atol=atol)
        for name in case.twins:
            if case.flat_at_twins and name in gradient:
                np.testing.assert_allclose(gradient[name], np.zeros(gradient[name].shape), rtol=0, atol=atol)


@every
def test_invariances(case):
    if not case.invariances:
        pytest.skip("none declared")
    with jax.enable_x64(True):
        inputs = case.draw()
        expected = value_of(case, inputs)
        for meaning, change in case.invariances.items():
            value = value_of(case, change(case.rng(2), inputs))
            np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12, err_msg=meaning)


@every
def test_masked_class(case):
    """-inf on both sides is the same as a class that is not there; no gradient reaches it."""
    if not case.masked_class:
        pytest.skip("-inf has no meaning here")
    inputs = cast(case.draw(), np.float32)
    if "labels" in inputs and not is_float(inputs["labels"]):
        inputs["labels"] = np.minimum(inputs["labels"], case.size - 2)

    def without_last(v):
        return np.concatenate([v[..., :-1], np.full_like(v[..., :1], -np.inf)], -1)

    padded = {n: without_last(v) if is_float(v) else v for n, v in inputs.items()}
    dropped = {n: v[..., :-1] if is_float(v) else v for n, v in inputs.items()}
    value, gradient = run(case, padded)
    expected, expected_gradient = run(case, dropped)
    close(value, expected, rtol=1e-6)
    for name, array in gradient.items():
        close(array[..., :-1], expected_gradient[name], rtol=1e-5)
        assert not np.any(array[..., -1])


@every
def test_bad_input(case):
    """The error names the argument, its shape and what was expected, at trace time."""
    if not case.bad:
        pytest.skip("none declared")
    inputs = cast(case.draw((5,) if (5,) in case.leading else None), np.float32)
    # Users have no jaxtyping: the library's own checks must speak.
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        for change, error, pattern in case.bad.values():
            changed = change(inputs)
            with pytest.raises(error, match=pattern):
                jax.eval_shape(case.call, changed)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


@every
def test_jit_vmap_and_shard_map(case):
    """All three give what plain calls give: `shard_map` on each device's own rows."""
    inputs = device(cast(case.draw(), np.float32))
    eager = case.call(inputs)
    close(jax.jit(case.call)(inputs), eager, rtol=1e-6)

    draws = [device(cast(case.draw(salt=salt), np.float32)) for salt in (0, 1)]
    stacked = {name: jnp.stack([draw[name] for draw in draws]) for name in draws[0]}
    close(jax.vmap(case.call)(stacked), jnp.stack([case.call(draw) for draw in draws]), rtol=1e-6)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    inputs = device(cast(case.draw(case.rows), np.float32))
    specs = {name: PartitionSpec() if name in case.shared else PartitionSpec("data") for name in inputs}
    mapped = jax.shard_map(case.call, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec("data"))
    own = case.rows[0] // 8
    chunks = [{n: v if n in case.shared else v[i * own : (i + 1) * own] for n, v in inputs.items()} for i in range(8)]
    close(jax.jit(mapped)(inputs), np.concatenate([case.call(chunk) for chunk in chunks]), rtol=1e-6)


@every
def test_sharded_over_eight_devices(case):
    """A global array that is split over 8 devices gives the value and gradient of the same array on one."""
    inputs = device(cast(case.draw(case.rows), np.float32))
    value, gradient = run(case, inputs)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = {n: NamedSharding(mesh, PartitionSpec() if n in case.shared else PartitionSpec("data")) for n in inputs}
    placed = jax.device_put(inputs, sharding)
    sharded_value, sharded_gradient = value_and_gradient(CASES.index(case))(placed)
    # 1e-5: sums over the batch are taken in another order.
    close(sharded_value, value, rtol=1e-5)
    for name, array in gradient.items():
        close(sharded_gradient[name], array, rtol=1e-5)


def products(jaxpr):
    """Every matrix product of a program, those of its loops and branches too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            if hasattr(parameter, "eqns") or hasattr(parameter, "jaxpr"):
                yield from products(getattr(parameter, "jaxpr", parameter))


@every
def test_products_keep_the_digits_of_their_inputs(case):
    """By default a GPU or TPU rounds float32 operands to 10 or 7 bits: every product asks for all, forward and backward."""
    inputs = device(cast(case.draw(), np.float32))
    moved, _ = split(case, inputs)
    program = jax.make_jaxpr(jax.grad(lambda moved: jnp.sum(case.call(inputs | moved))))(moved)
    for product in products(program.jaxpr):
        precision = product.params["precision"]
        assert precision is not None, product
        assert set(precision) == {jax.lax.Precision.HIGHEST}


def test_products_are_found():
    program = jax.make_jaxpr(lambda x: jax.lax.map(lambda row: row @ x, x))(jnp.ones((3, 3)))
    assert [product.params["precision"] for product in products(program.jaxpr)] == [None]


@every
def test_batch_permutation_commutes(case):
    if case.ordered:
        pytest.skip("the order of rows matters")
    inputs = case.draw(case.rows)
    order = case.rng(3).permutation(case.rows[0])
    moved = {name: value if name in case.shared else value[order] for name, value in inputs.items()}
    with jax.enable_x64(True):
        np.testing.assert_allclose(value_of(case, moved), value_of(case, inputs)[order], rtol=1e-9, atol=1e-12)


@every
def test_masked_equals_dropped(case):
    if case.where is None:
        pytest.skip("takes no mask")
    argument, axis = case.where
    inputs = case.draw(case.rows)
    keep = np.arange(case.rows[axis]) % 3 != 1
    mask = np.broadcast_to(keep, case.rows[: axis + 1])
    rows = {n: n not in case.shared and v.ndim > axis for n, v in inputs.items()}
    # What is masked out holds values of another size, so that a leak shows.
    shape = (1,) * axis + (-1,)

    def spoil(v):
        kept = keep.reshape(shape + (1,) * (v.ndim - axis - 1))
        return np.where(kept, v, 100 + v)

    spoiled = {n: spoil(v) if rows[n] and is_float(v) else v for n, v in inputs.items()}
    dropped = {n: np.compress(keep, v, axis=axis) if rows[n] else v for n, v in inputs.items()}
    with jax.enable_x64(True):

        def total(moved, inputs, more):
            value = case.call(inputs | moved, **more)
            weight = mask.astype(float) if "where" in more or argument in more else np.ones(value.shape)
            if value.ndim <= axis:
                weight = np.ones(value.shape)
            weight = weight.reshape(weight.shape + (1,) * (value.ndim - weight.ndim))
            return jnp.sum(value * weight), value

        results = []
        for given, more in ((spoiled, {argument: jnp.asarray(mask)}), (dropped, {})):
            given = device(given)
            moved, _ = split(case, given)
            (_, value), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(moved, given, more)
            results.append((value, gradient))
        (value, gradient), (expected, expected_gradient) = results
        if value.ndim > axis:
            value = np.compress(keep, value, axis=axis)
        np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-12)
        for name, array in gradient.items():
            if rows[name]:
                assert not np.any(np.compress(~keep, array, axis=axis)), "a gradient reaches what is masked out"
                array = np.compress(keep, array, axis=axis)
            np.testing.assert_allclose(array, expected_gradient[name], rtol=1e-8, atol=1e-12)


@every
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    data=st.data(),
    salt=st.integers(10, 10**6),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 10.0]),
)
def test_fuzz(case, data, salt, scale):
    """Any size, batch and scale: the formula's value in float64, and a finite gradient."""
    leading = data.draw(st.sampled_from(case.leading))
    size = data.draw(st.integers(2, 9)) if case.size == 7 else case.size
    inputs = case.draw(leading, size=size, salt=salt)
    inputs |= {n: v * scale for n, v in inputs.items() if is_float(v) and n.endswith(("logits", "features", "embeddings"))}
    with jax.enable_x64(True):
        expected = case.expected(inputs)
        value, gradient = run(case, inputs)
        close(value, expected, rtol=1e-9)
        assert all(np.all(np.isfinite(array)) for array in gradient.values())
