"""What one published architecture is: its config.json both ways, and where each parameter stands in its files."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jkd.errors import InputError
from jkd.models.pretrained.layout import Layout

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One class of ``transformers``.

    Args:
        architecture: its name, as config.json has it.
        read: a config.json to a model config; an `InputError` for what the network here cannot do.
        write: the way back.
        table: ``{parameter path: (tensor name, layout)}``. ``{}`` stands for a number: in both for one parameter of each, in the
            name alone for parameters that are stacked along their first axis.
        ignored: patterns of tensor names that may be there and are not read.
        prefix: what the names of all but the head's tensors begin with.
        also: names of all tensors to further ones that its files hold.
        bare: whether its own files leave the prefix out, as those of a network without a head do.
        canonical: a config with one way of saying what can be said in several, and without what no config.json says.
    """

    architecture: str
    read: Callable[[Json], Any]
    write: Callable[[Any], dict[str, Any]]
    table: Mapping[str, tuple[str, str]]
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    bare: bool = False
    also: Callable[[Iterable[str]], Mapping[str, np.ndarray]] = lambda names: {}
    canonical: Callable[[Any], Any]

    def source(self, path: str) -> Source:
        """Where a parameter stands."""
        for pattern, name, layout in self._patterns:
            if match := pattern.fullmatch(path):
                return Source(name, match.groups(), layout)
        raise InputError(f"{self.architecture} has no place for the parameter {path!r}")

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern, str, Layout]]:
        numbers = lambda path: re.compile(re.escape(path).replace(r"\{\}", r"(\d+)"))  # noqa: E731
        return [(numbers(path), name, Layout.parse(layout)) for path, (name, layout) in self.table.items()]

    def holds(self, config: Any) -> bool:
        """Whether config.json can say all that this config says."""
        try:
            return self.canonical(self.read(self.write(config))) == self.canonical(config)
        except (InputError, AttributeError):
            return False


@dataclasses.dataclass(frozen=True)
class Source:
    """A tensor's name, filled in as far as the parameter's path does; one more ``{}`` counts stacked layers."""

    pattern: str
    numbers: tuple[str, ...]
    layout: Layout

    @property
    def stacked(self) -> bool:
        return self.pattern.count("{}") > len(self.numbers)

    def names(self, shape: tuple[int, ...]) -> list[str]:
        """The tensors that make up a parameter of this shape."""
        if not self.stacked:
            return [self.pattern.format(*self.numbers)]
        return [self.pattern.format(*self.numbers, layer) for layer in range(shape[0])]

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each."""
        return self.layout.file_shape(shape[1:] if self.stacked else shape)


def both(ours: str, theirs: str, weight: tuple[str, str] = ("kernel", "out in -> in out")) -> dict[str, tuple[str, str]]:
    """Table entries of a linear map and its bias; ``weight`` is what its matrix is called here, and its layout."""
    return {f"{ours}/{weight[0]}": (f"{theirs}.weight", weight[1]), f"{ours}/bias": (f"{theirs}.bias", "out -> out")}


def normed(ours: str, theirs: str) -> dict[str, tuple[str, str]]:
    """Table entries of a norm with scale and bias."""
    return both(ours, theirs, ("scale", "dim -> dim"))


def require(json: Json, **values: Any) -> None:
    """Fields that must have these values where they are there at all.

    Raises:
        InputError: names the field that has another.
    """
    for name, value in values.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if name in json and json[name] not in allowed:
            wanted = " or ".join(repr(one) for one in allowed)
            raise InputError(f"config.json: {name} = {json[name]!r} is not supported, only {wanted}")


def labels(json: Json) -> int:
    """The number of classes; transformers leaves out what equals its own default, 2."""
    return len(json["id2label"]) if "id2label" in json else json.get("num_labels", 2)


def label_names(classes: int) -> dict[str, Any]:
    """The fields that say how many classes there are."""
    names = {str(number): f"LABEL_{number}" for number in range(classes)}
    return {"id2label": names, "label2id": {name: int(number) for number, name in names.items()}}
