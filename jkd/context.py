"""A run, resolved: networks built, shapes known, every mistake that shapes can show already told. Nothing is computed or placed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jkd import sharding, trees
from jkd.config import Ensemble, Run, StudentEma
from jkd.errors import InputError, nearest
from jkd.optim import Optimizer
from jkd.recipe import Recipe, Update, Vars
from jkd.schedules import Clock
from jkd.types import Array, Batch, Model, Outputs, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What is known of a run before its first batch; `Recipe.init` reads it.

    Args:
        run: the run.
        networks: ``student`` and, where there is one, ``teacher``.
        mesh: the devices.
        batch: shapes of the global batch as the recipe sees it: augmented, and prepared where the recipe prepares.
        raw_batch: shapes of the global batch as the data gives it.
        student_outputs: shapes of the student's Outputs on the batch, the recipe's taps included.
        teacher_outputs: likewise, or None.
        classes: size of the last axis of the student's logits, or None where it has none.
        train_size: examples to train on, or None where that is not known.
        params: ``{group: tree}`` of the networks: arrays while `Recipe.init` runs (a head may be copied), else shapes.
        buffers: likewise.
    """

    run: Run
    networks: Mapping[str, Model]
    mesh: Mesh
    batch: Batch
    raw_batch: Batch
    student_outputs: Outputs
    teacher_outputs: Outputs | None
    classes: int | None
    train_size: int | None
    params: Mapping[str, Tree]
    buffers: Mapping[str, Tree]

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def student(self) -> Model:
        return self.networks["student"]

    @property
    def teacher(self) -> Model | None:
        return self.networks.get("teacher")

    @property
    def steps(self) -> int:
        return self.run.steps

    @property
    def prepares(self) -> bool:
        """Whether the recipe changes batches in a program of its own, before the step."""
        return type(self.recipe).prepare is not Recipe.prepare

    @property
    def steps_per_epoch(self) -> float:
        """Batches in one pass over the training data (a fraction); 1 where the size is not known."""
        return self.train_size / self.run.batch_size if self.train_size else 1.0

    @property
    def bank_rows(self) -> int:
        """Rows of a per-example bank: ``train_size`` rounded up so that the mesh splits it evenly."""
        if not self.train_size:
            raise InputError(f"{type(self.recipe).__name__} keeps a row for each example: the run needs data of known size")
        return -(-self.train_size // self.batch_shards) * self.batch_shards

    @property
    def batch_shards(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def clock(self, step: Array | int) -> Clock:
        return Clock(step, self.steps, jnp.asarray(step, jnp.float32) / self.steps_per_epoch)

    @functools.cached_property
    def vars(self) -> Vars:
        """Shapes of what `Recipe.init` makes."""
        with explained(f"{type(self.recipe).__name__}.init"):
            return jax.eval_shape(lambda key: self.recipe.init(key, self), _key())

    @functools.cached_property
    def updates(self) -> tuple[Update, ...]:
        """The recipe's updates with nothing left None."""
        recipe, own = self.recipe, tuple(self.vars.params)
        updates = tuple(
            dataclasses.replace(
                update,
                groups=("student", *own) if update.groups is None else update.groups,
                **{
                    hook: getattr(update, hook) or getattr(recipe, hook) for hook in ("forward", "terms", "observe", "remember")
                },
            )
            for update in recipe.updates
        )
        known = {"student", *own} | ({"teacher"} if self.teacher is not None else set())
        for update in updates:
            if update.every < 1:
                raise InputError(f"{type(recipe).__name__}: Update.every = {update.every}; give at least 1")
            if unknown := set(update.groups or ()) - known:
                raise InputError(f"{type(recipe).__name__}: no parameter group {min(unknown)!r}; there are {sorted(known)}")
        return updates

    @functools.cached_property
    def groups(self) -> tuple[str, ...]:
        """Every group that lives in the state; ``teacher`` only where an update trains it."""
        named = dict.fromkeys(
            ("student", *self.vars.params, *(group for update in self.updates for group in update.groups or ()))
        )
        return tuple(named)

    def trains(self, group: str, path: str) -> bool:
        """Whether a parameter moves."""
        return group != "student" or trees.matches(path, self.run.trainable)

    @functools.cached_property
    def specs(self) -> dict[str, Tree]:
        """``{group: tree of PartitionSpec}`` for the stored parameters of every group, the frozen teacher's too."""
        shapes = {**self.params, **self.vars.params}
        rules = {} if isinstance(self.run.teacher, StudentEma) else {"teacher": self.run.teacher_rules}
        return {
            group: sharding.parameter_specs(tree, self.mesh, rules.get(group, self.run.rules)) for group, tree in shapes.items()
        }

    def optimizer(self, group: str) -> optax.GradientTransformation:
        """The optax transformation of a group. Its schedule follows the run's steps however often the group moves."""
        per_step = sum(1 / update.every for update in self.updates if group in (update.groups or ()))
        return self.optimizer_config(group).build(lambda count: self.clock(count / per_step if per_step else count))

    def optimizer_config(self, group: str) -> Optimizer:
        config = self.run.optimizer
        if isinstance(config, Optimizer):
            return config
        for name in (group, group.rpartition(":")[2], "*"):
            if name in config:
                return config[name]
        raise InputError(f"Run.optimizer names no optimizer for the group {group!r} and no '*' for the others")


def make_context(
    run: Run, batch: Batch | None = None, *, train_size: int | None = None, devices: list[Any] | None = None
) -> Context:
    """Resolves a run.

    Args:
        run: its ``teacher`` is a Model, a config, `StudentEma`, an `Ensemble` of these, or None: names are resolved by now.
        batch: one global batch, or its shapes; None to ask ``run.data``.
        train_size: examples to train on; None to ask ``run.data``.
        devices: for the mesh; all by default.

    Raises:
        InputError: a tap that does not exist, shapes that do not fit, another number of classes, a batch that does not divide
            by mesh and microbatches, microbatches of what couples examples.
    """
    mesh = run.mesh.build(devices)
    if batch is None:
        if run.data is None:
            raise InputError("Run.data = None: give data, or a batch to make the context from")
        batch = run.data.spec(run.batch_size)
        train_size = run.data.train_size
    raw_batch = jax.eval_shape(lambda batch: batch, batch)
    _check_batch(run, raw_batch, mesh)
    with explained("Run.augment"):
        augmented = jax.eval_shape(lambda batch, key: augment(run, batch, key), raw_batch, _key())
    ctx = _resolve(run, mesh, raw_batch, augmented, train_size)
    if ctx.prepares:
        from jkd.prepare import prepared_shapes

        ctx = _resolve(run, mesh, raw_batch, prepared_shapes(ctx), train_size)
        _check_batch(run, ctx.batch, mesh)
    _check_groups(ctx)
    return ctx


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def _resolve(run: Run, mesh: Mesh, raw_batch: Batch, batch: Batch, train_size: int | None) -> Context:
    recipe = run.recipe
    networks = {"student": build(run.student)}
    if run.teacher is not None:
        networks["teacher"] = networks["student"] if isinstance(run.teacher, StudentEma) else build_teacher(run.teacher)
    elif recipe.needs_teacher:
        raise InputError(f"Run.teacher = None: {type(recipe).__name__} needs a teacher")
    params, buffers = {}, {}
    for side, network in networks.items():
        shapes = (network.params, network.buffers)
        params[side], buffers[side] = jax.eval_shape(lambda tree: tree, shapes)

    def outputs(side: str, taps: tuple[str, ...]) -> Outputs:
        network = networks[side]
        if side == "teacher" and "teacher" in batch:
            return batch["teacher"]

        def run_it(params, buffers, batch, key):
            cast = to_compute(run, params), buffers, to_compute(run, batch)
            return network.apply(*cast, taps=taps, train=side == "student", key=key)[0]

        with explained(f"{side} {network.name} on a batch {_shapes(batch)}"):
            return jax.eval_shape(run_it, params[side], buffers[side], batch, _key())

    student = outputs("student", recipe.student_taps)
    teacher = outputs("teacher", recipe.teacher_taps) if "teacher" in networks else None
    classes = student.logits_shape[-1] if student.has_logits else None
    data_classes = getattr(run.data, "classes", None)
    if classes is not None and data_classes is not None and classes < data_classes:
        raise InputError(f"student {networks['student'].name} has {classes} classes, the data {data_classes}")
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


class explained:
    """Turns an error of a user's own code, raised while shapes are traced, into one line that says where."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, (TypeError, ValueError, LookupError, AttributeError)) and not isinstance(error, InputError):
            told = f"no {error}" if isinstance(error, KeyError) else str(error)
            lines = [line.strip() for line in told.splitlines() if line.strip()]
            raise InputError(f"{self.where}: {lines[0] if lines else type(error).__name__}") from error


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


def augment(run: Run, batch: Batch, key: Array) -> Batch:
    """The run's augmentations on the global batch."""
    for place, function in enumerate(run.augment):
        batch = function(batch, jax.random.fold_in(key, place))
    return batch


# What a network never computes with in its own dtype: weights of means, targets, and answers prepared earlier.
_KEPT = ("weight", "labelled", "label", "index", "teacher", "mask", "loss_mask")


def to_compute(run: Run, tree: Tree) -> Tree:
    """Floating leaves (and uint8 images, on their 0..1 scale) in the run's compute dtype."""
    dtype = jnp.dtype(run.compute_dtype)
    if dtype == jnp.float32:
        return tree

    def cast(keys, leaf):
        names = [getattr(key, "key", None) for key in keys]
        if any(name in _KEPT for name in names):
            return leaf
        if leaf.dtype == jnp.uint8 and names and names[-1] == "image":
            return leaf.astype(dtype) / 255
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)


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


def _check_groups(ctx: Context) -> None:
    """Every group has an optimizer, and every name and pattern in the run is one of a group or parameter that exists."""
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
    paths = trees.flatten(ctx.params["student"])
    for pattern in run.trainable:
        if not any(trees.matches(path, (pattern.removeprefix("!"),)) for path in paths):
            raise InputError(f"Run.trainable: {pattern!r} matches no parameter of the student{nearest(pattern, paths)}")
