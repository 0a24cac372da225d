"""The numbers that the authors' code prints, values and gradients (``tests/golden``: the calls and where each was made)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jkd import losses, targets

FOLDER = Path(__file__).parent.parent / "golden"
INDEX = json.loads((FOLDER / "index.json").read_text())


def test_nothing_is_left_out():
    assert {case["name"] for case in INDEX} == {path.stem for path in FOLDER.glob("*.npz")}


@pytest.mark.parametrize("case", INDEX, ids=lambda case: case["name"])
def test_golden(case):
    """To 1e-5 of the value and of the gradient's largest entry: float32 here against (mostly) float64 there."""
    stored = np.load(FOLDER / f"{case['name']}.npz")
    inputs = {name: jnp.asarray(stored[f"in_{name}"]) for name in case["inputs"]}
    call = compile(case["call"], case["name"], "eval")

    def mean(moved):
        names = {"losses": losses, "targets": targets, **inputs, case["gradient_of"]: moved}
        value = eval(call, names)
        if case["mean"] == "plain":
            return jnp.mean(value)
        assert case["mean"] == "over mask"
        return jnp.sum(value * inputs["mask"]) / jnp.sum(inputs["mask"])

    value, gradient = jax.jit(jax.value_and_grad(mean))(inputs[case["gradient_of"]])
    np.testing.assert_allclose(value, stored["expected"], rtol=1e-5)
    np.testing.assert_allclose(gradient, stored["grad"], rtol=0, atol=1e-5 * np.abs(stored["grad"]).max())
