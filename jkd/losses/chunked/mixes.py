"""A mix of losses between hidden states and heads: for each token, or as a weighted sum over all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from jkd.losses._common import check_exact_rank, check_labels, check_rank, describe
from jkd.losses.chunked.heads import Head, Side
from jkd.losses.chunked.parts import Each, Part
from jkd.losses.chunked.places import mesh_of, token_shards, vocab_shards
from jkd.losses.chunked.plan import Schedule, choose
from jkd.losses.chunked.sweeps import Problem

Mix = Part | Sequence[tuple[Any, Part]]
"""One part, or several with their coefficients: numbers, or one for each token (the leading shape of ``student_hidden``)."""


def per_token(
    mix: Mix,
    student_hidden: Any,
    student_head: Any,
    teacher_hidden: Any = None,
    teacher_head: Any = None,
    *,
    labels: Any = None,
    temperature: Any = 1.0,
    weights: Any = None,
    schedule: Schedule | None = None,
) -> Any:
    """``sum_k coef_k * loss_k``, one value for each token.

    Args:
        mix: a `Part`, or ``[(coef, Part), …]``: all of them in one pass.
        student_hidden: ``[..., dim]``.
        student_head: ``[dim, vocab]``, or a `Head` with its bias, soft-cap and padding.
        teacher_hidden: ``[..., dim]`` of the teacher's own dim; None where no part reads a teacher.
        teacher_head: likewise.
        labels: int ``[...]``, for `CrossEntropy`. One out of range reads the nearest class.
        temperature: T of the divergences, a number or one for each token. Its square is inside.
        weights: ``[...]``, what each token is expected to weigh where these values are summed. With them the gradient is made in the
            forward pass, each logit is computed once. Other weights than expected still give the right gradient, at the cost of
            another pass; None: that pass is taken always.
        schedule: `Tokens` or `Vocabulary`; None: the cheaper one (`jkd.losses.chunked.plan`).

    Returns:
        ``[...]``, float32 (float64 where an input is). Gradients pass to hidden states and heads of both sides.

    Raises:
        ValueError: shapes that do not fit, something that a part reads is missing, another number of classes.
        TypeError: a gradient by a temperature or a hyperparameter is asked for.
    """
    asked = dict(labels=labels, temperature=temperature, weights=weights, schedule=schedule)
    found = per_part(mix, student_hidden, student_head, teacher_hidden, teacher_head, **asked)
    coefs = [1.0] if isinstance(mix, Part) else [coef for coef, _ in mix]
    return sum(coef * values for coef, values in zip(coefs, found, strict=True))


def per_part(
    mix: Mix,
    student_hidden: Any,
    student_head: Any,
    teacher_hidden: Any = None,
    teacher_head: Any = None,
    *,
    labels: Any = None,
    temperature: Any = 1.0,
    weights: Any = None,
    schedule: Schedule | None = None,
) -> tuple[Any, ...]:
    """Every part's own values ``[...]``, in one pass; see `per_token`.

    The coefficients of the mix only say, times ``weights``, what each value is expected to weigh where all are summed.
    """
    problem, coefs, shape = _problem(mix, student_hidden, student_head, teacher_hidden, teacher_head, labels, temperature)
    expected = None if weights is None else jax.lax.stop_gradient(coefs * _each(weights, shape, coefs.dtype))
    values = _values(schedule or choose(problem, weighted=weights is not None), problem, expected)
    return tuple(value.reshape(shape) for value in values)


def weighted_sum(
    mix: Mix,
    student_hidden: Any,
    student_head: Any,
    teacher_hidden: Any = None,
    teacher_head: Any = None,
    *,
    weights: Any,
    labels: Any = None,
    temperature: Any = 1.0,
    schedule: Schedule | None = None,
) -> Any:
    """``sum over tokens of weight * sum_k coef_k * loss_k``, its gradient made in the forward pass: each logit is computed once.

    The arguments are those of `per_token`, but that ``weights`` ``[...]`` must be given. There are gradients by the weights and the
    coefficients too.

    Returns:
        A scalar.
    """
    problem, coefs, shape = _problem(mix, student_hidden, student_head, teacher_hidden, teacher_head, labels, temperature)
    coefs = coefs * _each(weights, shape, coefs.dtype)
    return _total(schedule or choose(problem, weighted=True), problem, coefs)


def _each(weights: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if jnp.shape(weights) != shape:
        raise ValueError(f"weights must be {list(shape)}, one for each token of student_hidden, got {describe(weights)}")
    return jnp.asarray(weights, dtype).reshape(1, -1)


# --- the two primitives -------------------------------------------------------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """What a backward pass must know that is no array."""

    value: Any


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _values(schedule: Schedule, problem: Problem, expected: Any) -> Any:
    """``[parts, tokens]``; ``expected`` ``[parts, tokens]`` or None is the cotangent, but for a factor, that is prepared for."""
    return schedule.values(problem)[0]


def _values_forward(schedule: Schedule, traced: Any, expected: Any):
    problem, wants = _wanted(traced)
    gradients = None
    if expected is None or not any(want.any for want in wants):
        values, kept = schedule.values(problem)
    else:
        expected = expected.value
        (values, kept), gradients = schedule.gradients(problem, None, expected, wants)
    return values, (problem, expected, kept, gradients, _Static(wants))


def _values_backward(schedule: Schedule, residuals: Any, cotangent: Any):
    problem, expected, kept, gradients, wants = residuals
    if isinstance(cotangent, SymbolicZero):
        return None, None
    onto: Any = None
    unless: Any = False
    if gradients is not None:
        size = jnp.sum(expected * expected)
        factor = jnp.where(size > 0, jnp.sum(cotangent * expected) / jnp.where(size > 0, size, 1), 0)
        onto = jax.tree.map(lambda x: x * factor, gradients)
        # as alike as a few roundings leave them
        unless = jnp.all(jnp.abs(cotangent - factor * expected) <= 1e-5 * jnp.abs(cotangent))
        cotangent = cotangent - factor * expected
    _, gradients = schedule.gradients(problem, kept, cotangent, wants.value, onto=onto, unless=unless)
    return _cotangent(schedule.finished(gradients), _skeleton(problem).value), None


_values.defvjp(_values_forward, _values_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(schedule: Schedule, problem: Problem, coefs: Any) -> Any:
    """``sum(coefs * values)``, ``coefs`` ``[parts, tokens]``."""
    return _sum(coefs, schedule.values(problem)[0])


def _sum(coefs: Any, values: Any) -> Any:
    # a token that does not count may hold anything
    return jnp.sum(jnp.where(coefs == 0, 0, values) * coefs)


def _total_forward(schedule: Schedule, traced: Any, coefs: Any):
    problem, wants = _wanted(traced)
    if any(want.any for want in wants):
        (values, _), gradients = schedule.gradients(problem, None, coefs.value, wants)
    else:
        values, gradients = schedule.values(problem)[0], tuple(Side() for _ in wants)
    return _sum(coefs.value, values), (gradients, values, _skeleton(problem))


def _total_backward(schedule: Schedule, residuals: Any, cotangent: Any):
    gradients, values, skeleton = residuals
    if isinstance(cotangent, SymbolicZero):
        return None, None
    found = schedule.finished(jax.tree.map(lambda x: x * cotangent, gradients))
    return _cotangent(found, skeleton.value), values * cotangent


_total.defvjp(_total_forward, _total_backward, symbolic_zeros=True)


def _wanted(traced: Any) -> tuple[Problem, tuple[Side, ...]]:
    """The problem, and of which of its arrays a gradient is asked for."""

    def both(leaf: Any) -> bool:
        return isinstance(leaf, CustomVJPPrimal)

    problem = jax.tree.map(lambda leaf: leaf.value, traced, is_leaf=both)
    asked = jax.tree.map(lambda leaf: leaf.perturbed, traced, is_leaf=both)
    if any(jax.tree.leaves((asked.temperature, asked.fields, asked.rows))):
        raise TypeError(
            "losses.chunked has gradients by hidden states and heads alone, not by a temperature, a hyperparameter or the rows of "
            "an Each: stop them (jax.lax.stop_gradient), or take the loss of whole logits"
        )
    # what a head collects stands for its kernel's gradient
    return problem, tuple(
        Side(bool(s.hidden), bool(s.kernel) and not s.collects, bool(s.bias), collects=bool(s.collects)) for s in asked.sides
    )


def _skeleton(problem: Problem) -> _Static:
    """The problem with dtypes in the places of heads and hidden states, and nothing else."""

    def dtypes(side: Side | None) -> Any:
        return jax.tree.map(lambda leaf: leaf.dtype, side)

    bare: Any = dict(labels=None, temperature=None, fields=None, rows=None)
    return _Static(dataclasses.replace(problem, student=dtypes(problem.student), teacher=dtypes(problem.teacher), **bare))


def _cotangent(gradients: tuple[Side, ...], skeleton: Problem) -> Problem:
    """The gradients in their primals' dtypes; None, which is zero, for all else."""
    found = []
    for side, gradient in zip(skeleton.sides, gradients, strict=True):
        arrays = ("hidden", "kernel", "bias", "collects")
        some = {name: (getattr(gradient, name), getattr(side, name)) for name in arrays}
        cast = {name: None if x is None else x.astype(dtype) for name, (x, dtype) in some.items()}
        found.append(dataclasses.replace(side, **cast))
    return dataclasses.replace(skeleton, student=found[0], teacher=found[1] if len(found) > 1 else None)


# --- from arguments to a problem ----------------------------------------------------------------------------------------


def _problem(
    mix: Mix, student_hidden: Any, student_head: Any, teacher_hidden: Any, teacher_head: Any, labels: Any, temperature: Any
) -> tuple[Problem, Any, tuple[int, ...]]:
    """The checked arguments, flat over tokens; the coefficients ``[parts, tokens]``; the leading shape."""
    pairs = [(1.0, mix)] if isinstance(mix, Part) else list(mix)
    parts = [part.simplest() for _, part in pairs]
    reads = {name for part in parts for name in part.reads}
    sides = {"student": (student_hidden, Head.of(student_head))}
    if "teacher" in reads:
        if teacher_hidden is None or teacher_head is None:
            raise ValueError("teacher_hidden and teacher_head must be given: a part of the mix reads the teacher")
        sides["teacher"] = (teacher_hidden, Head.of(teacher_head))
    shape = _check_sides(sides)
    width = min(head.kernel.shape[-1] for _, head in sides.values())
    mesh = mesh_of(student_hidden, sides["student"][1].kernel)
    shards = token_shards(mesh, shape[0] if shape else 1)
    flat = {name: _side(hidden, head, width, shards) for name, (hidden, head) in sides.items()}
    tokens, classes = flat["student"].hidden.shape[0], min(head.vocab for _, head in sides.values())
    if "labels" in reads:
        if labels is None:
            raise ValueError("labels must be given: a part of the mix reads them")
        check_labels(labels, student_hidden, logits_name="student_hidden")
        labels = jnp.clip(labels.reshape(-1), 0, classes - 1)

    def each_token(value: Any) -> Any:
        value = jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))
        return jnp.broadcast_to(value, shape).reshape(-1)

    def row(value: Any) -> Any:
        value = jnp.asarray(value)
        return jnp.broadcast_to(value, (tokens,)) if value.ndim == 0 else value.reshape(tokens, *value.shape[len(shape) :])

    fixed = temperature if isinstance(temperature, (int, float)) else None
    fields = [part.traced() for part in parts]
    problem = Problem(
        student=flat["student"],
        teacher=flat.get("teacher"),
        labels=labels if "labels" in reads else None,
        temperature=each_token(temperature) if fixed is None else None,
        fields=tuple(jax.tree.map(each_token, found) for found in fields),
        rows=tuple(jax.tree.map(row, part.rows) if isinstance(part, Each) else () for part in parts),
        parts=tuple(part.without(found) for part, found in zip(parts, fields, strict=True)),
        fixed=fixed,
        classes=classes,
        mesh=mesh,
        shards=shards,
        lanes=vocab_shards(mesh, width),
    )
    coefs = jnp.stack([each_token(coef) for coef, _ in pairs]).astype(problem.student.dtype)
    return problem, coefs, shape


def _check_sides(sides: dict[str, tuple[Any, Head]]) -> tuple[int, ...]:
    """The leading shape of the hidden states, which all sides have."""
    shape = None
    for side, (hidden, head) in sides.items():
        check_rank(1, "[..., dim]", **{f"{side}_hidden": hidden})
        check_exact_rank(2, "[dim, vocab]", **{f"{side}_head": head.kernel})
        if hidden.shape[-1] != head.kernel.shape[0]:
            raise ValueError(
                f"{side}_head must be [dim, vocab] with the dim of {side}_hidden {describe(hidden)}, got {describe(head.kernel)}"
            )
        if head.collects is not None and head.collects.shape[1:] != head.kernel.shape:
            raise ValueError(
                f"{side}_head's collects must be [shards, dim, vocab] of its kernel {describe(head.kernel)}, "
                f"got {describe(head.collects)}"
            )
        if head.bias is not None and head.bias.shape != head.kernel.shape[1:]:
            raise ValueError(
                f"{side}_head's bias must be [vocab] as its kernel {describe(head.kernel)}, got {describe(head.bias)}"
            )
        if shape is not None and hidden.shape[:-1] != shape:
            raise ValueError(
                f"{side}_hidden must have the leading shape {list(shape)} of student_hidden, got {describe(hidden)}"
            )
        shape = hidden.shape[:-1]
    vocabs = {side: head.vocab for side, (_, head) in sides.items()}
    if len(set(vocabs.values())) > 1:
        raise ValueError(
            f"student and teacher must have the same classes, got {vocabs['student']} and {vocabs['teacher']}; where one "
            "vocabulary is padded differently say how many columns are classes: Head(kernel, classes=…)"
        )
    return shape  # type: ignore[return-value]


def _side(hidden: Any, head: Head, width: int, shards: int) -> Side:
    kernel, bias, collects = head.kernel, head.bias, head.collects
    if collects is not None and collects.shape[0] != shards:
        collects = None
    # Only where two heads are padded differently is one of them copied, cut.
    if kernel.shape[-1] > width:
        kernel, bias, collects = (x if x is None else x[..., :width] for x in (kernel, bias, collects))
    dtype = jnp.promote_types(jnp.result_type(hidden, kernel), jnp.bfloat16)
    hidden = jnp.asarray(hidden, dtype).reshape(-1, hidden.shape[-1])
    return Side(hidden, jnp.asarray(kernel, dtype), bias, head.softcap, collects)
