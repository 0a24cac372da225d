"""Models made of other models, or of answers that are already there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jkd.data.tokenizer import check_same
from jkd.errors import InputError
from jkd.models.adapt import own_taps
from jkd.types import Model, Outputs, Preprocess


@dataclasses.dataclass(frozen=True)
class Members:
    """The ``config`` of an ensemble: what its answers depend on beside its weights.

    Args:
        mean: what is averaged.
        built: of each member, what it was built from and what it does to its images.
    """

    mean: str | None
    built: tuple[tuple[Any, Preprocess | None], ...]


def ensemble(models: Sequence[Model], *, mean: Literal["probabilities", "logits"] | None = "probabilities") -> Model:
    """Several models as one teacher.

    ``logits`` ``[..., classes]`` are the logarithm of the mean of the members' probabilities, in float32, or the mean of
    their logits; without a mean there are none, and members may know other classes. ``heads["1"]`` are the logits of member 1,
    ``heads["1/name"]`` a head of it. ``params`` and ``buffers`` are the members', under ``"0"``, ``"1"``, …; member 1's taps and
    parts are ``1/path``. Each member applies its own ``preprocess``. The tokenizer is that of all members that know theirs.

    Args:
        models: the members.
        mean: what is averaged; None for nothing.

    Raises:
        InputError: no members, another ``mean``, a path that does not begin with a member's number, other numbers of classes or
            other tokenizers where there is a mean.
    """
    if not models:
        raise InputError("ensemble(models=[]): give at least one model")
    if mean not in ("probabilities", "logits", None):
        raise InputError(f"ensemble(mean={mean!r}): choose 'probabilities', 'logits' or None")
    members = {str(number): model for number, model in enumerate(models)}
    title = f"ensemble of {len(members)}"
    known = {f"member {name}": model.tokenizer for name, model in members.items() if model.tokenizer is not None}
    if mean is not None:
        check_same(**known)

    def init(key):
        made = {name: model.init(jax.random.fold_in(key, int(name))) for name, model in members.items()}
        return {name: one[0] for name, one in made.items()}, {name: one[1] for name, one in made.items()}

    def member(path: str, what: str) -> tuple[str, str]:
        first, _, rest = path.partition("/")
        if first not in members:
            raise InputError(f"{what} {path!r}: begin with the number of a member, 0 to {len(members) - 1}, as in '0/{path}'")
        return first, rest

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        wanted: dict[str, list[str]] = {name: [] for name in members}
        for text in taps:
            name, rest = member(text, "tap")
            wanted[name].append(rest)
        heads, captured, new = dict[str, Any](), dict[str, Any](), {}
        for name, model in members.items():
            own = None if key is None else jax.random.fold_in(key, int(name))
            outputs, new[name] = model.apply(params[name], buffers[name], batch, taps=tuple(wanted[name]), train=train, key=own)
            if mean is not None or outputs.has_logits:
                heads[name] = outputs.logits
            heads |= {f"{name}/{head}": answer for head, answer in outputs.heads.items()}
            captured |= {f"{name}/{text}": outputs.taps[text] for text in wanted[name]}
        if mean is None:
            return Outputs(heads=heads, taps=captured), new
        logits = [heads[name] for name in members]
        if len({answer.shape for answer in logits}) > 1:
            raise InputError(
                f"{title}: the members' logits differ in shape: {[answer.shape for answer in logits]}; mean=None keeps them apart"
            )
        stacked = jnp.stack(logits)
        if mean == "probabilities":
            stacked = stacked.astype(jnp.promote_types(stacked.dtype, jnp.float32))
            answer = jax.nn.logsumexp(jax.nn.log_softmax(stacked), axis=0) - jnp.log(float(len(members))).astype(stacked.dtype)
        else:
            answer = stacked.mean(0)
        return Outputs(answer, heads=heads, taps=captured), new

    def submodule(path):
        name, rest = member(path, "submodule")
        return members[name].submodule(rest) if rest else members[name]

    return Model(
        init=init,
        apply=apply,
        params={name: model.params for name, model in members.items()},
        buffers={name: model.buffers for name, model in members.items()},
        paths=lambda batch: {f"{name}/{path}": s for name, model in members.items() for path, s in model.paths(batch).items()},
        submodule=submodule,
        couples_batch=any(model.couples_batch for model in members.values()),
        config=Members(mean, tuple((model.config, model.preprocess) for model in models)),
        tokenizer=next(iter(known.values())) if len(set(known.values())) == 1 else None,
        name=title,
    )


def prepared() -> Model:
    """A teacher whose answers come with the batch: ``batch["teacher"]``, an `Outputs` (a cache, a rollout, a remote teacher).

    It has no parameters. What can be tapped is what those Outputs hold in ``taps``.

    Raises:
        InputError: a batch without ``teacher``, or with something else there; a tap that it does not hold.
    """

    def read(batch) -> Outputs:
        if not isinstance(answer := batch.get("teacher"), Outputs):
            found = "is missing" if answer is None else f"is {type(answer).__name__}, not jkd.Outputs"
            raise InputError(
                f"batch['teacher'] {found}; this teacher's answers must be prepared (by a cache, or by recipe.prepare)"
            )
        return answer

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        answer = read(batch)
        return answer.replace(taps=own_taps(answer, taps, model="the prepared teacher")), buffers

    return Model(
        init=lambda key: ({}, {}),
        apply=apply,
        params={},
        buffers={},
        paths=lambda batch: jax.eval_shape(lambda taps: dict(taps), read(batch).taps),
        name="prepared answers",
    )
