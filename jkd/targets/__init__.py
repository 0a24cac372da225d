"""What is done to a teacher's answer before a loss sees it: pure functions of arrays.

Logits in, logits out. Log-probabilities are logits, so where a function makes a distribution it returns its logarithm (-inf for a
probability of 0), and any loss takes the result as ``teacher_logits``. Only `standardize` and `lelp_merge` are for the student too.
"""

from __future__ import annotations

from jkd.targets.labels import hard, lelp_merge, lelp_split, marginal, progressive, renormalised, smoothed
from jkd.targets.teachers import (
    interpolate,
    mean_logits,
    mean_probabilities,
    noise,
    prototype,
    sharpen,
    smooth,
    standardize,
)

__all__ = [
    # one teacher, or several made one
    "standardize",
    "smooth",
    "sharpen",
    "mean_probabilities",
    "mean_logits",
    "noise",
    "interpolate",
    "prototype",
    # labels
    "hard",
    "smoothed",
    "marginal",
    "renormalised",
    "progressive",
    "lelp_split",
    "lelp_merge",
]
