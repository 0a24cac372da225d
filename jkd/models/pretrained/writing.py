"""From arrays, wherever they are, to a directory."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd import sharding
from jkd.data.tokenizer import Tokenizer
from jkd.errors import InputError
from jkd.models.pretrained import families, preprocess
from jkd.models.pretrained.family import Source
from jkd.models.pretrained.files import write_tensors
from jkd.models.pretrained.reading import leaves_of
from jkd.types import Model


def save_pretrained(
    model: Model,
    directory: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    extra: Mapping[str, Any] | None = None,
    largest: int = 2 * 2**30,
) -> None:
    """Writes a directory that ``transformers`` loads unchanged: config.json and safetensors, in the dtype of the weights.

    On several hosts every process must call this; the first writes. One parameter at a time is made whole.

    Args:
        model: with weights, built from a config of `jkd.models`.
        directory: made if need be; must hold no weights yet.
        tokenizer: written beside it; its tokens around a document go into config.json.
        extra: further fields of config.json.
        largest: bytes of a file.

    Raises:
        InputError: a model without weights, one that no known architecture describes, or a directory that holds weights.
    """
    directory, family = Path(directory), families.describing(model.config)
    if not model.initialised:
        raise InputError(f"save_pretrained: this {model.name} holds no weights")
    if any(directory.glob("*.safetensors")):
        raise InputError(f"save_pretrained: {directory} holds weights already; give another directory")
    leaves = [(family.source(path.partition("/")[2]), leaf) for path, leaf in leaves_of(model).items()]
    dtypes = {str(leaf.dtype) for _, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
    described = {"architectures": [family.architecture], **family.write(model.config)}
    described["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    if tokenizer is not None:
        described |= {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end}
    described |= extra or {}
    tensors = _tensors(leaves, family.prefix if family.bare else "")
    if jax.process_index():
        for _ in tensors:  # its part in making parameters whole
            pass
        return
    directory.mkdir(parents=True, exist_ok=True)
    sizes = {
        name: leaf.nbytes // len(names) for names, leaf in ((s.names(leaf.shape), leaf) for s, leaf in leaves) for name in names
    }
    also = family.also(sizes)
    held = [*sizes.values(), *(array.nbytes for array in also.values())]
    write_tensors(directory, held, itertools.chain(tensors, also.items()), largest)
    _write(directory / "config.json", described)
    if model.preprocess is not None:
        _write(directory / preprocess.FILE, preprocess.write(model.preprocess))
    if tokenizer is not None:
        tokenizer.save(directory)


def _write(path: Path, described: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensors(leaves: list[tuple[Source, Any]], without: str) -> Iterator[tuple[str, np.ndarray]]:
    """What a file holds, one after the other."""
    for source, leaf in leaves:
        for number, name in enumerate(source.names(leaf.shape)):
            whole = sharding.whole(leaf[number] if source.stacked else leaf)
            yield name.removeprefix(without), source.layout.write(whole)
