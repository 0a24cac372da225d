"""Rows whose responses the models say themselves: how a batch of text becomes prompts, and answers a batch again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jkd import tokens
from jkd.errors import InputError
from jkd.models.generate import Generated, Sampling, Speaker, rollout
from jkd.recipe import Models
from jkd.types import Array, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """Responses said anew, in rows of the same shape.

    A row's prompt is what stands before its first counted token (``loss_mask``), of more than ``prompt`` tokens the last ones; or its
    first ``prompt`` tokens where every token counts. Of a packed row it is the last document in there alone. The response follows it
    at once.

    Args:
        prompt: most tokens of a prompt.
        length: most tokens of a response; what does not fit into the row is cut.
        sampling: how tokens are drawn.
        end: the token that ends a response (``data.tokenizer.end``); None: every response has its full length.

    Raises:
        InputError: ``prompt`` or ``length`` below 1.
    """

    prompt: int = 64
    length: int = 64
    sampling: Sampling = Sampling()
    end: int | None = None

    def __post_init__(self):
        for name in ("prompt", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"Rollout.{name} = {getattr(self, name)}: must be at least 1")

    def say(self, models: Models, batch: Batch, shares: Mapping[str, float]) -> Batch:
        """The batch with responses drawn from the networks' mixture; ``own`` ``[batch]`` is 1.

        Args:
            models: with the weights of the moment.
            batch: as `with_masks` gives it, with ``index``: what a row says depends on it, the step and the seed.
            shares: of each network by name; they sum to 1.
        """
        prompts, mask, count = self._prompts(batch)

        def speaker(name: str, share: float) -> Speaker:
            return Speaker(lambda batch: models.apply(name, batch, taps=())[0], models.networks[name].cache, share)

        found = rollout(
            [speaker(*pair) for pair in shares.items()],
            prompts,
            mask,
            length=self.length,
            keys=models.keys(batch),
            sampling=self.sampling,
            end=self.end,
        )
        return _joined(batch, prompts, mask, count, jax.lax.stop_gradient(found))

    def _prompts(self, batch: Batch) -> tuple[Array, Array, Array]:
        """Tokens and mask ``[rows, prompt]``, and how many columns of each row belong to the prompt."""
        width = min(self.prompt, batch["tokens"].shape[1])
        real = tokens.real(batch)
        counted = real & (batch["loss_mask"] > 0)
        first = jnp.argmax(counted, axis=1)
        last = real.shape[1] - jnp.argmax(real[:, ::-1], axis=1)
        # a row that counts its very first token has no prompt of its own: it is text
        end = jnp.where(counted.any(1) & (first > 0), first, jnp.minimum(last, width))
        start = jnp.maximum(end - width, 0)  # an answer is to the end of a question
        places = start[:, None] + jnp.arange(width)[None]

        def cut(array: Array) -> Array:
            return jnp.take_along_axis(array, jnp.minimum(places, array.shape[1] - 1), axis=1)

        mask = cut(real) & (places < end[:, None])
        if "segment" in batch:
            own = jnp.take_along_axis(batch["segment"], jnp.maximum(end - 1, 0)[:, None], axis=1)
            mask &= cut(batch["segment"]) == own
        return cut(batch["tokens"]), mask, end - start


def with_masks(batch: Batch) -> Batch:
    """The batch with ``mask``, ``loss_mask`` and ``own``, which it may lack; rollouts then change no shape."""
    shape = batch["tokens"].shape
    whole = {name: jnp.ones(shape, jnp.uint8) for name in ("mask", "loss_mask") if name not in batch}
    return {**batch, **whole, "own": jnp.zeros(shape[0], jnp.float32)}


def _joined(batch: Batch, prompts: Array, mask: Array, count: Array, said: Generated) -> Batch:
    """Prompts with what was said right behind them."""
    time = batch["tokens"].shape[1]
    after = jnp.arange(time)[None] - count[:, None]
    place = jnp.clip(after, 0, said.tokens.shape[1] - 1)
    spoken = (after >= 0) & (after < said.tokens.shape[1]) & jnp.take_along_axis(said.mask, place, axis=1)
    response = jnp.where(spoken, jnp.take_along_axis(said.tokens, place, axis=1), 0)
    prompts, mask = (jnp.pad(array, ((0, 0), (0, time - array.shape[1]))) for array in (prompts, mask))
    real = jnp.where(after < 0, mask, spoken)
    made = {
        "tokens": jnp.where(after < 0, prompts, response),
        "mask": real,
        "loss_mask": spoken,
        "segment": real,
        "position": jnp.cumsum(real, axis=1) - real,
        "own": jnp.ones_like(batch["own"]),
    }
    return {**batch, **{name: array.astype(batch[name].dtype) for name, array in made.items() if name in batch}}
