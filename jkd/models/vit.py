"""Vision transformers as in DeiT (https://arxiv.org/abs/2012.12877), with its distillation token on request.

Initialisation and layers follow timm's ``deit_*_patch16_224``. Query, key and value are three linear maps, so that each can be
tapped; their parameters are as many as those of the fused one.

Taps: ``patches``; ``blocks/i``, ``blocks/i/attention``, ``blocks/i/attention/query`` (``key``, ``value``:
``[batch, tokens, heads, dim/heads]``), ``blocks/i/mlp``; ``norm`` (all tokens); ``head``, ``distillation_head``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jkd.errors import InputError
from jkd.models.adapt_nnx import from_nnx
from jkd.models.layers import Attention
from jkd.types import Model, Outputs, Preprocess

Array = jax.Array
IMAGENET = Preprocess(size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""What DeiT was trained with."""

_init = nnx.initializers.truncated_normal(0.02)


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=_init, rngs=rngs)


class Mlp(nnx.Module):
    """Linear, gelu, linear."""

    def __init__(self, dim: int, hidden: int, dropout: float, rngs: nnx.Rngs):
        self.up, self.down = _linear(dim, hidden, rngs), _linear(hidden, dim, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.dropout(nnx.gelu(self.up(x), approximate=False))
        return self.dropout(self.down(x))


class Block(nnx.Module):
    """Attention, then mlp, each on the normalised input and added to it (or, in training, at times skipped)."""

    def __init__(self, config: Config, skip: float, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(config.dim, epsilon=config.epsilon, rngs=rngs)
        self.attention = Attention(config.dim, config.heads, config.dropout, rngs)
        self.norm2 = nnx.LayerNorm(config.dim, epsilon=config.epsilon, rngs=rngs)
        self.mlp = Mlp(config.dim, round(config.dim * config.mlp_ratio), config.dropout, rngs)
        # One draw for each example drops its whole branch: stochastic depth.
        self.skip = nnx.Dropout(skip, broadcast_dims=(1, 2), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.skip(self.attention(self.norm1(x)))
        return x + self.skip(self.mlp(self.norm2(x)))


class Patches(nnx.Module):
    """``[batch, height, width, channels]`` to ``[batch, tokens, dim]``, one token for each square of pixels."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        size = (config.patch, config.patch)
        init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.conv = nnx.Conv(config.channels, config.dim, size, strides=size, padding="VALID", kernel_init=init, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv(x)
        return x.reshape(x.shape[0], -1, x.shape[-1])


class ViT(nnx.Module):
    """Patches, class token (and distillation token), blocks, norm, head(s)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        tokens = 2 if config.distillation_token else 1
        self.patches = Patches(config, rngs)
        self.tokens = nnx.Param(_init(rngs.params(), (1, tokens, config.dim)))
        length = tokens + (config.size[0] // config.patch) * (config.size[1] // config.patch)
        self.position = nnx.Param(_init(rngs.params(), (1, length, config.dim)))
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        skips = [config.stochastic_depth * number / max(config.depth - 1, 1) for number in range(config.depth)]
        self.blocks = nnx.List([Block(config, skip, rngs) for skip in skips])
        self.norm = nnx.LayerNorm(config.dim, epsilon=config.epsilon, rngs=rngs)
        self.head = _linear(config.dim, config.classes, rngs)
        self.distillation_head = _linear(config.dim, config.classes, rngs) if config.distillation_token else None

    def __call__(self, x: Array) -> Outputs:
        x = self.patches(x)
        tokens = jnp.broadcast_to(self.tokens[...], (x.shape[0], *self.tokens.shape[1:])).astype(x.dtype)
        x = self.dropout(jnp.concatenate([tokens, x], 1) + self.position[...].astype(x.dtype))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        heads = {} if self.distillation_head is None else {"distillation": self.distillation_head(x[:, 1])}
        return Outputs(self.head(x[:, 0]), heads=heads)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A vision transformer; `tiny`, `small` and `base` are the published DeiT sizes.

    With ``distillation_token`` the answer has ``heads["distillation"]`` ``[batch, classes]`` beside ``logits``. DeiT averages
    the two when it is deployed; here ``logits`` is the class token's alone, in training and evaluation.

    Args:
        size: ``(height, width)`` of the image in pixels, multiples of ``patch``.
        patch: side of a patch.
        dim: width of a token.
        depth: blocks.
        heads: attention heads, which divide ``dim``.
        mlp_ratio: hidden width of the mlp over ``dim``.
        classes: logits.
        distillation_token: a second token with its own head.
        dropout: after the position embedding, attention and both maps of the mlp (DeiT: 0).
        stochastic_depth: rate at which the last block's branches are skipped, growing linearly from 0 (DeiT: 0.1).
        epsilon: of the norms.
        channels: of the image.
        preprocess: how it wants its images; None: as float 0..1, already of ``size``.

    Raises:
        InputError: a size that is no multiple of the patch, a width that is no multiple of the heads.
    """

    size: tuple[int, int] = (224, 224)
    patch: int = 16
    dim: int
    depth: int = 12
    heads: int
    mlp_ratio: float = 4.0
    classes: int
    distillation_token: bool = False
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    epsilon: float = 1e-6
    channels: int = 3
    preprocess: Preprocess | None = None

    def __post_init__(self):
        if any(side % self.patch for side in self.size):
            raise InputError(f"vit size={self.size}: both sides must be multiples of patch={self.patch}")
        if self.dim % self.heads:
            raise InputError(f"vit dim={self.dim}: must be a multiple of heads={self.heads}")

    def build(self) -> Model:
        """The Model, holding shapes; ``init(key)`` makes weights."""
        model = from_nnx(lambda rngs: ViT(self, rngs), preprocess=self.preprocess, name="vit")
        return dataclasses.replace(model, config=self)

    @property
    def features(self) -> tuple[str, ...]:
        """Taps of every block's output, ``[batch, tokens, dim]``."""
        return tuple(f"blocks/{number}" for number in range(self.depth))


def _deit(dim: int, heads: int, classes: int, changes: dict[str, Any]) -> Config:
    given: dict[str, Any] = {"dim": dim, "heads": heads, "classes": classes, "preprocess": IMAGENET}
    return Config(**given | changes)


def tiny(*, classes: int = 1000, **changes: Any) -> Config:
    """DeiT-Ti: 5.7 million parameters."""
    return _deit(192, 3, classes, changes)


def small(*, classes: int = 1000, **changes: Any) -> Config:
    """DeiT-S: 22 million parameters."""
    return _deit(384, 6, classes, changes)


def base(*, classes: int = 1000, **changes: Any) -> Config:
    """DeiT-B: 87 million parameters."""
    return _deit(768, 12, classes, changes)
