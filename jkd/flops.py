"""Floating-point operations of a traced program: what a step asks of teacher and student, counted before anything compiles.

Matrix products, convolutions and fused attention are counted, an addition and a multiplication as two; elementwise work is not.
The count follows the program and not its text: a scanned body counts once for every turn (XLA's own `cost_analysis` counts it
once), of the branches of a condition the dearest counts, and what nothing reads does not count.

The backward pass is derived from the forward pass rather than traced: a product costs itself again for each of its operands that a
gradient reaches. So 2 operations per weight and token for a frozen teacher and 6 for a student come out where they are true, the
first layer does without the gradient of its input, frozen weights without theirs, and what rematerialisation or a chunked loss
computes twice counts once: it is the numerator of MFU. `of_program` of the whole step counts repeated work too, as HFU does.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

from jkd import trees
from jkd.context import Context
from jkd.networks import models_at, seen, step_key
from jkd.prepare import prepare_of
from jkd.recipe import Update
from jkd.state import Frozen, State, step_shapes, trainable
from jkd.step import make_step, objective
from jkd.types import Batch, Tree

_MOVES, _STUDENT, _TEACHER = 1, 2, 4
"""What is known of a value: a gradient flows back through it; it depends on what trains; it depends on the teacher's weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """Floating-point operations, of one step over the whole global batch.

    Args:
        teacher: products that read the frozen teacher and nothing that trains.
        student_forward: products that read anything that trains: student, projectors, critics, and teacher layers that the
            student's answer passes through.
        student_backward: their gradients.
        other: products that read neither, such as those of an augmentation.
    """

    teacher: float = 0.0
    student_forward: float = 0.0
    student_backward: float = 0.0
    other: float = 0.0

    @property
    def student(self) -> float:
        """Forward and backward."""
        return self.student_forward + self.student_backward

    @property
    def total(self) -> float:
        return self.teacher + self.student + self.other

    def __add__(self, more: Work) -> Work:
        return Work(**{field.name: getattr(self, field.name) + getattr(more, field.name) for field in dataclasses.fields(Work)})

    def __mul__(self, times: float) -> Work:
        return Work(**{field.name: getattr(self, field.name) * times for field in dataclasses.fields(Work)})


def of_step(ctx: Context, *, mean: bool = True) -> Work:
    """The work of one step of a run over its global batch, nothing repeated.

    Generation and other work of `Recipe.prepare` is a program of its own and not in it (`of_prepare`). An update whose `when` waits
    for the memory counts as if it ran at every step.

    Args:
        mean: of all steps: an update with ``every=n`` counts 1/n. Else the work of a step in which every update runs.
    """
    arguments = step_shapes(ctx)
    work = Work()
    for update in ctx.updates:

        def forward(state: State, frozen: Frozen, batch: Batch, update: Update = update) -> Any:
            clock, key = ctx.clock(state.step), step_key(state)
            models = models_at(ctx, state, frozen, clock)
            parts, (_, _, _, observed) = objective(ctx, update, models, seen(ctx, batch, key), key, None)
            return parts, observed

        jaxpr, shapes = jax.make_jaxpr(forward, return_shape=True)(*arguments)
        wanted = [place == 0 for place, part in enumerate(shapes) for _ in jax.tree.leaves(part)]
        work += _count(jaxpr, jax.tree.leaves(_marks(ctx, update, *arguments)), wanted) * (1 / update.every if mean else 1)
    return work


def of_prepare(ctx: Context) -> Work:
    """The work of `Recipe.prepare` on one global batch, forward passes all; nothing where the recipe prepares nothing.

    Generation counts as if every row said as many tokens as it may.
    """
    if not ctx.prepares:
        return Work()
    state, frozen, _ = step_shapes(ctx)
    jaxpr = jax.make_jaxpr(prepare_of(ctx))(state, frozen, ctx.raw_batch, jax.ShapeDtypeStruct((), jnp.int32))
    marks = [*jax.tree.leaves(_marks(ctx, Update(groups=()), state, frozen, ctx.raw_batch)), 0]
    return _count(jaxpr, marks, [False] * len(jaxpr.out_avals))


def phases(ctx: Context) -> list[tuple[Context, float]]:
    """The run as it is in a step in which some of its updates run, for each such choice, and the share of steps that are so.

    What is measured of each, times its share, sums to the mean of all steps. A ``when`` counts as if it always held.
    """
    period = math.lcm(*(update.every for update in ctx.updates))
    if period == 1:
        return [(ctx, 1.0)]
    every = (tuple(place for place, update in enumerate(ctx.updates) if step % update.every == 0) for step in range(period))
    found = []
    for running, count in collections.Counter(every).items():
        only = dataclasses.replace(ctx)
        updates = tuple(dataclasses.replace(ctx.updates[place], every=1) for place in running)
        vars(only).update(updates=updates, groups=ctx.groups)  # in place of what it would read from the recipe
        found.append((only, count / period))
    return found


def executed(ctx: Context) -> float:
    """All that a step and `Recipe.prepare` execute, what they compute twice twice: the mean of all steps."""
    total = sum(of_program(make_step(only), *step_shapes(only)) * share for only, share in phases(ctx))
    return total + of_prepare(ctx).total


def _marks(ctx: Context, update: Update, state: State, frozen: Frozen, batch: Batch) -> tuple[State, Frozen, Batch]:
    """What is known of each leaf that a step is called with."""

    def all_of(tree: Tree, marks: int) -> Tree:
        return jax.tree.map(lambda _: marks, tree)

    def group(name: str, tree: Tree) -> Tree:
        owner = _TEACHER if name == "teacher" and name not in (update.groups or ()) else _STUDENT
        moving, rest = trainable(ctx, name, tree)
        moves = _MOVES if name in (update.groups or ()) else 0
        return trees.merge(all_of(moving, owner | moves), all_of(rest, owner))

    params = {name: group(name, tree) for name, tree in state.params.items()}
    marks = dataclasses.replace(all_of(state, 0), params=params, ema=all_of(state.ema, _TEACHER))
    return marks, all_of(frozen, _TEACHER), all_of(batch, 0)


def of_program(function: Callable[..., Any], *arguments: Any) -> float:
    """All that a function executes, what it computes twice twice.

    Args:
        function: any function of arrays, jitted or not; of `make_step` the whole step.
        arguments: arrays or shapes.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments)
    return _count(jaxpr, [0] * len(jaxpr.in_avals)).total


def _count(closed: Any, marks: Sequence[int], wanted: Sequence[bool] | None = None) -> Work:
    """The work of a program whose arguments are known to be so; ``wanted``: which results are differentiated."""
    jaxpr = _open(closed)
    live, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    marks = [mark for mark, reads in zip(marks, used, strict=True) if reads]
    return _work(live, marks, wanted or [True] * len(jaxpr.outvars))[0]


def _known(jaxpr: Any, marks: Sequence[int]) -> dict[Any, int]:
    """What is known of every value of a jaxpr, from its arguments on."""
    known = dict(zip(jaxpr.invars, marks, strict=True))
    for eqn in jaxpr.eqns:
        for var, mark in zip(eqn.outvars, _results(eqn, _of(known, eqn.invars)), strict=True):
            known[var] = mark if jnp.issubdtype(getattr(var.aval, "dtype", jnp.int32), jnp.inexact) else mark & ~_MOVES
    return known


def _of(known: dict[Any, int], atoms: Sequence[Any]) -> list[int]:
    return [0 if hasattr(atom, "val") else known.get(atom, 0) for atom in atoms]


def _results(eqn: Any, given: list[int]) -> list[int]:
    inner = _inner(eqn, given)
    if inner is None:
        mark = _union(given)
        return [mark & ~_MOVES if eqn.primitive.name == "stop_gradient" else mark] * len(eqn.outvars)
    each = [_of(_known(body, marks), body.outvars) for body, marks in inner.bodies]
    return [_union(marks) for marks in zip(*each, strict=True)]


def _work(jaxpr: Any, marks: Sequence[int], wanted: Sequence[bool]) -> tuple[Work, list[bool]]:
    """The work of a jaxpr of whose results some get a gradient, and which of its arguments get one: read backwards."""
    known = _known(jaxpr, marks)
    needed = {var for var, want in zip(jaxpr.outvars, wanted, strict=True) if want and not hasattr(var, "val")}
    work = Work()
    for eqn in reversed(jaxpr.eqns):
        given = _of(known, eqn.invars)
        more, wants = _equation(eqn, given, [var in needed and bool(known[var] & _MOVES) for var in eqn.outvars])
        work += more
        needed |= {var for var, want, mark in zip(eqn.invars, wants, given, strict=True) if want and mark & _MOVES}
    return work, [var in needed for var in jaxpr.invars]


def _equation(eqn: Any, given: list[int], wanted: list[bool]) -> tuple[Work, list[bool]]:
    inner = _inner(eqn, given)
    if inner is None:
        product = _PRODUCTS.get(eqn.primitive.name)
        work = _owned(product(eqn), given, any(wanted)) if product else Work()
        return work, [any(wanted)] * len(given)
    while True:  # until what is wanted of the carried values no longer changes
        found = [_work(body, marks, wanted) for body, marks in inner.bodies]
        wants = [any(each) for each in zip(*(wants for _, wants in found), strict=True)]
        carried = [new or old for new, old in zip(wants[inner.carried or slice(0)], wanted, strict=False)]
        if carried == wanted[: len(carried)]:
            break
        wanted = [*carried, *wanted[len(carried) :]]
    work = max((work for work, _ in found), key=lambda work: work.total)
    return work * inner.turns, [False] * (len(given) - len(wants)) + wants


@dataclasses.dataclass(frozen=True)
class _Inner:
    """The jaxprs inside an equation: of the branches one runs, ``turns`` times; their arguments are the equation's last ones.

    ``carried``: those arguments that are the first results of the turn before.
    """

    bodies: list[tuple[Any, list[int]]]
    turns: float = 1.0
    carried: slice | None = None


def _inner(eqn: Any, given: list[int]) -> _Inner | None:
    name, params = eqn.primitive.name, eqn.params
    if name in _PRODUCTS:
        return None
    if name == "scan":
        body = _open(params["jaxpr"])
        # what is carried has one shape inside and outside; what is stacked has an axis more outside
        carried = sum(inner.aval.shape == outer.aval.shape for inner, outer in zip(body.outvars, eqn.outvars, strict=True))
        whole = sum(inner.aval.shape == outer.aval.shape for inner, outer in zip(body.invars, eqn.invars, strict=True))
        return _loop(body, given, slice(whole - carried, whole), params["length"])
    if name == "while":
        given = given[params["cond_nconsts"] :]
        turns = _turns(_open(params["cond_jaxpr"]))
        return _loop(_open(params["body_jaxpr"]), given, slice(params["body_nconsts"], len(given)), turns)
    if name == "cond":
        return _Inner([(_open(branch), given[1:]) for branch in params["branches"]])
    inner = next((_open(params[key]) for key in ("jaxpr", "call_jaxpr") if key in params), None)
    if inner is None or len(inner.invars) != len(given):
        return None
    return _Inner([(inner, given)], _copies(name, params))


def _turns(condition: Any) -> int:
    """The one number that a while loop's counter stays below, so many turns at most from 0 on; 1 where there is no such number."""
    limits = [
        int(eqn.invars[1].val)
        for eqn in condition.eqns
        if eqn.primitive.name == "lt"
        and hasattr(eqn.invars[1], "val")
        and jnp.issubdtype(eqn.invars[1].aval.dtype, jnp.integer)
    ]
    return limits[0] if len(limits) == 1 else 1


def _loop(body: Any, given: list[int], carried: slice, turns: int) -> _Inner:
    """A loop's body, with what is known of the carried values once it no longer changes."""
    while True:
        marks = _of(_known(body, given), body.outvars)
        after = [old | new for old, new in zip(given[carried], marks, strict=False)]
        if after == given[carried]:
            return _Inner([(body, given)], turns, carried)
        given = [*given[: carried.start], *after, *given[carried.stop :]]


def _owned(forward: float, given: Sequence[int], wanted: bool) -> Work:
    mark = _union(given)
    if mark & _STUDENT:
        # fused attention is two products, whatever the number of its arrays
        backward = forward * min(2, sum(bool(each & _MOVES) for each in given)) * wanted
        return Work(student_forward=forward, student_backward=backward)
    return Work(teacher=forward) if mark & _TEACHER else Work(other=forward)


def _union(marks: Sequence[int]) -> int:
    found = 0
    for mark in marks:
        found |= mark
    return found


def _copies(name: str, params: Any) -> int:
    """How many devices run what a jaxpr of one device's part shows."""
    if name != "shard_map":
        return 1
    return math.prod(params["mesh"].shape[axis] for axis in params.get("manual_axes", params["mesh"].axis_names))


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _dot(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _ragged_dot(eqn: Any) -> float:
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    return 2.0 * math.prod(left) * right[-1]


def _convolution(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    out = eqn.params["dimension_numbers"].rhs_spec[0]  # its other axes, space and channels of a group, are summed over
    # zeros that dilation puts between the rows of the input (the gradient of a stride) are not multiplied
    between = eqn.params["batch_group_count"] * math.prod(eqn.params["lhs_dilation"])
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) / kernel[out] / between


def _attention(eqn: Any) -> float:
    """Fused attention (``[batch, time, heads, size]``): scores, and their product with the values; masked places count."""
    query, key = (atom.aval.shape for atom in eqn.invars[:2])
    return 4.0 * math.prod(query) * key[1]


def _kernel(eqn: Any) -> float:
    """A Pallas kernel, by what its author says of it."""
    cost = eqn.params.get("cost_estimate")
    return 0.0 if cost is None else float(cost.flops)


_PRODUCTS: dict[str, Callable[[Any], float]] = {
    "dot_general": _dot,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "dot_product_attention_fwd": _attention,
    "dot_product_attention_fwd_wrapper": _attention,
    "pallas_call": _kernel,
}
