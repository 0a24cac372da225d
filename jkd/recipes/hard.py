"""Augmentations that are learned against the student: images on which it and its teacher disagree."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates

from jkd import losses, schedules
from jkd.data.augment import as_float
from jkd.errors import InputError
from jkd.recipe import Models, Recipe, Update, Vars
from jkd.recipes.logits import with_task
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Term, Tree


class Augmentor(Protocol):
    """A learned augmentation: a frozen dataclass, differentiable in its parameters."""

    def init(self, key: Array, shape: tuple[int, ...]) -> Tree:
        """Parameters, a nested dict, for images ``[height, width, channels]``."""
        ...

    def __call__(self, params: Tree, image: Array, keys: Array) -> Array:
        """``[batch, height, width, channels]`` to the same; ``keys`` ``[batch]`` for what is drawn by example."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Affine:
    """Affine maps of the image plane, each drawn from one learned normal distribution: ``A = I + a, a ~ N(mean, spread²)``.

    A maps places of the new image to places of the old, both in -1..1 from border to border; the six numbers are those of a 2x3
    matrix, the last column a shift. Read bilinearly, 0 outside.

    Args:
        spread: standard deviation of all six at the start; the means start at 0.
    """

    spread: float = 0.2

    def __post_init__(self):
        if not self.spread > 0:
            raise InputError(f"Affine(spread={self.spread}): must be positive")

    def init(self, key: Array, shape: tuple[int, ...]) -> Tree:
        return {"mean": jnp.zeros((2, 3)), "log_spread": jnp.full((2, 3), jnp.log(self.spread))}

    def __call__(self, params: Tree, image: Array, keys: Array) -> Array:
        height, width = image.shape[1:3]
        sides = jnp.array([height, width], jnp.float32)[:, None, None]
        pixels = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")).astype(jnp.float32)
        place = (2 * pixels + 1) / sides - 1  # of pixel centres
        spread = jnp.exp(params["log_spread"])

        def move(key: Array, image: Array) -> Array:
            drawn = jnp.eye(2, 3) + params["mean"] + spread * jax.random.normal(key, (2, 3))
            source = jnp.einsum("ij,jhw->ihw", drawn[:, :2], place) + drawn[:, 2, None, None]
            at = ((source + 1) * sides - 1) / 2
            read = jax.vmap(lambda plane: map_coordinates(plane, list(at), order=1, cval=0.0), in_axes=-1, out_axes=-1)
            return read(image)

        return jax.vmap(move)(keys, image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HARD(Recipe):
    """Hard augmentations: the student learns ``T² KL(teacher(a(x)) || student(a(x)))``, the augmentor a learns to raise it.

    They take turns. The student trains until that loss is below ``lower``; then the augmentor trains on
    ``max disagreement * T² KL(teacher(a(x)) || student(a(x))) - constancy * T² KL(teacher(x) || teacher(a(x)))``, so that the teacher
    still sees what it saw, until the loss is above ``upper`` or ``patience`` steps have passed; then the student again. A step of the
    run is a step of one of them. a is in the group ``augmentor`` with an optimizer of its own.

    The paper's thresholds, temperature and weights could not be checked, nor how it ends a phase that never ends: the numbers here
    are ours.

    Args:
        augmentor: the learned augmentation; any `Augmentor` (a decoder of images, too).
        temperature: T of all terms.
        disagreement: weight of what the augmentor raises.
        constancy: weight of what it must leave as it is; number or schedule.
        lower, upper: of the student's loss.
        patience: the most steps that the augmentor takes in a turn.
        task_weight: of the labels' term, on augmented images; 0 leaves it out.
    """

    augmentor: Augmentor = Affine()
    temperature: float = 1.0
    disagreement: float | Schedule = 1.0
    constancy: float | Schedule = 0.3
    lower: float = 0.1
    upper: float = 0.5
    patience: int = 5
    task_weight: float = 0.0

    citation: ClassVar[str] = "Nix, Burg & Sinz, HARD: Hard Augmentations for Robust Distillation, 2023, arXiv:2305.14890"
    family: ClassVar[str] = "augmentation"
    requires: ClassVar[str] = "images, as batch['image']"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "mechanism"
    teacher_gradient: ClassVar[Literal["stop", "through"]] = "through"

    def __post_init__(self):
        if not 0 <= self.lower < self.upper:
            raise InputError(
                f"HARD(lower={self.lower}, upper={self.upper}): the student's loss goes down to one, up to the other"
            )

    @property
    def updates(self):
        return (
            Update(groups=("student",), when=lambda memory, clock: ~memory["augmenting"]),
            Update(
                groups=("augmentor",),
                forward=self.contest,
                terms=self.harder,
                remember=self.after_augmenting,
                when=lambda memory, clock: memory["augmenting"],
                name="augmentor",
            ),
        )

    def init(self, key, ctx):
        params = self.augmentor.init(key, ctx.batch["image"].shape[1:])
        return Vars(params={"augmentor": params}, memory={"augmenting": jnp.bool_(False), "turn": jnp.int32(0)})

    def forward(self, models, batch, key):
        hard = self._augmented(models, batch)
        teacher = models.teacher(hard)
        student, models = models.student(hard, key=key)
        return student, teacher, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        kd = losses.forward_kl(student.logits, teacher.logits, temperature=self.temperature)
        return with_task(self.task_weight, student, batch) | {"kd": Term(kd, batch["weight"])}

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return {"augmenting": terms["kd"] < self.lower, "turn": jnp.int32(0)}

    def contest(self, models, batch, key):
        """The augmentor's forward: the teacher on the images as they are, too. The student's buffers stay."""
        hard = self._augmented(models, batch)
        student, _ = models.student(hard, key=key)
        return student, {"plain": models.teacher(batch), "hard": models.teacher(hard)}, models

    def harder(self, vars, student, teacher, batch, *, clock, key):
        """The augmentor's terms."""
        plain, hard = teacher["plain"].logits, teacher["hard"].logits
        disagreement = losses.forward_kl(student.logits, hard, temperature=self.temperature)
        change = losses.forward_kl(hard, plain, temperature=self.temperature)
        return {
            "disagreement": Term(disagreement, batch["weight"], -schedules.at(self.disagreement, clock)),
            "change": Term(change, batch["weight"], schedules.at(self.constancy, clock)),
        }

    def after_augmenting(self, memory, observed, batch, *, terms, clock, key):
        """What the augmentor's update leaves in the memory."""
        turn = memory["turn"] + 1
        return {"augmenting": (terms["disagreement"] <= self.upper) & (turn < self.patience), "turn": turn}

    def _augmented(self, models: Models, batch: Batch) -> Batch:
        if "teacher" in batch:
            raise InputError("HARD asks the teacher about images of its own: answers in batch['teacher'] cannot stand for it")
        image = self.augmentor(models.params["augmentor"], as_float(batch["image"]), models.keys(batch))
        return {**batch, "image": image}
