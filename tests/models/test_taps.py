"""The grammar of tap paths, apart from any model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from jkd.errors import InputError
from jkd.models import taps
from jkd.models.taps import Captured, Tap


@pytest.mark.parametrize(
    ("text", "tap"),
    [
        ("head", Tap("head", "head")),
        ("blocks/3/mlp", Tap("blocks/3/mlp", "blocks/3/mlp")),
        ("blocks/3:scores", Tap("blocks/3:scores", "blocks/3", "scores")),
        (":features", Tap(":features", "", "features")),
        ("act#2", Tap("act#2", "act", call=2)),
        ("layers@-1", Tap("layers@-1", "layers", layer=-1)),
        ("layers/mlp:up#1@11", Tap("layers/mlp:up#1@11", "layers/mlp", "up", 1, 11)),
    ],
)
def test_parse(text, tap):
    assert taps.parse(text) == tap


@pytest.mark.parametrize("text", ["", "a@b", "a#-1", "a@1#1", "a:b:c", "a:"])
def test_parse_refuses(text):
    with pytest.raises(InputError, match="not of the form"):
        taps.parse(text)


def test_rank_survives_transformations():
    def layer(carry, _):
        return carry, Captured({"x": carry})

    _, plain = layer(jnp.ones((2, 3)), None)
    _, stacked = jit(lambda x: jax.lax.scan(layer, x, None, length=4))(jnp.ones((2, 3)))
    assert not plain.stacked
    assert stacked.stacked
    assert stacked.value["x"].shape == (4, 2, 3)


@pytest.mark.parametrize(
    ("value", "fits"), [(None, False), ("a", False), ((jnp.ones(1), "a"), False), ({"a": np.ones(1)}, True)]
)
def test_what_can_be_captured(value, fits):
    assert Captured.fits(value) is fits


def test_numbers_sort_as_numbers():
    captured = {(f"blocks/{number}", "__call__"): (jnp.ones(1),) for number in (10, 2, 1)}
    assert list(taps.shapes(captured)) == ["blocks/1", "blocks/2", "blocks/10"]
