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
def recording(module: nnx.Module, wanted: Mapping[str, Iterable[str]] | None) -> Iterator[None]:
    """Within, the wanted methods of the wanted modules (None: all) sow what they return.

    ``nnx.capture(method_outputs=…)`` records every method that the module's own class defines, and breaks static methods; this
    records inherited ones too and only what is asked for. Classes are changed while a trace lasts, hence the lock.
    """
    methods: dict[type, set[str]] = {}
    for path, part in nnx.iter_modules(module):
        names = _public(type(part)) if wanted is None else wanted.get("/".join(map(str, path)), ())
        names = {name for name in names if _is_method(type(part), name)}
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
            # A raw lax.scan or jax.checkpoint around a module it closes over hides what is inside.
            with contextlib.suppress(errors.TraceContextError):
                nnx.Module.sow(self, nnx.Intermediate, name, tap.Captured(result))
        return result

    with contextlib.suppress(AttributeError, TypeError):
        functools.update_wrapper(recorded, method)
    return recorded


_BASE = frozenset(name for cls in nnx.Module.__mro__ for name in vars(cls))


def _is_method(cls: type, name: str) -> bool:
    member = inspect.getattr_static(cls, name, None)
    return callable(member) and not isinstance(member, staticmethod | classmethod | type)


def _public(cls: type) -> set[str]:
    names = {name for base in cls.__mro__ for name in vars(base) if not name.startswith("_") and name not in _BASE}
    return names | {tap.CALL}


def calls(captured: Any) -> dict[tap.Key, tuple]:
    """What `nnx.capture` gave, by module path and method: a tuple with one value for each call."""
    found: dict[tap.Key, tuple] = {}
    for where, variable in nnx.to_flat_state(captured):
        value = variable.get_raw_value()
        found["/".join(map(str, where[:-1])), str(where[-1])] = value if isinstance(value, tuple) else (value,)
    return found
