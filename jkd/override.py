"""``--set``: one value of a config, changed from the command line and checked against what stands there."""

from __future__ import annotations

import ast
import collections.abc
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jkd.errors import InputError, nearest

if TYPE_CHECKING:
    from jkd.config import Experiment


@dataclasses.dataclass(frozen=True)
class Set:
    """One ``--set`` argument.

    Args:
        text: as it was given.
        name: a parameter of config(), or the node of a field (``*`` for every run).
        path: the field, from outside in; empty for a parameter.
        raw: the value's text.
    """

    text: str
    name: str
    path: tuple[str, ...]
    raw: str

    @classmethod
    def parse(cls, text: str) -> Set:
        """Raises: InputError: not of the form ``name=value``."""
        target, equals, raw = text.partition("=")
        name, *path = target.strip().split(".")
        if not equals or not name or not all(path):
            raise InputError(f"--set {text}: write name=value, node.field=value or '*.field=value'")
        return cls(text, name, tuple(path), raw.strip())

    def refuse(self, why: str) -> InputError:
        return InputError(f"--set {self.text}: {why}")


def arguments(function: Callable[..., Any], sets: Sequence[Set]) -> dict[str, Any]:
    """Keyword arguments for a config function.

    Raises:
        InputError: no such parameter, a value of another type than the default's, a parameter without a value.
    """
    accepted = inspect.signature(function).parameters
    named = {name: each for name, each in accepted.items() if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)}
    open_ended = any(each.kind is each.VAR_KEYWORD for each in accepted.values())
    given: dict[str, Any] = {}
    for each in sets:
        if each.name not in named and not open_ended:
            raise each.refuse(_no_parameter(each.name, named))
        parameter = named.get(each.name)
        default = None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default
        hint = Any if parameter is None else _evaluated(parameter.annotation, getattr(function, "__globals__", {}))
        given[each.name] = _value(each, each.name, default, hint)
    missing = [name for name, each in named.items() if each.default is inspect.Parameter.empty and name not in given]
    if missing:
        raise InputError(f"config() needs a value for {missing[0]!r}: --set {missing[0]}=… (or give it a default)")
    return given


def _no_parameter(name: str, named: Mapping[str, Any]) -> str:
    from jkd.config import Run

    message = f"config() has no parameter {name!r}{nearest(name, named)}"
    if name in {field.name for field in dataclasses.fields(Run)}:
        message += f" (a field of one run is node.{name}=…, of all runs '*.{name}=…')"
    return message


def field(experiment: Experiment, each: Set) -> Experiment:
    """The experiment with one field of one run (or of all) changed.

    Raises:
        InputError: no such node or field, a node that is no Run, or a value that the field does not take.
    """
    from jkd.config import Experiment, Run

    nodes = experiment.nodes
    runs = [name for name, node in nodes.items() if isinstance(node, Run)]
    if each.name == "*":
        chosen = runs
        if not chosen:
            raise each.refuse("the experiment has no Run")
    elif each.name not in nodes:
        raise each.refuse(f"the experiment has no node {each.name!r}{nearest(each.name, nodes)}")
    elif each.name not in runs:
        raise each.refuse(
            f"{each.name} is a function and has no fields to set; change it in the config, or set a run's{_list(runs)}"
        )
    else:
        chosen = [each.name]
    changed = {name: _changed(nodes[name], each.path, each, name) for name in chosen}
    try:
        return Experiment(**{**nodes, **changed})
    except InputError as error:  # a teacher that is no earlier node
        raise each.refuse(str(error)) from error


def _list(names: Sequence[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _changed(node: Any, path: tuple[str, ...], each: Set, where: str) -> Any:
    """``node`` with the value at ``path`` replaced; every container on the way is copied."""
    name, rest = path[0], path[1:]
    there = _children(node, where, each)
    if name not in there:
        raise each.refuse(f"{where} ({type(node).__name__}) has no field {name!r}{nearest(name, there)}")
    below = f"{where}.{name}"
    value = _changed(there[name], rest, each, below) if rest else _value(each, below, there[name], _hint(node, name))
    try:
        if isinstance(node, Mapping):
            return {**node, name: value}
        if isinstance(node, (tuple, list)):
            return type(node)(value if i == int(name) else old for i, old in enumerate(node))
        return dataclasses.replace(node, **{name: value})
    except (InputError, TypeError, ValueError) as error:
        raise each.refuse(str(error)) from error


def _children(node: Any, where: str, each: Set) -> dict[str, Any]:
    """What can be set inside a value, by name."""
    from jkd.types import Model

    if dataclasses.is_dataclass(node) and not isinstance(node, (type, Model)):
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node) if field.init}
    if isinstance(node, Mapping):
        return {str(key): value for key, value in node.items()}
    if isinstance(node, (tuple, list)):
        return {str(place): value for place, value in enumerate(node)}
    raise each.refuse(f"{where} is {_show(node)}, which has no fields to set")


def _hint(node: Any, name: str) -> Any:
    """The type that a dataclass's field is annotated with; None where that cannot be known."""
    if not dataclasses.is_dataclass(node):
        return None
    kind: type = type(node)
    for owner in kind.__mro__:
        if name in inspect.get_annotations(owner):
            return _evaluated(inspect.get_annotations(owner)[name], vars(sys.modules[owner.__module__]))
    return None


def _evaluated(annotation: Any, names: Mapping[str, Any]) -> Any:
    if annotation is inspect.Parameter.empty:
        return None
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(names))
    except (NameError, AttributeError):  # imported for type checkers only
        return None


class _Unfit(Exception):
    pass


def _value(each: Set, where: str, current: Any, hint: Any) -> Any:
    """The value's text as what its annotation, or else the value that stands there, calls for."""
    value = _read(each.raw)
    if hint is None:
        hint = Any if current is None else type(current)
    try:
        return _fitted(value, each.raw, hint)
    except _Unfit:
        pass
    wanted = _written(hint)
    if dataclasses.is_dataclass(current) and not isinstance(current, type):
        inside = ", ".join(field.name for field in dataclasses.fields(current) if field.init)
        why = f"{where} takes {wanted}: change it in the config, or set its fields ({where}.{{{inside}}})"
    elif not _from_text(hint):
        why = f"{where} takes {wanted}, which cannot be written on the command line; change it in the config"
    else:
        default = f" (as its default, {current!r})" if "." not in where else ""
        why = f"{where} takes {wanted}, not {value!r}{default}"
    raise each.refuse(why)


_WORDS = {"true": True, "false": False, "none": None}


def _read(raw: str) -> Any:
    """A Python literal; true, false and none in any case; else the text itself."""
    try:
        return ast.literal_eval(raw)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return _WORDS.get(raw.lower(), raw)


def _fitted(value: Any, raw: str, hint: Any) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is object:
        return value
    if origin in (typing.Union, types.UnionType):
        if type(value) in inner:
            return value  # 50 stays an int where int | float is wanted
        for one in inner:
            try:
                return _fitted(value, raw, one)
            except _Unfit:
                continue
    elif origin is typing.Literal:
        for option in inner:
            if (type(option), option) in ((type(value), value), (str, raw)):
                return option
    elif hint in (None, types.NoneType):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is str:
        return value if isinstance(value, str) else raw
    elif hint in (int, bool, bytes):
        if type(value) is hint:
            return value
    elif (origin or hint) in (tuple, list, collections.abc.Sequence):
        if isinstance(value, (tuple, list)):
            return _sequence(value, origin or hint, inner)
    elif (origin or hint) in (dict, collections.abc.Mapping) and isinstance(value, dict):
        return value
    raise _Unfit


def _sequence(value: Sequence[Any], kind: Any, inner: tuple[Any, ...]) -> Any:
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        if len(inner) != len(value):
            raise _Unfit
        kinds = inner
    else:
        kinds = (inner[0] if inner else Any,) * len(value)
    items = [_fitted(item, str(item), one) for item, one in zip(value, kinds, strict=True)]
    return items if kind is list else tuple(items)


def _from_text(hint: Any) -> bool:
    """Whether any literal could be such a value."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_from_text(one) for one in inner)
    plain = (int, float, str, bool, bytes, tuple, list, dict, collections.abc.Sequence, collections.abc.Mapping)
    return origin is typing.Literal or hint in (Any, None, types.NoneType) or (origin or hint) in plain


def _written(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_written(one) for one in inner)
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if hint is types.NoneType:
        return "None"
    return (
        getattr(hint, "__name__", str(hint))
        if origin is None
        else str(hint).replace("typing.", "").replace("collections.abc.", "")
    )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"a {type(value).__name__}"
