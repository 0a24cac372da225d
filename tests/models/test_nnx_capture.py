"""Taps into NNX modules: everything that is listed is captured, and nothing leaks."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from quick import jit
from zoo import DIM, close, same

from jkd import models
from jkd.errors import InputError


def test_every_path_is_captured_with_its_shape(net, batch):
    model, params, buffers = net
    paths = model.paths(batch)
    assert {
        "blocks/0",
        "blocks/1/linear#0",
        "blocks/1/linear#1",
        "named/first:twice",
        "data/second/0",
        "stack",
        ":features",
    } <= set(paths)
    assert paths["stack/drop"].shape == (3, 8, DIM)
    outputs, _ = jit(lambda p: model.apply(p, buffers, batch, taps=tuple(paths)))(params)
    assert outputs.taps.keys() == paths.keys()
    for path, tap in outputs.taps.items():
        assert (tap.shape, tap.dtype) == (paths[path].shape, paths[path].dtype), path


def test_only_requested_taps_and_in_the_callers_words(net, batch):
    model, params, buffers = net
    taps = ("head", "stack@2", "stack@-1", "stack", ":features", "blocks/0:__call__")
    outputs = jit(lambda p: model.apply(p, buffers, batch, taps=taps)[0])(params)
    assert set(outputs.taps) == set(taps)
    same(outputs.taps["head"], outputs.logits)
    same(outputs.taps["stack@2"], outputs.taps["stack"][2])
    same(outputs.taps["stack@-1"], outputs.taps["stack"][2])
    same(outputs.taps[":features"], outputs.taps["stack@2"])


def test_calls_in_order(net, batch):
    model, params, buffers = net
    taps = ("blocks/0/linear#0", "blocks/0/linear#1", "blocks/0:twice")
    outputs = jit(lambda p: model.apply(p, buffers, batch, taps=taps)[0])(params)
    weights = params["blocks"]["0"]["linear"]
    close(outputs.taps["blocks/0/linear#0"], batch["image"] @ weights["kernel"] + weights["bias"][None])
    same(outputs.taps["blocks/0/linear#1"], outputs.taps["blocks/0:twice"])


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        ("blocks/0/linear", "is called 2 times; choose one of 'blocks/0/linear#0', 'blocks/0/linear#1'"),
        ("blocks/0/linear#2", "is called 2 times; choose one of"),
        ("blocks/0#1", "'blocks/0' is called once; leave out #1"),
        ("block/0", "Net computes nothing under this path; did you mean 'blocks/0'"),
        ("stack:thrice", "did you mean 'stack:twice'"),
        ("blocks/0@1", "'blocks/0' is one layer, not a stack; leave out @1"),
        ("stack@3", "'stack' stacks 3 layers; choose @0 to @2"),
        ("stack@-4", "'stack' stacks 3 layers"),
        ("a::b", r"not of the form module/path\[:method\]\[#call\]\[@layer\]"),
        ("", "not of the form"),
    ],
)
def test_wrong_taps(net, batch, tap, message):
    model, params, buffers = net
    with pytest.raises(InputError, match=message):
        jax.eval_shape(lambda p: model.apply(p, buffers, batch, taps=(tap,))[0], params)


def test_inherited_super_static_and_odd_results(batch):
    class Base(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(DIM, DIM, rngs=rngs)

        @staticmethod
        def double(x):
            return 2 * x

        @property
        def width(self):
            return DIM

        def describe(self):
            return "words"

        def pair(self, x):
            return {"x": x, "y": self.double(x)}

        def __call__(self, x):
            self.describe()
            return self.pair(self.linear(x))["y"]

    class Inherits(Base):
        pass

    class Calls(Base):
        def __call__(self, x):
            return super().__call__(x) + 1

    class All(nnx.Module):
        def __init__(self, rngs):
            self.base, self.inherits, self.calls = Base(rngs), Inherits(rngs), Calls(rngs)

        def __call__(self, x):
            self.sow(nnx.Intermediate, "sown", x)
            return self.calls(self.inherits(self.base(x)))

    model = models.from_nnx(All)
    params, buffers = model.init(jax.random.key(0))
    paths = model.paths(batch)
    assert {"base", "inherits", "calls", "calls:pair", ":sown"} <= set(paths)
    assert not any("describe" in path or "double" in path or "width" in path for path in paths)
    outputs, _ = model.apply(params, buffers, batch, taps=("base:pair", "inherits", "calls", ":sown"))
    assert set(outputs.taps["base:pair"]) == {"x", "y"}
    same(outputs.taps["calls"], outputs.logits)
    same(outputs.taps[":sown"], batch["image"])


def test_what_transformations_hide_is_left_out(batch):
    class Hides(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.SimpleCell(DIM, DIM, rngs=rngs))
            self.inside = nnx.Linear(DIM, DIM, rngs=rngs)
            self.head = nnx.Linear(DIM, 3, rngs=rngs)

        def __call__(self, x):
            x = self.rnn(x[:, None])[:, 0]
            x, _ = jax.lax.scan(lambda x, _: (self.inside(x), None), x, None, length=2)
            return self.head(x)

    model = models.from_nnx(Hides)
    params, buffers = jax.eval_shape(model.init, jax.random.key(0))
    assert set(model.paths(batch)) == {":__call__", "rnn", "head"}
    for tap in ("inside", "rnn/cell"):
        apply = functools.partial(model.apply, taps=(tap,))
        with pytest.raises(InputError, match=f"tap '{tap}': Hides computes nothing under this path"):
            jax.eval_shape(apply, params, buffers, batch)
    apply = functools.partial(model.apply, taps=("rnn",))
    with pytest.raises(TypeError, match="contracting dimensions"):
        jax.eval_shape(apply, params, buffers, {"image": jnp.ones((2, DIM + 1))})
