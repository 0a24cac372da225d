"""The table that drives every check of a public loss: one `Case` for each loss (and for each notable setting of it).

A case says how to draw inputs, what the value must be (a NumPy formula written from the paper) and which properties hold.
`test_table.py` runs them all. Rows live in ``cases_*.py``, formulas in ``formulas_*.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from jkd import losses, targets

Inputs = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One loss with one setting.

    Args:
        name: the public function's name, then optionally ``/setting``.
        inputs: ``inputs(rng, leading, size) -> {argument: array}`` in the order of the call; floats are float64 and are
            rounded by the checks that want less. ``size`` is the number of classes or channels.
        formula: ``formula(**inputs, **hyper)`` in float64 NumPy, written from the maths and not by calling jkd.
        hyper: keyword arguments.
        keywords: names of inputs that are passed by keyword.
        output: picks the value out of what the function returns.
        size: the usual ``size``.
        leading: leading shapes that the formula is tried at; the first that is not ``()`` serves the checks of bad input.
        rows: the leading shape of all other checks, so that they share a program; its first axis divides by 8 devices.
        shared: inputs without the leading axes.
        couples: one row's value depends on other rows.
        ordered: the order of rows matters.
        gradient: inputs that a gradient is checked for; default the first.
        smooth: False where the loss has kinks at random inputs, or stops gradients on purpose, so that differences of values
            are not its gradient.
        twins: ``{student input: teacher input}``: where they are equal the value is ``at_twins`` with zero gradient; None where
            the loss has no such point.
        at_twins: the value there.
        twins_tolerance: what float64 leaves of 1 - 1 and of log(x / x).
        flat_at_twins: the gradient is zero there too; False for a kink (an absolute value, a norm).
        invariances: ``{meaning: change(rng, inputs) -> inputs}``, changes that keep the value.
        invariances_tolerance: relative, what a small number in a denominator leaves of them.
        extremes: ``{meaning: change(rng, inputs) -> inputs}`` beyond the common ones; value and gradient stay finite.
        plain_extremes: False leaves out the common ones (inputs that are no logits or features).
        masked_class: what -inf logits or scores mean. "dropped": -inf on both sides is a class that is not there; "finite": no
            more than that value and gradient stay finite; "": nothing.
        where: ``(argument, axis)``: masking along that axis equals dropping those rows.
        bad: ``{meaning: (change(inputs) -> inputs, exception, pattern)}``.
    """

    name: str
    inputs: Callable[[np.random.Generator, tuple[int, ...], int], Inputs]
    formula: Callable[..., np.ndarray]
    hyper: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keywords: tuple[str, ...] = ()
    output: Callable[[Any], Any] = lambda value: value
    size: int = 7
    leading: tuple[tuple[int, ...], ...] = ((), (5,), (2, 3), (2, 2, 3))
    rows: tuple[int, ...] = (16,)
    shared: tuple[str, ...] = ()
    couples: bool = False
    ordered: bool = False
    gradient: tuple[str, ...] | None = None
    smooth: bool = True
    twins: Mapping[str, str] | None = None
    at_twins: float = 0.0
    flat_at_twins: bool = True
    twins_tolerance: float = 1e-12
    invariances: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    invariances_tolerance: float = 1e-9
    extremes: Mapping[str, Callable] = dataclasses.field(default_factory=dict)
    plain_extremes: bool = True
    masked_class: Literal["", "finite", "dropped"] = ""
    where: tuple[str, int] | None = None
    bad: Mapping[str, tuple[Callable, type[Exception], str]] = dataclasses.field(default_factory=dict)

    @property
    def function(self) -> Callable:
        name = self.name.split("/")[0]
        return getattr(losses if hasattr(losses, name) else targets, name)

    @property
    def usual(self) -> tuple[int, ...]:
        return next(shape for shape in self.leading if shape)

    @functools.cached_property
    def arguments(self) -> tuple[str, ...]:
        """Names of the inputs in the order of the call (jit and device_put sort a dict's keys)."""
        return tuple(self.draw())

    @property
    def gradient_of(self) -> tuple[str, ...]:
        return self.arguments[:1] if self.gradient is None else self.gradient

    def rng(self, salt: int = 0) -> np.random.Generator:
        """A stream of its own for each case, the same on every run."""
        return np.random.default_rng(zlib.crc32(self.name.encode()) + salt)

    def draw(self, leading: tuple[int, ...] | None = None, *, size: int | None = None, salt: int = 0) -> Inputs:
        return self.inputs(self.rng(salt), self.rows if leading is None else leading, self.size if size is None else size)

    def call(self, inputs: Mapping[str, Any], **more: Any) -> Any:
        """The loss, as a user calls it."""
        positional = [inputs[name] for name in self.arguments if name not in self.keywords]
        named = {name: inputs[name] for name in self.keywords if name in inputs}
        return self.output(self.function(*positional, **named, **self.hyper, **more))

    def expected(self, inputs: Inputs) -> np.ndarray:
        return np.asarray(self.formula(**inputs, **self.hyper), np.float64)


def is_float(array: Any) -> bool:
    return np.issubdtype(np.asarray(array).dtype, np.floating)


def cast(inputs: Inputs, dtype: Any) -> Inputs:
    """Float inputs in another dtype; labels, ids and keys stay."""
    return {name: np.asarray(value).astype(dtype) if is_float(value) else value for name, value in inputs.items()}


def changed(inputs: Inputs, **changes: Callable[[np.ndarray], np.ndarray]) -> Inputs:
    return {name: changes[name](value) if name in changes else value for name, value in inputs.items()}


SIDES = ("student", "teacher", "weak")
SCORES = ("logits", "scores", "similarities")


def with_masked(inputs: Inputs, classes: list[int], sides: tuple[str, ...] = SIDES) -> Inputs:
    """Those sides' logits (or scores) of some classes at -inf; labels name a class that stays."""
    kept = np.setdiff1d(np.arange(min(v.shape[-1] for n, v in inputs.items() if n.endswith(SCORES))), classes)
    masked = dict(inputs)
    for name, value in inputs.items():
        if name.endswith(SCORES) and name.startswith(sides):
            masked[name] = value.copy()
            masked[name][..., classes] = -np.inf
        elif name == "labels" and not is_float(value):
            masked[name] = kept[value % len(kept)].astype(value.dtype)
    return masked


def without(inputs: Inputs, classes: list[int]) -> Inputs:
    """The same, with those classes left out of every array that has a class axis."""
    first, *_ = inputs.values()
    kept = np.setdiff1d(np.arange(first.shape[-1]), classes)
    return {
        name: np.delete(value, classes, -1)
        if value.ndim == first.ndim
        else np.searchsorted(kept, value)
        if name == "labels"
        else value
        for name, value in inputs.items()
    }


def common_extremes(case: Case) -> dict[str, Callable[[np.random.Generator, Inputs], Inputs]]:
    """What every loss must survive: +-1e4 everywhere, all zeros, and student equal to teacher."""

    def large(rng, inputs):
        return {n: rng.choice([-1e4, 0.0, 1e4], size=v.shape) if is_float(v) else v for n, v in inputs.items()}

    def zero(rng, inputs):
        return {n: np.zeros_like(v) if is_float(v) else v for n, v in inputs.items()}

    def constant(rng, inputs):
        return {n: np.full_like(v, 1e4) if is_float(v) else v for n, v in inputs.items()}

    def identical(rng, inputs):
        return inputs | {student: inputs[teacher] for student, teacher in (case.twins or {}).items()}

    def one_hot(rng, inputs):
        """A teacher certain of one class against a student certain of another."""
        teacher = inputs["teacher_logits"]
        return inputs | {
            "teacher_logits": 1e4 * np.eye(teacher.shape[-1])[np.zeros(teacher.shape[:-1], int)],
            "student_logits": 1e4 * np.eye(teacher.shape[-1])[np.ones(teacher.shape[:-1], int)],
        }

    def masked(rng, inputs):
        """Padded classes beside the largest logits."""
        return with_masked(large(rng, inputs), [0, case.size - 1])

    found: dict[str, Callable] = {}
    if case.plain_extremes:
        found |= {"large": large, "zero": zero, "constant": constant}
        if "teacher_logits" in case.draw():
            found["one_hot"] = one_hot
        if case.twins:
            found["identical"] = identical
        if case.masked_class:
            found["masked"] = masked
    return found | dict(case.extremes)


# --- inputs and changes that many rows share ----------------------------------------------------------------------------


def logit_pair(rng, leading, size) -> Inputs:
    return {"student_logits": 2 * rng.normal(size=(*leading, size)), "teacher_logits": 2 * rng.normal(size=(*leading, size))}


def logits_and_labels(rng, leading, size) -> Inputs:
    return logit_pair(rng, leading, size) | {"labels": np.asarray(rng.integers(0, size, size=leading), np.int32)}


def shift_student(rng, inputs):
    """Logits are defined up to a constant for each position."""
    logits = inputs["student_logits"]
    return inputs | {"student_logits": logits + rng.normal(size=(*logits.shape[:-1], 1))}


def shift_teacher(rng, inputs):
    logits = inputs["teacher_logits"]
    return inputs | {"teacher_logits": logits + rng.normal(size=(*logits.shape[:-1], 1))}


def permute_classes(rng, inputs):
    """The same renaming of classes on both sides, labels too."""
    size = inputs["student_logits"].shape[-1]
    order = rng.permutation(size)
    renamed = {n: v[..., order] if is_float(v) and v.shape[-1:] == (size,) else v for n, v in inputs.items()}
    if "labels" in inputs and not is_float(inputs["labels"]):
        renamed["labels"] = np.argsort(order)[inputs["labels"]].astype(np.int32)
    return renamed


SHIFTS = {"shift_student": shift_student, "shift_teacher": shift_teacher}
TWIN_LOGITS = {"student_logits": "teacher_logits"}

BAD_LOGITS: dict[str, tuple[Callable, type[Exception], str]] = {
    "classes": (
        lambda inputs: changed(inputs, teacher_logits=lambda x: x[..., :-1]),
        ValueError,
        r"student_logits and teacher_logits must have the same number of classes.*float32\[5,7\] and float32\[5,6\]",
    ),
    "rank": (
        lambda inputs: changed(inputs, student_logits=lambda x: x[0]),
        ValueError,
        r"teacher_logits must have the shape of student_logits float32\[7\], got float32\[5,7\]",
    ),
    "scalar": (
        lambda inputs: changed(inputs, student_logits=lambda x: x[0, 0]),
        (TypeError, ValueError),
        r"student_logits must be",
    ),
    "empty": (
        lambda inputs: changed(inputs, student_logits=lambda x: x[..., :0], teacher_logits=lambda x: x[..., :0]),
        ValueError,
        r"student_logits must have a non-empty classes axis.*float32\[5,0\]",
    ),
    "dtype": (
        lambda inputs: changed(inputs, teacher_logits=lambda x: x.astype(np.complex64)),
        TypeError,
        r"teacher_logits must hold real numbers, got complex64",
    ),
}
BAD_LABELS = BAD_LOGITS | {
    "label_dtype": (
        lambda inputs: changed(inputs, labels=lambda x: x.astype(np.float32)),
        TypeError,
        r"labels must be integers.*got float32\[5\]",
    ),
    "label_shape": (
        lambda inputs: changed(inputs, labels=lambda x: x[:-1]),
        ValueError,
        r"labels must have the shape of student_logits float32\[5,7\] without its last axis, got int32\[4\]",
    ),
}
