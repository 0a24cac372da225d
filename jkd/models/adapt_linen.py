"""Any Flax Linen module, unmodified, as a Model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, errors, traverse_util
from flax import linen as nn

from jkd.errors import InputError
from jkd.models import taps as tap
from jkd.models.adapt import MODES, Inputs, arguments, mode_arguments, read_batch, shapes_of, to_outputs, typed_key
from jkd.types import Batch, Model, Outputs, Preprocess, Tree

_CAPTURED = "intermediates"


def from_linen(
    module: nn.Module,
    variables: Mapping[str, Any] | None = None,
    *,
    example: Batch | None = None,
    inputs: Inputs | None = None,
    output: Callable[[Any], Outputs] | None = None,
    preprocess: Preprocess | None = None,
    name: str | None = None,
    couples_batch: bool | None = None,
) -> Model:
    """A Model from a Linen module that knows nothing of jkd.

    ``params`` is the collection of that name; ``buffers`` holds all others by name (``buffers["batch_stats"]``). Random
    streams of any name are made from ``apply``'s ``key``. The mode goes to ``__call__`` where that takes ``train``,
    ``deterministic`` or the like, else to the module's field of such a name; in training all buffers are mutable.

    Args:
        module: unbound (a constructor: Linen modules hold no weights), or bound with ``module.bind(variables)``.
        variables: weights by collection, ``{"params": …, "batch_stats": …}``.
        example: a batch (arrays, or shapes as ``jax.ShapeDtypeStruct``) from which a module without weights learns the shapes
            of its parameters; the batch size doesn't matter. ``init`` runs the module on zeros of these shapes.
        inputs: ``batch -> call arguments`` (a tuple is positional, a dict keyword arguments); default: the preprocessed
            ``batch["image"]``, else ``batch["tokens"]``.
        output: ``result -> Outputs``; default: an array is logits, `Outputs` stay.
        preprocess: how the module wants its images; None: as float 0..1.
        name: for tables and messages; default: the class's name.
        couples_batch: default: whether it has a collection ``batch_stats``.

    Raises:
        InputError: no Linen module; neither weights nor an example.
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"from_linen: {type(module).__name__} is no Linen module (nnx modules go to from_nnx)")
    if module.scope is not None:
        module, variables = module.unbind()
    title = name or type(module).__name__
    read = functools.partial(read_batch, inputs=inputs, preprocess=preprocess)
    if variables is not None:
        weights = _split(variables)
        init = lambda key: weights  # noqa: E731
    elif example is not None:
        shapes = shapes_of(example)

        def init(key):
            batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            args, kwargs = read(batch)
            ready, extra = _in_mode(module, tap.CALL, False, kwargs)
            return _split(ready.init(_streams(key), *args, **(kwargs | extra)))

        weights = jax.eval_shape(init, jax.random.key(0))
    else:
        raise InputError(
            f"from_linen({title}): pass variables=, or example=batch (shapes are enough) to learn its parameters' shapes"
        )
    return _model(
        module,
        weights,
        init,
        read=read,
        output=output,
        preprocess=preprocess,
        title=title,
        couples_batch=couples_batch,
    )


def _split(variables: Mapping[str, Any]) -> tuple[Tree, Tree]:
    plain: dict[str, Any] = core.unfreeze(nn.meta.unbox(variables))
    params = plain.pop("params", {})
    return params, _by_path({kind: tree for kind, tree in plain.items() if kind != _CAPTURED and jax.tree.leaves(tree)})


def _by_path(collections: Mapping[str, Any]) -> Tree:
    """Linen's ``{"batch_stats": {"block": {"mean": x}}}`` as buffers, ``{"block": {"batch_stats:mean": x}}``.

    A part's buffers then are the subtree at the part's path, as its parameters are.
    """
    flat = traverse_util.flatten_dict(collections)
    return traverse_util.unflatten_dict({(*path, f"{kind}:{name}"): leaf for (kind, *path, name), leaf in flat.items()})


def _collections(buffers: Tree) -> dict[str, Any]:
    """The inverse of `_by_path`."""
    flat: dict[tuple[str, ...], Any] = {}
    for (*path, last), leaf in traverse_util.flatten_dict(buffers).items():
        kind, _, name = last.partition(":")
        flat[(kind, *path, name)] = leaf
    return traverse_util.unflatten_dict(flat)


def _streams(key: jax.Array) -> dict[str, jax.Array]:
    # Linen takes the stream "params" for every name that it isn't given; "dropout" is there for modules that ask has_rng.
    key = typed_key(key)
    return {"params": key, "dropout": jax.random.fold_in(key, 1)}


def _in_mode(module: nn.Module, method: str, train: bool, given: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    extra = mode_arguments(getattr(type(module), method), train, given)
    fields: dict[str, Any] = {n: value == train for n, value in MODES.items() if n in module.__dataclass_fields__ and not extra}
    fields = {n: value for n, value in fields.items() if isinstance(getattr(module, n), bool | None)}
    return (module.clone(**fields) if fields else module), extra


def _model(module, weights, init, *, read, output, preprocess, title, couples_batch, method=tap.CALL) -> Model:
    def run(params, buffers, batch, wanted: set[tap.Key] | None, train, key):
        args, kwargs = read(batch)
        ready, extra = _in_mode(module, method, train, kwargs)
        kept = _collections(buffers)
        mutable = [*(kept if train else ()), *(() if wanted == set() else (_CAPTURED,))]
        variables = {"params": params, **kept}
        streams = None if key is None else _streams(key)
        with nn.intercept_methods(_recorder(wanted)):
            try:
                result = ready.apply(variables, *args, **kwargs, **extra, method=method, rngs=streams, mutable=mutable or False)
            except errors.InvalidRngError as error:
                raise InputError(f"{title}: apply needs key=, because the model draws random numbers (dropout)") from error
        result, changed = result if mutable else (result, {})
        changed = core.unfreeze(changed)
        captured = _calls(changed.pop(_CAPTURED, {}))
        # The same dtypes, else buffers could not be carried through lax.scan.
        new = {kind: jax.tree.map(lambda o, n: n.astype(o.dtype), old, changed.get(kind, old)) for kind, old in kept.items()}
        return result, captured, _by_path(new) if train else buffers

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        wanted = [tap.parse(text) for text in taps]
        result, captured, buffers = run(params, buffers, batch, {(t.path, t.method) for t in wanted}, train, key)
        outputs = to_outputs(result, output, title)
        found = tap.select(wanted, captured, lambda: paths(shapes_of(batch)), model=title)
        return outputs.replace(taps={**outputs.taps, **found}), buffers

    def paths(batch):
        return tap.shapes(jax.eval_shape(lambda p, b, x: run(p, b, x, None, False, None)[1], *weights, batch))

    def submodule(path):
        where = tap.parse(path)
        part, name = _part(module, weights, where, title), tuple(where.path.split("/"))

        def cut(trees):
            params, buffers = trees
            return _down(params, name), _down(buffers, name)

        return _model(
            part,
            cut(weights),
            lambda key: cut(init(key)),
            read=arguments,
            output=None,
            preprocess=None,
            title=f"{title}/{path}",
            couples_batch=None,
            method=where.method,
        )

    return Model(
        init=init,
        apply=apply,
        params=weights[0],
        buffers=weights[1],
        paths=paths,
        submodule=submodule,
        preprocess=preprocess,
        couples_batch="batch_stats" in _collections(weights[1]) if couples_batch is None else couples_batch,
        name=title,
    )


def _recorder(wanted: set[tap.Key] | None) -> Callable:
    """An interceptor that sows what the wanted methods return (None: all public ones), with its rank (see `tap.Captured`)."""

    def record(next_method, args, kwargs, context):
        result = next_method(*args, **kwargs)
        module, name = context.module, context.method_name
        if name == "setup" or module.scope is None:
            return result
        public = name == tap.CALL or not name.startswith("_")
        asked = public if wanted is None else ("/".join(module.path), name) in wanted
        if asked and tap.Captured.fits(result):
            module.sow(_CAPTURED, name, tap.Captured(result))
        return result

    return record


def _calls(captured: Mapping[str, Any]) -> dict[tap.Key, tuple]:
    flat = traverse_util.flatten_dict(captured)
    return {("/".join(path), name): v if isinstance(v, tuple) else (v,) for (*path, name), v in flat.items()}


def _part(module: nn.Module, weights: tuple[Tree, Tree], where: tap.Tap, title: str) -> nn.Module:
    part: Any = module.bind({"params": weights[0], **_collections(weights[1])})
    for step in where.path.split("/"):
        attribute, _, number = step.rpartition("_")
        try:
            found = getattr(part, step, None)
            # Linen names the entries of a list or dict "<attribute>_<index or key>".
            if found is None and attribute:
                group = getattr(part, attribute)
                found = group[int(number)] if number.isdigit() and not isinstance(group, Mapping) else group[number]
        except (AttributeError, LookupError, TypeError):
            found = None
        if not isinstance(found, nn.Module):
            raise InputError(
                f"submodule({where.text!r}): {type(part).__name__} in {title} defines no such part in setup(); "
                "what a @nn.compact method makes inline can't be cut out: make it in setup(), or wrap it with from_function"
            )
        part = found
    return part.unbind()[0]


def _down(tree: Tree, path: tuple[str, ...]) -> Tree:
    for part in path:
        tree = tree.get(part, {})
    return tree
