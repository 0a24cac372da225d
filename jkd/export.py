"""Out again: a run's product as a directory that others load.

What is written: ``model.safetensors``; ``model.stablehlo``, the network as a program (`jax.export`) for CPUs, GPUs and TPUs that
takes ``({tensor name: array}, {input: array [batch, ...]})``, the tensors being those of the safetensors files as they are, and
gives ``{"logits": …}``; and ``card.json``, which says what it takes and where it came from. Of a published family the directory is
one that ``transformers`` loads besides: config.json, its tensor names, tokenizer, chat template, generation config.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from jkd import fingerprint, models, provenance, sharding, trees
from jkd.data.tokenizer import File
from jkd.errors import InputError, MissingExtra
from jkd.models.pretrained import Family, describing
from jkd.models.pretrained.files import Tensors, write_tensors
from jkd.models.pretrained.reading import leaves_of
from jkd.replay import Stand
from jkd.sharding import MeshShape
from jkd.types import Batch, Model, Outputs

PROGRAM, CARD = "model.stablehlo", "card.json"
PLATFORMS = ("cpu", "cuda", "tpu")
_BESIDE = ("generation_config.json", "preprocessor_config.json", "chat_template.jinja")
_ROWS = 4
_LARGEST = 2 * 2**30

Tree = dict[str, Any]


class Differs(Exception):
    """What was written gives other answers than what was to be written."""


def export(
    stand: Stand,
    directory: str | Path,
    *,
    ema: bool | None = None,
    dtype: str | None = None,
    said: Callable[[str], None] = print,
) -> None:
    """Writes a run's product, reads it back, and compares the answers to a few evaluation examples.

    Args:
        stand: where the run stands (`jkd.replay.stand`).
        directory: made if need be; must be empty.
        ema: the average's weights in the student's place; None: as the run evaluates.
        dtype: of the floating weights, ``float32`` or ``bfloat16``; None: as they are.
        said: gets a line for each thing that was written, and what the comparison found.

    Raises:
        InputError: a directory that is not empty, no average to export, data to compare on that is not there.
        Differs: what was read back answers differently; the directory is left for inspection.
    """
    if missing := [name for name in ("flatbuffers", "safetensors") if importlib.util.find_spec(name) is None]:
        raise MissingExtra(f"export needs {', '.join(missing)}: pip install 'jkd[train]'")
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory} is there and not empty; give another directory")
    if ema and (stand.ctx.run.ema is None or "student" not in stand.ctx.run.ema.groups):
        raise InputError(f"--ema: the run {stand.name} keeps no average of its student (Run.ema = Ema(…))")
    whole = _on_one_device(stand.product(ema=ema))
    product = whole if dtype is None else _cast(whole, jnp.dtype(dtype))
    batch = _examples(stand)
    family = _family(product)
    directory.mkdir(parents=True, exist_ok=True)
    _write_weights(stand, product, family, directory)
    said(f"wrote {directory}: {_kind(family)}, {trees.nbytes((product.params, product.buffers)) / 1e6:.1f} MB of weights")
    weigh, names = _assembly(product, family)
    tensors = _tensors(directory)
    exported, inputs = _program(product, weigh, tensors, batch)
    (directory / PROGRAM).write_bytes(exported.serialize())
    anywhere = "batches of any size" if _any_size(exported) else f"batches of {_ROWS} (the network reads its batch's size)"
    said(f"wrote {directory / PROGRAM}: {', '.join(exported.platforms)}; reads {', '.join(inputs)}; {anywhere}")
    card = _card(stand, product, family, exported, inputs, batch, ema) | {"tensors": names}
    (directory / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    _compare(product, family, directory, batch, inputs, said)
    if dtype is not None and product is not whole:
        lost = _difference(_answers(product, batch), _answers(whole, batch))
        said(f"compared with the weights as they were trained, {dtype} changes the answers by {lost:.2g} of the largest")


def _on_one_device(product: Model) -> Model:
    params, buffers = jax.tree.map(jnp.asarray, sharding.whole((product.params, product.buffers)))
    return product.with_weights(params, buffers)


def _cast(product: Model, dtype: Any) -> Model:
    def cast(leaf: jax.Array) -> jax.Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return product.with_weights(*jax.tree.map(cast, (product.params, product.buffers)))


def _examples(stand: Stand) -> Batch:
    """A few rows of the run's data, without a teacher's answers."""
    data = stand.ctx.run.data
    if data is None:
        raise InputError(f"the run {stand.name} has no data: nothing to compare answers on")
    rows = data.eval_batches(_ROWS) if data.has_eval else data.batches(_ROWS, seed=0)
    batch = next(iter(rows))
    rows.close()  # type: ignore[attr-defined]
    return {name: value for name, value in batch.items() if isinstance(value, np.ndarray)}


def _family(product: Model) -> Family | None:
    try:
        return describing(product.config) if product.config is not None else None
    except InputError:
        return None


def _kind(family: Family | None) -> str:
    return "tensors by path" if family is None else f"a {family.architecture} as transformers loads it"


def _write_weights(stand: Stand, product: Model, family: Family | None, directory: Path) -> None:
    if family is None:
        leaves = {path: np.asarray(leaf) for path, leaf in leaves_of(product).items()}
        write_tensors(directory, [leaf.nbytes for leaf in leaves.values()], iter(leaves.items()), _LARGEST)
        return
    run = stand.ctx.run
    tokenizer = None if run.data is None else run.data.tokenizer
    models.save_pretrained(product, directory, tokenizer=tokenizer)
    sources = [run.student.directory] if isinstance(run.student, models.Pretrained) else []
    sources += [tokenizer.path] if isinstance(tokenizer, File) else []
    folders = [path if path.is_dir() else path.parent for path in map(Path, sources)]
    if tokenizer is None and folders and (folders[0] / "tokenizer.json").exists():
        File(folders[0]).save(directory)
    for folder, name in itertools.product(folders, _BESIDE):
        if (folder / name).exists() and not (directory / name).exists():
            shutil.copyfile(folder / name, directory / name)


def _tensors(directory: Path) -> dict[str, jax.Array]:
    """What the safetensors files hold, under their own names."""
    found = Tensors(directory)
    return {
        name: jnp.asarray(found[name][tuple(slice(None) for _ in found.shape(name)) or ...]) for name in sorted(found.names)
    }


def _assembly(product: Model, family: Family | None) -> tuple[Callable[[Mapping[str, Any]], tuple[Tree, Tree]], list[str]]:
    """From the tensors of the files to ``(params, buffers)``, traceable; and the tensors that it reads."""
    leaves = leaves_of(product)
    if family is None:

        def split(flat: Mapping[str, Any]) -> tuple[Tree, Tree]:
            tree = {"params": {}, "buffers": {}} | trees.unflatten({path: flat[path] for path in leaves})
            return _filled(product, tree)

        return split, list(leaves)
    sources = {path: (family.source(path.partition("/")[2]), leaf.shape) for path, leaf in leaves.items()}
    bare = family.prefix if family.bare else ""

    def assemble(tensors: Mapping[str, Any]) -> tuple[Tree, Tree]:
        flat = {}
        for path, (source, shape) in sources.items():
            one = shape[1:] if source.stacked else shape
            block = tuple(slice(None) for _ in one)
            parts = [source.layout.read(tensors[name.removeprefix(bare)], one, block) for name in source.names(shape)]
            flat[path] = jnp.stack(parts) if source.stacked else parts[0]
        return _filled(product, {"params": {}, "buffers": {}} | trees.unflatten(flat))

    names = [name.removeprefix(bare) for source, shape in sources.values() for name in source.names(shape)]
    return assemble, names


def _filled(product: Model, tree: Tree) -> tuple[Tree, Tree]:
    """With the empty dicts that have no path."""

    def like(shape: Any, node: Any) -> Any:
        return {name: like(each, node.get(name, {})) for name, each in shape.items()} if isinstance(shape, Mapping) else node

    return like(product.params, tree["params"]), like(product.buffers, tree["buffers"])


def _said(outputs: Outputs) -> dict[str, jax.Array]:
    """The answers by name: logits where there are any, else hidden states; and whatever other heads are arrays."""
    if outputs.has_logits:
        return {"logits": outputs.logits}
    found = {} if outputs.hidden is None else {"hidden": outputs.hidden}
    return found | {name: head for name, head in trees.flatten(outputs.heads).items() if hasattr(head, "shape")}


def _program(product: Model, weigh: Any, tensors: Mapping[str, Any], batch: Batch) -> tuple[Any, list[str]]:
    """The exported program, and the entries of a batch that it reads."""
    mesh = MeshShape(data=1).build(jax.devices("cpu")[:1]).abstract_mesh  # no kernel of the machine that exports

    def answer(tensors: Mapping[str, Any], inputs: Batch) -> dict[str, jax.Array]:
        with jax.sharding.use_abstract_mesh(mesh):
            return _said(product.apply(*weigh(tensors), inputs)[0])

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(tensors))

    def made(names: list[str], rows: Any, platforms: tuple[str, ...]) -> Any:
        inputs = {name: jax.ShapeDtypeStruct((rows, *batch[name].shape[1:]), batch[name].dtype) for name in names}
        return jax_export.export(jax.jit(answer), platforms=platforms)(shapes, inputs)

    everything = made(sorted(batch), _ROWS, ("cpu",))
    kept = set(everything.module_kept_var_idx)
    inputs = [name for place, name in enumerate(sorted(batch), len(shapes)) if place in kept]
    try:
        rows = jax_export.symbolic_shape("batch")[0]
        return made(inputs, rows, PLATFORMS), inputs
    except Exception as error:  # whatever a network's own Python does with a size that is no number
        if isinstance(error, InputError):
            raise
        return made(inputs, _ROWS, PLATFORMS), inputs


def _any_size(exported: Any) -> bool:
    return any(not isinstance(size, int) for aval in exported.in_avals for size in aval.shape)


def _card(
    stand: Stand, product: Model, family: Family | None, exported: Any, inputs: list[str], batch: Batch, ema: bool | None
) -> dict[str, Any]:
    first = "batch" if _any_size(exported) else _ROWS
    names = sorted(jax.tree.unflatten(exported.out_tree, exported.out_avals))
    return {
        "model": product.name,
        "architecture": None if family is None else family.architecture,
        "config": None if product.config is None else fingerprint.to_json(product.config),
        "parameters": trees.count(product.params),
        "dtypes": sorted({str(leaf.dtype) for leaf in jax.tree.leaves((product.params, product.buffers))}),
        "program": {
            "file": PROGRAM,
            "platforms": list(exported.platforms),
            "inputs": {name: {"shape": [first, *batch[name].shape[1:]], "dtype": str(batch[name].dtype)} for name in inputs},
            "outputs": {
                name: {"shape": [size if isinstance(size, int) else "batch" for size in aval.shape], "dtype": str(aval.dtype)}
                for name, aval in zip(names, exported.out_avals, strict=True)
            },
        },
        "preprocess": None if product.preprocess is None else dataclasses.asdict(product.preprocess),
        "tokenizer": product.tokenizer,
        "run": {"name": stand.name, "step": stand.step, "steps": stand.ctx.run.steps, "average": _averaged(stand, ema)},
        "made_by": {"revision": provenance.code_revision(), "versions": provenance.package_versions()},
    }


def _averaged(stand: Stand, ema: bool | None) -> bool:
    return stand.ctx.run.evaluate_ema if ema is None else ema


def _answers(product: Model, batch: Batch) -> dict[str, np.ndarray]:
    return jax.device_get(jax.jit(lambda weights: _said(product.apply(*weights, batch)[0]))((product.params, product.buffers)))


def _difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """The largest difference of two answers, as a share of the largest answer."""
    largest = max((float(np.abs(np.asarray(value, np.float32)).max()) for value in other.values()), default=0.0)
    apart = [np.abs(np.asarray(one[name], np.float32) - np.asarray(other[name], np.float32)).max() for name in other]
    return float(max(apart, default=0.0)) / (largest or 1.0)


def _compare(
    product: Model, family: Family | None, directory: Path, batch: Batch, inputs: list[str], said: Callable[[str], None]
) -> None:
    """Reads everything back from the directory alone.

    Raises:
        Differs: the tensors are others, or the program's answers are not those of the network to rounding.
    """
    wanted = _answers(product, batch)
    tensors = _tensors(directory)
    if family is None:
        again = product.with_weights(*_assembly(product, None)[0](tensors))
    else:
        one = MeshShape(data=1).build(jax.devices()[:1])
        again = models.from_pretrained(directory, mesh=one, architecture=family.architecture)
    read = _difference(_answers(again, batch), wanted)
    program = jax_export.deserialize(bytearray((directory / PROGRAM).read_bytes()))
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in program.platforms:
        said(
            f"read back: the weights' answers differ by {read:.2g} of the largest; the program was not run (no {platform} in it)"
        )
        ran = 0.0
    else:
        found = jax.device_get(jax.jit(program.call)(tensors, {name: batch[name] for name in inputs}))
        ran = _difference(found, wanted)
        said(f"read back: answers differ by {read:.2g} (weights) and {ran:.2g} (program on {platform}) of the largest")
    half = any(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(product.params))
    # the same weights in the same network: what is left is the order of sums (on accelerators in fewer bits by default)
    allowed = 2e-2 if half or platform != "cpu" else 1e-4
    if not (read <= allowed and ran <= allowed):  # not a number is no agreement
        raise Differs(f"{directory}: read back, the answers differ by {read:.2g} and {ran:.2g} of the largest")
