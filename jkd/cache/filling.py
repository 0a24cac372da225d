"""Fills the cache of a run with its teacher's answers, on the run's own mesh and data."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jkd import compiler, networks, sharding, sparse, teachers, tokens, trees
from jkd.cache import manifest
from jkd.cache.codec import Codec
from jkd.cache.config import Cache
from jkd.cache.dense import Dense
from jkd.cache.manifest import Facts
from jkd.cache.sampled import Sampled
from jkd.cache.topk import TopK
from jkd.cache.training import Answers, inputs_of, keys_of
from jkd.cache.writer import Writer
from jkd.config import Ensemble, Run
from jkd.context import Context
from jkd.errors import InputError
from jkd.fingerprint import to_json
from jkd.models.compose import Members
from jkd.resolve import build
from jkd.types import Array, Batch, Model, Outputs, Preprocess

_REPORT_S = 10.0


def ready(
    cache: Cache,
    ctx: Context,
    earlier: Mapping[str, Any],
    report: Callable[[str], None],
    *,
    whole: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Makes sure that a run's cache is finished, of this teacher, and whole; fills it where it is not and the teacher is known.

    Args:
        cache: the run's teacher as it was written down.
        ctx: the run.
        earlier: artifacts of the nodes before.
        report: gets a line now and then.
        whole: look through all examples even where the cache is finished, and add what it lacks.
        stop: asked after each batch, by all hosts alike, whether to leave it at that; the next call goes on from there.

    Returns:
        Whether it is ready; False where it was told to stop.

    Raises:
        InputError: another teacher, tokenizer or codec; not finished and no teacher to ask; damaged; it lacks an example that
            lies in memory.
    """
    run = ctx.run
    answers = None if run.data is None else run.data.answers
    if run.data is None or not isinstance(answers, Answers):
        raise InputError("Run.data = None: the answers of a cache come with the data's batches")
    expected = None
    fills = cache.teacher is not None and (whole or not (Path(cache.path) / "manifest.json").exists())
    if fills or (cache.teacher is not None and cache.fingerprint is None):
        named = isinstance(cache.teacher, (str, Ensemble))
        teacher = teachers.named(cache.teacher, earlier) if named else build(cache.teacher)
        if not teacher.initialised:
            raise InputError(f"Cache.teacher: {teacher.name} holds no weights: train it first (an earlier run) or load it")
        expected = Facts(
            codec=cache.codec,
            inputs=inputs_of(run.data.spec(1)),
            teacher=fingerprint(teacher),
            tokenizer=teacher.tokenizer,
        )
        if cache.fingerprint not in (None, expected.teacher):
            raise InputError(f"Cache.fingerprint = {cache.fingerprint!r}: Cache.teacher is {expected.teacher!r}")
        if fills and not fill(Path(cache.path), expected, teacher, run, ctx.mesh, report, stop):
            return False
    reader = answers.open()
    found = reader.facts
    if expected is None:
        expected = dataclasses.replace(found, teacher=cache.fingerprint or found.teacher)
    expected.check(found, reader.folder)
    own = ctx.student.tokenizer
    if None not in (own, found.tokenizer) and own != found.tokenizer:
        raise InputError(
            f"cache {cache.path} is of tokenizer {found.tokenizer}, student {ctx.student.name} of {own}: its answers are about other "
            "tokens; recipes for other vocabularies (ULD) need the teacher itself"
        )
    return True


def fingerprint(model: Model) -> str:
    """A network by its name and a checksum of its weights, of what it does to its inputs, and of what it was built from: equal weights
    under another position encoding or window, or averaged in another way, give other answers. Rematerialisation does not count.

    Leaf after leaf, so that sharded weights are never whole in one place.
    """
    parts = [f"{path} {trees.sha256({'': sharding.whole(leaf)})}" for path, leaf in _leaves(model)]
    parts.append(json.dumps(to_json(_built(model.config, model.preprocess)), sort_keys=True))
    return f"{model.name} {manifest.digest(chr(10).join(parts))}"


def _built(config: Any, preprocess: Preprocess | None) -> list[Any]:
    """What a network's answers depend on beside its weights; an ensemble's are its members'."""
    if isinstance(config, Members):
        config = [config.mean, *(_built(*member) for member in config.built)]
    elif dataclasses.is_dataclass(config) and not isinstance(config, type) and hasattr(config, "remat"):
        config = dataclasses.replace(config, remat=None)
    return [config, preprocess]


def fill(
    folder: Path,
    facts: Facts,
    teacher: Model,
    run: Run,
    mesh: Any,
    report: Callable[[str], None],
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Adds the answers that a cache lacks, each host those to its own rows of every batch, and seals it.

    Returns:
        Whether it got to the end; False where ``stop`` said so before. What was added by then stays.
    """
    index, count = jax.process_index(), jax.process_count()
    ask = _asking(facts.codec, teacher, run, mesh)
    writer = Writer(
        folder, facts.codec, inputs=facts.inputs, teacher=facts.teacher, tokenizer=facts.tokenizer, host=(index, count)
    )
    before = len(writer)
    told = time.monotonic()
    for total, batch in _passes(facts.codec, run, (index, count)):
        keys = keys_of(batch, facts.inputs)
        wanted = [row for row in np.flatnonzero(batch["weight"] > 0) if keys[row] not in writer]
        if _anywhere(bool(wanted)):
            draws = np.frombuffer(b"".join(keys), "<u4").reshape(len(keys), -1)[:, 0]
            found = ask(batch, np.ascontiguousarray(draws))
            for row in wanted:
                writer.add(keys[row], {name: array[row] for name, array in found.items()})
        if time.monotonic() - told > _REPORT_S:
            told = time.monotonic()
            report(f"cache {folder}: {len(writer):,} answers{f' of {total:,}' if count == 1 else ' on this host'}")
        if stop():
            writer.flush()
            report(f"cache {folder}: stopped at {len(writer):,} answers{'' if count == 1 else ' on this host'}, which are kept")
            return False
    writer.flush()
    _together(f"filled {folder}")
    if index == 0:
        body = manifest.seal(folder)
        size = sum(shard[suffix]["bytes"] for shard in body["shards"].values() for suffix in (manifest.DATA, manifest.INDEX))
        report(
            f"cache {folder}: {body['examples']:,} answers ({len(writer) - before:,} of them new), {size / 2**20:,.1f} MiB, "
            f"{size / max(1, body['examples']):,.1f} bytes each; teacher: {facts.teacher}"
        )
    _together(f"sealed {folder}")
    return True


def _passes(codec: Codec, run: Run, process: tuple[int, int]) -> Iterator[tuple[int, Batch]]:
    """(examples in all, batch): the training examples once, and the evaluation examples where the answers say something there."""
    data = run.data
    assert data is not None
    plain = dataclasses.replace(data, answers=None, streams=())
    sets = [dataclasses.replace(plain, eval=data.train, eval_maps=data.train_maps)]
    if data.has_eval and isinstance(codec, Dense) and codec.classes:
        sets.append(plain)
    total = sum(each.eval_size for each in sets)
    for each in sets:
        for batch in each.eval_batches(run.batch_size, process=process):
            yield total, batch


def _asking(codec: Codec, teacher: Model, run: Run, mesh: Any) -> Callable[[Batch, np.ndarray], dict[str, np.ndarray]]:
    """``ask(batch, draws) -> answers`` of this host's rows, NumPy; ``draws`` are numbers that random draws are made from."""
    kept = jnp.dtype(run.teacher_dtype)
    cast = jax.tree.map(lambda leaf: leaf.astype(kept) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, teacher.params)
    params = sharding.put(cast, sharding.shardings(_specs(teacher, run, mesh), mesh))
    everywhere = jax.tree.map(lambda _: jax.P(), teacher.buffers)
    buffers = sharding.put(teacher.buffers, sharding.shardings(everywhere, mesh))
    answer = program(codec, teacher, run, mesh)

    def ask(batch: Batch, draws: np.ndarray) -> dict[str, np.ndarray]:
        placed = sharding.put_batch({"batch": batch, "draws": draws}, mesh)
        return {name: _local(array) for name, array in answer(params, buffers, placed["batch"], placed["draws"]).items()}

    return ask


def program(codec: Codec, teacher: Model, run: Run, mesh: Any) -> Any:
    """``answer(params, buffers, batch, draws) -> arrays`` by name, what a codec keeps of the teacher's answers: one jitted function
    of global arrays, of which shapes may be traced without weights or devices."""
    specs, taps = _specs(teacher, run, mesh), tuple(getattr(codec, "taps", ()))

    def answer(params: Any, buffers: Any, batch: Batch, draws: Array) -> dict[str, Array]:
        read = tokens.for_teacher(batch)
        outputs, _ = networks.applied(teacher, params, buffers, read, run=run, specs=specs, mesh=mesh, taps=taps)
        return signals(codec, outputs, draws)

    return compiler.jit(answer, mesh, out_shardings=jax.sharding.NamedSharding(mesh, sharding.BATCH))


def _specs(teacher: Model, run: Run, mesh: Any) -> Any:
    """Where the teacher's parameters are stored."""
    return sharding.parameter_specs(jax.eval_shape(lambda tree: tree, teacher.params), mesh, run.teacher_rules)


def signals(codec: Codec, outputs: Outputs, draws: Array) -> dict[str, Array]:
    """What a codec keeps of a batch's outputs, as it wants to encode it; logits of a whole text are never held.

    Raises:
        InputError: the outputs are not what the codec says.
    """
    if isinstance(codec, Dense):
        found: dict[str, Array] = {} if codec.classes is None else {"logits": outputs.logits}
        found |= {f"taps/{path}": outputs.taps[path] for path in codec.taps}
        for name in codec.heads:
            if name not in outputs.heads:
                raise InputError(f"Cache.codec: the teacher has no head {name!r} but {sorted(outputs.heads)}")
            found[f"heads/{name}"] = outputs.heads[name]
        return {name: array.astype(jnp.float32) for name, array in found.items()}
    assert isinstance(codec, (TopK, Sampled))
    if outputs.logits_shape[-1] != codec.vocab:
        raise InputError(f"Cache.codec: vocab = {codec.vocab}, but the teacher tells {outputs.logits_shape[-1]} classes apart")
    if isinstance(codec, TopK):
        return sparse.by_position(lambda logits: sparse.top_k(logits, codec.k), outputs)
    shape = (*outputs.logits_shape[1:-1], codec.draws)
    # an example's draws depend on its contents alone
    uniform = jax.vmap(lambda number: jax.random.uniform(jax.random.fold_in(jax.random.key(0), number), shape))(draws)
    return {"ids": sparse.by_position(sparse.draw, outputs, uniform)}


def _leaves(model: Model) -> list[tuple[str, Any]]:
    return list(trees.flatten({"params": model.params, "buffers": model.buffers}).items())


def _local(array: Array) -> np.ndarray:
    """This host's rows, in order."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _anywhere(here: bool) -> bool:
    """Whether it holds on any host: all run the same programs."""
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(here)).any())


def _together(what: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)
