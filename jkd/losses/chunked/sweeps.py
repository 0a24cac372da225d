"""What is summed over the vocabulary, window by window; the schedules say where the windows' logits come from.

Three sweeps: `statistics` (the normalisers, by an online log-sum-exp), `totals` (each part's value, and the sums that its gradient
needs: left out where every part's follow from the first sweep), `slopes` (the gradient by the logits of one window).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jkd.losses.chunked.heads import FLOOR, Side, Windows, loop
from jkd.losses.chunked.parts import Classes, Each, Part

Read = Callable[[Any], list[Any]]
"""``j -> [student logits, teacher logits where there is one]`` of window j, each ``[rows, columns of the window]``."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """A mix, and what it is of; every array has one row for each token.

    Args:
        student, teacher: each a `Side`, or no teacher.
        labels: int ``[tokens]``, or None.
        temperature: ``[tokens]`` where it is traced, else None.
        fields: for each part, those of its fields that are traced, ``[tokens]``.
        rows: for each part, what an `Each` reads beside logits.
        parts: without what is traced.
        fixed: the temperature where it is a Python number.
        classes: columns that are no padding.
        mesh: that everything is on.
        shards, lanes: over how many of its devices the tokens and the vocabulary are split.
    """

    # Any: a tree is also made of placeholders, truth values or dtypes in the places of its leaves
    student: Any
    teacher: Any
    labels: Any
    temperature: Any
    fields: Any
    rows: Any
    parts: tuple[Part, ...] = dataclasses.field(metadata=dict(static=True))
    fixed: Any = dataclasses.field(metadata=dict(static=True))
    classes: int = dataclasses.field(metadata=dict(static=True))
    mesh: Any = dataclasses.field(metadata=dict(static=True))
    shards: int = dataclasses.field(metadata=dict(static=True))
    lanes: int = dataclasses.field(metadata=dict(static=True))

    @property
    def tokens(self) -> int:
        return self.student.hidden.shape[0]

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @property
    def by_row(self) -> Any:
        """Everything that has one row for each token."""
        return tuple(side.hidden for side in self.sides), self.labels, self.temperature, self.fields, self.rows

    def with_rows(self, by_row: Any) -> Problem:
        """The same of other tokens."""
        hidden, labels, temperature, fields, rows = by_row
        student, *teacher = (dataclasses.replace(side, hidden=x) for side, x in zip(self.sides, hidden, strict=True))
        changed = dict(labels=labels, temperature=temperature, fields=fields, rows=rows)
        return dataclasses.replace(self, student=student, teacher=teacher[0] if teacher else None, **changed)

    def each(self, k: int) -> Callable[..., Any]:
        """Part k, an `Each`, as a function of logits."""
        part = self.parts[k]
        return lambda *logits: part.function(*logits, *self.rows[k])  # type: ignore[attr-defined]

    @property
    def summed(self) -> list[tuple[int, Part]]:
        """The parts that are sums over classes, with their places in the mix."""

        def column(value: Any) -> Any:
            return value[:, None]

        return [
            (k, dataclasses.replace(part, **jax.tree.map(column, self.fields[k])))
            for k, part in enumerate(self.parts)
            if not isinstance(part, Each)
        ]

    @property
    def single(self) -> bool:
        """Whether one sweep is enough for all values."""
        return all(type(part).online is not Part.online for _, part in self.summed)

    def view(self, part: Part) -> str:
        """Under which temperature a part reads logits."""
        return "tempered" if part.tempered and self.fixed != 1 else "plain"

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.view(part) for _, part in self.summed))

    def read_by(self, view: str) -> tuple[str, ...]:
        """Whose scores are read there."""
        teacher = any("teacher" in part.reads for _, part in self.summed if self.view(part) == view)
        return ("student", "teacher") if teacher else ("student",)

    def kelvin(self, view: str) -> Any:
        """The temperature of a view: 1, a number, or ``[tokens]``."""
        if view == "plain":
            return 1
        return self.temperature if self.fixed is None else self.fixed

    def scores(self, logits: Any, view: str) -> Any:
        if view == "plain":
            return logits
        return logits / (self.temperature[:, None] if self.fixed is None else self.fixed)


Norms = dict[str, dict[str, Any]]
"""By view: ``student`` and ``teacher``, each ``(largest score, log of the sum of exponentials less it)``, and the first moments."""


def _masked(windows: Windows, logits: list[Any], ids: Any) -> list[Any]:
    """A window's logits with padding at the floor."""
    return [jnp.where((ids >= 0)[None], x, FLOOR) for x in logits] if windows.masks else logits


def statistics(problem: Problem, windows: Windows, read: Read) -> Norms:
    """The normalisers of both sides; and, where they are enough for every value, ``expected_p``, ``expected_q`` and ``at_label``."""
    dtype = problem.student.dtype
    zeros = jnp.zeros(problem.student.hidden.shape[0], dtype)
    start = {}
    for view in problem.views:
        sides = problem.read_by(view)
        start[view] = {f"top_{side}": zeros + FLOOR for side in sides} | {f"total_{side}": zeros for side in sides}
        if problem.single:
            start[view] |= {f"moment_{side}": zeros for side in sides} | {"at_label": zeros}

    def gather(j: Any, carry: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        ids = windows.ids(j)
        masked = _masked(windows, read(j), ids)
        return {view: _gathered(problem, view, old, masked, ids) for view, old in carry.items()}

    return {view: _norms(found) for view, found in loop(windows.count, gather, start).items()}


def _gathered(problem: Problem, view: str, old: dict[str, Any], masked: list[Any], ids: Any) -> dict[str, Any]:
    """What was gathered, with one window more."""
    sides = problem.read_by(view)
    scores = {side: problem.scores(logits, view) for side, logits in zip(sides, masked, strict=False)}
    top = {side: jnp.maximum(old[f"top_{side}"], scores[side].max(-1)) for side in sides}
    fall = {side: old[f"top_{side}"] - top[side] for side in sides}
    lower = {side: scores[side] - top[side][:, None] for side in sides}
    new = {f"top_{side}": top[side] for side in sides}
    for side in sides:
        powers, scale = jnp.exp(lower[side]), jnp.exp(fall[side])
        new[f"total_{side}"] = old[f"total_{side}"] * scale + powers.sum(-1)
        if not problem.single:
            continue
        new[f"moment_{side}"] = old[f"moment_{side}"]
        if len(sides) == 2:
            # the mean of the teacher's scores less the student's under this side; both fall as larger scores are found
            moved = old[f"moment_{side}"] + old[f"total_{side}"] * (fall["teacher"] - fall["student"])
            new[f"moment_{side}"] = moved * scale + (powers * (lower["teacher"] - lower["student"])).sum(-1)
    if problem.single:
        new["at_label"] = old["at_label"]
        if problem.labels is not None:
            hit = ids[None] == problem.labels[:, None]
            new["at_label"] = old["at_label"] + jnp.where(hit, scores["student"], 0).sum(-1)
    return new


def _norms(found: dict[str, Any]) -> dict[str, Any]:
    logs = {name.removeprefix("total_"): jnp.log(total) for name, total in found.items() if name.startswith("total_")}
    norms: dict[str, Any] = {side: (found[f"top_{side}"], log) for side, log in logs.items()}
    if "at_label" in found:
        norms["at_label"] = found["at_label"] - found["top_student"] - logs["student"]
        if "teacher" in logs:
            for side, name in (("teacher", "expected_p"), ("student", "expected_q")):
                norms[name] = found[f"moment_{side}"] / found[f"total_{side}"] - logs["teacher"] + logs["student"]
    return norms


def _classes(problem: Problem, windows: Windows, norms: Norms, view: str, masked: list[Any], ids: Any) -> Classes:
    """A window's classes, as the parts of a view see them."""
    found: dict[str, Any] = {}
    for side, letter, logits in zip(problem.read_by(view), ("q", "p"), masked, strict=False):
        top, log_total = norms[view][side]
        found[f"log_{letter}"] = log = (problem.scores(logits, view) - top[:, None]) - log_total[:, None]
        found[letter] = jnp.exp(log)
    hit = None if problem.labels is None else ids[None] == problem.labels[:, None]
    return Classes(**found, hit=hit, kept=(ids >= 0)[None] if windows.masks else None)


Totals = dict[int, tuple[Any, Any, Any]]
"""By part: value, sum of its slopes by the student, and by the teacher; each ``[rows]``, without the factor T²."""


def totals(problem: Problem, windows: Windows, read: Read, norms: Norms) -> Totals:
    """What each part sums to; a sweep only where the first one did not tell."""
    if problem.single:
        return {k: part.online(norms[problem.view(part)]) for k, part in problem.summed}  # type: ignore[misc]
    zeros = jnp.zeros(problem.student.hidden.shape[0], problem.student.dtype)

    def add(j: Any, carry: Totals) -> Totals:
        ids = windows.ids(j)
        masked = _masked(windows, read(j), ids)
        seen = {view: _classes(problem, windows, norms, view, masked, ids) for view in problem.views}
        return {
            k: tuple(old + new.sum(-1) for old, new in zip(carry[k], part.summand(seen[problem.view(part)]), strict=True))
            for k, part in problem.summed
        }  # type: ignore[return-value]

    return loop(windows.count, add, {k: (zeros, zeros, zeros) for k, _ in problem.summed})


def values(problem: Problem, found: Totals) -> dict[int, Any]:
    """Each part's value ``[rows]``, T² in it."""
    squares = {view: problem.kelvin(view) ** 2 for view in problem.views}
    return {k: found[k][0] * squares[problem.view(part)] for k, part in problem.summed}


def active(wants: tuple[Side, ...]) -> int:
    """How many sides a gradient is wanted of: both, where it is the teacher's."""
    return 2 if any(want.any for want in wants[1:]) else 1


def slopes(
    problem: Problem, windows: Windows, read: Read, norms: Norms, found: Totals, coefs: Any, j: Any, active: int
) -> list[Any]:
    """The gradient of ``sum_k coefs[k] * value_k`` by the logits of window j before their cap, of the student and what else is active.

    With D a part and f its summand, ``dD / d score_c = df_c / d log q_c - q_c sum_k df_k / d log q_k``.

    Args:
        coefs: ``[parts, rows]``.
    """
    logits, ids = read(j), windows.ids(j)
    masked = _masked(windows, logits, ids)
    gradients = [jnp.zeros_like(x) for x in logits[:active]]
    for view in problem.views:
        c = _classes(problem, windows, norms, view, masked, ids)
        drift: list[Any] = [0, 0]
        for k, part in problem.summed:
            if problem.view(part) == view:
                weight = coefs[k] * problem.kelvin(view)  # T² of the value, 1/T of the scores
                for place, slope in enumerate(part.summand(c)[1 : 1 + active]):
                    gradients[place] += weight[:, None] * slope
                    drift[place] += weight * found[k][1 + place]
        for place, side in enumerate(problem.read_by(view)[:active]):
            gradients[place] -= (c.q if side == "student" else c.p) * drift[place][:, None]
    return [side.uncapped(*pair) for side, *pair in zip(problem.sides, gradients, logits, strict=False)]
