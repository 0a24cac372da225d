"""What an experiment means, without computing any of it: configs resolved, shapes traced, memory counted."""

from __future__ import annotations

import dataclasses
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.sharding import PartitionSpec as P

from jkd import codehash, fingerprint, sharding, state, step, teachers, trees
from jkd.config import Experiment, Run, StudentEma, every
from jkd.context import Context
from jkd.errors import InputError
from jkd.recipe import Vars
from jkd.resolve import build, make_context
from jkd.types import Model, Term, Tree

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of what lies in device memory during a run: bytes in all, and of them on the device that holds most."""

    name: str
    total: int
    per_device: int


def describe(experiment: Experiment) -> str:
    """Every node of an experiment, as text: config, module paths, the recipe's parameters, terms, memory.

    A teacher that is an earlier run counts as that run's student; nothing has weights and nothing is compiled.

    Raises:
        InputError: what `jkd.make_context` refuses.
    """
    parts, students = [], dict[str, Model]()
    for name, node in experiment.nodes.items():
        if isinstance(node, Run):
            students[name] = build(node.student)
            parts.append(_node(name, node, students))
        else:
            parts.append(f"{name}: a function, {codehash.name(node)}; its result is known when it has run\n")
    return "\n".join(parts)


def memory(ctx: Context) -> list[Part]:
    """What a run keeps on the devices between steps, part by part; activations and gradients come on top."""
    shapes, places = state.state_shapes(ctx), state.state_shardings(ctx)
    found = []
    for what in ("params", "optimizer", "buffers", "ema"):
        groups = getattr(shapes, what)
        found += [_part(f"{what} {group}", groups[group], getattr(places, what)[group]) for group in groups]
    found.append(_part("memory", shapes.memory, places.memory))
    for what, groups in state.frozen_shapes(ctx).items():
        for group, tree in groups.items():
            specs = ctx.specs[group] if what == "params" else jax.tree.map(lambda _: P(), tree)
            found.append(_part(f"{what} {group} (frozen)", tree, sharding.shardings(specs, ctx.mesh)))
    rows = jax.tree.map(lambda _: sharding.BATCH, ctx.batch)
    found.append(_part("batch", ctx.batch, sharding.shardings(rows, ctx.mesh)))
    return [part for part in found if part.total]


def terms(ctx: Context) -> dict[str, tuple[float | None, float | None]]:
    """``{term: (its coefficient at the first step, at the last)}``; None where it depends on more than the clock."""
    shapes, frozen, key = state.state_shapes(ctx), state.frozen_shapes(ctx), jax.eval_shape(lambda: jax.random.key(0))
    found: dict[str, tuple[float | None, float | None]] = {}
    for update in ctx.updates:

        def coefficients(now: Any, rest: Any, update=update) -> dict[str, Any]:
            now_state, frozen, batch, key = rest
            models = step.models_of(ctx, dataclasses.replace(now_state, step=now), frozen)
            student, teacher, models = update.forward(models, batch, key)
            vars = Vars(params=dict(models.params), memory=models.memory, buffers=dict(models.buffers))
            made: dict[str, Term] = update.terms(vars, student, teacher, batch, clock=ctx.clock(now), key=key)
            return {name: jnp.asarray(term.coef, jnp.float32) for name, term in made.items()}

        jaxpr, made = jax.make_jaxpr(coefficients, return_shape=True)(shapes.step, (shapes, frozen, ctx.batch, key))
        # the outputs are in the order of the names: that is how jax flattens a dict
        for name, variable in zip(sorted(made), jaxpr.jaxpr.outvars, strict=True):
            at = _of_first_input(jaxpr, variable)
            ends = (None, None) if at is None else (at(0), at(ctx.steps - 1))
            found[f"{update.name}.{name}" if update.name else name] = ends
    return found


def _of_first_input(closed: core.ClosedJaxpr, output: core.Var) -> Callable[[int], float] | None:
    """One output of a jaxpr as a function of its first input; None where it needs another. Only what it needs is computed."""
    makers = {out: equation for equation in closed.jaxpr.eqns for out in equation.outvars}
    needed, ready = [output], {*closed.jaxpr.constvars, closed.jaxpr.invars[0]}
    used: set[int] = set()
    while needed:
        var = needed.pop()
        if isinstance(var, core.Literal) or var in ready:
            continue
        ready.add(var)
        if var not in makers:
            return None  # another input
        used.add(id(makers[var]))
        needed += makers[var].invars
    equations = [equation for equation in closed.jaxpr.eqns if id(equation) in used]
    first = closed.jaxpr.invars[:1]
    small = core.ClosedJaxpr(closed.jaxpr.replace(eqns=equations, invars=first, outvars=[output]), closed.consts)
    return lambda value: float(core.jaxpr_as_fun(small)(np.int32(value))[0])


def context(run: Run, devices: list[Any] | None = None) -> Context:
    """The run's context; of data that is not on this machine the shapes are known and the size is not."""
    if run.data is None:
        return make_context(run, devices=devices)
    try:
        size: int | None = run.data.train_size
    except InputError:
        size = None
    return make_context(run, run.data.spec(run.batch_size), train_size=size, devices=devices)


def _node(name: str, run: Run, students: dict[str, Model]) -> str:
    resolved = teachers.unweighted(run, students)
    lines = [f"{name}", "=" * len(name), *_config(run)]
    if resolved is None:
        lines += ["", f"teacher: what the node {run.teacher!r} gives; shapes are known when it has run"]
        return "\n".join(lines) + "\n"
    ctx = context(resolved)
    lines += ["", *_sides(ctx), "", *_paths(ctx)]
    if own := ctx.vars.params:
        lines += ["", "parameters of the recipe"]
        lines += columns(
            [(f"{group}/{path}", _shape(leaf)) for group in own for path, leaf in trees.flatten(own[group]).items()]
        )
    lines += ["", "terms", *columns([(term, _coefficient(*ends)) for term, ends in terms(ctx).items()])]
    lines += ["", "memory of the state, MiB", *_memory(ctx)]
    return "\n".join(lines) + "\n"


def _config(run: Run) -> list[str]:
    """The config, one field of the run after the other, each as it would be written."""

    def written(value: Any) -> str:
        if isinstance(value, dict):
            fields = ", ".join(f"{name}={written(item)}" for name, item in value.items() if name != fingerprint.CLASS)
            if fingerprint.CLASS not in value:
                return f"{{{fields}}}"
            name = str(value[fingerprint.CLASS]).rpartition(":")[2]
            return f"{name}({fields})" if fields else name
        if isinstance(value, list):
            return f"[{', '.join(map(written, value))}]"
        return repr(value)

    fields = fingerprint.to_json(run)
    lines = [f"{name}: {written(value)}" for name, value in fields.items() if name != fingerprint.CLASS]
    return [part for line in lines for part in textwrap.wrap(line, 120, subsequent_indent="    ")]


def _sides(ctx: Context) -> list[str]:
    run = ctx.run
    about = {
        side: f"{side}: {network.name}, {trees.count(ctx.params[side]):,} parameters" for side, network in ctx.networks.items()
    }
    if isinstance(run.teacher, StudentEma):
        about["teacher"] = "teacher: the average of the student"
    lines = list(about.values())
    lines.append(f"batch: {', '.join(f'{name} {_shape(leaf)}' for name, leaf in trees.flatten(ctx.batch).items())}")
    axes = ", ".join(f"{axis} {size}" for axis, size in ctx.mesh.shape.items())
    lines.append(
        f"mesh: {axes} ({ctx.mesh.size} {ctx.mesh.devices.flat[0].platform} devices); microbatches: {run.microbatches}"
    )
    epochs = f" ({run.steps / ctx.steps_per_epoch:.1f} epochs of {ctx.train_size:,})" if ctx.train_size else ""
    at = {what: every(getattr(run, f"{what}_every"), run.steps) for what in ("evaluate", "checkpoint")}
    rhythm = ", ".join(f"{what} every {steps}" if steps else f"{what} at the end" for what, steps in at.items())
    return [*lines, f"steps: {run.steps:,}{epochs}; {rhythm}"]


def _paths(ctx: Context) -> list[str]:
    """Every path of the two networks that the recipe may tap side by side; what it taps has a star."""
    taps = {"student": ctx.recipe.student_taps, "teacher": ctx.recipe.teacher_taps}
    sides = []
    for side in (side for side in taps if side in ctx.networks):
        known = ctx.networks[side].paths(ctx.batch)
        tapped = {tap for tap in taps[side] if tap in known}
        rows = [("*" if path in tapped else " ", path, _shape(leaf)) for path, leaf in known.items()]
        rows += [("*", tap, "") for tap in taps[side] if tap not in known]  # with #call or @layer
        sides.append([("", side, ""), *rows])
    joined = [tuple(itertools.chain(*cells)) for cells in itertools.zip_longest(*sides, fillvalue=("", "", ""))]
    return ["module paths (* is tapped)", *columns(joined)]


def _memory(ctx: Context) -> list[str]:
    parts = memory(ctx)
    parts.append(Part("all", sum(part.total for part in parts), sum(part.per_device for part in parts)))
    rows = [("", "total", "per device")]
    rows += [(part.name, f"{part.total / MIB:,.3f}", f"{part.per_device / MIB:,.3f}") for part in parts]
    return columns(rows, right=(1, 2))


def _part(name: str, shapes: Tree, places: Tree) -> Part:
    def here(leaf: Any, place: jax.sharding.Sharding) -> int:
        return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return Part(name, trees.nbytes(shapes), sum(jax.tree.leaves(jax.tree.map(here, shapes, places))))


def _coefficient(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return "coefficient depends on the batch"
    return f"coefficient {first:g}" if first == last else f"coefficient {first:g} at the first step, {last:g} at the last"


def _shape(leaf: Any) -> str:
    if not hasattr(leaf, "shape"):
        return ", ".join(_shape(each) for each in jax.tree.leaves(leaf))
    return f"{leaf.dtype.name}{list(leaf.shape)}"


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), indent: str = "  ") -> list[str]:
    """A table as lines; the columns named in ``right`` are flush right."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))] if rows else []
    align: Callable[[int], str] = lambda place: ">" if place in right else "<"  # noqa: E731
    return [(indent + "  ".join(f"{cell:{align(i)}{widths[i]}}" for i, cell in enumerate(row))).rstrip() for row in rows]
