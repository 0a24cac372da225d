"""A teacher that is shown the labels, through noise, for dense prediction (segmentation)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import jax
import jax.numpy as jnp

from jkd import losses, schedules
from jkd.data.augment import as_float
from jkd.errors import InputError
from jkd.recipe import Recipe
from jkd.recipes.logits import task
from jkd.schedules import Schedule
from jkd.types import Array, Batch, Model, Outputs, Term

if TYPE_CHECKING:
    from jkd.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisedLabels:
    """A network that sees the labels as one more channel of its image, in which every class has a number drawn for that image.

    The channel is ``scale * (number of the pixel's class + noise * N(0, 1))``, the numbers N(0, 1), one for each class of each
    image, and one for pixels without a label: it shows which pixels belong together, and not to what. Draws come from
    ``batch["keys"]`` ``[batch]`` where a recipe gives them, else (evaluation) they are the same every time. A model config:
    ``Run(student=NoisedLabels(network=unet.Config(channels=4), classes=21), recipe=LADTeacher())``.

    Args:
        network: a Model or config for images of one channel more, whose ``preprocess`` knows that channel too.
        classes: of the labels, ``batch["label"]`` int ``[batch, height, width]`` as large as the image; a number that is no class
            means no label.
        noise, scale: the authors' (their channel stands beside images of about -120 to 120).
    """

    network: Model | ModelConfig
    classes: int
    noise: float = 0.03
    scale: float = 100.0

    def build(self) -> Model:
        network = self.network if isinstance(self.network, Model) else self.network.build()

        def apply(params, buffers, batch, **options):
            return network.apply(params, buffers, self._seen(batch), **options)

        return dataclasses.replace(
            network, apply=apply, paths=lambda batch: network.paths(self._seen(batch)), name=f"{network.name} that sees labels"
        )

    def channel(self, label: Array, keys: Array) -> Array:
        """``[batch, height, width]`` from labels of that shape and a key for each image."""
        known = (label >= 0) & (label < self.classes)

        def draw(key: Array, which: Array) -> Array:
            of_class, of_pixel = jax.random.split(key)
            numbers = jax.random.normal(of_class, (self.classes + 1,))
            return numbers[which] + self.noise * jax.random.normal(of_pixel, which.shape)

        return self.scale * jax.vmap(draw)(keys, jnp.where(known, label, self.classes))

    def _seen(self, batch: Batch) -> Batch:
        image, label = jnp.asarray(batch["image"]), batch.get("label")
        if label is None or label.shape != image.shape[:-1]:
            found = "is missing" if label is None else f"is {list(label.shape)}"
            raise InputError(f"NoisedLabels: batch['label'] {found}; give one label for each pixel of {list(image.shape)}")
        keys = batch["keys"] if "keys" in batch else jax.random.split(jax.random.key(0), label.shape[0])
        image = image if jnp.issubdtype(image.dtype, jnp.floating) else as_float(image)
        hint = self.channel(label, keys).astype(image.dtype)
        return {**batch, "image": jnp.concatenate([image, hint[..., None]], -1)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LADTeacher(Recipe):
    """Label assistance, the teacher: ``CE(z_1) + CE(z_2) + weight * (CWD(z_1 || z_2) + CWD(z_2 || z_1))``.

    z_1 and z_2 are the answers of one network (`NoisedLabels`) to two draws of the label's noise; CWD is the channel-wise
    distance at ``temperature``, with T², each side in turn the detached target. So the network may use which pixels belong together and
    no number in particular. Pixels without a label are left out of CE's mean. The authors' auxiliary heads are left out.

    Args:
        weight: of both distances; number or schedule.
        temperature: of their softmaxes over the positions.
    """

    weight: float | Schedule = 5.0
    temperature: float = 4.0

    citation: ClassVar[str] = (
        "Qiu et al., Make a Strong Teacher with Label Assistance: A Novel Knowledge Distillation Approach for Semantic Segmentation, "
        "ECCV 2024"
    )
    family: ClassVar[str] = "teachers"
    requires: ClassVar[str] = "a network that reads the labels (NoisedLabels)"
    needs_teacher: ClassVar[bool] = False
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def forward(self, models, batch, key):
        paths = []
        for place in range(2):
            keys = jax.vmap(lambda own, place=place: jax.random.fold_in(own, place))(models.keys(batch))
            outputs, models = models.student({**batch, "keys": keys}, key=jax.random.fold_in(key, place))
            paths.append(outputs)
        return paths, None, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        first, second = student
        there = _distance(first, jax.lax.stop_gradient(second), self.temperature)
        back = _distance(second, jax.lax.stop_gradient(first), self.temperature)
        return {
            "task": task(first, batch),
            "second_task": task(second, batch),
            "consistency": Term(there + back, batch["weight"], schedules.at(self.weight, clock)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LAD(Recipe):
    """Label assistance, the student: ``CE + weight * CWD(teacher || student)``, the teacher of `LADTeacher`.

    The student sees the image alone (in the authors' code it has the teacher's channels, and zeros where the labels would be). The
    teacher's draws are new at every step; the authors' distillation code gives each class one number for the whole run.

    Args:
        weight: number or schedule.
        temperature: of both softmaxes over the positions.
        task_weight: of the labels' term.
    """

    weight: float | Schedule = 3.0
    temperature: float = 4.0
    task_weight: float = 1.0

    citation: ClassVar[str] = LADTeacher.citation
    family: ClassVar[str] = "teachers"
    requires: ClassVar[str] = "a teacher that reads the labels (NoisedLabels)"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def forward(self, models, batch, key):
        teacher = models.teacher({**batch, "keys": models.keys(batch)})
        student, models = models.student(batch, key=key)
        return student, teacher, models

    def terms(self, vars, student, teacher, batch, *, clock, key):
        kd = Term(_distance(student, teacher, self.temperature), batch["weight"], schedules.at(self.weight, clock))
        return {"task": task(student, batch, coef=self.task_weight), "kd": kd}


def _distance(mine: Outputs, target: Outputs, temperature: float) -> Array:
    return jnp.asarray(losses.channel_wise(mine.logits, target.logits, temperature=temperature))
