"""Augmentation on the device: ``f(batch, key) -> batch``, jittable, on the *global* batch with the step's key.

They run before microbatches are split, and change ``batch["image"]`` itself: teacher and student see the same draw. Random
numbers don't depend on the number of devices, and neither do the results. They are listed in ``Run.augment``; frozen
dataclasses, so that a config prints them.

Mixing pairs every row with the row at the same distance from the batch's other end. The order of the examples is random
already, so this is as good as a random partner, and on a mesh it costs each device one exchange with one other instead of a
gather of all images. Rows that are padding (``weight`` 0) stay out: who is paired with one keeps its image and its label. Where
a label isn't known (``labelled`` 0) that of the mixture isn't either: ``labelled`` becomes the product of the pair's.
``weight`` and ``index`` stay the row's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jkd.errors import InputError
from jkd.types import Array, Batch

Augment = Callable[[Batch, Array], Batch]


@dataclasses.dataclass(frozen=True)
class Crop:
    """Pads every side with zeros, then takes a window of the original size at a random place of each row.

    Args:
        padding: pixels on each side; 4 for CIFAR (He et al. 2015, arXiv:1512.03385, section 4.2).
    """

    padding: int = 4

    def __call__(self, batch: Batch, key: Array) -> Batch:
        image, pad = batch["image"], self.padding
        rows, height, width, channels = image.shape
        start = jax.random.randint(key, (rows, 2), 0, 2 * pad + 1)
        padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))

        def window(row: Array, place: Array) -> Array:
            return jax.lax.dynamic_slice(row, (place[0], place[1], 0), (height, width, channels))

        return {**batch, "image": jax.vmap(window)(padded, start)}


@dataclasses.dataclass(frozen=True)
class Flip:
    """Mirrors each row left and right with this probability."""

    probability: float = 0.5

    def __call__(self, batch: Batch, key: Array) -> Batch:
        image = batch["image"]
        mirrored = jax.random.bernoulli(key, self.probability, (image.shape[0], 1, 1, 1))
        return {**batch, "image": jnp.where(mirrored, image[:, :, ::-1], image)}


@dataclasses.dataclass(frozen=True)
class Mixup:
    """``image <- share * image + (1 - share) * partner``, and the labels likewise (Zhang et al. 2017, arXiv:1710.09412, eq. 1).

    The image becomes float32 in 0..1, an int ``label`` a distribution ``[batch, classes]`` float32.

    Args:
        alpha: ``share ~ Beta(alpha, alpha)``. 1 (the default) is uniform on 0..1, as in FunMatch (Beyer et al. 2021,
            arXiv:2106.05237, section 3); 0.2 is the mixup paper's choice for ImageNet, 0.8 DeiT's.
        classes: number of classes; needed where the label is int.
        probability: of mixing at all (each batch; each row with ``per_example``).
        per_example: a share for each row instead of one for the batch. The paper's code draws one.
    """

    alpha: float = 1.0
    classes: int | None = dataclasses.field(default=None, kw_only=True)
    probability: float = dataclasses.field(default=1.0, kw_only=True)
    per_example: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        _check("Mixup", self.alpha, self.probability)

    def __call__(self, batch: Batch, key: Array) -> Batch:
        rows = batch["image"].shape[0]
        share = _share(key, self.alpha, self.probability, rows if self.per_example else 1)
        share = jnp.where(_paired(batch), jnp.broadcast_to(share, (rows,)), 1.0)
        image, partner = _pairs(batch)
        wide = share[:, None, None, None]
        return _mix_labels("Mixup", {**batch, "image": wide * image + (1 - wide) * partner}, share, self.classes)


@dataclasses.dataclass(frozen=True)
class CutMix:
    """A rectangle of the partner replaces that of the image; labels are mixed by area.

    Yun et al. 2019 (arXiv:1905.04899), eq. 1 and 2. One rectangle for the batch, its centre uniform, its sides
    ``sqrt(1 - share)`` of the image's, clipped at the border; the label's share is the area that is really left. Image and
    label become what `Mixup` makes of them.

    Args:
        alpha: ``share ~ Beta(alpha, alpha)``; 1 in the paper.
        classes: number of classes; needed where the label is int.
        probability: of cutting at all, for each batch; the paper uses 0.5 for CIFAR and 1 for ImageNet.
    """

    alpha: float = 1.0
    classes: int | None = dataclasses.field(default=None, kw_only=True)
    probability: float = dataclasses.field(default=1.0, kw_only=True)

    def __post_init__(self):
        _check("CutMix", self.alpha, self.probability)

    def __call__(self, batch: Batch, key: Array) -> Batch:
        image, partner = _pairs(batch)
        _, height, width, _ = image.shape
        share_key, place_key = jax.random.split(key)
        share = _share(share_key, self.alpha, self.probability, 1)[0]
        side = jnp.sqrt(1 - share)
        centre = jax.random.uniform(place_key, (2,))

        def covered(length: int, where: Array) -> Array:
            # Whole pixels, as the paper's code has them: half the side to both sides of the centre, clipped.
            middle = jnp.floor(where * length)
            half = jnp.floor(jnp.floor(length * side) / 2)
            pixel = jnp.arange(length)
            return (pixel >= middle - half) & (pixel < middle + half)

        box = covered(height, centre[0])[:, None] & covered(width, centre[1])[None, :]
        paired = _paired(batch)
        left = jnp.where(paired, 1 - box.mean(dtype=jnp.float32), 1.0)
        cut = box[None, :, :, None] & paired[:, None, None, None]
        return _mix_labels("CutMix", {**batch, "image": jnp.where(cut, partner, image)}, left, self.classes)


@dataclasses.dataclass(frozen=True, init=False)
class Choose:
    """One of several, drawn for each batch: ``Choose(Mixup(0.8, classes=10), CutMix(1.0, classes=10))``.

    Args:
        *options: augmentations that give the same keys, shapes and dtypes.
        probabilities: of each, summing to 1; None: equal.
    """

    options: tuple[Augment, ...]
    probabilities: tuple[float, ...] | None

    def __init__(self, *options: Augment, probabilities: Sequence[float] | None = None):
        if not options:
            raise InputError("Choose() needs at least one augmentation")
        if probabilities is not None and (len(probabilities) != len(options) or abs(sum(probabilities) - 1) > 1e-6):
            raise InputError(f"Choose: probabilities={tuple(probabilities)} must be {len(options)} numbers that sum to 1")
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "probabilities", None if probabilities is None else tuple(probabilities))

    def __call__(self, batch: Batch, key: Array) -> Batch:
        which_key, key = jax.random.split(key)
        chance = jnp.asarray(self.probabilities) if self.probabilities else None
        which = jax.random.choice(which_key, len(self.options), p=chance)
        return jax.lax.switch(which, self.options, batch, key)


@dataclasses.dataclass(frozen=True)
class At:
    """An augmentation of a batch inside the batch: ``At("unlabelled", Flip())``."""

    name: str
    augment: Augment

    def __call__(self, batch: Batch, key: Array) -> Batch:
        return {**batch, self.name: self.augment(batch[self.name], key)}


def as_float(image: Array) -> Array:
    """uint8 0..255 to float32 0..1; floats become float32."""
    return image.astype(jnp.float32) / 255 if image.dtype == jnp.uint8 else image.astype(jnp.float32)


def _check(name: str, alpha: float, probability: float) -> None:
    if not alpha > 0:
        raise InputError(f"{name}(alpha={alpha}): must be positive; leave {name} out to mix nothing")
    if not 0 <= probability <= 1:
        raise InputError(f"{name}(probability={probability}): must be from 0 to 1")


def _share(key: Array, alpha: float, probability: float, count: int) -> Array:
    beta_key, mix_key = jax.random.split(key)
    # Beta(1, 1) is uniform, and this compiles to a few operations instead of rejection loops.
    share = jax.random.uniform(beta_key, (count,)) if alpha == 1 else jax.random.beta(beta_key, alpha, alpha, (count,))
    return jnp.where(jax.random.bernoulli(mix_key, probability, (count,)), share, 1.0)


def _pairs(batch: Batch) -> tuple[Array, Array]:
    """The images and those of their partners; turned round before they become float, so that bytes travel between devices."""
    return as_float(batch["image"]), as_float(batch["image"][::-1])


def _paired(batch: Batch) -> Array:
    """``[batch]`` bool: the row and its partner are both real."""
    real = batch["weight"] > 0
    return real & real[::-1]


def _mix_labels(name: str, batch: Batch, share: Array, classes: int | None) -> Batch:
    """Labels and ``labelled`` of rows that keep ``share`` ``[batch]`` of themselves."""
    if "teacher" in batch:
        raise InputError(f"{name}: batch['teacher'] was prepared for unmixed images; mix before it is prepared, or not at all")
    mixed = dict(batch)
    if "label" in batch:
        label = batch["label"]
        if label.ndim == 1:
            if classes is None:
                raise InputError(f"{name}(classes=None): an int label needs the number of classes to be mixed; give classes=")
            label = jax.nn.one_hot(label, classes, dtype=jnp.float32)
        wide = share[:, None]
        mixed["label"] = wide * label + (1 - wide) * label[::-1]
    if "labelled" in batch:
        own = batch["labelled"]
        mixed["labelled"] = jnp.where(share < 1, own * own[::-1], own)
    return mixed
