"""What language models say at the end of a run: its product, and its teacher beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd.context import Context, to_compute
from jkd.data.batch import Record
from jkd.data.tokenizer import Tokenizer
from jkd.errors import InputError
from jkd.models.generate import Generated, Sampling, Speaker, rollout
from jkd.networks import gathered, models_of
from jkd.recipe import Models
from jkd.state import Frozen, State
from jkd.step import deployed
from jkd.types import Array, Model

PROMPT, LENGTH = 48, 96
"""Most tokens of a text that are given, and most that are said."""
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


@dataclasses.dataclass(frozen=True)
class Sample:
    """A piece of evaluation text, and how models go on.

    Args:
        prompt: the piece.
        text: what the run's product says.
        teacher: what its teacher says; None where there is none that says text.
    """

    prompt: str
    text: str
    teacher: str | None = None


def sample(ctx: Context, product: Model, state: State, frozen: Frozen, tell: Callable[[str], None]) -> Sample | None:
    """How product and teacher go on with the first evaluation row; None where the product is no model that says text.

    Always the same prompt and the same draws, so that runs, seeds and sides can be read side by side. The prompt is what stands
    before the row's first counted token, or of plain text its beginning. The run is done by now: what goes wrong here (no memory
    for it, say) is told, and costs the sample alone.

    Args:
        product: what the recipe deploys of ``state``.
        tell: takes a line on what went wrong.
    """
    data = ctx.run.data
    tokenizer = getattr(data, "tokenizer", None)
    if data is None or tokenizer is None or data.eval is None or not _generates(product):
        return None

    def student(models: Models) -> Speaker:
        model = deployed(ctx, dataclasses.replace(models, params=gathered(ctx, models.params)))
        params = to_compute(ctx.run, model.params)
        return Speaker(lambda batch: model.apply(params, model.buffers, to_compute(ctx.run, batch))[0], model.cache)

    def teacher(models: Models) -> Speaker:
        return Speaker(lambda batch: models.apply("teacher", batch, taps=())[0], models.networks["teacher"].cache)

    found: dict[str, str] = {}
    sides = {"student": (student, tokenizer)}
    if ctx.teacher is not None and _generates(ctx.teacher):
        sides["teacher"] = (teacher, data.teacher_tokenizer or tokenizer)
    for name, (side, own) in sides.items():
        try:
            numbers = _prompt(data.eval.records([0])[0])
            prompt = tokenizer.decode(numbers)
            if own is not tokenizer:
                begin = [] if own.begin is None else [own.begin]
                numbers = np.array([*begin, *own.encode(prompt)], np.int32)
            found[name] = _said(ctx, side, state, frozen, numbers, own)
        except Exception as error:  # of the device, the data or a model's own code
            tell(f"no sample of what the {name} says: {(str(error).splitlines() or [type(error).__name__])[0]}")
            return None if name == "student" else Sample(prompt, found["student"])
    return Sample(prompt, found["student"], found.get("teacher"))


def _generates(model: Model) -> bool:
    """False of an encoder, say, and of answers that lie in a cache."""
    try:
        jax.eval_shape(lambda: model.cache(1, 1))
    except InputError:
        return False
    return True


def _prompt(row: Record) -> np.ndarray:
    real = np.asarray(row.get("mask", np.ones_like(row["tokens"]))) > 0
    numbers = np.asarray(row["tokens"])[real]
    counted = np.flatnonzero(np.asarray(row.get("loss_mask", real))[real])
    # of a row that counts its very first token no part is a prompt: it is text
    return numbers[: counted[0]] if len(counted) and counted[0] else numbers[: min(PROMPT, max(1, len(numbers) // 2))]


def _said(
    ctx: Context, side: Callable[[Models], Speaker], state: State, frozen: Frozen, prompt: np.ndarray, tokenizer: Tokenizer
) -> str:
    def say(state: State, frozen: Frozen, prompt: Array) -> Generated:
        speaker = side(models_of(ctx, state, frozen, ema=ctx.run.evaluate_ema))
        keys = jax.random.key(0)[None]
        return rollout((speaker,), prompt, length=LENGTH, keys=keys, sampling=SAMPLING, end=tokenizer.end)

    # every process gives the same prompt, and hears the whole answer
    everywhere = NamedSharding(ctx.mesh, P())
    found = jax.device_get(jax.jit(say, out_shardings=everywhere)(state, frozen, prompt[None]))
    return tokenizer.decode(found.tokens[0][found.mask[0]])
