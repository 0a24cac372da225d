"""What is said of a run that is done: its summary, and ``result.json`` in its folder."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath

from jkd import flops, sharding, trees
from jkd.context import Context
from jkd.evaluate import Evaluation
from jkd.samples import Sample
from jkd.state import State
from jkd.types import Model
from jkd.workdir import write_json

Summary = dict[str, Any]


def summarise(ctx: Context, product: Model, state: State, evaluation: Evaluation, examples_per_s: float | None) -> Summary:
    """A run in numbers: of its product, of what it cost, and of its last evaluation."""
    work = flops.of_step(ctx)
    own = [tree for group, tree in state.params.items() if group != "student"]
    return {
        "parameters": trees.count(product.params),
        "extra_parameters": sum(map(trees.count, own)),  # what the recipe trains beside the student: projectors, critics
        **{name: evaluation.metrics.get(name) for name in ("accuracy", "nll", "ece", "agreement", "kl")},
        **{name: evaluation.metrics[name] for name in ("bits_per_byte", "oracle_kl") if name in evaluation.metrics},
        "examples_per_s": examples_per_s,
        "steps": ctx.steps,
        **{f"{side}_flops": getattr(work, side) for side in ("student", "teacher")},  # of one step
        "params_sha256": trees.sha256(sharding.whole(product.params)),
    }


def write(
    folder: epath.Path | None, ctx: Context, summary: Summary, evaluation: Evaluation, sample: Sample | None = None
) -> None:
    """Writes ``result.json``: from then on the run is done.

    Args:
        folder: the run's; None writes nothing.
        sample: what its product says, where it says text.
    """
    if folder is None:
        return
    result: dict[str, Any] = {"summary": summary, "metrics": evaluation.metrics, "details": evaluation.details}
    result |= {} if sample is None else {"sample": dataclasses.asdict(sample)}
    data = ctx.run.data
    names = (getattr(source, "names", None) for source in (data.eval, data.train)) if data is not None else ()
    if known := next(filter(None, names), None):
        result["classes"] = list(known)
    write_json(folder / "result.json", result)
