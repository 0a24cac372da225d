"""A directory of safetensors files: what it holds, any part of it, and how one is written."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jkd.errors import InputError

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: no such file, or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error})") from error


class Tensors:
    """The tensors of a directory by name. Nothing is read before a tensor is sliced.

    Args:
        directory: where they are.
        prefix: what their names begin with, unless they are of the bare network without a head: then it is put before them.

    Raises:
        InputError: no safetensors there, or a file that the index names is not.
    """

    def __init__(self, directory: Path, prefix: str = ""):
        from safetensors import SafetensorError, safe_open

        self.directory = directory
        names = [_SINGLE]
        if (directory / _INDEX).exists():
            names = sorted(set(read_json(directory / _INDEX)["weight_map"].values()))
        elif not (directory / _SINGLE).exists():
            raise InputError(
                f"{directory}: holds no {_SINGLE} (nor {_INDEX}); weights of other formats must be converted first"
            )
        found: dict[str, Any] = {}
        for name in names:
            if not (directory / name).exists():
                raise InputError(f"{directory}: {name} is missing, though {_INDEX} names it")
            try:
                file = safe_open(directory / name, framework="np")
            except SafetensorError as error:
                raise InputError(f"{directory / name}: is damaged ({error})") from error
            found |= dict.fromkeys(file.keys(), file)
        bare = not any(name.startswith(prefix) for name in found)
        self._found = {prefix * bare + _renamed(name): (name, file) for name, file in found.items()}

    @property
    def names(self) -> set[str]:
        return set(self._found)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].get_shape())

    def __getitem__(self, name: str) -> Any:
        """To be sliced with one slice for each axis."""
        original, file = self._found[name]
        return file.get_slice(original)


def _renamed(name: str) -> str:
    """Names that the first BERTs have from TensorFlow."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def write_tensors(directory: Path, sizes: Sequence[int], tensors: Iterable[tuple[str, np.ndarray]], largest: int) -> None:
    """Writes tensors as they come, in files of at most ``largest`` bytes (more where one tensor has more).

    Args:
        directory: where to.
        sizes: bytes of every tensor, in the order in which they come: the files' names hold how many files there are.
        tensors: names and values; a file's worth of them is held at a time.
        largest: bytes.
    """
    from safetensors.numpy import save_file

    parts: list[list[int]] = [[]]
    for size in sizes:
        if parts[-1] and sum(parts[-1]) + size > largest:
            parts.append([])
        parts[-1].append(size)
    count, coming, where = len(parts), iter(tensors), dict[str, str]()
    for number, part in enumerate(parts, 1):
        file = _SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        held = dict(next(coming) for _ in part)
        # "pt" says that the names are PyTorch's; without it transformers refuses the file.
        save_file(held, directory / file, metadata={"format": "pt"})
        where |= dict.fromkeys(held, file)
    if count > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
