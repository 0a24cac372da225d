"""Teachers that are named, averaged, or not what they seem."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jkd.config import Ensemble, Run
from jkd.context import Context
from jkd.errors import InputError, nearest
from jkd.networks import models_of
from jkd.resolve import build
from jkd.state import Frozen, State
from jkd.types import Batch, Model


def named(teacher: str | Ensemble, artifacts: Mapping[str, Any]) -> Model:
    """The Model that a run's teacher stands for, with names looked up among the earlier nodes' artifacts.

    Raises:
        InputError: a name that no earlier node has, or whose node gave no Model.
    """
    if isinstance(teacher, Ensemble):
        from jkd import models

        members = [named(member, artifacts) if isinstance(member, str) else build(member) for member in teacher.members]
        return models.ensemble(members, mean=teacher.mean)
    if teacher not in artifacts:
        raise InputError(f"teacher={teacher!r}: no earlier node is called that{nearest(teacher, artifacts)}")
    found = artifacts[teacher]
    if not isinstance(found, Model):
        raise InputError(f"teacher={teacher!r}: that node gave a {type(found).__name__}, no Model")
    return found


def resolved(run: Run, artifacts: Mapping[str, Any]) -> Run:
    """The run with Models where it names earlier nodes: as its teacher and as its oracle.

    Raises:
        InputError: as `named`.
    """

    def model(side: Any) -> Any:
        return named(side, artifacts) if isinstance(side, str | Ensemble) else side

    return dataclasses.replace(run, teacher=model(run.teacher), oracle=model(run.oracle))


def unweighted(run: Run, students: Mapping[str, Model]) -> Run | None:
    """The run with earlier runs' networks for their names, not yet weights; None where its teacher is what a function gives.

    Such an oracle is left out: only evaluation asks it.
    """

    def network(side: Any) -> Any:
        if isinstance(side, str):
            return students.get(side)
        if isinstance(side, Ensemble):
            members = tuple(network(member) for member in side.members)
            return None if None in members else dataclasses.replace(side, members=members)
        return side

    teacher = network(run.teacher)
    unknown = teacher is None and run.teacher is not None
    return None if unknown else dataclasses.replace(run, teacher=teacher, oracle=network(run.oracle))


def check_logits(ctx: Context, state: State, frozen: Frozen, batch: Batch) -> None:
    """Looks at a teacher's answers to one batch.

    Raises:
        InputError: they are probabilities (no entry negative, every row sums to 1), or not finite.
    """
    if ctx.teacher_outputs is None or not ctx.teacher_outputs.has_logits:
        return

    def look(state: State, frozen: Frozen, batch: Batch) -> tuple[jax.Array, jax.Array]:
        outputs = models_of(ctx, state, frozen).teacher(batch, taps=())
        assert outputs is not None
        logits = outputs.logits.astype(jnp.float32)
        sums_to_one = jnp.all(jnp.abs(logits.sum(-1) - 1) < 1e-2)
        return sums_to_one & jnp.all(logits >= 0), jnp.all(jnp.isfinite(logits))

    probabilities, finite = jax.device_get(jax.jit(look)(state, frozen, batch))
    name = ctx.networks["teacher"].name
    if probabilities and ctx.classes != 1:
        raise InputError(
            f"teacher {name} returns probabilities where logits are wanted; adapt it with output=lambda p: jnp.log(p)"
        )
    if not finite:
        raise InputError(f"teacher {name} gives answers that are not finite on the first batch; check its weights and dtype")
