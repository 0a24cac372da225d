"""What JAX says about its compilations while one listens."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

_BUILT = "/jax/core/compile/backend_compile_duration"
_HIT = "/jax/compilation_cache/cache_hits"


@dataclasses.dataclass
class Compilations:
    """Programs that were built while `listening`.

    Args:
        names: of each, such as ``jit(step)``, in order; one that came from the persistent cache is among them.
        hits: how many came from the persistent cache.
    """

    names: list[str] = dataclasses.field(default_factory=list)
    hits: int = 0

    def of(self, name: str) -> int:
        """How often a jitted function of this name was compiled."""
        return sum(each in (name, f"jit({name})") for each in self.names)


@contextlib.contextmanager
def listening() -> Iterator[Compilations]:
    """Counts the compilations of this process for as long as the context lasts."""
    found = Compilations()

    def built(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == _BUILT:
            found.names.append(str(kwargs.get("fun_name", "")))

    def happened(event: str, **kwargs: Any) -> None:
        found.hits += event == _HIT

    jax.monitoring.register_event_duration_secs_listener(built)
    jax.monitoring.register_event_listener(happened)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(built)
        jax.monitoring.unregister_event_listener(happened)
