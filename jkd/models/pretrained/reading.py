"""From a directory into sharded arrays."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import sharding, trees
from jkd.data.tokenizer import File
from jkd.errors import InputError
from jkd.models.pretrained import families, preprocess
from jkd.models.pretrained.family import Family, Source
from jkd.models.pretrained.files import Tensors, read_json
from jkd.sharding import MeshShape, Rules
from jkd.types import Model

EVERYWHERE = MeshShape(data=1, fsdp=-1)
"""Every parameter split over all devices."""


def from_pretrained(
    directory: str | Path,
    *,
    dtype: Any = None,
    mesh: MeshShape | jax.sharding.Mesh = EVERYWHERE,
    rules: Rules = (),
    architecture: str | None = None,
    changes: Mapping[str, Any] | None = None,
    fresh: tuple[str, ...] = (),
    key: jax.Array | None = None,
) -> Model:
    """A Model with the weights of a directory as ``transformers`` writes it: config.json, safetensors, and where they are there
    preprocessor_config.json and tokenizer.json.

    Every process reads the blocks that its own devices hold, parameter by parameter; nothing is ever whole on one host unless it
    is placed so. Rows of the embedding beyond the tokenizer's are no classes (`Outputs.classes`).

    Args:
        directory: where they are.
        dtype: of the floating parameters; None: as stored. (A run trains in float32 whatever comes; see `Run.teacher_dtype`.)
        mesh: where they go; by default split over all devices.
        rules: see `Run.rules`.
        architecture: another one than config.json names, made of the same network: its head is not read then.
        changes: fields of the model's config to change, such as ``{"classes": 3}``.
        fresh: globs on parameter paths that are drawn and not read, such as ``("classifier/*",)``.
        key: for these.

    Raises:
        InputError: an unknown architecture, or a setting of a known one that is not supported; missing or extra tensors, or one of
            another shape; parameters to draw without a key.
    """
    directory = Path(directory)
    model = from_config(directory, architecture=architecture, changes=changes)
    family = families.named(read_json(directory / "config.json"), architecture)
    tensors, leaves = Tensors(directory, family.prefix), leaves_of(model)
    sources = {path: family.source(path.partition("/")[2]) for path in leaves}
    drawn = {path for path in leaves if trees.matches(path.partition("/")[2], fresh)}
    needs = {path: (sources[path], leaf.shape) for path, leaf in leaves.items()}
    _check(family, tensors, needs, drawn, architecture, directory)
    mesh = mesh.build() if isinstance(mesh, MeshShape) else mesh
    specs = {"params": sharding.parameter_specs(model.params, mesh, rules)}
    specs |= {"buffers": jax.tree.map(lambda _: P(), model.buffers)}
    places = trees.flatten(sharding.shardings(specs, mesh))
    read = {path: leaf for path, leaf in leaves.items() if path not in drawn}
    weights = {path: _load(tensors, sources[path], leaf, places[path], dtype) for path, leaf in read.items()}
    weights |= _drawn(model, {path: places[path] for path in drawn}, key)
    both = {"params": {}, "buffers": {}} | trees.unflatten(weights)
    return model.with_weights(both["params"], both["buffers"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
    """`from_pretrained` as a model config: nothing is read before the run that names it begins.

    Args:
        directory, dtype, mesh, rules, architecture, changes, fresh: see `from_pretrained`.
        seed: of what is drawn.
    """

    directory: str | Path
    dtype: Any = None
    mesh: MeshShape = EVERYWHERE
    rules: Rules = ()
    architecture: str | None = None
    changes: Mapping[str, Any] | None = None
    fresh: tuple[str, ...] = ()
    seed: int = 0

    def build(self) -> Model:
        """The Model with its weights."""
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "seed"}
        return from_pretrained(**options, key=jax.random.key(self.seed))


def from_config(
    described: str | Path | Mapping[str, Any],
    *,
    architecture: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Model:
    """The network that a config.json describes, without weights: to be drawn, or to see its shapes.

    Args:
        described: the directory (its preprocessor_config.json and tokenizer.json are heeded), or what config.json holds.
        architecture, changes: see `from_pretrained`.

    Raises:
        InputError: an unknown architecture, or a setting of a known one that is not supported.
    """
    if isinstance(described, Mapping):
        config, vocabulary = families.named(described, architecture).read(described), None
    else:
        directory = Path(described)
        content = read_json(directory / "config.json")
        config = families.named(content, architecture).read(content)
        if hasattr(config, "preprocess") and (directory / preprocess.FILE).exists():
            config = dataclasses.replace(config, preprocess=preprocess.read(read_json(directory / preprocess.FILE)))
        vocabulary = File(directory) if (directory / "tokenizer.json").exists() else None
        if vocabulary is not None and hasattr(config, "tokens"):
            config = dataclasses.replace(config, tokens=min(config.vocab, vocabulary.size))
    model = dataclasses.replace(config, **(changes or {})).build()
    return dataclasses.replace(model, tokenizer=None if vocabulary is None else vocabulary.fingerprint)


def leaves_of(model: Model) -> dict[str, Any]:
    """``{"params/path" or "buffers/path": array or shape}``."""
    return trees.flatten({side: tree for side, tree in (("params", model.params), ("buffers", model.buffers)) if tree})


def _check(
    family: Family,
    tensors: Tensors,
    sources: Mapping[str, tuple[Source, tuple[int, ...]]],
    drawn: set[str],
    wanted: str | None,
    directory: Path,
) -> None:
    """Every tensor that is needed is there, in its shape, and no other is."""
    needed: dict[str, tuple[int, ...]] = {}
    known: set[str] = set()
    for path, (source, shape) in sources.items():
        names = source.names(shape)
        known.update(names)
        needed |= {} if path in drawn else dict.fromkeys(names, source.tensor_shape(shape))
    if missing := sorted(needed.keys() - tensors.names):
        raise InputError(f"{directory}: {_some(missing)} missing for {family.architecture}")
    ignored = re.compile("|".join(family.ignored) or "$^")
    extra = {name for name in tensors.names - known if not ignored.fullmatch(name)}
    if wanted is not None:  # another head than the one that is wanted
        extra = {name for name in extra if name.startswith(family.prefix)}
    if extra:
        raise InputError(f"{directory}: {_some(sorted(extra))} not part of {family.architecture} as config.json describes it")
    for name, shape in needed.items():
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


def _drawn(model: Model, places: Mapping[str, NamedSharding], key: jax.Array | None) -> dict[str, jax.Array]:
    """Fresh parameters in their places."""
    if not places:
        return {}
    if key is None:
        raise InputError(f"from_pretrained: {sorted(places)[0].partition('/')[2]} is drawn, so give key=jax.random.key(…)")

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        leaves = trees.flatten(dict(zip(("params", "buffers"), model.init(key), strict=True)))
        return {path: leaves[path] for path in places}

    return jax.jit(draw, out_shardings=dict(places))(key)
