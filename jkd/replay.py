"""What lies in a workdir: the newest checkpoint of every run, as a state to go on from, and evaluated again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from jkd import configfile, fingerprint, teachers, trees
from jkd.checkpoint import Checkpoints
from jkd.config import Experiment, Run, dependencies
from jkd.context import Context
from jkd.errors import InputError, nearest
from jkd.evaluate import make_evaluate
from jkd.networks import models_of
from jkd.resolve import make_context
from jkd.state import Frozen, State, freeze, init_state, step_shapes
from jkd.step import deployed
from jkd.types import Model


def experiment_of(workdir: epath.Path) -> Experiment:
    """The experiment that ``jkd train`` recorded in a folder.

    Raises:
        InputError: it holds none, or the recorded config now means something else.
    """
    if not (workdir / "command.json").exists():
        inner = sorted(path.parent.name for path in workdir.glob("*/command.json"))
        hint = f"; evaluate one of {', '.join(str(workdir / name) for name in inner)}" if inner else ""
        raise InputError(f"{workdir} holds no config that jkd train recorded{hint}")
    command = json.loads((workdir / "command.json").read_text())
    experiment = configfile.resolve(configfile.load(workdir / "config.py", beside=command.get("folder")), command["set"])
    differences = fingerprint.differences(json.loads((workdir / "config.json").read_text()), fingerprint.to_json(experiment))
    if differences:
        raise InputError(f"{workdir}: its config means something else now ({'; '.join(differences[:5])})")
    return experiment


@dataclasses.dataclass(frozen=True)
class Stand:
    """Where a run stands: its newest good checkpoint.

    Args:
        name: of the run in its experiment.
        ctx: the run with its teachers' weights.
        state, frozen: what a step is called with.
        step: updates done.
        weights: sampling weights in force, or None.
    """

    name: str
    ctx: Context
    state: State
    frozen: Frozen
    step: int
    weights: np.ndarray | None = None

    def product(self, *, ema: bool | None = None) -> Model:
        """What the run is for (`Recipe.deploy`), with weights; the average's if asked for, by default as the run says."""
        models = models_of(self.ctx, self.state, self.frozen, ema=self.ctx.run.evaluate_ema if ema is None else ema)
        return deployed(self.ctx, models)


def stands(
    experiment: Experiment, workdir: epath.Path, report: Callable[[str], None], *, fresh: str | None = None
) -> Iterator[Stand]:
    """Every run that has a checkpoint, in order.

    Args:
        experiment: what was trained there.
        workdir: the folder.
        report: gets a line for each run that has none, or was not finished.
        fresh: a run that stands at its start if it has no checkpoint.
    """
    artifacts: dict[str, Any] = {}
    for name, node in experiment.nodes.items():
        missing = [needed for needed in dependencies(node) if needed not in artifacts]
        if missing:
            report(f"{name}: needs {missing[0]}, which is not there")
            continue
        if not isinstance(node, Run):
            node = node(**{needed: artifacts[needed] for needed in dependencies(node)})
        if not isinstance(node, Run):
            artifacts[name] = node
            continue
        node = teachers.resolved(node, artifacts)
        stand = _restored(name, node, workdir / name, report) or (_begun(name, node) if name == fresh else None)
        if stand is None:
            report(f"{name}: has no checkpoint")
            continue
        if stand.step < node.steps:
            report(f"{name}: stands at step {stand.step} of {node.steps}")
        artifacts[name] = stand.product()
        yield stand


def stand(
    experiment: Experiment, workdir: epath.Path, name: str | None, report: Callable[[str], None], *, fresh: bool = False
) -> Stand:
    """One run by name; by default the last of the experiment. With ``fresh`` at its start, if it has no checkpoint.

    Raises:
        InputError: no such run, or it has no checkpoint.
    """
    nodes = list(experiment.nodes)
    name = nodes[-1] if name is None else name
    if name not in nodes:
        raise InputError(f"{workdir}: no run is called {name!r}{nearest(name, nodes)}")
    # later nodes need not be there, and earlier ones only if this one needs them
    wanted = {name}
    for other in reversed(nodes[: nodes.index(name) + 1]):
        wanted |= set(dependencies(experiment.nodes[other])) if other in wanted else set()
    told: list[str] = []
    needed = Experiment(**{other: node for other, node in experiment.nodes.items() if other in wanted})
    for found in stands(needed, workdir, told.append, fresh=name if fresh else None):
        if found.name == name:
            for line in told:
                report(line)
            return found
    raise InputError(f"{workdir}: there is nothing of {name}: {'; '.join(told) or 'it is a function, not a run'}")


def evaluate(experiment: Experiment, workdir: epath.Path, report: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """``{run: {parameters, accuracy, nll, …, steps}}`` of every run that has a checkpoint; see `stands`."""
    used = {name for node in experiment.nodes.values() for name in dependencies(node)}
    found: dict[str, dict[str, Any]] = {}
    for one in stands(experiment, workdir, report):
        evaluation = make_evaluate(one.ctx)
        metrics: dict[str, Any] = {} if evaluation is None else evaluation(one.state, one.frozen).metrics
        if one.name in used:
            metrics.setdefault("agreement", 1.0)  # it is what the others are held against
        found[one.name] = {"parameters": trees.count(one.product().params), **metrics, "steps": one.step}
    return found


def _restored(name: str, run: Run, folder: epath.Path, report: Callable[[str], None]) -> Stand | None:
    """None where there is no checkpoint."""
    if not (folder / "checkpoints").exists():  # Checkpoints would make it
        return None
    ctx = make_context(run)
    checkpoints = Checkpoints(folder / "checkpoints", keep=run.keep, best=run.best, report=report)
    try:
        restored = checkpoints.restore(step_shapes(ctx)[0])
    finally:
        checkpoints.close()
    if restored is None:
        return None
    state, meta, step = restored
    return Stand(name, ctx, state, freeze(ctx), step, meta.get("sampling_weights"))


def _begun(name: str, run: Run) -> Stand:
    ctx = make_context(run)
    return Stand(name, ctx, *init_state(ctx, jax.random.key(run.seed)), 0)
