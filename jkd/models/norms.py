"""Normalisations as values: what a network's config takes, and builds once for each layer."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from flax import nnx

from jkd.errors import InputError


class Norm(Protocol):
    """What `Config.norm` may be: a frozen dataclass with this method."""

    def build(self, features: int, rngs: nnx.Rngs) -> nnx.Module: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm:
    """Batch statistics; ``momentum`` is the share of the running average that is kept (PyTorch's is one minus it)."""

    momentum: float = 0.9
    epsilon: float = 1e-5

    def build(self, features: int, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.BatchNorm(features, momentum=self.momentum, epsilon=self.epsilon, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupNorm:
    """Statistics of one example's channel groups: examples stay independent, so microbatches change nothing."""

    groups: int = 8
    epsilon: float = 1e-5

    def build(self, features: int, rngs: nnx.Rngs) -> nnx.Module:
        if features % self.groups:
            raise InputError(f"norm=GroupNorm(groups={self.groups}): {features} channels don't divide into that many groups")
        return nnx.GroupNorm(features, num_groups=self.groups, epsilon=self.epsilon, rngs=rngs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Statistics of one pixel's channels."""

    epsilon: float = 1e-6

    def build(self, features: int, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.LayerNorm(features, epsilon=self.epsilon, rngs=rngs)
