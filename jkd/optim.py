"""Optimizers as config: each names an optax chain and the defaults that the field uses with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import optax

from jkd import schedules, trees
from jkd.errors import InputError
from jkd.schedules import Clock, Schedule
from jkd.types import Array, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A rule for one group of parameters.

    Args:
        learning_rate: number or schedule.
        make: ``make() -> GradientTransformation`` whose updates are still to be multiplied by ``-learning_rate``.
        weight_decay: decoupled (added after ``make``), or coupled (added to the gradient before it).
        coupled: see ``weight_decay``.
        decay: globs on parameter paths that decay; None decays every parameter of two or more axes (kernels, embeddings).
        clip: largest global norm of the gradient over the whole group, before anything else; None for no limit.
    """

    learning_rate: float | Schedule
    make: Callable[[], optax.GradientTransformation]
    weight_decay: float = 0.0
    coupled: bool = False
    decay: tuple[str, ...] | None = None
    clip: float | None = None

    def __post_init__(self):
        for field, least in (("learning_rate", 0.0), ("weight_decay", 0.0), ("clip", 0.0)):
            value = getattr(self, field)
            if callable(value) or (value is None and field == "clip"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= least:
                schedule = " or a schedule" if field == "learning_rate" else ""
                raise InputError(f"optimizer {field} = {value!r}: give a number that is not negative{schedule}")

    def build(self, clock: Callable[[Array], Clock]) -> optax.GradientTransformation:
        """The optax transformation; ``clock`` turns its own count of updates into the run's clock."""

        patterns = self.decay

        def decays(params: Tree) -> Tree:
            if patterns is None:
                return jax.tree.map(lambda leaf: leaf.ndim >= 2, params)
            return trees.map_with_path(lambda path, _: trees.matches(path, patterns), params)

        decay = [optax.add_decayed_weights(self.weight_decay, decays)] if self.weight_decay else []
        return optax.chain(
            *([optax.clip_by_global_norm(self.clip)] if self.clip is not None else []),
            *(decay if self.coupled else []),
            self.make(),
            *([] if self.coupled else decay),
            optax.scale_by_learning_rate(lambda count: schedules.at(self.learning_rate, clock(count))),
        )


@dataclasses.dataclass(frozen=True)
class _Momentum:
    momentum: float
    nesterov: bool

    def __call__(self) -> optax.GradientTransformation:
        return optax.trace(self.momentum, nesterov=self.nesterov) if self.momentum else optax.identity()


@dataclasses.dataclass(frozen=True)
class _Adam:
    b1: float
    b2: float
    eps: float

    def __call__(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)


def sgd(
    learning_rate: float | Schedule,
    *,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: tuple[str, ...] | None = ("*",),
    clip: float | None = None,
) -> Optimizer:
    """SGD as PyTorch defines it: the decay is added to the gradient, of every parameter, before the momentum."""
    return Optimizer(
        learning_rate=learning_rate,
        make=_Momentum(momentum, nesterov),
        weight_decay=weight_decay,
        coupled=True,
        decay=decay,
        clip=clip,
    )


def adamw(
    learning_rate: float | Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-4,
    decay: tuple[str, ...] | None = None,
    clip: float | None = None,
) -> Optimizer:
    """AdamW (Loshchilov & Hutter 2019): decoupled decay, times the learning rate, of arrays with two or more axes.

    ``weight_decay`` defaults to optax's 1e-4.
    """
    return Optimizer(learning_rate=learning_rate, make=_Adam(b1, b2, eps), weight_decay=weight_decay, decay=decay, clip=clip)


def from_optax(learning_rate: float | Schedule, make: Callable[[], optax.GradientTransformation], **options) -> Optimizer:
    """Any optax transformation that leaves the learning rate out, e.g. ``optax.scale_by_lion``; ``options`` as `Optimizer`."""
    return Optimizer(learning_rate=learning_rate, make=make, **options)
