"""Methods in two stages: a loss that only initialises the student, then ordinary training."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jkd.recipe import Recipe

if TYPE_CHECKING:
    from jkd.config import Run


def two_stages(name: str, run: Run, initial: Recipe, *, steps: int, **changes: Any) -> dict[str, Run | Callable[..., Any]]:
    """Two nodes of an `Experiment`: ``{name}_initial`` trains the student with another recipe, ``name`` is the run from there.

    ``Experiment(teacher=…, **two_stages("ab", run, AB(…), steps=2000))`` where ``run`` is `Supervised` (or any other recipe).

    Args:
        name: of the second node, whose product counts.
        run: the second stage.
        initial: the recipe of the first stage (`AB`, `FSP`, a hint without labels).
        steps: of the first stage.
        changes: other fields of the first stage's run, its ``teacher`` for example.
    """
    from jkd import teachers
    from jkd.config import Ensemble, dependencies

    first = dataclasses.replace(run, recipe=initial, steps=steps, **changes)

    def second(**artifacts: Any) -> Run:
        teacher = run.teacher
        if isinstance(teacher, (str, Ensemble)):
            teacher = teachers.named(teacher, artifacts)
        return dataclasses.replace(run, student=artifacts[f"{name}_initial"], teacher=teacher)

    # an experiment reads from a function's parameters which earlier nodes it needs
    needed = dict.fromkeys((f"{name}_initial", *dependencies(run)))
    parameters = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in needed]
    second.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return {f"{name}_initial": first, name: second}
