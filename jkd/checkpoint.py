"""Keeps and brings back everything that a step changes, so that a killed run goes on as if it had not been.

A checkpoint is one directory, named after its step: ``arrays/`` (written by orbax), ``leaves.json`` (path, shape and dtype of each
array), ``meta-<host>.json``, and last of all a manifest per host (`jkd.manifest`). Without its manifests it is not finished, and is
never read. All file operations go through epath, so ``gs://`` and ``s3://`` directories work where orbax can write to them.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jkd import manifest
from jkd.errors import InputError
from jkd.jsonable import decode, encode
from jkd.types import Tree

if TYPE_CHECKING:
    from jkd.state import State

# A step that is saved again (after its first checkpoint turned out damaged) goes to 300.1: nothing good is ever overwritten.
_PLACE = re.compile(r"(\d+)(?:\.(\d+))?")
_TICKETS = itertools.count()  # saves, counted alike on all hosts: barriers need names that never come again
_BARRIER_TIMEOUT_MS = 20 * 60 * 1000


class Checkpoints:
    """The checkpoints of one run.

    With several processes all of them construct it and call `save`, `restore`, `wait` and `close` at the same points; the
    directory must be the same for all.

    Args:
        directory: local, or ``gs://…``, ``s3://…``.
        keep: how many of the newest to keep.
        best: the metric whose best checkpoint is kept besides: ``"accuracy"`` (larger is better), ``"-nll"`` (smaller is).
        report: gets one line for whatever the user should know. It is called from a background thread too.

    Raises:
        InputError: ``keep`` is below 1, or the directory cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 2,
        best: str | None = None,
        report: Callable[[str], None] = lambda line: None,
    ):
        if keep < 1:
            raise InputError(f"Checkpoints: keep = {keep}; give at least 1")
        self.directory = epath.Path(directory).expanduser().resolve()
        self._keep, self._best, self._report = keep, best, report
        self._host, self._hosts = jax.process_index(), jax.process_count()
        self._damaged: set[str] = set()
        self._thread: threading.Thread | None = None
        _reroute_logs()
        self._checkpointer = _checkpointer()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write checkpoints to {self.directory}: {error.strerror or error}") from error

    def save(self, step: int, state: State, meta: dict, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to write a checkpoint; returns as soon as the state may be donated.

        A save that is still under way is waited for first. When writing fails (no space left, say) that is reported, what was
        written is removed, earlier checkpoints stay, and the next save tries again.

        Args:
            step: updates done.
            meta: JSON values and NumPy arrays; it comes back exactly, tuples as lists. Every host keeps its own.
            metrics: what ``best`` chooses by; a checkpoint without that metric, or with a NaN, is never the best.

        Raises:
            InputError: something in ``meta`` is neither JSON nor an array.
        """
        texts = {f"meta-{self._host}.json": encode(meta)}
        arrays = {name: _plain(leaf) for name, leaf in _named(state).items()}
        if self._host == 0:
            texts["leaves.json"] = json.dumps({name: _describe(leaf) for name, leaf in arrays.items()}, indent=1)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        self.wait()
        place, ticket = self._prepare(step), next(_TICKETS)
        if place is None:
            return
        # orbax refuses arrays without elements; their shape, in leaves.json, is all there is to them
        arrays = {name: leaf for name, leaf in arrays.items() if leaf.size}
        try:
            self._checkpointer.save(place / "arrays", args=ocp.args.PyTreeSave(arrays))
        except OSError as error:
            self._failed(step, error)
            return
        self._thread = threading.Thread(
            target=self._finish, args=(step, place, texts, metrics, ticket), name=f"checkpoint {step}"
        )
        self._thread.start()

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints that are not known to be damaged, ascending."""
        return sorted(self._finished())

    def best_step(self) -> int | None:
        """The step of the checkpoint that is best by ``best``; the later one of two that are alike, None where there is none."""
        if self._best is None:
            return None
        name, sign = self._best.removeprefix("-"), -1 if self._best.startswith("-") else 1
        scores = {}
        for step, place in self._finished().items():
            try:
                value = manifest.read(place, 0, manifest.hosts(place))["metrics"].get(name, math.nan)
            except (ValueError, OSError) as error:
                self._report(f"checkpoint {step}: {error}; it is not considered as the best")
                continue
            if not math.isnan(value):
                scores[step] = (sign * value, step)
        return max(scores, key=scores.__getitem__, default=None)

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict, int] | None:
        """The newest checkpoint that is whole, or the one asked for, as ``(state, meta, step)``.

        Every file is compared with its manifest first. A checkpoint that does not match is reported, with the file, and the one
        before it is used (never when a step was asked for).

        Args:
            like: shapes with shardings, or arrays: the checkpoint comes back as that tree, each leaf in that place, whatever mesh
                it was saved from.
            step: None for the newest.

        Returns:
            None where there is no finished checkpoint. ``meta`` is this host's; the first host's where there were fewer hosts.

        Raises:
            InputError: there are checkpoints but none is whole, the step asked for is not there or not whole, or the checkpoint
                is of another model (names the first leaf that differs).
        """
        self.wait()
        found = json.loads(self._from_first(json.dumps({step: place.name for step, place in self._finished().items()})))
        places = {int(step): self.directory / name for step, name in found.items()}
        if step is not None and step not in places:
            raise InputError(f"no checkpoint of step {step} in {self.directory}; there are {sorted(places) or 'none'}")
        if step is None:
            self._tell_unfinished(places)
        order = [step] if step is not None else sorted(places, reverse=True)
        wrong = ""
        for number, candidate in enumerate(order):
            wrong = self._problem(places[candidate])
            if not wrong:
                return *self._read(candidate, places[candidate], like), candidate
            self._damaged.add(places[candidate].name)
            wrong = f"checkpoint {candidate}: {wrong}"
            if number + 1 < len(order):
                self._report(f"{wrong}; using checkpoint {order[number + 1]}")
        if wrong:
            none = "" if step is not None else f"; no checkpoint in {self.directory} is whole"
            raise InputError(f"{wrong}{none}")
        return None

    def wait(self) -> None:
        """Returns when everything asked for is on disk with its manifest (or was reported as failed)."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits, and gives back the threads. Without it a save under way when Python exits may be lost."""
        self.wait()
        self._checkpointer.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _places(self) -> dict[int, dict[int, epath.Path]]:
        """All directories, finished or not: ``{step: {attempt: place}}``."""
        found: dict[int, dict[int, epath.Path]] = {}
        for path in self.directory.iterdir():
            if match := _PLACE.fullmatch(path.name):
                found.setdefault(int(match[1]), {})[int(match[2] or 0)] = path
        return found

    def _finished(self) -> dict[int, epath.Path]:
        """The last finished and undamaged attempt of each step."""
        finished = {}
        for step, attempts in self._places().items():
            for _, place in sorted(attempts.items()):
                if place.name not in self._damaged and manifest.hosts(place):
                    finished[step] = place
        return finished

    def _prepare(self, step: int) -> epath.Path | None:
        """Removes what earlier saves left unfinished and makes the new directory; None, reported, where that fails."""
        name, failure = "", ""
        if self._host == 0:
            try:
                places = self._places()
                for place in [place for attempts in places.values() for place in attempts.values()]:
                    if not manifest.hosts(place):
                        place.rmtree()
                attempt = max(self._places().get(step, {-1: None})) + 1
                name = f"{step}.{attempt}" if attempt else str(step)
                (self.directory / name).mkdir()
            except OSError as error:
                failure = _line(error)
        name, failure = json.loads(self._from_first(json.dumps([name, failure])))
        if failure:
            self._failed(step, failure)
            return None
        return self.directory / name

    def _finish(
        self, step: int, place: epath.Path, texts: Mapping[str, str], metrics: Mapping[str, float], ticket: int
    ) -> None:
        """In the background: the rest of the files, the manifest, and then what is no longer needed."""
        errors: list[BaseException] = []
        try:
            for name, text in texts.items():
                (place / name).write_text(text)
        except OSError as error:
            errors.append(error)
        try:
            self._checkpointer.wait_until_finished()
            if not errors:
                manifest.write(place, host=self._host, hosts=self._hosts, step=step, metrics=metrics)
        except Exception as error:  # tensorstore raises kinds of its own; whatever it was, training goes on
            errors.append(error)
        if errors:
            self._failed(step, errors[0])
        try:
            self._barrier(f"{ticket}_written")
            try:
                if self._host == 0:
                    self._prune(place)
            finally:
                self._barrier(f"{ticket}_pruned")  # what is there after `wait` is the same for all
        except Exception as error:  # a peer that died (a kind of jaxlib's), or files that cannot be removed
            self._report(f"checkpoint {step}: removing what is no longer needed failed: {_line(error)}")

    def _failed(self, step: int, error: BaseException | str) -> None:
        reason = error if isinstance(error, str) else _line(error)
        self._report(f"checkpoint {step} could not be written: {reason}; training goes on")

    def _prune(self, written: epath.Path) -> None:
        """Removes all but the newest, the best and the one just written; or that one alone, where it is not finished."""
        if not manifest.hosts(written):
            written.rmtree()
            return
        finished = self._finished()
        kept = {step: finished[step] for step in sorted(finished)[-self._keep :]}
        best = self.best_step()
        names = {place.name for place in (*kept.values(), written)} | ({finished[best].name} if best is not None else set())
        for attempts in self._places().values():
            for place in attempts.values():
                if place.name not in names:
                    for path in list(place.iterdir()):
                        if manifest.NAME.fullmatch(path.name):
                            path.unlink()  # first: a checkpoint that is half removed must not look finished
                    place.rmtree()

    def _tell_unfinished(self, finished: Mapping[int, epath.Path]) -> None:
        newest = max(finished, default=-1)
        for step in sorted(self._places()):
            if step > newest:
                instead = f"using checkpoint {newest}" if finished else "there is none before it"
                self._report(f"checkpoint {step} has no manifest: its save was not finished; {instead}")

    def _problem(self, place: epath.Path) -> str:
        """What is wrong with a checkpoint; all hosts share the work and come to the same answer."""
        wrong = manifest.problem(place, host=self._host, hosts_now=self._hosts)
        if self._hosts == 1:
            return wrong
        text = np.frombuffer(wrong.encode()[:1000].ljust(1000), np.uint8)
        lines = [bytes(row).decode(errors="replace").strip() for row in multihost_utils.process_allgather(text)]
        return next(filter(None, lines), "")

    def _read(self, step: int, place: epath.Path, like: State) -> tuple[State, dict]:
        leaves = _named(like)
        shapes = {name: _plain_shape(leaf) for name, leaf in leaves.items()}
        _check_same(step, json.loads((place / "leaves.json").read_text()), {n: _describe(s) for n, s in shapes.items()})
        saved = {name: shape for name, shape in shapes.items() if math.prod(shape.shape)}
        args = ocp.args.PyTreeRestore(item=saved, restore_args=ocp.checkpoint_utils.construct_restore_args(saved))
        arrays = self._checkpointer.restore(place / "arrays", args=args)
        values = []
        for name, leaf in leaves.items():
            shape = shapes[name]
            value = arrays[name] if name in arrays else jnp.zeros(shape.shape, shape.dtype, device=shape.sharding)
            if _is_key(leaf):
                value = jax.random.wrap_key_data(value, impl=_key_impl(leaf))
            values.append(value)
        hosts = manifest.hosts(place)
        meta = decode((place / f"meta-{self._host if self._host < hosts else 0}.json").read_text())
        return jax.tree.unflatten(jax.tree.structure(like), values), meta

    def _from_first(self, text: str) -> str:
        """The first host's text, on all hosts."""
        if self._hosts == 1:
            return text
        data = np.frombuffer(text.encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        mine = data if self._host == 0 else np.zeros(size, np.uint8)
        return bytes(multihost_utils.broadcast_one_to_all(mine)).decode()

    def _barrier(self, name: str) -> None:
        # The distributed client's, for it needs no device: this runs beside the training steps.
        ocp.multihost.get_barrier_sync_fn()(key=f"jkd_checkpoint_{name}", timeout_ms=_BARRIER_TIMEOUT_MS)


def _checkpointer() -> ocp.AsyncCheckpointer:
    # By default every replica writes a slice of a replicated array. Cutting them compiles a program for each shape and device,
    # while training waits; what is large enough for that to pay is split over fsdp anyway.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    handlers = ocp.type_handlers.create_type_handler_registry(
        (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
    )
    # Uncompressed: trained weights shrink by 8 % at most, and saving them takes two to four times as long.
    return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=handlers, use_compression=False))


def _named(tree: Tree) -> dict[str, Any]:
    """``{path: leaf}`` in the order of the tree's leaves; any pytree."""
    named: dict[str, Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(keys, simple=True, separator="/")
        named[name if name not in named else f"{name}#{len(named)}"] = leaf
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_impl(leaf: Any) -> Any:
    """Which generator a key is for, of a shape too: jax tells that of arrays only, traced ones included."""
    impls: list[Any] = []
    jax.eval_shape(lambda key: impls.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return impls[0]


def _plain(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _plain_shape(leaf: Any) -> jax.ShapeDtypeStruct:
    if leaf.sharding is None:
        raise InputError("Checkpoints.restore: a leaf of like has no sharding; give shapes with their shardings, or arrays")
    data = jax.eval_shape(_plain, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _check_same(step: int, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    names = list(dict.fromkeys((*wanted, *saved)))
    differ = [name for name in names if saved.get(name) != wanted.get(name)]
    if differ:
        first = differ[0]
        there, here = saved.get(first, "not there"), wanted.get(first, "not there")
        raise InputError(
            f"checkpoint {step} is of another model or optimizer: {first} is {there} in the checkpoint, {here} in this run "
            f"({len(differ)} of {len(names)} arrays differ); use another workdir, or the config that it was made with"
        )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    system = re.search(r"([^:]+) \[os_error_code", text)  # tensorstore puts the whole way there before what the system said
    return (system[1].strip() if system else text)[:300]


def _reroute_logs() -> None:
    """Sends what orbax logs, and absl would print, to the logger ``jkd.orbax``, which is silent until it is given a handler."""
    logger = logging.getLogger("absl")
    if _not_orbax not in logger.filters:
        logger.addFilter(_not_orbax)
        logging.getLogger("jkd.orbax").addHandler(logging.NullHandler())
        logging.getLogger("jkd.orbax").propagate = False  # absl itself gives the root logger a handler that prints


def _not_orbax(record: logging.LogRecord) -> bool:
    if f"{os.sep}orbax{os.sep}" not in record.pathname:
        return True
    target = logging.getLogger("jkd.orbax")
    if target.isEnabledFor(record.levelno):
        target.handle(record)
    return False
