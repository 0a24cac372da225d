"""Decoders of the Llama, Qwen and Gemma kind: one network, scanned over its layers, that says ``hidden`` and ``head`` for logits.

Reads ``tokens`` and, where they are there, ``mask``, ``segment``, ``position`` (see `jkd.tokens`) and ``cache``.

Taps: ``embed``; ``layers@i`` (all of them without ``@i``), ``layers/attention@i``, ``layers/attention/query@i`` (``key``, ``value``:
``[batch, time, heads, head_dim]``, before rotation), ``layers/mlp@i``; ``norm`` (what the head reads).

To generate, inside jit and with fixed shapes: ``cache = model.cache(rows, length)``; the prompts in one call,
``apply(…, {"tokens": prompts, "mask": mask, "cache": cache})``, padded on either side; then token by token, with the cache that
``outputs.heads["cache"]`` gave back as a loop's carry, ``apply(…, {"tokens": [rows, 1], "cache": cache})``. ``mask`` 0 keeps a
row's token out of what later ones see (a finished row). ``length`` must hold all columns, padding among them. Positions go on
by themselves; with a cache ``batch["position"]`` is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jkd import tokens as token
from jkd.errors import InputError
from jkd.models.adapt_nnx import from_nnx
from jkd.models.attention import attend, attend_where
from jkd.models.layers import Embed, RMSNorm, gather
from jkd.models.memory import Memory, advanced, empty_cache, placed
from jkd.models.rope import Rope, rotate
from jkd.types import Batch, Model, Outputs, Tree

Array = jax.Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=True)}

RULES = (
    ("*/attention/out/kernel", P(None, "tensor", None, "fsdp")),
    ("*/attention/*/kernel", P(None, "fsdp", "tensor")),
    ("*/mlp/down/kernel", P(None, "tensor", "fsdp")),
    ("*/mlp/*/kernel", P(None, "fsdp", "tensor")),
    ("embed/embedding", P("tensor", "fsdp")),
    ("head/kernel", P("fsdp", "tensor")),
)
"""For `Run.rules` on a mesh with a ``tensor`` axis: heads, hidden units and vocabulary are split over it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A decoder.

    Args:
        vocab: rows of the embedding.
        tokens: how many of them are tokens; the rest only pad the shape and are never predicted. None: all.
        dim: width of a token.
        depth: layers.
        heads: query heads.
        kv_heads: key and value heads, which divide ``heads``; None: as many.
        head_dim: width of a head, even; None: ``dim / heads``.
        hidden: hidden width of the gated mlp.
        activation: of its gate.
        tied: the head is the embedding, transposed.
        rope: rotary position embedding.
        local_rope: another one for the layers with a window.
        window: how many tokens such a layer sees, itself among them.
        windowed: for each layer whether it has that window; None: all, where ``window`` is given.
        query_norm: queries and keys are normalised, head by head, before rotation.
        sandwich_norm: what attention and mlp give is normalised too.
        centered_norm: the scale of a norm is stored less 1.
        qkv_bias, out_bias, mlp_bias: which linear maps have biases.
        embedding_scale: embeddings are multiplied by this.
        query_scale: scores are multiplied by this; None: ``head_dim ** -0.5``.
        attention_softcap: scores become ``cap * tanh(score / cap)``.
        logit_softcap: likewise the logits.
        epsilon: of the norms.
        length: longest row it is made for; nothing here depends on it, who serves the model wants to know.
        remat: what a layer keeps for the backward pass, a policy of ``jax.checkpoint_policies``; None: everything. By default
            nothing but its input.

    Raises:
        InputError: heads that do not divide, ``windowed`` of another length than ``depth`` or without ``window``, an unknown
            activation.
    """

    vocab: int
    tokens: int | None = None
    dim: int
    depth: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int
    activation: Literal["silu", "gelu"] = "silu"
    tied: bool = False
    rope: Rope = Rope()
    local_rope: Rope | None = None
    window: int | None = None
    windowed: tuple[bool, ...] | None = None
    query_norm: bool = False
    sandwich_norm: bool = False
    centered_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float | None = None
    query_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    epsilon: float = 1e-6
    length: int = 2048
    remat: Callable[..., Any] | None = jax.checkpoint_policies.nothing_saveable

    def __post_init__(self):
        if self.heads % self.groups:
            raise InputError(f"decoder heads={self.heads}: must be a multiple of kv_heads={self.groups}")
        if self.head_dim is None and self.dim % self.heads:
            raise InputError(f"decoder dim={self.dim}: must be a multiple of heads={self.heads}, or give head_dim")
        if self.width % 2:
            raise InputError(f"decoder head_dim={self.width}: must be even (rotation works on pairs)")
        if self.windowed is not None and (self.window is None or len(self.windowed) != self.depth):
            raise InputError(
                f"decoder windowed={self.windowed}: give window, and one value for each of the {self.depth} layers"
            )
        if self.activation not in ACTIVATIONS:
            raise InputError(f"decoder activation={self.activation!r}: give one of {', '.join(ACTIVATIONS)}")
        if self.tokens is not None and not 0 < self.tokens <= self.vocab:
            raise InputError(f"decoder tokens={self.tokens}: must be from 1 to vocab={self.vocab}")

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    @property
    def width(self) -> int:
        return self.head_dim or self.dim // self.heads

    @property
    def local(self) -> tuple[bool, ...]:
        """For each layer whether it has the window."""
        return self.windowed or (self.window is not None,) * self.depth

    @property
    def kinds(self) -> tuple[tuple[tuple[int | None, Rope], ...], tuple[int, ...]]:
        """The distinct (window, rope) of its layers, and which of them each layer has."""
        own = [(self.window, self.local_rope or self.rope) if local else (None, self.rope) for local in self.local]
        distinct = tuple(dict.fromkeys(own))
        return distinct, tuple(distinct.index(kind) for kind in own)

    @property
    def features(self) -> tuple[str, ...]:
        """Taps of every layer's output, ``[batch, time, dim]``."""
        return tuple(f"layers@{number}" for number in range(self.depth))

    def build(self) -> Model:
        """The Model, holding shapes; ``init(key)`` makes weights."""
        model = from_nnx(lambda rngs: Decoder(self, rngs), inputs=_inputs, name="decoder")
        return dataclasses.replace(model, config=self, cache=self.cache, stacked=("layers",))

    def cache(self, rows: int, length: int, dtype: Any = jnp.float32) -> Tree:
        """Room for the keys and values of ``length`` tokens in each row; see `jkd.models.memory`."""
        return empty_cache(self.depth, rows, length, self.groups, self.width, dtype)


def _inputs(batch: Batch) -> dict[str, Any]:
    if "tokens" not in batch:
        raise InputError(f"a decoder reads batch['tokens']; this batch has {sorted(batch)}")
    cache = batch.get("cache")
    counted: Batch = batch if cache is None else {name: batch[name] for name in ("tokens", "mask") if name in batch}
    return {
        "tokens": batch["tokens"],
        "segment": token.segments(counted),
        "position": token.positions(counted),
        "cache": cache,
    }


@dataclasses.dataclass(frozen=True)
class Context:
    """What all layers share in one call: rotations by kind ``[kinds, 2, batch, time, head_dim / 2]``, documents, positions."""

    tables: Array
    segment: Array | None
    position: Array


class Attention(nnx.Module):
    """Causal attention of grouped heads, rotated: ``[batch, time, dim]`` to the same."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        make = lambda heads: nnx.LinearGeneral(  # noqa: E731
            config.dim, (heads, config.width), use_bias=config.qkv_bias, kernel_init=init, rngs=rngs
        )
        self.query, self.key, self.value = make(config.heads), make(config.groups), make(config.groups)
        self.out = nnx.LinearGeneral(
            (config.heads, config.width),
            config.dim,
            axis=(-2, -1),
            use_bias=config.out_bias,
            kernel_init=_residual(config),
            rngs=rngs,
        )
        self.query_norm = _norm(config.width, config) if config.query_norm else None
        self.key_norm = _norm(config.width, config) if config.query_norm else None
        self.config = config

    def __call__(self, x: Array, kind: Array, context: Context, memory: Memory | None) -> Array:
        query, key, value = self.query(x), self.key(x), self.value(x)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        table = context.tables[0] if len(context.tables) == 1 else context.tables[kind]
        query, key = rotate(query, table), rotate(key, table)
        if memory is None:
            return self.out(self._among(query, key, value, kind, context))
        memory.write(key, value)
        if memory.seen is None:
            return self.out(self._among(query, key, value, kind, context))
        scale, softcap = self.config.query_scale, self.config.attention_softcap
        keys, values = memory.read(x.dtype)
        return self.out(attend_where(query, keys, values, memory.seen[kind], scale=scale, softcap=softcap))

    def _among(self, query: Array, key: Array, value: Array, kind: Array, context: Context) -> Array:
        def within(window: int | None) -> Callable[..., Array]:
            scale, softcap = self.config.query_scale, self.config.attention_softcap
            return lambda q, k, v: attend(
                q, k, v, causal=True, window=window, segment=context.segment, scale=scale, softcap=softcap
            )

        # A kernel knows its window when it is compiled; layers that are scanned are one program, hence the switch.
        windows = [window for window, _ in self.config.kinds[0]]
        if len(set(windows)) == 1:
            return within(windows[0])(query, key, value)
        return jax.lax.switch(kind, [within(window) for window in windows], query, key, value)


class Mlp(nnx.Module):
    """``down(activation(gate(x)) * up(x))``."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        make = lambda: nnx.Linear(config.dim, config.hidden, use_bias=config.mlp_bias, kernel_init=init, rngs=rngs)  # noqa: E731
        self.gate, self.up = make(), make()
        self.down = nnx.Linear(config.hidden, config.dim, use_bias=config.mlp_bias, kernel_init=_residual(config), rngs=rngs)
        self.activation = ACTIVATIONS[config.activation]

    def __call__(self, x: Array) -> Array:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def _norm(features: int, config: Config) -> RMSNorm:
    return RMSNorm(features, epsilon=config.epsilon, centered=config.centered_norm)


def _residual(config: Config):
    # As GPT-2: what every layer adds shrinks with the number of layers that add.
    return nnx.initializers.normal(0.02 / (2 * config.depth) ** 0.5)


class Layer(nnx.Module):
    """Attention, then mlp, each on the normalised input and added to it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        norm = lambda: _norm(config.dim, config)  # noqa: E731
        self.norm1, self.attention = norm(), Attention(config, rngs)
        self.norm2, self.mlp = norm(), Mlp(config, rngs)
        self.post_norm1 = norm() if config.sandwich_norm else None
        self.post_norm2 = norm() if config.sandwich_norm else None

    def __call__(self, x: Array, kind: Array, context: Context, memory: Memory | None) -> Array:
        y = self.attention(self.norm1(x), kind, context, memory)
        x = x + (y if self.post_norm1 is None else self.post_norm1(y))
        y = self.mlp(self.norm2(x))
        return x + (y if self.post_norm2 is None else self.post_norm2(y))


class Decoder(nnx.Module):
    """Embedding, layers, norm; the head is given, not applied."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embed = Embed(config.vocab, config.dim, rngs)
        stacked = nnx.vmap(lambda rngs: Layer(config, rngs), in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=config.depth)(stacked)(rngs)
        self.norm = _norm(config.dim, config)
        head = lambda: nnx.Linear(config.dim, config.vocab, use_bias=False, kernel_init=init, rngs=rngs)  # noqa: E731
        self.head = None if config.tied else head()
        self.config = config

    def __call__(self, tokens: Array, *, segment: Array | None, position: Array, cache: Tree | None) -> Outputs:
        collects = self.embed.collects(tokens.shape[0]) if self.head is None else None
        x = self.embed(tokens, collects)
        if self.config.embedding_scale is not None:
            x = x * jnp.asarray(self.config.embedding_scale, x.dtype)
        seen = None
        if cache is not None:
            real = jnp.ones(tokens.shape, bool) if segment is None else segment > 0
            windows = [window for window, _ in self.config.kinds[0]]
            cache, position, seen = placed(cache, jnp.broadcast_to(position, tokens.shape), real, windows)
        tables = jnp.stack([rope.table(position, self.config.width) for _, rope in self.config.kinds[0]])
        x, cache = self._run(x, Context(tables, segment, position), cache, seen)
        x = self.norm(x)
        head = self.embed.embedding[...].T if self.head is None else self.head.kernel[...]
        heads = {} if cache is None else {"cache": advanced(cache, tokens.shape[1])}
        return Outputs(
            hidden=x,
            head=head.astype(x.dtype),
            collects=None if collects is None else collects.swapaxes(1, 2),
            softcap=self.config.logit_softcap,
            classes=self.config.tokens,
            heads=heads,
        )

    def _run(self, x: Array, context: Context, cache: Tree | None, seen: Array | None) -> tuple[Array, Tree | None]:
        kinds = jnp.asarray(self.config.kinds[1])

        def run(layer: Layer, carry: tuple[Array, Tree | None], number: Array) -> tuple[Array, Tree | None]:
            gather("layers", layer)
            x, cache = carry
            if cache is None:
                return layer(x, kinds[number], context, None), None
            memory = Memory(cache, number, seen)
            x = layer(x, kinds[number], context, memory)
            return x, memory.cache

        if cache is None and self.config.remat is not None:
            run = nnx.remat(run, prevent_cse=False, policy=self.config.remat)
        scanned = nnx.scan(run, in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry)
        return scanned(self.layers, (x, cache), jnp.arange(self.config.depth))
