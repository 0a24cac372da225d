"""A step whose loss or gradient is not finite: what is kept of it, and a replay that names where it begins."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jkd import calls, replay, sharding, trees
from jkd.config import Experiment
from jkd.context import Context
from jkd.errors import InputError
from jkd.feed import Feed
from jkd.networks import models_of, seen, step_key
from jkd.prepare import make_prepare
from jkd.recipe import Update
from jkd.replay import Stand
from jkd.state import State, run_key
from jkd.step import objective
from jkd.types import Array, Batch, Tree
from jkd.workdir import write_json

RECORD, ROWS = "nonfinite.json", "nonfinite-{}.npz"
Stats = dict[str, Array]


def keep(folder: epath.Path, ctx: Context, step: int, cause: str, weights: np.ndarray | None, process: tuple[int, int]) -> str:
    """Writes the batch and the key of a step that is not finite into a run's folder, for `find`, and says what came of it.

    Args:
        folder: of the run.
        ctx: the run.
        step: updates done before it.
        cause: what was seen.
        weights: sampling weights in force, or None.
        process: (index, count) of this host.
    """
    try:
        _write(folder, ctx, step, cause, weights, process)
    except Exception as error:  # a full disk, say: what was not finite is still to be told
        return f"its batch could not be kept: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return f"jkd debug {folder.parent} says where it begins"


def _write(
    folder: epath.Path, ctx: Context, step: int, cause: str, weights: np.ndarray | None, process: tuple[int, int]
) -> None:
    run = ctx.run
    assert run.data is not None
    # the data are a function of the position, so that nothing need be held while it is well
    rows: Any = run.data.batches(run.batch_size, seed=run.seed, start=step, process=process, weights=weights)
    flat = {path: leaf for path, leaf in trees.flatten(next(rows)).items() if isinstance(leaf, np.ndarray)}
    rows.close()
    with (folder / ROWS.format(process[0])).open("wb") as file:
        np.savez(file, **flat)  # type: ignore[arg-type]
    if process[0] == 0:
        key = jax.random.key_data(jax.random.fold_in(run_key(jax.random.key(run.seed)), step))
        record = {"step": step, "cause": cause, "key": np.asarray(key).tolist(), "processes": process[1]}
        write_json(folder / RECORD, record)


def find(experiment: Experiment, workdir: epath.Path, name: str | None, tell: Callable[[str], None]) -> list[str]:
    """Replays a run from its last good checkpoint (or its start) to the step that was not finite, and looks into that step.

    Args:
        experiment: what was trained there.
        workdir: the folder.
        name: of the run; None: the one that has such a step.
        tell: hears how it goes.

    Returns:
        Lines: whether batch and weights are finite, and the first tap, term and gradient that are not, in the order in which they
        are computed.

    Raises:
        InputError: no run has kept such a step, or a process's part of it is not in the folder.
    """
    folders = {each: workdir / each for each in experiment.nodes if (workdir / each / RECORD).exists()}
    if not folders or (name is not None and name not in folders):
        what = f"the run {name} has kept" if name is not None else "no run has kept"
        raise InputError(
            f"{workdir}: {what} {'no ' if name is not None else 'a '}step that was not finite; there is nothing to replay"
        )
    name = name or next(iter(folders))
    record = json.loads((folders[name] / RECORD).read_text())
    stand = replay.stand(experiment, workdir, name, tell, fresh=True)
    if stand.step > record["step"]:
        raise InputError(f"{workdir}: {name} stands at step {stand.step}, beyond step {record['step'] + 1} that was not finite")
    rows = _kept(folders[name], record["processes"])
    batch, state, step = _arrive(stand, rows, record["step"], tell)
    stand = dataclasses.replace(stand, state=state, step=step)
    lines = [f"{name}: step {step + 1} was not finite: {record['cause']}"]
    key = np.asarray(jax.random.key_data(step_key(state)))
    if step == record["step"] and key.tolist() != record["key"]:
        lines.append("its key is not the one that was kept: jkd or jax has changed since")
    return lines + list(_look(stand, batch))


def _kept(folder: epath.Path, processes: int) -> Batch:
    """The rows that every process kept, in their order in the batch."""
    parts = []
    for process in range(processes):
        try:
            with (folder / ROWS.format(process)).open("rb") as file:
                parts.append(dict(np.load(file)))
        except OSError as error:
            raise InputError(f"{folder}: the rows of process {process} of {processes} are not there: {error}") from None
    return trees.unflatten({path: np.concatenate([part[path] for part in parts]) for path in parts[0]})


def _arrive(stand: Stand, rows: Batch, wanted: int, tell: Callable[[str], None]) -> tuple[Batch, State, int]:
    """The batch as the step sees it and the state before it; an earlier step, if that one is not finite now."""
    ctx, state, frozen = stand.ctx, stand.state, stand.frozen
    ctx = dataclasses.replace(ctx, run=dataclasses.replace(ctx.run, steps_per_call=1))
    feed = Feed(ctx, (0, 1), stand.step, stand.weights)
    try:
        if feed.resamples(stand.step):
            feed.resample(state, stand.step)
        if stand.step < wanted:
            tell(f"{stand.name}: replays steps {stand.step + 1} to {wanted}")
            step, copy = calls.make_program(ctx), jax.jit(lambda state: jax.tree.map(jnp.copy, state))
        for number in range(stand.step, wanted):
            batch = feed.next(state, frozen, number)
            before = copy(state)
            state, values = step(state, frozen, batch)
            if not all(np.isfinite(jax.device_get((values["loss"], values["gradient_norm"])))):
                tell(f"{stand.name}: step {number + 1} already is not finite now")
                return batch, before, number
            if feed.resamples(number + 1):
                feed.resample(state, number + 1)
        if "teacher" in ctx.raw_batch:  # a cache's answers are not kept a second time
            return feed.next(state, frozen, wanted), state, wanted
        batch, prepare = sharding.put_batch(rows, ctx.mesh), make_prepare(ctx)
        return batch if prepare is None else prepare[0](state, frozen, batch, jnp.int32(wanted)), state, wanted
    finally:
        feed.close()


def _look(stand: Stand, batch: Batch) -> Iterator[str]:
    """What is not finite in a step, in the order of its computation."""
    ctx, state, frozen = stand.ctx, stand.state, stand.frozen
    ctx = dataclasses.replace(ctx, run=dataclasses.replace(ctx.run, remat=None))  # inside one, nothing has an order
    yield _first("the batch", jax.jit(_stats)(trees.flatten({name: leaf for name, leaf in batch.items() if name != "teacher"})))
    yield _first("weights", jax.jit(_stats)(_by_group({**frozen["params"], **state.params})))
    for side in (side for side in ("teacher", "student") if side in ctx.networks):
        order, found, rows = _taps(ctx, side, state, frozen, batch)
        yield _first(f"taps of the {side}", {path: found[path] for path in order}, rows)
    for place, update in enumerate(ctx.updates):
        title = f" of update {update.name or place}" if len(ctx.updates) > 1 else ""
        look = _inside(ctx, place, update)
        means, gradients = jax.device_get(jax.jit(lambda *args, look=look: _measured(*look(*args)))(state, frozen, batch))
        bad = [f"{term} = {value}" for term, value in means.items() if not np.isfinite(value)]
        yield f"terms{title}: {'first that is not finite: ' + bad[0] if bad else _all(means)}"
        for term, found in gradients.items():
            if any(one["bad"] for one in found.values()):
                order = _order(lambda *args, look=look, term=term: look(*args)[1][term], state, frozen, batch)
                found = {path: found[path] for path in order}
            yield _first(f"gradient of {term}{title}", found)


def _measured(means: dict[str, Array], gradients: dict[str, dict[str, Array]]) -> tuple[dict[str, Array], dict[str, Any]]:
    return means, {name: _stats(leaves) for name, leaves in gradients.items()}


def _order(function: Callable[..., dict[str, Any]], *args: Any) -> list[str]:
    """The names of what a function gives, in the order in which it is computed; what comes at once, the innermost path first."""
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    made = {id(var): number for number, equation in enumerate(closed.jaxpr.eqns) for var in equation.outvars}
    # dicts are flattened in the order of their names
    when = {name: made.get(id(var), -1) for name, var in zip(sorted(shapes), closed.jaxpr.outvars, strict=True)}
    return sorted(when, key=lambda name: (when[name], -name.count("/"), name))


def _taps(ctx: Context, side: str, state: State, frozen: Any, batch: Batch) -> tuple[list[str], dict[str, Stats], np.ndarray]:
    """The paths of a network in the order in which it computes them, what they hold, and the examples that are not finite in the
    first that is not."""

    def captured(state: State, frozen: Any, batch: Batch) -> dict[str, Any]:
        key = step_key(state)
        models, rows = models_of(ctx, state, frozen), seen(ctx, batch, key)
        if side == "teacher" and "teacher" in rows:  # prepared answers
            return {}
        key = jax.random.split(jax.random.fold_in(key, 1))[0]
        paths = tuple(ctx.networks[side].paths(rows))
        outputs, _ = models.apply(side, rows, taps=paths, train=side == "student", key=key if side == "student" else None)
        taps = {
            f"{path}{jax.tree_util.keystr(keys)}": leaf for path, tap in outputs.taps.items() for keys, leaf in _leaves(tap)
        }
        return taps | ({"logits": outputs.logits} if outputs.has_logits else {})

    order = _order(captured, state, frozen, batch)

    def measure(*args: Any) -> tuple[dict[str, Stats], dict[str, Array]]:
        taps = captured(*args)
        rows = {name: _bad_rows(leaf) for name, leaf in taps.items() if leaf.ndim and leaf.shape[0] == batch["weight"].shape[0]}
        return _stats(taps), rows

    found, rows = jax.device_get(jax.jit(measure)(state, frozen, batch))
    first = next((name for name in order if found[name]["bad"]), None)
    return order, found, np.flatnonzero(rows[first]) if first in rows else np.zeros(0, int)


def _inside(ctx: Context, place: int, update: Update) -> Callable[..., Any]:
    """The means of an update's terms, and the gradient of each by group and path; the whole batch at once."""

    def look(state: State, frozen: Any, batch: Batch) -> tuple[dict[str, Array], dict[str, dict[str, Array]]]:
        key = step_key(state)
        rows, own = seen(ctx, batch, key), jax.random.fold_in(key, place + 1)
        groups = update.groups or ()

        def parts(moving: Tree) -> tuple[dict[str, Array], dict[str, Array]]:
            models = models_of(ctx, dataclasses.replace(state, params={**state.params, **moving}), frozen)
            found, (means, *_) = objective(ctx, update, models, rows, own, None)
            return found, {name: mean["term"] for name, mean in means.items()}

        moving = {group: state.params[group] for group in groups}
        found, means = parts(moving)
        # one by one: in a pass for all of them one term's infinity would meet another's zero
        gradients = {name: jax.grad(lambda moving, name=name: parts(moving)[0][name])(moving) for name in found}
        return means, {name: _by_group(gradient) for name, gradient in gradients.items()}

    return look


def _by_group(groups: Mapping[str, Tree]) -> dict[str, Any]:
    """``{"student head/kernel": leaf}``."""
    return {path.replace("/", " ", 1): leaf for path, leaf in trees.flatten(groups).items()}


def _leaves(tap: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tap)[0]


def _stats(leaves: Mapping[str, Any]) -> dict[str, Stats]:
    """Of each array of numbers: how many are not finite, of how many, and the largest of the others."""

    def look(leaf: Any) -> Stats:
        leaf = jnp.asarray(leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.size:
            return {"bad": jnp.int32(0), "nan": jnp.int32(0), "size": jnp.int32(leaf.size), "largest": jnp.float32(0)}
        finite = jnp.isfinite(leaf)
        largest = jnp.max(jnp.where(finite, jnp.abs(leaf.astype(jnp.float32)), 0))
        return {
            "bad": jnp.sum(~finite),
            "nan": jnp.sum(jnp.isnan(leaf)),
            "size": jnp.int32(leaf.size),
            "largest": largest,
        }

    return {name: look(leaf) for name, leaf in leaves.items()}


def _bad_rows(leaf: Any) -> Array:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape[0], bool)
    return ~jnp.isfinite(leaf).all(tuple(range(1, leaf.ndim)))


def _first(what: str, found: Mapping[str, Stats], rows: np.ndarray | None = None) -> str:
    here = jax.device_get(dict(found))  # which sorts it by name
    found = {name: here[name] for name in found}
    bad = [name for name, one in found.items() if one["bad"]]
    if not bad:
        name = max(found, key=lambda name: float(found[name]["largest"]), default=None)
        largest = "" if name is None else f", largest {float(found[name]['largest']):.3g} in {name}"
        return f"{what}: finite{largest}"
    one = found[bad[0]]
    kind = "nan" if one["nan"] == one["bad"] else "inf" if not one["nan"] else "nan and inf"
    line = f"{what}: first that is not finite: {bad[0]}: {int(one['bad'])} of {int(one['size'])} values ({kind})"
    if rows is not None and rows.size:
        line += f", in rows {', '.join(map(str, rows[:8]))}{', …' if rows.size > 8 else ''} of the batch"
    return line + (f"; {len(bad)} of {len(found)} in all" if len(found) > 1 else "")


def _all(means: Mapping[str, Any]) -> str:
    return ", ".join(f"{term} {float(value):.4g}" for term, value in means.items())
