"""What the three adapters share, and the one for plain functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jkd.errors import InputError, nearest
from jkd.types import Batch, Model, Outputs, Preprocess, Tree

Inputs = Callable[[Batch], Any]
"""``batch -> call arguments``: a tuple is positional arguments, a dict keyword arguments, anything else the one argument."""

MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}
"""The names under which networks take their mode, as an argument or as an attribute, and the value they have in training."""


def read_batch(batch: Batch, inputs: Inputs | None, preprocess: Preprocess | None) -> tuple[tuple, dict[str, Any]]:
    """The positional and keyword arguments of the network's call.

    ``batch["image"]`` is preprocessed first (without a ``preprocess`` it becomes float 0..1), so that ``inputs`` sees it ready.

    Raises:
        InputError: no ``inputs`` and the batch has neither ``image`` nor ``tokens``.
    """
    if isinstance(batch, Mapping) and "image" in batch:
        batch = {**batch, "image": (preprocess or Preprocess())(batch["image"])}
    return arguments((inputs or _default_inputs)(batch))


def arguments(value: Any) -> tuple[tuple, dict[str, Any]]:
    """Call arguments as `Inputs` gives them, split into positional and keyword ones."""
    if isinstance(value, Mapping):
        return (), dict(value)
    return (value, {}) if isinstance(value, tuple) else ((value,), {})


def _default_inputs(batch: Batch) -> Any:
    for name in ("image", "tokens"):
        if name in batch:
            return batch[name]
    raise InputError(f"the batch has neither 'image' nor 'tokens' but {sorted(batch)}; pass inputs=lambda batch: …")


def mode_arguments(function: Callable, train: bool, given: Mapping[str, Any]) -> dict[str, bool]:
    """``train=…`` or ``deterministic=…`` (see `MODES`) for a network that takes its mode as an argument."""
    try:
        accepted = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value == train for name, value in MODES.items() if name in accepted and name not in given}


def to_outputs(result: Any, output: Callable[[Any], Outputs] | None, model: str) -> Outputs:
    """The network's result as `Outputs`: an array is logits.

    Raises:
        InputError: a result that is neither an array nor `Outputs`, and no (or a wrong) ``output=``.
    """
    if output is not None:
        result = output(result)
    if isinstance(result, Outputs):
        return result
    if isinstance(result, jax.Array):
        return Outputs(result)
    kind = type(result).__name__
    if output is not None:
        raise InputError(f"{model}: output= gave {kind}; it must give jkd.Outputs (or an array of logits)")
    raise InputError(f"{model} returns {kind}; pass output=lambda result: Outputs(logits=…)")


def shapes_of(tree: Tree) -> Tree:
    """The shapes of a tree's arrays (also of traced ones)."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jax.dtypes.result_type(x)), tree)


def typed_key(key: jax.Array) -> jax.Array:
    """A key of ``jax.random.key``, also where ``jax.random.PRNGKey`` made it."""
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def from_function(
    function: Callable[..., Any],
    params: Tree | Callable[[jax.Array], Tree],
    buffers: Tree | Callable[[jax.Array], Tree] | None = None,
    *,
    inputs: Inputs | None = None,
    output: Callable[[Any], Outputs] | None = None,
    preprocess: Preprocess | None = None,
    name: str | None = None,
    couples_batch: bool = False,
) -> Model:
    """A Model from a plain function (Equinox, Haiku, Keras, or by hand).

    Args:
        function: ``function(params, *inputs)``; with ``buffers``: ``function(params, buffers, *inputs)``, which then returns
            ``(result, buffers)``. ``key`` is passed where the signature names it, and so is the mode (``train``, or another of
            `MODES`).
        params: nested dict of arrays; or ``key -> params``, traceable, so that they can be created sharded.
        buffers: likewise, for what no gradient reaches. None: the function has none.
        inputs: ``batch -> call arguments``; default: the preprocessed ``batch["image"]``, else ``batch["tokens"]``.
        output: ``result -> Outputs``; default: an array is logits, `Outputs` stay. A function has no module boundaries: what it
            puts in ``Outputs.taps`` is what can be tapped.
        preprocess: how the function wants its images.
        name: for tables and messages; default: the function's.
        couples_batch: True where one example's answer in training depends on the others.
    """
    title = name or str(getattr(function, "__name__", type(function).__name__))
    held = not callable(params)

    def init(key):
        make = lambda tree, number: tree(jax.random.fold_in(key, number)) if callable(tree) else tree  # noqa: E731
        return make(params, 0), make({} if buffers is None else buffers, 1)

    def run(params, state, batch, train, key):
        args, kwargs = read_batch(batch, inputs, preprocess)
        extra = mode_arguments(function, train, kwargs)
        if "key" in inspect.signature(function).parameters and "key" not in kwargs:
            extra["key"] = key
        if buffers is None:
            return to_outputs(function(params, *args, **kwargs, **extra), output, title), state
        result, changed = function(params, state, *args, **kwargs, **extra)
        return to_outputs(result, output, title), changed if train else state

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        outputs, buffers = run(params, buffers, batch, train, key)
        return outputs.replace(taps=own_taps(outputs, taps, model=title)), buffers

    def paths(batch):
        return dict(jax.eval_shape(lambda p, b, x: run(p, b, x, False, None)[0].taps, *weights, batch))

    weights = init(jax.random.key(0)) if held and not callable(buffers) else jax.eval_shape(init, jax.random.key(0))
    return Model(
        init=init,
        apply=apply,
        params=weights[0],
        buffers=weights[1],
        paths=paths,
        preprocess=preprocess,
        couples_batch=couples_batch,
        name=title,
    )


def own_taps(outputs: Outputs, wanted, *, model: str) -> dict[str, Any]:
    """The requested ones of the taps that `Outputs` already hold."""
    for text in wanted:
        if text not in outputs.taps:
            raise InputError(f"tap {text!r}: {model} has no such output{nearest(text, outputs.taps)}")
    return {text: outputs.taps[text] for text in wanted}
