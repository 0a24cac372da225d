"""Array types for signatures. jaxtyping names where a type checker or a test reads them, placeholders everywhere else.

jkd needs jax and numpy only, so jaxtyping may be absent. Every module here has ``from __future__ import annotations``: an
annotation stays text until the tests' import hook (``tests/conftest.py``, which imports jaxtyping first) evaluates it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    import jax
    import numpy as np
    from jaxtyping import Bool, Float, Key, Real
    from jaxtyping import Integer as Int  # unsigned too

    Array = jax.Array | np.ndarray
    Number = float | int
    """A Python number, where a formula is chosen or an array sized by it."""
    Scalar = float | int | Real[Array, ""]
    PerPosition = float | int | Real[Array, "..."]
    """A scalar, or one value for each position (all axes of the logits but the last)."""
else:
    Array = Bool = Float = Int = Key = Number = Real = Scalar = PerPosition = Any

__all__ = ["Array", "Bool", "Float", "Int", "Key", "Number", "PerPosition", "Real", "Scalar"]
