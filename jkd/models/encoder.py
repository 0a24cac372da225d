"""Encoders of the BERT kind (https://arxiv.org/abs/1810.04805): scanned over their layers, for features, classes or masked tokens.

Reads ``tokens`` and, where they are there, ``mask``, ``segment``, ``position`` (see `jkd.tokens`) and ``token_type``, int
``[batch, time]``, by default 0.

Taps: ``embed``; ``layers@i`` (all of them without ``@i``), ``layers/attention@i``, ``layers/attention/query@i`` (``key``, ``value``:
``[batch, time, heads, dim / heads]``), ``layers/mlp@i``; ``pool``, ``classifier``, ``predict``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jkd import tokens as token
from jkd.errors import InputError
from jkd.models.adapt_nnx import from_nnx
from jkd.models.layers import Attention, Embed, gather
from jkd.types import Batch, Model, Outputs

Array = jax.Array

_init = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """An encoder. Its answer has ``hidden`` ``[batch, time, dim]`` and, with ``pool``, ``heads["pooled"]`` ``[batch, dim]``.

    With ``classes`` it has ``logits`` ``[batch, classes]`` besides; with ``masked`` its ``hidden`` and ``head`` (and ``bias``) give the
    logits of every token.

    Args:
        vocab: rows of the embedding.
        tokens: how many of them are tokens; the rest only pad the shape and are never predicted. None: all.
        dim: width of a token.
        depth: layers.
        heads: attention heads, which divide ``dim``.
        hidden: hidden width of the mlp.
        length: longest row; positions are learned.
        offset: rows of the position table that come before position 0 (RoBERTa: 2).
        types: how many token types there are.
        pool: a linear map and tanh on the first token.
        classes: logits from the pooled token; None: none.
        masked: a linear map, gelu and norm before a head that is the embedding, transposed.
        dropout: on embeddings, on what attention and mlp give, and before the classes. (None on attention weights.)
        epsilon: of the norms.
        remat: see `jkd.models.decoder.Config`; by default everything is kept.

    Raises:
        InputError: a width that is no multiple of the heads; classes without a pooled token.
    """

    vocab: int
    tokens: int | None = None
    dim: int
    depth: int
    heads: int
    hidden: int
    length: int = 512
    offset: int = 0
    types: int = 2
    pool: bool = True
    classes: int | None = None
    masked: bool = False
    dropout: float = 0.1
    epsilon: float = 1e-12
    remat: Callable[..., Any] | None = None

    def __post_init__(self):
        if self.dim % self.heads:
            raise InputError(f"encoder dim={self.dim}: must be a multiple of heads={self.heads}")
        if self.classes is not None and not self.pool:
            raise InputError(f"encoder classes={self.classes}: needs pool=True")
        if self.tokens is not None and not 0 < self.tokens <= self.vocab:
            raise InputError(f"encoder tokens={self.tokens}: must be from 1 to vocab={self.vocab}")

    @property
    def features(self) -> tuple[str, ...]:
        """Taps of every layer's output, ``[batch, time, dim]``."""
        return tuple(f"layers@{number}" for number in range(self.depth))

    def build(self) -> Model:
        """The Model, holding shapes; ``init(key)`` makes weights."""
        model = from_nnx(lambda rngs: Encoder(self, rngs), inputs=self._inputs, name="encoder")
        return dataclasses.replace(model, config=self, stacked=("layers",))

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if "tokens" not in batch:
            raise InputError(f"an encoder reads batch['tokens']; this batch has {sorted(batch)}")
        if (time := batch["tokens"].shape[1]) > self.length:
            raise InputError(f"batch['tokens'] has rows of {time} tokens; this encoder has positions for length={self.length}")
        return {
            "tokens": batch["tokens"],
            "segment": token.segments(batch),
            "position": token.positions(batch),
            "kind": batch.get("token_type", jnp.zeros_like(batch["tokens"])),
        }


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=_init, rngs=rngs)


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.dim, epsilon=config.epsilon, rngs=rngs)


class Embeddings(nnx.Module):
    """Token, position and type, added and normalised."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.token = Embed(config.vocab, config.dim, rngs)
        self.position = Embed(config.length + config.offset, config.dim, rngs)
        self.kind = Embed(config.types, config.dim, rngs)
        self.norm, self.dropout = _norm(config, rngs), nnx.Dropout(config.dropout, rngs=rngs)
        self.offset = config.offset

    def __call__(self, tokens: Array, position: Array, kind: Array, collects: Array | None) -> Array:
        found = self.token(tokens, collects) + self.position(position + self.offset) + self.kind(kind)
        return self.dropout(self.norm(found))


class Mlp(nnx.Module):
    """Linear, gelu, linear."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up, self.down = _linear(config.dim, config.hidden, rngs), _linear(config.hidden, config.dim, rngs)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.dropout(self.down(nnx.gelu(self.up(x), approximate=False)))


class Layer(nnx.Module):
    """Attention, then mlp, each added to its input and normalised after."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.attention = Attention(config.dim, config.heads, config.dropout, rngs)
        self.norm1, self.mlp, self.norm2 = _norm(config, rngs), Mlp(config, rngs), _norm(config, rngs)

    def __call__(self, x: Array, segment: Array | None) -> Array:
        x = self.norm1(x + self.attention(x, segment))
        return self.norm2(x + self.mlp(x))


class Pool(nnx.Module):
    """``tanh(linear(first token))``."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.linear = _linear(config.dim, config.dim, rngs)

    def __call__(self, x: Array) -> Array:
        return jnp.tanh(self.linear(x[:, 0]))


class Predict(nnx.Module):
    """What the head of masked tokens reads: linear, gelu, norm; and the bias of its logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.linear, self.norm = _linear(config.dim, config.dim, rngs), _norm(config, rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab,)))

    def __call__(self, x: Array) -> Array:
        return self.norm(nnx.gelu(self.linear(x), approximate=False))


class Encoder(nnx.Module):
    """Embeddings, layers, and what is made of them."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embed = Embeddings(config, rngs)
        stacked = nnx.vmap(lambda rngs: Layer(config, rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=config.depth)(stacked)(rngs)
        self.pool = Pool(config, rngs) if config.pool else None
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.classifier = None if config.classes is None else _linear(config.dim, config.classes, rngs)
        self.predict = Predict(config, rngs) if config.masked else None
        self.config = config

    def __call__(self, tokens: Array, *, segment: Array | None, position: Array, kind: Array) -> Outputs:
        def run(layer: Layer, x: Array) -> Array:
            gather("layers", layer)
            return layer(x, segment)

        if self.config.remat is not None:
            run = nnx.remat(run, prevent_cse=False, policy=self.config.remat)
        # the logits of masked tokens come from the embedding
        collects = None if self.predict is None else self.embed.token.collects(tokens.shape[0])
        x = self.embed(tokens, position, kind, collects)
        x = nnx.scan(run, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(self.layers, x)
        heads = {} if self.pool is None else {"pooled": self.pool(x)}
        if self.predict is not None:
            head = self.embed.token.embedding[...].T.astype(x.dtype)
            bias, hidden = self.predict.bias[...], self.predict(x)
            by_class = None if collects is None else collects.swapaxes(1, 2)
            return Outputs(hidden=hidden, head=head, collects=by_class, bias=bias, classes=self.config.tokens, heads=heads)
        logits = None if self.classifier is None else self.classifier(self.dropout(heads["pooled"]))
        return Outputs(logits, hidden=x, heads=heads)
