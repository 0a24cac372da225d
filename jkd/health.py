"""What the metrics of a step say of a run's health: not finite, or of nothing at all."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jkd.config import Run
from jkd.errors import InputError

IDLE = 10
"""Steps from the first on without any loss or gradient after which nothing can be meant to count."""


class Health:
    """Watches a run from its first step on."""

    def __init__(self, run: Run):
        self._run, self._idle = run, 0

    def cause(self, step: int, found: Mapping[str, float]) -> str | None:
        """Why a step is not finite; None where it is.

        Raises:
            InputError: all steps so far had neither loss nor gradient.
        """
        if not (math.isfinite(found["loss"]) and math.isfinite(found["gradient_norm"])):
            terms = {name.removeprefix("term/"): value for name, value in found.items() if name.startswith("term/")}
            bad = [name for name, value in terms.items() if not math.isfinite(value)]
            return f"the term {bad[0]!r} is {terms[bad[0]]}" if bad else "every term is finite, a gradient is not"
        self._idle += found["loss"] == 0 == found["gradient_norm"]
        if step + 1 == self._idle == min(IDLE, self._run.steps):
            raise InputError(
                f"the first {self._idle} steps had neither loss nor gradient: nothing counts for {type(self._run.recipe).__name__} "
                "(are there labels, and examples of a weight above 0?)"
            )
        return None
