"""The values that pass between the parts of jkd: Batch, Outputs, Model, Term.

Axis names used in every docstring: ``batch`` examples, ``time`` tokens, ``height`` and ``width`` pixels, ``channels`` (always
last), ``classes`` or ``vocab`` (always last), ``dim`` features (always last). ``...`` is any leading shape. The student comes
first, the teacher second.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jkd.errors import InputError

Array = jax.Array
Tree = Any
"""A nested dict of arrays (or of ``jax.ShapeDtypeStruct`` where only shapes are known)."""
Batch = dict[str, Any]
"""Arrays by name, each ``[batch, ...]``; a value may itself be a Batch of another size (``batch["unlabelled"]``).

``weight`` ``[batch]`` float (0 marks padding) is always there. ``index`` ``[batch]`` int32 is a stable example id, ``labelled``
``[batch]`` is 1 where the label may be used. ``image`` is ``[batch, height, width, channels]``: uint8 in 0..255, or float in 0..1.
``label`` is int ``[batch]``, or a distribution ``[batch, classes]`` after mixing. ``tokens`` ``[batch, time]``, ``mask`` (1 = real),
``loss_mask`` (1 = counted), ``segment``, ``position``: see `jkd.tokens`. ``teacher`` is an `Outputs` that was prepared earlier.
``cache`` is what a model that generates has kept of earlier tokens (`Model.cache`).
"""


@jax.tree_util.register_pytree_node_class
class Outputs:
    """What a model says about a batch.

    Args:
        logits: ``[..., classes]``; or None where ``hidden`` and ``head`` give them, or where the model has none.
        hidden: ``[..., dim]``, the input of the last linear map.
        head: ``[dim, rows]``, that map. Keeping the two apart lets a loss walk the classes in blocks.
        collects: ``[shards, dim, rows]``, made of the same parameter as ``head``: a loss may give its gradient by the head to this,
            by shards of the batch, not summed (`losses.chunked.Head`); None: there is no such place.
        bias: ``[rows]`` that ``hidden @ head`` gets, or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` where this is given (a number, no array).
        classes: how many of the head's first ``rows`` are classes: the others only pad its shape, are in no softmax, and are cut
            from ``logits``; None: all. Two models of one vocabulary that pad it differently thus have logits of one shape.
        heads: further answers by name (distillation token, auxiliary head, embedding, score, box; the new ``cache``).
        taps: what was captured, by the path that asked for it.
    """

    def __init__(
        self,
        logits: Array | None = None,
        *,
        hidden: Array | None = None,
        head: Array | None = None,
        collects: Array | None = None,
        bias: Array | None = None,
        softcap: float | None = None,
        classes: int | None = None,
        heads: Mapping[str, Any] | None = None,
        taps: Mapping[str, Any] | None = None,
    ):
        self._logits = logits
        self.hidden = hidden
        self.head = head
        self.collects = collects
        self.bias = bias
        self.softcap = softcap
        self.classes = classes
        self.heads = dict(heads or {})
        self.taps = dict(taps or {})

    @property
    def logits(self) -> Array:
        """``[..., classes]``; computed in float32 as ``cap(hidden @ head + bias)`` where the model keeps the two apart.

        Raises:
            AttributeError: the model gives neither.
        """
        if self._logits is not None:
            return self._logits
        if self.hidden is not None and self.head is not None:
            logits = jnp.einsum("...d,dc->...c", self.hidden, self.head, preferred_element_type=jnp.float32)
            if self.bias is not None:
                logits += self.bias.reshape((1,) * (logits.ndim - 1) + (-1,))
            if self.softcap is not None:
                logits = self.softcap * jnp.tanh(logits / self.softcap)
            return logits[..., : self.classes]
        raise AttributeError("these Outputs hold no logits (neither logits nor hidden and head)")

    @property
    def has_logits(self) -> bool:
        return self._logits is not None or (self.hidden is not None and self.head is not None)

    @property
    def logits_shape(self) -> tuple[int, ...]:
        """``(..., classes)`` without computing the logits; also where the leaves are shapes only."""
        if self._logits is not None:
            return tuple(self._logits.shape)
        if self.hidden is None or self.head is None:
            raise AttributeError("these Outputs hold no logits (neither logits nor hidden and head)")
        rows = self.head.shape[-1]
        return (*self.hidden.shape[:-1], rows if self.classes is None else min(rows, self.classes))

    def replace(self, **changes: Any) -> Outputs:
        """A copy with some of the constructor's arguments changed."""
        given: dict[str, Any] = dict(
            logits=self._logits, hidden=self.hidden, head=self.head, collects=self.collects, bias=self.bias
        )
        given |= dict(softcap=self.softcap, classes=self.classes, heads=self.heads, taps=self.taps)
        return Outputs(**(given | changes))

    def tree_flatten(self):
        arrays = (self._logits, self.hidden, self.head, self.collects, self.bias, self.heads, self.taps)
        return arrays, (self.softcap, self.classes)

    @classmethod
    def tree_unflatten(cls, static, children):
        # Past __init__: jax also unflattens with placeholders that are no arrays and no mappings.
        outputs = object.__new__(cls)
        outputs._logits, outputs.hidden, outputs.head, outputs.collects, outputs.bias, outputs.heads, outputs.taps = children
        outputs.softcap, outputs.classes = static
        return outputs

    def __repr__(self) -> str:
        def shape(x):
            return getattr(x, "shape", x)

        given: dict[str, Any] = dict(logits=self._logits, hidden=self.hidden, head=self.head, bias=self.bias)
        given |= dict(softcap=self.softcap, classes=self.classes)
        parts = [f"{name}={shape(value)}" for name, value in given.items() if value is not None]
        parts += [
            f"{name}={jax.tree.map(shape, value)}" for name, value in (("heads", self.heads), ("taps", self.taps)) if value
        ]
        return f"Outputs({', '.join(parts)})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a model wants its images: ``(crop(resize(image)) - mean) / std``, from uint8 0..255 or float 0..1.

    Args:
        size: ``(height, width)`` of the result; an image that has it already is not resized or cropped. None to keep any.
        mean: per channel, on the 0..1 scale.
        std: per channel, on the 0..1 scale.
        method: how images are resized; antialiased.
        crop: 1 resizes to ``size``, whatever that does to the aspect ratio. Less than 1 keeps it: the image is resized until it
            just covers ``size / crop``, and the middle is cut out.
    """

    size: tuple[int, int] | None = None
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    method: Literal["bilinear", "bicubic"] = "bilinear"
    crop: float = 1.0

    def __post_init__(self):
        if not 0 < self.crop <= 1:
            raise InputError(f"Preprocess.crop = {self.crop}: give a share of the image, more than 0 and at most 1")

    def __call__(self, image: Array) -> Array:
        """``[..., height, width, channels]`` to float ``[..., *size, channels]`` (a float dtype is kept)."""
        image = jnp.asarray(image)
        if not jnp.issubdtype(image.dtype, jnp.floating):
            image = image.astype(jnp.float32) / 255
        if self.size is not None and image.shape[-3:-1] != tuple(self.size):
            image = self._resized(image, *self.size)
        # As many axes as the image: silent rank promotion is an error under some users' settings (and in the tests).
        leading = (1,) * (image.ndim - 1)
        mean, std = (jnp.asarray(value, image.dtype).reshape(*leading, -1) for value in (self.mean, self.std))
        return (image - mean) / std

    def _resized(self, image: Array, height: int, width: int) -> Array:
        sides = (height, width)
        if self.crop < 1:
            scale = max(int(height / self.crop) / image.shape[-3], int(width / self.crop) / image.shape[-2])
            # a little more before rounding down: the side that gives the scale must come out whole
            sides = tuple(int(side * scale + 1e-6) for side in image.shape[-3:-1])  # type: ignore[assignment]
        shape = (*image.shape[:-3], *sides, image.shape[-1])
        image = jax.image.resize(image, shape, self.method).astype(image.dtype)
        top, left = (sides[0] - height) // 2, (sides[1] - width) // 2
        image = image[..., top : top + height, left : left + width, :]
        return jnp.clip(image, 0, 1) if self.method == "bicubic" else image  # which overshoots at edges


def _no_cache(rows: int, length: int, dtype: Any = jnp.float32) -> Tree:
    raise InputError(f"cache({rows}, {length}): this model does not generate; models.decoder does")


def _no_parts(path: str) -> Model:
    raise InputError(f"submodule({path!r}): this model cannot be cut into parts; build it with models.from_nnx")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A network as two pure functions over plain trees: no Variables, no modules, no random state.

    Args:
        init: ``init(key) -> (params, buffers)``, traceable, so that ``jit(init, out_shardings=…)`` creates it sharded.
        apply: ``apply(params, buffers, batch, *, taps=(), train=False, key=None) -> (Outputs, buffers)``. It applies
            ``preprocess`` itself. ``taps`` are paths ``module/path[:method][#call][@layer]``; ``key`` feeds dropout.
        params: nested dict of arrays where the weights are known (pretrained), else of shapes.
        buffers: likewise; what the model carries that no gradient reaches (BatchNorm statistics).
        paths: ``paths(batch) -> {path: shape}`` of everything that can be tapped, by ``eval_shape`` alone.
        submodule: ``submodule(path) -> Model``, a part of this model whose ``apply`` takes the part's input in the batch's
            place and whose params are the subtree at that path.
        cache: ``cache(rows, length, dtype=float32) -> Tree``, room for ``length`` tokens of each row: see `jkd.models.decoder`.
        stacked: paths of stacked layers that it gathers one by one while it runs (`jkd.sharding.one_layer`).
        preprocess: how it wants its images; None for models that read no ``image``.
        couples_batch: True where one example's answer in training depends on the others (BatchNorm).
        config: what it was built from, where that is known; `models.save_pretrained` reads it.
        tokenizer: fingerprint of the vocabulary that its tokens are numbers of (`jkd.data.tokenizer`), where that is known.
        name: for tables and messages.
    """

    init: Callable[[Array], tuple[Tree, Tree]]
    apply: Callable[..., tuple[Outputs, Tree]]
    params: Tree
    buffers: Tree
    paths: Callable[[Any], dict[str, jax.ShapeDtypeStruct]] = dataclasses.field(default=lambda batch: {})
    submodule: Callable[[str], Model] = _no_parts
    cache: Callable[..., Tree] = _no_cache
    stacked: tuple[str, ...] = ()
    preprocess: Preprocess | None = None
    couples_batch: bool = False
    config: Any = None
    tokenizer: str | None = None
    name: str = "model"

    @property
    def initialised(self) -> bool:
        """True where ``params`` holds weights rather than shapes."""
        return not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((self.params, self.buffers)))

    def with_weights(self, params: Tree, buffers: Tree) -> Model:
        """The same network holding these weights (and so do its parts)."""

        def submodule(path: str) -> Model:
            return self.submodule(path).with_weights(subtree(params, path), subtree(buffers, path))

        return dataclasses.replace(self, params=params, buffers=buffers, submodule=submodule)


def subtree(tree: Tree, path: str) -> Tree:
    """The part of a params or buffers tree that ``Model.submodule(path)`` reads; ``{}`` where it has none."""
    for part in filter(None, path.partition(":")[0].split("/")):
        tree = tree.get(part, {})
    return tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """One summand of a recipe's loss: ``coef * sum(values * weight) / sum(weight)`` over the global batch.

    Args:
        values: what a loss returned, unreduced: ``[batch, ...]``.
        weight: what the mean divides by: ``[batch]``, or further leading axes of ``values``; trailing axes are averaged.
        coef: scalar, may be traced (a schedule).
    """

    values: Array | np.ndarray
    weight: Array | np.ndarray
    coef: float | Array = 1.0

    def sums(self) -> tuple[Array, Array]:
        """``(sum of values * weight, sum of weight)``, float32, of the rows at hand."""
        values = jnp.asarray(self.values, jnp.float32)
        weight = jax.lax.stop_gradient(jnp.asarray(self.weight, jnp.float32))
        if weight.ndim == 0 or values.shape[: weight.ndim] != weight.shape:
            raise InputError(
                f"values {values.shape} do not begin with the weight's shape {weight.shape}; hand over what the loss returned, "
                "unreduced"
            )
        values = values.mean(tuple(range(weight.ndim, values.ndim)))
        # Rows of weight 0 are padding and may hold anything; 0 * nan would reach the sum.
        return jnp.sum(jnp.where(weight == 0, 0, values) * weight), jnp.sum(weight)

    def mean(self) -> Array:
        """The mean over the rows at hand, 0 where nothing has weight; the step itself takes the one over the global batch.

        For what a recipe computes inside its forward (the loss of a virtual step): such a recipe couples examples.
        """
        return quotient(*self.sums())


def quotient(total: Array, weight: Array) -> Array:
    """``total / weight``, and 0 where the weight is."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0)
