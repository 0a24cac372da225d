"""A run, resolved: its networks, and every shape. Nothing is computed or placed. `jkd.resolve` makes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jkd import sharding, trees
from jkd.config import Run, StudentEma
from jkd.errors import InputError
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
            made = jax.eval_shape(lambda key: self.recipe.init(key, self), key_shape())
        if not isinstance(made, Vars):
            raise InputError(f"{type(self.recipe).__name__}.init gave {type(made).__name__}; give Vars(params, memory)")
        return made

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
        rules: dict[str, sharding.Rules] = {"oracle": ()}
        rules |= {} if isinstance(self.run.teacher, StudentEma) else {"teacher": self.run.teacher_rules}
        return {
            group: sharding.parameter_specs(tree, self.mesh, rules.get(group, self.run.rules)) for group, tree in shapes.items()
        }

    def optimizer(self, group: str, step: Array | int = 0) -> optax.GradientTransformation:
        """The optax transformation of a group at a step of the run, which its schedule follows however often the group moves."""
        return self.optimizer_config(group).build(lambda _: self.clock(step))

    def optimizer_config(self, group: str) -> Optimizer:
        config = self.run.optimizer
        if isinstance(config, Optimizer):
            return config
        for name in (group, group.rpartition(":")[2], "*"):
            if name in config:
                return config[name]
        raise InputError(f"Run.optimizer names no optimizer for the group {group!r} and no '*' for the others")


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


def key_shape() -> jax.ShapeDtypeStruct:
    """The shape of a random key, for tracing."""
    return jax.eval_shape(lambda: jax.random.key(0))


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
