"""What stands for code that no import reaches (lambdas, functions inside functions, all that a config file defines): its source.

Comments, layout and docstrings don't count. What it names of its own file counts with it, so that an edited helper is another
recipe. Where there is no source, the bytecode stands for it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from typing import Any

MODULE = "jkd_config_"
"""Prefix of the name of the module that a config file becomes."""


def sha(text: str) -> str:
    """Eight hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def is_local(thing: Any) -> bool:
    """Whether no import reaches a function or class: a lambda, one inside a function, or one of a config file or a script."""
    return "<" in thing.__qualname__ or _is_config(thing.__module__)


def name(thing: Any) -> str:
    """``module:qualname``; whatever the config file is called, its module is ``config``: a copy defines the same things."""
    return f"{'config' if _is_config(thing.__module__) else thing.__module__}:{thing.__qualname__}"


def code(thing: Any) -> str:
    """A checksum of a local function or class, of its local bases, and of what they name of their own file."""
    parts: dict[int, str] = {}
    _collect(thing, parts)
    return sha("\n".join(sorted(parts.values())))


def _is_config(module: str | None) -> bool:
    return module == "__main__" or str(module).startswith(MODULE)


def _collect(thing: Any, parts: dict[int, str]) -> None:
    if id(thing) in parts:
        return
    parts[id(thing)] = _source(thing)
    if isinstance(thing, type):
        for base in thing.__mro__[1:]:
            if is_local(base):
                _collect(base, parts)
    for function in _functions(thing):
        for each in _names(function.__code__):
            other = function.__globals__.get(each)
            if isinstance(other, (types.FunctionType, type)):
                if is_local(other):
                    _collect(other, parts)
            elif isinstance(other, (int, float, str, tuple)) and _is_config(function.__module__):
                parts[id(thing)] += f"\n{each} = {other!r}"


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    if isinstance(thing, types.FunctionType):
        yield thing
    elif isinstance(thing, type):
        for each in vars(thing).values():
            function = getattr(each, "fget", None) or getattr(each, "__func__", each)  # properties, class and static methods
            if isinstance(function, types.FunctionType) and function.__module__ == thing.__module__:
                yield function


def _names(code: types.CodeType) -> set[str]:
    inner = [_names(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*inner)


def _source(thing: Any) -> str:
    function = thing if isinstance(thing, types.FunctionType) else None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):  # typed at a prompt, or a lambda whose lines don't parse by themselves
        return _bytecode(function) if function else "\n".join(map(_bytecode, _functions(thing)))
    if function is not None and function.__name__ == "<lambda>":
        found = [node for node in ast.walk(tree) if isinstance(node, ast.Lambda)]  # its lines hold more than the lambda
        return ast.unparse(found[0]) if len(found) == 1 else _bytecode(function)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _bytecode(function: types.FunctionType) -> str:
    def read(value: Any) -> Any:
        if isinstance(value, types.CodeType):
            return [value.co_code.hex(), [read(each) for each in value.co_consts], value.co_names, value.co_varnames]
        # the order of a set of strings differs between processes
        return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)

    return f"{sys.version_info[:2]} {read(function.__code__)}"
