"""Masked tokens, which an encoder learns to fill in: drawn on the device, an entry of ``Run.augment``."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jkd import tokens
from jkd.errors import InputError
from jkd.types import Array, Batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskTokens:
    """Hides tokens, drawn anew in every step: ``masked`` ``[batch, time]`` says which, ``label`` what they were.

    Of the chosen ones 80 % become ``mask``, 10 % any token, 10 % stay (Devlin et al., BERT, NAACL 2019, section 3.1).

    Args:
        mask: number of the mask token.
        vocab: how many tokens there are to draw from.
        rate: share of the real tokens that are chosen.
        never: numbers of tokens that are not chosen (special ones).

    Raises:
        InputError: a rate outside 0..1, a mask that is no token.
    """

    mask: int
    vocab: int
    rate: float = 0.15
    never: tuple[int, ...] = ()

    def __post_init__(self):
        if not 0 < self.rate <= 1:
            raise InputError(f"MaskTokens.rate = {self.rate}: give a share of the tokens, more than 0 and at most 1")
        if not 0 <= self.mask < self.vocab:
            raise InputError(f"MaskTokens.mask = {self.mask}: must be a token, from 0 to {self.vocab - 1}")

    def __call__(self, batch: Batch, key: Array) -> Batch:
        told, shape = batch["tokens"], batch["tokens"].shape
        key_chosen, key_fate, key_other = jax.random.split(key, 3)
        chosen = jax.random.bernoulli(key_chosen, self.rate, shape) & tokens.real(batch)
        for special in self.never:
            chosen &= told != special
        fate = jax.random.uniform(key_fate, shape)
        other = jax.random.randint(key_other, shape, 0, self.vocab, told.dtype)
        seen = jnp.where(fate < 0.8, self.mask, jnp.where(fate < 0.9, other, told)).astype(told.dtype)
        return {**batch, "tokens": jnp.where(chosen, seen, told), "label": told, "masked": chosen.astype(jnp.uint8)}
