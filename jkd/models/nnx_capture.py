"""Recording what an NNX module's submodules return, without touching their code."""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from flax import errors, nnx

from jkd.models import taps as tap

_MARK = "_jkd_taps"
_LOCK = threading.RLock()


@contextlib.contextmanager
def recording(module: nnx.Module, wanted: Mapping[str, Iterable[str]]) -> Iterator[None]:
    """Within, the wanted methods (by module path) sow what they return.

    ``nnx.capture(method_outputs=…)`` records every method that the module's own class defines, and breaks static methods; this
    records inherited ones too and only what is asked for. Classes are changed while a trace lasts, hence the lock.
    """
    methods: dict[type, set[str]] = {}
    for path, part in nnx.iter_modules(module):
        names = {name for name in wanted.get("/".join(map(str, path)), ()) if _is_method(type(part), name)}
        if names:
            setattr(part, _MARK, frozenset(names))
            methods.setdefault(type(part), set()).update(names)
    with _LOCK, contextlib.ExitStack() as undo:
        for cls, names in methods.items():
            for name in names:
                own = cls.__dict__.get(name)
                recorder = _recorder(cls, name, inspect.getattr_static(cls, name))
                undo.callback(*((delattr, cls, name) if own is None else (setattr, cls, name, own)))
                setattr(cls, name, recorder)
        yield


def _recorder(cls: Any, name: str, method: Any) -> Callable:
    def recorded(self: Any, *args, **kwargs):
        bound = method.__get__(self, type(self)) if hasattr(method, "__get__") else functools.partial(method, self)
        result = bound(*args, **kwargs)
        # Only for instances of this very class: a subclass that calls super() is recorded once, by its own recorder.
        if type(self) is cls and name in vars(self).get(_MARK, ()) and tap.Captured.fits(result):
            # A raw lax.scan or jax.checkpoint around a module it closes over hides what is inside. sow would leak it: setting
            # the variable to what it is asks whether this is still the trace that it was made in.
            with contextlib.suppress(errors.TraceContextError):
                for variable in self.__captures__:
                    variable.set_raw_value(variable.get_raw_value())
                nnx.Module.sow(self, nnx.Intermediate, name, tap.Captured(result))
        return result

    with contextlib.suppress(AttributeError, TypeError):
        functools.update_wrapper(recorded, method)
    return recorded


_BASE = frozenset(name for cls in nnx.Module.__mro__ for name in vars(cls))


def _is_method(cls: type, name: str) -> bool:
    member = inspect.getattr_static(cls, name, None)
    return callable(member) and not isinstance(member, staticmethod | classmethod | type)


def methods(module: nnx.Module) -> dict[str, set[str]]:
    """The public methods of every module in this one, by its path."""
    found = {}
    for path, part in nnx.iter_modules(module):
        names = {name for base in type(part).__mro__ for name in vars(base) if not name.startswith("_") and name not in _BASE}
        found["/".join(map(str, path))] = names | {tap.CALL}
    return found


def everything(run: Callable[[dict[str, set[str]]], dict[tap.Key, tuple]], wanted: dict[str, set[str]]) -> dict[tap.Key, tuple]:
    """``run(wanted)`` where that can be recorded, else what remains without the modules that can't.

    ``nnx.scan`` with a module's state as carry (``nnx.RNN``) allows nothing new in that state. Which modules that concerns
    shows only when it fails, so the wanted ones are halved until what fails is one module.
    """
    try:
        return run(wanted)
    except (TypeError, ValueError):
        if not wanted:
            raise
    if len(wanted) == 1:
        return {}
    names = sorted(wanted)
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return {key: value for half in halves for key, value in everything(run, {name: wanted[name] for name in half}).items()}


def calls(captured: Any) -> dict[tap.Key, tuple]:
    """What `nnx.capture` gave, by module path and method: a tuple with one value for each call."""
    found: dict[tap.Key, tuple] = {}
    for where, variable in nnx.to_flat_state(captured):
        value = variable.get_raw_value()
        found["/".join(map(str, where[:-1])), str(where[-1])] = value if isinstance(value, tuple) else (value,)
    return found
