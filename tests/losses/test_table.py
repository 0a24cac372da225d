"""Every check of every row of the table (`table.Case`).

The checks of one row follow each other (pytest groups them by a module's fixture) and share what `run` has compiled for it:
nearly all of this module's time is compiling. That is why they take the same shapes.
"""

from __future__ import annotations

import cases_contrastive
import cases_features
import cases_logits
import cases_ranking
import cases_relations
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import config as jaxtyping_config
from table import SIDES, Case, cast, common_extremes, is_float, with_masked, without

from jkd import losses

ROWS = (cases_logits, cases_ranking, cases_features, cases_relations, cases_contrastive)
CASES: list[Case] = [case for module in ROWS for case in module.CASES]
FIRST = {case.name for case in {case.function: case for case in reversed(CASES)}.values()}
"""The first row of each function: for what does not depend on settings."""
KINDS = {case.name for case in {(case.function, case.inputs, case.size): case for case in reversed(CASES)}.values()}
"""Its first row with each kind of inputs: for what does not depend on numbers."""
MESH = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
FUZZ = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def rows(condition):
    """The rows that a check is for, where it is not for all."""

    def keep(check):
        check.condition = condition
        return check

    return keep


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        condition = getattr(metafunc.function, "condition", lambda case: True)
        metafunc.parametrize("case", [*filter(condition, CASES)], ids=lambda case: case.name, scope="module")


first = rows(lambda case: case.name in FIRST)
kinds = rows(lambda case: case.name in FIRST | KINDS)


@pytest.fixture(scope="module")
def run(case):
    """Jitted ``inputs -> (value, gradient of its sum)``; one compilation for each dtype."""
    return jax.jit(value_and_gradient(case))


@pytest.fixture(scope="module")
def everywhere(case):
    """The same in float32 on an array that is split over 8 devices, and the values of each device's rows by themselves."""
    specs = {name: PartitionSpec() if name in case.shared else PartitionSpec("data") for name in case.arguments}
    shard_map = jax.shard_map(case.call, mesh=MESH, in_specs=(specs,), out_specs=PartitionSpec("data"))
    vmap = jax.vmap(case.call, in_axes=({name: None if name in case.shared else 0 for name in case.arguments},))
    program = jax.jit(lambda inputs: (*value_and_gradient(case)(inputs), shard_map(inputs), vmap(pieces(case, inputs))))
    shardings = {name: NamedSharding(MESH, spec) for name, spec in specs.items()}

    def call(inputs):
        with jax.enable_x64(True):
            return program(jax.device_put(cast(inputs, np.float32), shardings))

    return call


@pytest.fixture
def single(case, run, request):
    """Value and gradient in float32."""
    if case.name in FIRST:
        program = request.getfixturevalue("everywhere")
        return lambda inputs: program(inputs)[:2]
    return lambda inputs: run(cast(inputs, np.float32))


def pieces(case, inputs):
    """The rows of each device; where every position has a value of its own, each row."""
    count = case.rows[0] if () in case.leading and not case.couples else 8
    cut = {}
    for name, value in inputs.items():
        whole = name in case.shared or count == case.rows[0]
        cut[name] = value if whole else value.reshape(count, -1, *value.shape[1:])
    return cut


def split(case, inputs):
    """What gradients are taken for, and the rest."""
    moved = {name: inputs[name] for name in case.gradient_of}
    return moved, {name: value for name, value in inputs.items() if name not in moved}


def value_and_gradient(case):
    def program(inputs, weight=1.0, **more):
        def total(moved):
            value = case.call(inputs | moved, **more)
            return jnp.sum(value * weight), value

        (_, value), gradient = jax.value_and_grad(total, has_aux=True)(split(case, inputs)[0])
        return value, gradient

    return program


def close(actual, expected, *, rtol, message=""):
    """Equal to ``rtol`` of the largest value: an entry whose terms cancel has no relative accuracy of its own."""
    expected = np.asarray(expected, np.float64)
    atol = rtol * max(np.max(np.abs(expected), initial=0.0), 1e-3)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol, err_msg=message)


def assert_slope(case, total, inputs, gradient):
    """The gradient, against central differences of ``total(inputs)`` along random directions (in float64: off by about 1e-9)."""
    step = 1e-5
    for salt in (4, 5):
        along = {name: case.rng(salt).normal(size=inputs[name].shape) for name in case.gradient_of}
        ahead, behind = (inputs | {n: inputs[n] + sign * step * along[n] for n in along} for sign in (1, -1))
        expected = (total(ahead) - total(behind)) / (2 * step)
        slope = sum(np.sum(np.where(np.isfinite(inputs[n]), gradient[n], 0) * along[n]) for n in along)
        scale = max(np.linalg.norm(gradient[n]) for n in along)
        np.testing.assert_allclose(slope, expected, rtol=1e-6, atol=1e-6 * max(scale, 1e-3))


# --- the table itself ---------------------------------------------------------------------------------------------------


def test_every_public_loss_has_a_row():
    named = {case.name.split("/")[0] for case in CASES}
    assert set(losses.__all__) <= named


def test_rows_have_names_of_their_own():
    names = [case.name for case in CASES]
    assert len(names) == len(set(names))


# --- float64 ------------------------------------------------------------------------------------------------------------


def test_formula_and_slope(case, run):
    """float64 against float64: 1e-9 leaves room for cancellation and for nothing else."""
    inputs = case.draw()
    with jax.enable_x64(True):
        value, gradient = run(inputs)
        expected = case.expected(inputs)
        assert value.shape == expected.shape
        assert value.dtype == jnp.float64
        close(value, expected, rtol=1e-9)
        if case.smooth:  # else the gradient is held by golden values or a test of its own
            assert_slope(case, lambda inputs: np.sum(run(inputs)[0]), inputs, gradient)


@first
def test_formula_at_other_shapes(case):
    """Any leading shape that the maths allows, each with another number of classes or channels."""
    shapes = [leading for leading in case.leading if leading not in ((), case.usual)] or [case.usual]  # () is tried by vmap
    sizes = [case.rng(6 + i).integers(2, 10) if case.size == 7 else case.size for i in range(len(shapes))]
    draws = [case.draw(leading, size=size) for leading, size in zip(shapes, sizes, strict=True)]
    with jax.enable_x64(True):
        values = jax.jit(lambda draws: [case.call(inputs) for inputs in draws])(draws)
        for value, inputs in zip(values, draws, strict=True):
            expected = case.expected(inputs)
            assert value.shape == expected.shape
            close(value, expected, rtol=1e-9)


@rows(lambda case: case.twins is not None)  # the others have no zero there
def test_student_equal_to_teacher(case, run):
    inputs = case.draw()
    inputs |= {student: inputs[teacher] for student, teacher in case.twins.items()}
    with jax.enable_x64(True):
        value, gradient = run(inputs)
        atol = case.twins_tolerance
        np.testing.assert_allclose(value, np.full(value.shape, case.at_twins), rtol=0, atol=atol)
        for name in case.twins:
            if case.flat_at_twins and name in gradient:
                np.testing.assert_allclose(gradient[name], np.zeros(gradient[name].shape), rtol=0, atol=atol)


def test_invariances(case, run):
    """The declared ones, and the batch's permutation, which commutes."""
    inputs = case.draw()
    with jax.enable_x64(True):
        expected = run(inputs)[0]
        for meaning, change in case.invariances.items():
            value = run(change(case.rng(2), inputs))[0]
            np.testing.assert_allclose(value, expected, rtol=case.invariances_tolerance, atol=1e-12, err_msg=meaning)
        if not case.ordered:
            order = case.rng(3).permutation(case.rows[0])
            moved = {name: value if name in case.shared else value[order] for name, value in inputs.items()}
            np.testing.assert_allclose(run(moved)[0], expected[order], rtol=1e-9, atol=1e-12)


@rows(lambda case: case.masked_class == "dropped")  # to the others -inf is not the same as absence
def test_masked_class(case, run):
    """-inf on both sides is the same as a class that is not there; no gradient reaches it."""
    classes = [1, case.size - 1]
    inputs = with_masked(case.draw(), classes)
    with jax.enable_x64(True):
        value, gradient = run(inputs)
        close(value, case.expected(without(inputs, classes)), rtol=1e-9)
        assert not any(np.any(array[..., classes]) for array in gradient.values())
        if case.smooth:
            assert_slope(case, lambda inputs: np.sum(run(inputs)[0]), inputs, gradient)


@rows(lambda case: case.where is not None)
def test_masked_equals_dropped(case):
    argument, axis = case.where
    inputs = case.draw()
    keep = np.arange(case.rows[axis]) % 3 != 1
    mask = np.broadcast_to(keep, case.rows[: axis + 1])
    rows = {n: n not in case.shared and v.ndim > axis for n, v in inputs.items()}

    def spoil(v):
        """What is masked out holds values of another size, so that a leak shows."""
        kept = keep.reshape((1,) * axis + (-1,) + (1,) * (v.ndim - axis - 1))
        return np.where(kept, v, 100 + v)

    spoiled = {n: spoil(v) if rows[n] and is_float(v) else v for n, v in inputs.items()}
    dropped = {n: np.compress(keep, v, axis=axis) if rows[n] else v for n, v in inputs.items()}
    with jax.enable_x64(True):
        program = jax.jit(value_and_gradient(case))
        expected = case.expected(dropped)
        by_row = expected.ndim > axis
        weight = mask.reshape(mask.shape + (1,) * (expected.ndim - mask.ndim)).astype(float) if by_row else 1.0

        def masked(inputs):
            return program(inputs, weight, **{argument: mask})

        value, gradient = masked(spoiled)
        np.testing.assert_allclose(np.compress(keep, value, axis=axis) if by_row else value, expected, rtol=1e-9, atol=1e-12)
        for name, array in gradient.items():
            assert not rows[name] or not np.any(np.compress(~keep, array, axis=axis)), "a gradient reaches what is masked out"
        if case.smooth:  # the masked value is the dropped one, so its own slope is too
            assert_slope(case, lambda inputs: np.sum(masked(inputs)[0] * weight), spoiled, gradient)
        else:
            _, expected_gradient = program(dropped)
            for name, array in gradient.items():
                array = np.compress(keep, array, axis=axis) if rows[name] else array
                np.testing.assert_allclose(array, expected_gradient[name], rtol=1e-8, atol=1e-12)


# --- float32 and less ---------------------------------------------------------------------------------------------------


@kinds
def test_single_precision(case, single):
    """float32 stays although 64 bits are allowed, and on 8 devices too."""
    inputs = case.draw()
    value, gradient = single(inputs)
    close(value, case.expected(inputs), rtol=2e-5)  # a few hundred roundings of 6e-8
    assert {value.dtype, *(array.dtype for array in gradient.values())} == {jnp.dtype(jnp.float32)}


@first
def test_eight_devices_vmap_and_shard_map(case, run, everywhere):
    """A global array that is split over 8 devices gives one device's gradient; mapped calls, the values of their rows."""
    inputs = case.draw()
    _, gradient, sharded, mapped = everywhere(inputs)
    with jax.enable_x64(True):
        expected_gradient = run(inputs)[1]
    for name, array in expected_gradient.items():
        close(gradient[name], array, rtol=2e-5, message=name)
    cut = pieces(case, inputs)
    each = [case.expected({n: v if n in case.shared else v[i] for n, v in cut.items()}) for i in range(len(mapped))]
    close(mapped, np.stack(each), rtol=2e-5)
    close(sharded, mapped.reshape(sharded.shape), rtol=1e-6)


@kinds
def test_extreme_values(case, single):
    """Finite value and finite gradient. Also of bfloat16, which is promoted first and has float32's range."""
    for meaning, change in common_extremes(case).items():
        value, gradient = single(change(case.rng(1), case.draw()))
        assert np.all(np.isfinite(value)), (meaning, value)
        for name, array in gradient.items():
            assert np.all(np.isfinite(array)), (meaning, name, array)


def equations(jaxpr):
    """Every operation of a program, those of its loops, branches and calls too (but not these themselves)."""
    for equation in jaxpr.eqns:
        is_program = lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")  # noqa: E731
        inner = [x for x in jax.tree.leaves(equation.params, is_leaf=is_program) if is_program(x)]
        if not inner:
            yield equation
        for part in inner:
            yield from equations(getattr(part, "jaxpr", part))


def test_low_precision_is_promoted_before_anything_else(case):
    """bfloat16 and float16 give float32, and the value is that of the promoted input. NumPy's arrays will do."""
    for dtype in (ml_dtypes.bfloat16, np.float16):
        inputs = cast(case.draw(), dtype)
        traced = jax.make_jaxpr(case.call)(inputs)
        assert [aval.dtype for aval in traced.out_avals] == [jnp.float32]
        low = {
            equation.primitive.name
            for equation in equations(traced.jaxpr)
            if any(variable.aval.dtype == dtype for variable in (*equation.invars, *equation.outvars))
        }
        assert low <= {"convert_element_type"}
    (result,) = jax.make_jaxpr(lambda: case.call(inputs))().out_avals
    assert result.dtype == jnp.float32


def test_products_keep_the_digits_of_their_inputs(case, run):
    """By default a GPU or TPU rounds float32 operands to 10 or 7 bits: every product asks for all, forward and backward."""
    with jax.enable_x64(True):
        program = run.trace(case.draw()).jaxpr
    for equation in equations(program):
        if equation.primitive.name == "dot_general":
            assert set(equation.params["precision"] or ["default"]) == {jax.lax.Precision.HIGHEST}, equation


def test_products_are_found():
    program = jax.make_jaxpr(lambda x: jax.lax.map(lambda row: row @ x, x))(jnp.ones((3, 3)))
    found = [equation for equation in equations(program.jaxpr) if equation.primitive.name == "dot_general"]
    assert [equation.params["precision"] for equation in found] == [None]


# --- users' mistakes ----------------------------------------------------------------------------------------------------


@rows(lambda case: case.bad)
def test_bad_input(case):
    """The error names the argument, its shape and what was expected, at trace time."""
    inputs = cast(case.draw(case.usual), np.float32)
    # Users have no jaxtyping: the library's own checks must speak.
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        for change, error, pattern in case.bad.values():
            changed = change(inputs)
            with pytest.raises(error, match=pattern):
                jax.eval_shape(case.call, changed)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)


# --- fuzz ---------------------------------------------------------------------------------------------------------------


def scaled(inputs, scale):
    return {n: v * scale if is_float(v) and n.endswith(("logits", "features", "embeddings")) else v for n, v in inputs.items()}


@settings(max_examples=6, **FUZZ)
@given(data=st.data(), salt=st.integers(10, 10**6), scale=st.sampled_from([1e-3, 0.3, 1.0, 10.0]))
def test_fuzz(case, run, data, salt, scale):
    """Any values and any classes at -inf, on one side or on both: the formula's value, and a finite gradient."""
    inputs = complete = scaled(case.draw(salt=salt), scale)
    if case.masked_class:
        classes = sorted(data.draw(st.sets(st.integers(0, case.size - 1), max_size=case.size - 2)))
        sides = data.draw(st.sampled_from([SIDES, SIDES[:1], SIDES[1:]]))
        inputs = with_masked(inputs, classes, sides)
        if classes:
            complete = without(inputs, classes) if case.masked_class == "dropped" and sides == SIDES else None
    with jax.enable_x64(True):
        value, gradient = run(inputs)
        if complete is not None:
            close(value, case.expected(complete), rtol=1e-9)
        assert np.all(np.isfinite(value))
        assert all(np.all(np.isfinite(array)) for array in gradient.values())


@settings(max_examples=20, **FUZZ)
@given(data=st.data(), salt=st.integers(10, 10**6), scale=st.sampled_from([1e-3, 0.3, 1.0, 10.0]))
def test_fuzz_of_shapes(data, salt, scale):
    """Any loss at any size and batch."""
    case = data.draw(st.sampled_from(CASES))
    size = data.draw(st.integers(2, 12)) if case.size == 7 else case.size
    inputs = scaled(case.draw(data.draw(st.sampled_from(case.leading)), size=size, salt=salt), scale)
    with jax.enable_x64(True):
        value, gradient = jax.jit(value_and_gradient(case))(inputs)
        close(value, case.expected(inputs), rtol=1e-9, message=case.name)
        assert all(np.all(np.isfinite(array)) for array in gradient.values()), case.name
