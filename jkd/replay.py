"""What lies in a workdir, evaluated again: the newest checkpoint of every run, on the config's evaluation data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from etils import epath

from jkd import configfile, fingerprint, teachers, trees
from jkd.checkpoint import Checkpoints
from jkd.config import Ensemble, Experiment, Run, dependencies
from jkd.errors import InputError
from jkd.evaluate import make_evaluate
from jkd.networks import models_of
from jkd.resolve import make_context
from jkd.state import freeze, step_shapes


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


def evaluate(experiment: Experiment, workdir: epath.Path, report: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """``{run: {parameters, accuracy, nll, …, steps}}`` of every run that has a checkpoint.

    Args:
        experiment: what was trained there.
        workdir: the folder.
        report: gets a line for each run that has none, or was not finished.
    """
    used = {name for node in experiment.nodes.values() for name in dependencies(node)}
    artifacts: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, node in experiment.nodes.items():
        missing = [needed for needed in dependencies(node) if needed not in artifacts]
        if missing:
            report(f"{name}: needs {missing[0]}, which is not there")
            continue
        earlier = {needed: artifacts[needed] for needed in dependencies(node)}
        if not isinstance(node, Run):
            node = node(**earlier)
        if not isinstance(node, Run):
            artifacts[name] = node
            continue
        if isinstance(node.teacher, (str, Ensemble)):
            node = dataclasses.replace(node, teacher=teachers.named(node.teacher, artifacts))
        product, metrics, step = _run(node, workdir / name, report)
        if product is None:
            report(f"{name}: has no checkpoint")
            continue
        if step < node.steps:
            report(f"{name}: stands at step {step} of {node.steps}")
        if name in used:
            metrics.setdefault("agreement", 1.0)  # it is what the others are held against
        artifacts[name] = product
        found[name] = {"parameters": trees.count(product.params), **metrics, "steps": step}
    return found


def _run(run: Run, folder: epath.Path, report: Callable[[str], None]) -> tuple[Any, dict[str, Any], int]:
    """A run's product, its metrics and the step it stands at; no product where there is no checkpoint."""
    if not (folder / "checkpoints").exists():  # Checkpoints would make it
        return None, {}, 0
    ctx = make_context(run)
    checkpoints = Checkpoints(folder / "checkpoints", keep=run.keep, best=run.best, report=report)
    try:
        restored = checkpoints.restore(step_shapes(ctx)[0])
    finally:
        checkpoints.close()
    if restored is None:
        return None, {}, 0
    state, _, step = restored
    frozen = freeze(ctx)
    evaluation = make_evaluate(ctx)
    metrics: dict[str, Any] = {} if evaluation is None else evaluation(state, frozen).metrics
    models = models_of(ctx, state, frozen, ema=run.evaluate_ema)
    return ctx.recipe.deploy(models), metrics, step
