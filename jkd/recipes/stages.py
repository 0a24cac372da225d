"""Methods in stages: losses that only prepare the student, then ordinary training."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jkd.recipe import Recipe

if TYPE_CHECKING:
    from jkd.config import Run, Teacher
    from jkd.data import Data

Nodes = dict[str, "Run | Callable[..., Any]"]


def in_stages(name: str, run: Run, **earlier: Mapping[str, Any]) -> Nodes:
    """Nodes of an `Experiment`, one for each stage: each begins with the student that the one before left; the last is ``name``.

    ``Experiment(teacher=…, **in_stages("bert", run, general=dict(recipe=…, data=…), task=dict(recipe=…)))`` has the nodes
    ``bert_general``, ``bert_task`` and ``bert``.

    Args:
        name: of the last node, whose product counts.
        run: the last stage.
        earlier: by the name of the stage, in order: the fields in which its run differs from ``run``.
    """
    runs = {f"{name}_{stage}": dataclasses.replace(run, **changes) for stage, changes in earlier.items()} | {name: run}
    nodes: Nodes = {}
    for node, one in runs.items():
        before = next(reversed(nodes), None)
        nodes[node] = one if before is None else _after(before, one)
    return nodes


def two_stages(name: str, run: Run, initial: Recipe, *, steps: int, **changes: Any) -> Nodes:
    """Two nodes of an `Experiment`: ``{name}_initial`` trains the student with another recipe, ``name`` is the run from there.

    ``Experiment(teacher=…, **two_stages("ab", run, AB(…), steps=2000))`` where ``run`` is `Supervised` (or any other recipe).

    Args:
        name: of the second node, whose product counts.
        run: the second stage.
        initial: the recipe of the first stage (`AB`, `FSP`, a hint without labels).
        steps: of the first stage.
        changes: other fields of the first stage's run, its ``teacher`` for example.
    """
    return in_stages(name, run, initial=dict(recipe=initial, steps=steps, **changes))


def ernie_tiny(
    name: str, run: Run, latent: Recipe, *, pretrained: Teacher, finetuned: Teacher, general: Data, steps: tuple[int, int, int]
) -> Nodes:
    """ERNIE-Tiny's four stages as nodes of an `Experiment`: ``{name}_gd``, ``{name}_ged``, ``{name}_tad`` and ``name``.

    General distillation from the pretrained teacher, general-enhanced distillation from the fine-tuned one, both on general data;
    task-adaptive distillation from the fine-tuned one on the task's data; then task-specific distillation, with its soft and hard
    labels. From stage to stage the teacher, the data or the loss changes, one at a time.

    Args:
        name: of the last node, whose product counts.
        run: the last stage: the student, the task's data, and a recipe of soft and hard labels, `TinyBERT` for example with
            ``soft_weight=1, task_weight=1``. Its teacher is ``finetuned``.
        latent: the loss of the first three stages, on attention and hidden states and no label: `TinyBERT` as it is by default.
        pretrained, finetuned: teachers of one shape, before and after the task.
        general: data of the first two stages.
        steps: of the first three stages.

    Source: Su et al., ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer Compression, 2021,
    arXiv:2106.02241. The order of the stages is the paper's; how they are tuned is not known here.
    """
    last = dataclasses.replace(run, teacher=finetuned)
    shared: dict[str, Any] = dict(recipe=latent)
    return in_stages(
        name,
        last,
        gd=shared | dict(teacher=pretrained, data=general, steps=steps[0]),
        ged=shared | dict(data=general, steps=steps[1]),
        tad=shared | dict(steps=steps[2]),
    )


def _after(before: str, run: Run) -> Callable[..., Any]:
    """A node that is ``run`` with the student of an earlier node."""
    from jkd import teachers
    from jkd.config import dependencies

    def node(**artifacts: Any) -> Run:
        return dataclasses.replace(teachers.resolved(run, artifacts), student=artifacts[before])

    # an experiment reads from a function's parameters which earlier nodes it needs
    needed = dict.fromkeys((before, *dependencies(run)))
    parameters = [inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in needed]
    node.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return node
