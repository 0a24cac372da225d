"""From a `Run` to its `Context`: networks built, shapes traced, and every mistake that shapes can show told."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jkd import tokens, trees
from jkd.cache import Cache
from jkd.config import Ensemble, Run, StudentEma
from jkd.context import Context, augment, explained, key_shape, to_compute
from jkd.data.tokenizer import check_same
from jkd.errors import InputError, nearest
from jkd.prepare import prepared_shapes
from jkd.recipe import Recipe
from jkd.types import Batch, Model, Outputs


def make_context(
    run: Run, batch: Batch | None = None, *, train_size: int | None = None, devices: list[Any] | None = None
) -> Context:
    """Resolves a run.

    Args:
        run: its ``teacher`` is a Model, a config, `StudentEma`, an `Ensemble` of these, a `Cache` (``Context.run`` then has data with
            its answers), or None: names are resolved by now.
        batch: one global batch, or its shapes; None to ask ``run.data``.
        train_size: examples to train on; None to ask ``run.data``.
        devices: for the mesh; all by default.

    Raises:
        InputError: a tap that does not exist, shapes that do not fit, another number of classes, a batch that does not divide
            by mesh and microbatches, microbatches of what couples examples.
    """
    cache = run.teacher if isinstance(run.teacher, Cache) else None
    if cache is not None:
        from jkd.cache.training import attached

        run, batch = attached(run, batch)
    mesh = run.mesh.build(devices)
    if batch is None:
        if run.data is None:
            raise InputError("Run.data = None: give data, or a batch to make the context from")
        batch = run.data.spec(run.batch_size)
        train_size = run.data.train_size
    raw_batch = jax.eval_shape(lambda batch: batch, batch)
    _check_batch(run, raw_batch, mesh)
    with explained("Run.augment"):
        augmented = jax.eval_shape(lambda batch, key: augment(run, batch, key), raw_batch, key_shape())
    ctx = _resolve(run, mesh, raw_batch, augmented, train_size)
    if ctx.prepares:
        ctx = _resolve(run, mesh, raw_batch, prepared_shapes(ctx), train_size)
        _check_batch(run, ctx.batch, mesh)
        if run.steps_per_call > 1:
            raise InputError(
                f"Run.steps_per_call = {run.steps_per_call}: {type(run.recipe).__name__} prepares every batch in a program of its own; "
                "use 1"
            )
    _check_groups(ctx, filled=cache is not None)
    if cache is not None:
        from jkd.cache.training import check_classes

        check_classes(cache, ctx)
    return ctx


def _resolve(run: Run, mesh: Mesh, raw_batch: Batch, batch: Batch, train_size: int | None) -> Context:
    recipe = run.recipe
    _check_recipe(recipe)
    networks = {"student": build(run.student)}
    if run.teacher is not None:
        networks["teacher"] = networks["student"] if isinstance(run.teacher, StudentEma) else build_teacher(run.teacher)
    elif recipe.needs_teacher:
        raise InputError(f"Run.teacher = None: {type(recipe).__name__} needs a teacher")
    if run.oracle is not None:
        networks["oracle"] = build_teacher(run.oracle)
    params, buffers = {}, {}
    for side, network in networks.items():
        shapes = (network.params, network.buffers)
        params[side], buffers[side] = jax.eval_shape(lambda tree: tree, shapes)

    def outputs(side: str, taps: tuple[str, ...]) -> Outputs:
        network = networks[side]
        if side == "teacher" and "teacher" in batch:
            return batch["teacher"]
        own = tokens.for_teacher(batch) if side == "teacher" else batch

        def run_it(params, buffers, batch, key):
            cast = to_compute(run, params), buffers, to_compute(run, batch)
            return network.apply(*cast, taps=taps, train=side == "student", key=key)[0]

        with explained(f"{side} {network.name} on a batch {_shapes(own)}"):
            return jax.eval_shape(run_it, params[side], buffers[side], own, key_shape())

    student = outputs("student", recipe.student_taps)
    teacher = outputs("teacher", recipe.teacher_taps) if "teacher" in networks else None
    classes = student.logits_shape[-1] if student.has_logits else None
    data_classes = getattr(run.data, "classes", None)
    if classes is not None and data_classes is not None and classes < data_classes:
        raise InputError(f"student {networks['student'].name} has {classes} classes, the data {data_classes}")
    fingerprints = {side: network.tokenizer for side, network in networks.items()}
    if "teacher_tokens" in batch:
        check_same(teacher_tokenizer=_fingerprint(run.data, "teacher_tokenizer"), teacher=fingerprints.pop("teacher", None))
    check_same(data=_fingerprint(run.data, "tokenizer"), **fingerprints)
    theirs = teacher.logits_shape[-1] if teacher is not None and teacher.has_logits else None
    if recipe.same_classes and None not in (classes, theirs) and classes != theirs:
        raise InputError(
            f"the teacher has {theirs} classes, the student {classes}: {type(recipe).__name__} compares them class by class; "
            "give both the same classes"
        )
    if run.microbatches > 1 and run.microbatch_statistics == "global":
        for who, couples in (
            (networks["student"].name, networks["student"].couples_batch),
            (type(recipe).__name__, recipe.couples_batch),
        ):
            if couples:
                raise InputError(
                    f"Run.microbatches = {run.microbatches}: {who} couples the examples of a batch (batch statistics, relations), so "
                    "microbatches would change the result; use microbatches=1, or microbatch_statistics='local' to accept that"
                )
    return Context(
        run=run,
        networks=networks,
        mesh=mesh,
        batch=batch,
        raw_batch=raw_batch,
        student_outputs=student,
        teacher_outputs=teacher,
        classes=classes,
        train_size=train_size,
        params=params,
        buffers=buffers,
    )


def _fingerprint(data: Any, field: str) -> str | None:
    return getattr(getattr(data, field, None), "fingerprint", None)


def build(model: Any) -> Model:
    """A Model from a Model or a model config."""
    if isinstance(model, Model):
        return model
    if hasattr(model, "build"):
        return model.build()
    raise InputError(f"{model!r} is neither a Model nor a model config with build()")


def build_teacher(teacher: Any) -> Model:
    """A Model from what `Run.teacher` may hold, names apart."""
    if isinstance(teacher, Ensemble):
        from jkd import models

        return models.ensemble([build(member) for member in teacher.members], mean=teacher.mean)
    if isinstance(teacher, str):
        raise InputError(f"Run.teacher = {teacher!r}: a name is known inside an Experiment only; give a Model")
    return build(teacher)


def _shapes(batch: Batch) -> str:
    return ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in batch.items() if hasattr(leaf, "shape"))


def _check_batch(run: Run, batch: Batch, mesh: Mesh) -> None:
    if "weight" not in batch:
        raise InputError("a batch needs 'weight' [batch] (1 for every real example, 0 for padding)")
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    for path, leaf in trees.flatten({k: v for k, v in batch.items() if k != "teacher"}).items():
        rows = leaf.shape[0] if leaf.shape else 0
        if rows == 0 or rows % (shards * run.microbatches):
            raise InputError(
                f"batch[{path!r}] has {rows} rows, which do not divide by {shards} devices (data x fsdp) x {run.microbatches} "
                "microbatches; change batch_size, mesh or microbatches"
            )


def _check_recipe(recipe: Recipe) -> None:
    """What the command line checks of a recipe's numbers, for those that are given in Python."""
    for field in dataclasses.fields(recipe):
        value, where = getattr(recipe, field.name), f"{type(recipe).__name__}.{field.name}"
        if isinstance(value, str) and str(field.type).startswith(("float", "int")):
            raise InputError(f"{where} = {value!r} is text; give a number")
        if field.name.endswith("temperature") and isinstance(value, int | float) and not 0 < value < math.inf:
            raise InputError(f"{where} = {value}: a temperature must be above 0")


def _check_groups(ctx: Context, *, filled: bool) -> None:
    """Every group has an optimizer, and every name and pattern in the run is one of a group or parameter that exists.

    Args:
        filled: whether the teacher is one that fills a cache: its rules are of parameters that are not here.
    """
    run, groups = ctx.run, ctx.groups
    for name, tree in {**ctx.params, **ctx.vars.params}.items():
        odd = [leaf for leaf in trees.flatten(tree).values() if not isinstance(leaf, jax.ShapeDtypeStruct)]
        if odd or not isinstance(tree, Mapping):
            found = type(odd[0]).__name__ if odd else "one array"
            raise InputError(f"parameters of {name!r} are nested dicts of arrays; this is {found}")
    for group in groups:
        ctx.optimizer_config(group)
    if isinstance(run.optimizer, Mapping):
        known = {"*", *groups, *(group.rpartition(":")[2] for group in groups)}
        for name in run.optimizer:
            if name not in known:
                raise InputError(f"Run.optimizer: no parameter group {name!r}{nearest(name, known)}")
    for name in run.ema.groups if run.ema is not None else ():
        if name not in groups:
            raise InputError(f"Ema.groups: no parameter group {name!r}{nearest(name, groups)}")
    sides = {side: list(trees.flatten(ctx.params[side])) for side in ctx.params}
    own = [path for group in ctx.vars.params.values() for path in trees.flatten(group)]
    stored = {
        "trainable": (run.trainable, sides["student"]),
        "rules": ([pattern for pattern, _ in run.rules], sides["student"] + own),
        "teacher_rules": ([pattern for pattern, _ in run.teacher_rules if not filled], sides.get("teacher", [])),
    }
    for field, (patterns, paths) in stored.items():
        for pattern in patterns:
            if not any(trees.matches(path, (pattern.removeprefix("!"),)) for path in paths):
                raise InputError(f"Run.{field}: {pattern!r} matches no parameter{nearest(pattern, paths)}")
    if groups == ("student",) and not any(ctx.trains("student", path) for path in sides["student"]):
        raise InputError(f"Run.trainable = {run.trainable}: no parameter is left to train")
