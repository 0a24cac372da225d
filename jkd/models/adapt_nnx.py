"""Any Flax NNX module, unmodified, as a Model: its Variables become plain trees, its random streams are rebuilt from a key."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jkd.errors import InputError, nearest
from jkd.models import taps as tap
from jkd.models.adapt import MODES, Inputs, arguments, mode_arguments, read_batch, shapes_of, to_outputs, typed_key
from jkd.models.nnx_capture import calls, everything, methods, recording
from jkd.models.nnx_network import Network
from jkd.types import Model, Outputs, Preprocess, subtree


def from_nnx(
    module: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
    *,
    inputs: Inputs | None = None,
    output: Callable[[Any], Outputs] | None = None,
    preprocess: Preprocess | None = None,
    name: str | None = None,
    couples_batch: bool | None = None,
) -> Model:
    """A Model from an NNX module that knows nothing of jkd.

    ``params`` are the values of its ``nnx.Param``, ``buffers`` those of all other Variables (``BatchStat``, …) and bare arrays,
    both as nested dicts whose keys are attribute names and list positions (``params["blocks"]["0"]["kernel"]``). Random streams
    (``nnx.Rngs``, the one inside ``nnx.Dropout``) are in neither: ``apply`` rebuilds them from its ``key``. The module that was
    passed is never changed, and its parameters are not copied.

    ``train`` sets the mode attributes (``deterministic``, ``use_running_average``, ``training``, …) of all its modules, and is
    passed to ``__call__`` where that takes ``train``, ``deterministic`` or the like. With ``train=False`` buffers come back
    unchanged.

    For bfloat16 compute build an ``nnx.BatchNorm`` with ``dtype=jnp.bfloat16``: without a dtype its float32 statistics make its
    output, and all that follows, float32.

    Args:
        module: an instance, whose weights the Model then holds; or a constructor, called as ``constructor(rngs)`` (by keyword
            where its parameter is called ``rngs``), so that ``jit(model.init, out_shardings=…)`` creates parameters sharded.
        inputs: ``batch -> call arguments`` (a tuple is positional, a dict keyword arguments); default: the preprocessed
            ``batch["image"]``, else ``batch["tokens"]``.
        output: ``result -> Outputs``; default: an array is logits, `Outputs` stay.
        preprocess: how the module wants its images; None: as float 0..1.
        name: for tables and messages; default: the class's name.
        couples_batch: default: whether it holds an ``nnx.BatchStat``.

    Raises:
        InputError: neither a module nor a constructor of one.
    """
    construct: Callable[[nnx.Rngs], nnx.Module] | None = None
    if isinstance(module, nnx.Module):
        sample = module
    else:
        construct = make = _constructor(module)
        # Annotations for flax's own eager sharding would demand a mesh here; placing arrays is the engine's part.
        with nnx.use_eager_sharding(False):
            sample = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    network = Network.of(sample)
    weights = network.split(sample)
    if construct is None and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(weights)):
        raise InputError(f"from_nnx: this {type(sample).__name__} holds shapes, not weights; pass its constructor")

    def init(key):
        if construct is None:
            return weights
        with nnx.use_eager_sharding(False):
            return network.split(construct(nnx.Rngs(typed_key(key))))

    return _model(
        network,
        weights,
        init,
        read=functools.partial(read_batch, inputs=inputs, preprocess=preprocess),
        output=output,
        preprocess=preprocess,
        title=name or type(sample).__name__,
        couples_batch=couples_batch,
    )


def _constructor(module: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    if not callable(module) or hasattr(module, "init_with_output"):
        hint = "; pass Linen modules to from_linen" if hasattr(module, "init_with_output") else ""
        raise InputError(f"from_nnx: {type(module).__name__} is neither an nnx.Module nor a constructor of one{hint}")
    inner = module
    while isinstance(inner, functools.partial):
        inner = inner.func
    # Of a class the signature of __init__: nnx's metaclass hides it.
    named = "rngs" in inspect.signature(getattr(inner, "__init__") if isinstance(inner, type) else inner).parameters  # noqa: B009

    def construct(rngs):
        made = module(rngs=rngs) if named else module(rngs)
        if not isinstance(made, nnx.Module):
            raise InputError(f"from_nnx: the constructor gave {type(made).__name__}; it must return an nnx.Module")
        # A bare array attribute is data, but flax takes a traced one for a static attribute, and would leak the tracer.
        for _, node in nnx.iter_graph(made):
            if isinstance(node, nnx.Pytree):
                for attribute, value in list(vars(node).items()):
                    if isinstance(value, jax.core.Tracer):
                        setattr(node, attribute, nnx.data(value))
        return made

    return construct


def _model(network: Network, weights, init, *, read, output, preprocess, title, couples_batch, method=tap.CALL) -> Model:
    def run(params, buffers, batch, wanted: dict[str, set[str]], train, key):
        if key is None and train and network.random:
            raise InputError(f"{title}: apply(train=True) needs key=, because the model draws random numbers (dropout)")
        key = jax.random.key(0) if key is None else typed_key(key)
        module = network.build(params, buffers, key)
        _set_mode(module, train)
        args, kwargs = read(batch)
        kwargs |= mode_arguments(getattr(type(module), method), train, kwargs)
        with recording(module, wanted):
            # Always under capture: a module that sows would otherwise warn, and change its own structure.
            call = nnx.capture(lambda module: getattr(module, method)(*args, **kwargs), nnx.Intermediate)
            result, captured = call(module)
        new = network.updated(module, buffers) if train else buffers
        return result, calls(captured), new

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        wanted = [tap.parse(text) for text in taps]
        named: dict[str, set[str]] = {}
        for one in wanted:
            named.setdefault(one.path, set()).add(one.method)
        try:
            result, captured, buffers = run(params, buffers, batch, named, train, key)
        except (TypeError, ValueError):
            # A scan that won't have taps inside it: then the wrong tap is what to name.
            tap.require(wanted, paths(shapes_of(batch)) if wanted else (), model=title)
            raise
        outputs = to_outputs(result, output, title)
        found = tap.select(wanted, captured, lambda: paths(shapes_of(batch)), model=title)
        return outputs.replace(taps={**outputs.taps, **found}), buffers

    def paths(batch):
        def captured(wanted):
            return jax.eval_shape(lambda p, b, x: run(p, b, x, wanted, False, None)[1], *weights, batch)

        captured({})  # a batch that does not fit fails here, with its own error
        return tap.shapes(everything(captured, methods(network.shapes())))

    def submodule(path):
        part, method = _part(network, path, title)
        cut = lambda trees: tuple(subtree(tree, path) for tree in trees)  # noqa: E731
        return _model(
            part,
            cut(weights),
            lambda key: cut(init(key)),
            read=arguments,
            output=None,
            preprocess=None,
            title=f"{title}/{path}",
            couples_batch=None,
            method=method,
        )

    return Model(
        init=init,
        apply=apply,
        params=weights[0],
        buffers=weights[1],
        paths=paths,
        submodule=submodule,
        preprocess=preprocess,
        couples_batch=network.batch_statistics if couples_batch is None else couples_batch,
        name=title,
    )


def _part(network: Network, path: str, title: str) -> tuple[Network, str]:
    where = tap.parse(path)
    modules = {"/".join(map(str, at)): module for at, module in nnx.iter_modules(network.shapes()) if at}
    if where.path not in modules or where.call is not None or where.layer is not None:
        raise InputError(f"submodule({path!r}): {title} has no such module{nearest(where.path, modules)}")
    module = modules[where.path]
    if not callable(getattr(module, where.method, None)):
        raise InputError(f"submodule({path!r}): {type(module).__name__} has no method {where.method!r}")
    part = Network.of(module)
    within = tuple(where.path.split("/"))
    for kind, names in part.names.items():
        if missing := {within + name for name in names} - network.names[kind]:
            shared = "/".join(min(missing))
            raise InputError(f"submodule({path!r}): {shared!r} is shared with another part of {title}, so it can't be cut out")
    return part, where.method


def _set_mode(module: nnx.Module, train: bool) -> None:
    for _, part in nnx.iter_modules(module):
        for name, when_training in MODES.items():
            if name in vars(part) and isinstance(vars(part)[name], bool | None):
                setattr(part, name, when_training == train)
