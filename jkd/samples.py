"""What a language model says at the end of its run."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jkd.context import Context, to_compute
from jkd.errors import InputError
from jkd.models.generate import Sampling, Speaker, rollout
from jkd.types import Model

PROMPT, LENGTH = 48, 96
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A piece of evaluation text, and how a model goes on."""

    prompt: str
    text: str


def sample(ctx: Context, product: Model) -> Sample | None:
    """The product's continuation of the first evaluation row's beginning; None where it is no model that says text.

    Always the same prompt and the same draws, so that runs and seeds can be read side by side.
    """
    data = ctx.run.data
    tokenizer = getattr(data, "tokenizer", None)
    if data is None or tokenizer is None or data.eval is None:
        return None
    try:
        product.cache(1, 1)
    except InputError:  # an encoder, say
        return None
    row = data.eval.records([0])[0]
    real = np.asarray(row["tokens"])[np.asarray(row.get("mask", np.ones_like(row["tokens"]))) > 0]
    first = real[: min(PROMPT, max(1, len(real) // 2))]

    def say(weights, prompt):
        def says(batch):
            return product.apply(to_compute(ctx.run, weights[0]), weights[1], to_compute(ctx.run, batch))[0]

        keys = jax.random.key(0)[None]
        speaker = Speaker(says, product.cache)
        return rollout((speaker,), prompt, length=LENGTH, keys=keys, sampling=SAMPLING, end=tokenizer.end)

    found = jax.device_get(jax.jit(say)((product.params, product.buffers), jnp.asarray(first)[None]))
    return Sample(tokenizer.decode(first), tokenizer.decode(found.tokens[0][found.mask[0]]))
