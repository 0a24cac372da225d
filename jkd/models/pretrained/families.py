"""All families: which one a config.json names, and which one can say what a model config says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jkd.errors import InputError, nearest
from jkd.models.pretrained import bert, gemma, llama, vision
from jkd.models.pretrained.family import Family

FAMILIES: tuple[Family, ...] = (
    *(llama.LLAMA, llama.QWEN2, llama.QWEN3, gemma.GEMMA2, gemma.GEMMA3),
    *bert.FAMILIES,
    *(vision.VIT, vision.RESNET),
)
"""Every architecture that is read and written; where several could say the same, the first writes it."""


def named(described: Mapping[str, Any], wanted: str | None = None) -> Family:
    """The family that config.json names, or the one that is wanted in its place.

    Raises:
        InputError: there is none of this name.
    """
    names = [wanted] if wanted is not None else described.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in names:
            return family
    known = [family.architecture for family in FAMILIES]
    what = repr(names[0]) if names else "not named"
    raise InputError(f"config.json: the architecture is {what}{nearest(names[0] if names else '', known)}")


def describing(config: Any) -> Family:
    """The first family whose config.json can say all that a model config says.

    Raises:
        InputError: there is none.
    """
    for family in FAMILIES:
        if family.holds(config):
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise InputError(f"save_pretrained: none of {known} describes this {type(config).__name__}: {config}")
