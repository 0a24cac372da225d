"""Published weights in and out: directories of the Hugging Face kind, read into sharded arrays and written back."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import sharding, trees
from jkd.errors import InputError, nearest
from jkd.models.pretrained import gemma, llama
from jkd.models.pretrained.family import Family, Source
from jkd.models.pretrained.files import Tensors, read_json, write_tensors
from jkd.sharding import MeshShape, Rules
from jkd.types import Model

FAMILIES: tuple[Family, ...] = (llama.LLAMA, llama.QWEN2, llama.QWEN3, gemma.GEMMA2, gemma.GEMMA3)
"""Every architecture that is read and written; where several could say the same, the first writes it."""


EVERYWHERE = MeshShape(data=1, fsdp=-1)
"""Every parameter split over all devices."""


def from_pretrained(
    directory: str | Path,
    *,
    dtype: Any = None,
    mesh: MeshShape | jax.sharding.Mesh = EVERYWHERE,
    rules: Rules = (),
    changes: Mapping[str, Any] | None = None,
) -> Model:
    """A Model with the weights of a directory as ``transformers`` writes it: config.json, safetensors, tokenizer.json if any.

    Every process reads the blocks that its own devices hold, parameter by parameter; nothing is ever whole on one host unless it
    is placed so. Rows of the embedding beyond the tokenizer's are no classes (`Outputs.classes`).

    Args:
        directory: where they are.
        dtype: of the floating parameters; None: as stored. (A run trains in float32 whatever comes; see `Run.teacher_dtype`.)
        mesh: where they go; by default split over all devices.
        rules: see `Run.rules`.
        changes: fields of the model's config to change, such as ``{"remat": None}``.

    Raises:
        InputError: an unknown architecture, or a setting of a known one that is not supported; missing or extra tensors, or one of
            another shape.
    """
    directory = Path(directory)
    described = read_json(directory / "config.json")
    family = _family(described, directory)
    config = dataclasses.replace(family.read(described), **(changes or {}))
    model = config.build()
    tensors = Tensors(directory)
    sources = {path: family.source(path.partition("/")[2]) for path in _leaves(model)}
    _check(family, tensors, [(sources[path], leaf.shape) for path, leaf in _leaves(model).items()], directory)
    mesh = mesh.build() if isinstance(mesh, MeshShape) else mesh
    places = sharding.shardings(sharding.parameter_specs(model.params, mesh, rules), mesh)
    everywhere = jax.tree.map(lambda _: NamedSharding(mesh, P()), model.buffers)

    def load(prefix: str) -> Callable[[str, Any, NamedSharding], jax.Array]:
        return lambda path, leaf, place: _load(tensors, sources[prefix + path], leaf, place, dtype)

    params = trees.map_with_path(load("params/"), model.params, places)
    return model.with_weights(params, trees.map_with_path(load("buffers/"), model.buffers, everywhere))


def save_pretrained(
    model: Model, directory: str | Path, *, extra: Mapping[str, Any] | None = None, largest: int = 2 * 2**30
) -> None:
    """Writes a directory that ``transformers`` loads unchanged: config.json and safetensors, in the dtype of the weights.

    On several hosts every process must call this; the first writes. One parameter at a time is made whole.

    Args:
        model: with weights, built from a config of `jkd.models`.
        directory: made if need be; must hold no weights yet.
        extra: further fields of config.json, such as ``{"eos_token_id": 2}``.
        largest: bytes of a file.

    Raises:
        InputError: a model without weights, one that no known architecture describes, or a directory that holds weights.
    """
    directory, family = Path(directory), describing(model.config)
    if not model.initialised:
        raise InputError(f"save_pretrained: this {model.name} holds no weights")
    if any(directory.glob("*.safetensors")):
        raise InputError(f"save_pretrained: {directory} holds weights already; give another directory")
    leaves = [(family.source(path.partition("/")[2]), leaf) for path, leaf in _leaves(model).items()]
    dtypes = {str(leaf.dtype) for _, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
    described = {"architectures": [family.architecture], **family.write(model.config), **(extra or {})}
    described["torch_dtype"] = dtypes.pop() if len(dtypes) == 1 else "float32"
    tensors = _tensors(leaves)
    if jax.process_index():
        for _ in tensors:  # its part in making parameters whole
            pass
        return
    directory.mkdir(parents=True, exist_ok=True)
    named = [(source.names(leaf.shape), leaf.nbytes) for source, leaf in leaves]
    sizes = {name: size // len(names) for names, size in named for name in names}
    write_tensors(directory, sizes, tensors, largest)
    (directory / "config.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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


def _family(described: Mapping[str, Any], directory: Path) -> Family:
    named = described.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in named:
            return family
    known = [family.architecture for family in FAMILIES]
    what = repr(named[0]) if named else "not named"
    raise InputError(f"{directory}/config.json: the architecture is {what}{nearest(named[0] if named else '', known)}")


def _leaves(model: Model) -> dict[str, Any]:
    """``{"params/path" or "buffers/path": array or shape}``."""
    return trees.flatten({"params": model.params, "buffers": model.buffers})


def _check(family: Family, tensors: Tensors, sources: list[tuple[Source, tuple[int, ...]]], directory: Path) -> None:
    """Every tensor that is needed is there, in its shape, and no other is."""
    shapes = {name: source.tensor_shape(shape) for source, shape in sources for name in source.names(shape)}
    if missing := sorted(shapes.keys() - tensors.names):
        raise InputError(f"{directory}: {_some(missing)} missing for {family.architecture}")
    extra = sorted(name for name in tensors.names - shapes.keys() if not re.fullmatch("|".join(family.ignored) or "$^", name))
    if extra:
        raise InputError(f"{directory}: {_some(extra)} not part of {family.architecture} as config.json describes it")
    for name, shape in shapes.items():
        if (found := tensors.shape(name)) != shape:
            raise InputError(f"{directory}: {name} has shape {list(found)}, but config.json asks for {list(shape)}")


def _some(names: list[str]) -> str:
    if len(names) == 1:
        return f"tensor {names[0]} is"
    return f"tensors {', '.join(names[:5])}{f', … ({len(names)} in all)' if len(names) > 5 else ''} are"


def _load(tensors: Tensors, source: Source, leaf: Any, place: NamedSharding, dtype: Any) -> jax.Array:
    """One parameter, each block of it read where it will be."""
    names, shape = source.names(leaf.shape), tuple(leaf.shape)

    def block(index: Any) -> np.ndarray:
        if not source.stacked:
            return cast(source.layout.read(tensors[names[0]], shape, index))
        layers = range(*index[0].indices(shape[0]))
        return np.stack([cast(source.layout.read(tensors[names[layer]], shape[1:], index[1:])) for layer in layers])

    def cast(array: np.ndarray) -> np.ndarray:
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        return np.ascontiguousarray(array, dtype=jnp.dtype(dtype) if dtype is not None and floating else array.dtype)

    return jax.make_array_from_callback(shape, place, block)


def _tensors(leaves: list[tuple[Source, Any]]) -> Iterator[tuple[str, np.ndarray]]:
    """What a file holds, one after the other."""
    for source, leaf in leaves:
        for number, name in enumerate(source.names(leaf.shape)):
            whole = sharding.whole(leaf[number] if source.stacked else leaf)
            yield name, source.layout.write(whole)
