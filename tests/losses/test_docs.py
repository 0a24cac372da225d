"""Docstrings: their layout, their doctests, and the page that is made of them."""

from __future__ import annotations

import doctest
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled
from jaxtyping import config as jaxtyping_config

from jkd import losses, targets

ROOT = Path(__file__).parent.parent.parent
spec = importlib.util.spec_from_file_location("make_losses_page", ROOT / "docs/losses.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)

FUNCTIONS = [getattr(package, name) for package in (losses, targets) for name in package.__all__]


def test_page_is_what_the_docstrings_say():
    committed = (ROOT / "docs/losses.md").read_text()
    assert committed == make.page(), "run: python docs/losses.py > docs/losses.md"


def test_page_lists_everything():
    page = make.page()
    assert all(f"| `{function.__name__}` |" in page for function in FUNCTIONS)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_docstring(function):
    """It has the layout, names every argument, and its example prints what it says."""
    doc = make.parse(function)
    plain = getattr(function, "__wrapped__", function)
    for name in plain.__code__.co_varnames[: plain.__code__.co_argcount + plain.__code__.co_kwonlyargcount]:
        assert f"{name}:" in doc["Args"] or f"{name}," in doc["Args"], f"{function.__name__} does not say what {name} is"
    # Under jit, which takes a tenth of the time.
    names = {"jnp": jnp, "jax": jax, "np": np, function.__name__: compiled(function)}
    (test,) = doctest.DocTestFinder().find(plain, function.__name__, globs=names)
    # Examples pass what users pass; that jaxtyping is absent there is part of the check.
    jaxtyping_config.update("jaxtyping_disable", True)
    try:
        result = doctest.DocTestRunner().run(test)
    finally:
        jaxtyping_config.update("jaxtyping_disable", False)
    assert result.attempted
    assert not result.failed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("Source:", "From:"), "has no Source"),
        (lambda text: text.replace("[KD]", "KD:"), "Source must be"),
        (lambda text: text.replace("``", ""), "first line must hold the formula"),
        (lambda text: text.replace(">>>", ""), "no doctest"),
    ],
)
def test_layout_errors_are_found(change, message):
    def broken():
        pass

    broken.__doc__ = change(losses.forward_kl.__doc__)
    with pytest.raises(ValueError, match=message):
        make.parse(broken)
