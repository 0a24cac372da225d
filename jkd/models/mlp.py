"""A multilayer perceptron on flattened images or plain vectors."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from jkd.models.adapt_nnx import from_nnx
from jkd.types import Model, Preprocess


class Layer(nnx.Module):
    """Linear, (LayerNorm), relu, (dropout)."""

    def __init__(self, inputs: int, width: int, config: Config, rngs: nnx.Rngs):
        self.linear = nnx.Linear(inputs, width, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs) if config.norm else None
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs) if config.dropout else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.linear(x)
        x = nnx.relu(x if self.norm is None else self.norm(x))
        return x if self.dropout is None else self.dropout(x)


class MLP(nnx.Module):
    """``[batch, ...]``, flattened to ``[batch, features]``, to logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        sizes = (config.features, *config.hidden)
        self.layers = nnx.List([Layer(*pair, config, rngs) for pair in zip(sizes[:-1], sizes[1:], strict=True)])
        self.head = nnx.Linear(sizes[-1], config.classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A perceptron that reads ``batch["image"]``: ``[batch, height, width, channels]`` or ``[batch, features]``.

    Taps: ``layers/i`` (after its relu), ``layers/i/linear``, ``head``.

    Args:
        features: length of the flattened image.
        hidden: width of each hidden layer.
        classes: logits.
        norm: LayerNorm before each relu.
        dropout: after each relu.
        preprocess: how it wants its images; None: as float 0..1.
    """

    features: int
    hidden: tuple[int, ...] = (256, 256)
    classes: int
    norm: bool = False
    dropout: float = 0.0
    preprocess: Preprocess | None = None

    def build(self) -> Model:
        """The Model, holding shapes; ``init(key)`` makes weights."""
        return from_nnx(lambda rngs: MLP(self, rngs), preprocess=self.preprocess, name="mlp")
