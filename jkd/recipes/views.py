"""Several views of the same examples, drawn before the batch is cut, so that both sides and every microbatch see the same ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jkd.errors import InputError
from jkd.types import Array, Batch


@dataclasses.dataclass(frozen=True, init=False)
class View:
    """For ``Run.augment``: a further view of the same rows, a Batch under a name: ``View("strong", Crop(2), Flip())``.

    The list is applied in order, so a view that stands before the other augmentations starts from the images as they are stored:
    ``augment=(View("strong", Crop(4), Flip()), Flip())``. In a batch inside the batch: ``At("unlabelled", View("strong", …))``.

    Args:
        name: key of the view in the batch.
        *augments: augmentations of the view alone, in order; none for a copy of what has been made so far.
    """

    name: str
    augments: tuple[Callable[[Batch, Array], Batch], ...]

    def __init__(self, name: str, *augments: Callable[[Batch, Array], Batch]):
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "augments", augments)

    def __call__(self, batch: Batch, key: Array) -> Batch:
        # what was prepared for the rows' own images, and other views, are no part of this one
        view: Batch = {name: rows for name, rows in batch.items() if name != "teacher" and not isinstance(rows, dict)}
        for place, augment in enumerate(self.augments):
            view = augment(view, jax.random.fold_in(key, place))
        return {**batch, self.name: view}


def view(recipe: Any, batch: Batch, name: str, how: str) -> Batch:
    """``batch[name]``.

    Raises:
        InputError: it is not there; ``how`` says what makes it.
    """
    if name not in batch:
        raise InputError(f"{type(recipe).__name__}: the batch has no {name!r}; {how}")
    return batch[name]
