"""Text from models, inside jit: fixed shapes, a key-value cache, temperature and nucleus sampling, several models mixed.

`generate` takes a `Model` that holds its weights; `rollout` takes whatever answers batches (a recipe's networks with the weights of
the step). Both are functions of arrays and keys: what a row says depends on its own key and its own prompt, not on the rows beside
it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jkd.errors import InputError
from jkd.types import Array, Batch, Model, Outputs, Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What was said after the prompts.

    Args:
        tokens: int32 ``[rows, length]``; 0 after the end.
        mask: ``[rows, length]`` bool: up to the end, the end token too.
    """

    tokens: Array
    mask: Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: of the likeliest tokens so many are kept as have this probability together (Holtzman et al. 2020, section 3.1);
            1 keeps all.

    Raises:
        InputError: a negative temperature, ``top_p`` outside 0..1 or 0.
    """

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: must not be negative")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must be more than 0 and at most 1")

    def log_probs(self, logits: Array) -> Array:
        """``[..., vocab]`` float32, -inf where a token is never drawn."""
        logits = logits.astype(jnp.float32)
        if self.temperature == 0:
            return jnp.log(jax.nn.one_hot(logits.argmax(-1), logits.shape[-1]))
        found = jax.nn.log_softmax(logits / self.temperature)
        if self.top_p < 1:
            falling = jnp.sort(found, axis=-1, descending=True)
            before = jnp.cumsum(jnp.exp(falling), axis=-1) - jnp.exp(falling)
            # the likeliest token always stays: before it lies nothing
            least = jnp.where(before < self.top_p, falling, jnp.inf).min(-1, keepdims=True)
            found = jax.nn.log_softmax(jnp.where(found >= least, found, -jnp.inf))
        return found


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A model with its weights, and room for what it has read.

    Args:
        says: batch -> Outputs; the batch has ``tokens``, ``mask`` and ``cache``, and the new one is ``outputs.heads["cache"]``.
        room: ``room(rows, length) -> cache``.
        share: of the mixture that tokens are drawn from.
    """

    says: Callable[[Batch], Outputs]
    room: Callable[[int, int], Tree]
    share: float = 1.0


def generate(
    model: Model,
    prompts: Array,
    *,
    mask: Array | None = None,
    length: int,
    key: Array,
    sampling: Sampling = Sampling(),
    end: int | None = None,
) -> Generated:
    """What a model says after ``prompts``; jittable.

    Args:
        model: holds its weights, and generates (`models.decoder`).
        prompts: int ``[rows, time]``.
        mask: ``[rows, time]``, 1 = real; padding on either side. None: all real.
        length: tokens to say.
        key: of the draws.
        sampling: how they are drawn.
        end: the token after which a row is silent; None: there is none.
    """
    speaker = Speaker(lambda batch: model.apply(model.params, model.buffers, batch)[0], model.cache)
    keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(prompts.shape[0]))
    return rollout((speaker,), prompts, mask, length=length, keys=keys, sampling=sampling, end=end)


def rollout(
    speakers: Sequence[Speaker],
    prompts: Array,
    mask: Array | None = None,
    *,
    length: int,
    keys: Array,
    sampling: Sampling = Sampling(),
    end: int | None = None,
) -> Generated:
    """Tokens drawn one by one from ``sum of share * softmax(logits / temperature)`` of several models that read the same.

    Args:
        speakers: one or more of one vocabulary; shares sum to 1.
        prompts, mask, length, sampling, end: see `generate`.
        keys: ``[rows]``, one for each row.
    """
    rows, time = prompts.shape
    mask = jnp.ones(prompts.shape, bool) if mask is None else mask > 0
    last = time - 1 - jnp.argmax(mask[:, ::-1], axis=1)

    def read(tokens: Array, mask: Array, caches: Sequence[Tree], place: Array) -> tuple[Array, tuple[Tree, ...]]:
        """Log-probabilities ``[rows, vocab]`` of what follows the token at ``place`` ``[rows]``, and the caches."""
        found, kept = [], []
        for speaker, cache in zip(speakers, caches, strict=True):
            outputs = speaker.says({"tokens": tokens, "mask": mask, "cache": cache})
            kept.append(outputs.heads["cache"])
            logits = _at(outputs, place).logits[:, 0]
            found.append(sampling.log_probs(logits) + (0.0 if speaker.share == 1 else jnp.log(speaker.share)))
        return found[0] if len(found) == 1 else jax.nn.logsumexp(jnp.stack(found), axis=0), tuple(kept)

    first = read(prompts, mask, [speaker.room(rows, time + length) for speaker in speakers], last)

    def more(carry: Any) -> Array:
        step, _, _, silent, _, _ = carry
        return (step < length) & ~silent.all()

    def say(carry: Any) -> Any:
        step, log_probs, caches, silent, tokens, said = carry
        own = jax.vmap(lambda key: jax.random.fold_in(key, step))(keys)
        drawn = jax.vmap(jax.random.categorical)(own, log_probs).astype(jnp.int32)
        drawn = jnp.where(silent, 0, drawn)
        tokens = jax.lax.dynamic_update_slice(tokens, drawn[:, None], (0, step))
        said = jax.lax.dynamic_update_slice(said, ~silent[:, None], (0, step))
        log_probs, caches = read(drawn[:, None], ~silent[:, None], caches, jnp.zeros_like(last))
        silent = silent if end is None else silent | (drawn == end)
        return step + 1, log_probs, caches, silent, tokens, said

    start = (jnp.int32(0), *first, jnp.zeros(rows, bool), jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, length), bool))
    *_, tokens, said = jax.lax.while_loop(more, say, start)
    return Generated(tokens, said)


def _at(outputs: Outputs, place: Array) -> Outputs:
    """The outputs at one place of each row: no logits of a whole prompt are made."""

    def one(array: Array) -> Array:
        return jnp.take_along_axis(array, place[:, None, None], axis=1)

    if outputs.hidden is None:
        return Outputs(one(outputs.logits))
    return outputs.replace(logits=None, hidden=one(outputs.hidden), heads=None, taps=None)
