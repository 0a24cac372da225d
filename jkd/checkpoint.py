"""Keeps and brings back everything that a step changes, so that a killed run goes on as if it had not been.

A checkpoint is one directory, named after its step: ``arrays/`` (written by orbax), ``leaves.json`` (path, shape and dtype of each
array), ``meta-<host>.json``, and last of all a manifest per host (`jkd.manifest`). Without its manifests it is not finished, and is
never read. All file operations go through epath, so the directory may be ``gs://`` (with gcsfs installed) or, for one process,
``s3://`` (with s3fs).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import orbax.checkpoint as ocp
from etils import epath

from jkd import manifest, peers
from jkd.arraystore import ArrayStore, describe, direct, named
from jkd.errors import InputError, MissingExtra, nearest
from jkd.jsonable import decode, encode
from jkd.recipe import Bank

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
        MissingExtra: what reads and writes such paths is not installed.
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
        self._keep, self._best, self._report = keep, best, report
        self._host, self._hosts = jax.process_index(), jax.process_count()
        self._damaged: set[str] = set()
        self._thread: threading.Thread | None = None
        self._save = peers.Together("no save")
        self._arrays = ArrayStore(lambda **options: self._save.meet(**options))
        self.directory = _directory(directory)
        if self._hosts > 1 and not direct(self.directory):
            raise InputError(
                f"cannot keep checkpoints of {self._hosts} processes in {self.directory}: use gs:// or a shared disk"
            )

    def save(self, step: int, state: State, meta: dict, metrics: Mapping[str, float] | None = None) -> None:
        """Starts to write a checkpoint; returns as soon as the state may be donated.

        A save that is still under way is waited for first. When writing fails (no space left, say), on this host or another, that
        is reported, what was written is removed, earlier checkpoints stay, and the next save tries again.

        Args:
            step: updates done.
            meta: JSON values and NumPy arrays; it comes back exactly, tuples as lists. Every host keeps its own.
            metrics: what ``best`` chooses by; a checkpoint without that metric, or with a NaN, is never the best.

        Raises:
            InputError: something in ``meta`` is neither JSON nor an array.
        """
        texts = {f"meta-{self._host}.json": encode(meta)}
        if self._host == 0:
            texts["leaves.json"] = json.dumps(describe(state), indent=1)
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        name = (self._best or "").removeprefix("-")
        if metrics and name and name not in metrics:
            self._report(f"best = {self._best!r}: step {step} was measured without it{nearest(name, metrics)}")
        self.wait()
        place, ticket = self._prepare(step), next(_TICKETS)
        if place is None:
            return
        self._save, wrong = peers.Together(f"save {ticket}"), None
        try:
            self._arrays.save(place / "arrays", state)
        except OSError as error:
            wrong = error
        self._thread = threading.Thread(
            target=self._finish, args=(step, place, texts, metrics, ticket, wrong), name=f"checkpoint {step}"
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
        found = json.loads(peers.from_first(json.dumps({step: place.name for step, place in self._finished().items()})))
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
        self._arrays.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _places(self) -> dict[int, dict[int, epath.Path]]:
        """All directories, finished or not: ``{step: {attempt: place}}``."""
        found: dict[int, dict[int, epath.Path]] = {}
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:  # an object store has no empty directories
            return found
        for name in names:
            if match := _PLACE.fullmatch(name):
                found.setdefault(int(match[1]), {})[int(match[2] or 0)] = self.directory / name
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
        name, failure = json.loads(peers.from_first(json.dumps([name, failure])))
        if failure:
            self._failed(step, failure)
            return None
        return self.directory / name

    def _finish(
        self,
        step: int,
        place: epath.Path,
        texts: Mapping[str, str],
        metrics: Mapping[str, float],
        ticket: int,
        wrong: Exception | None,
    ) -> None:
        """In the background: the rest of the files, the manifest, and then what is no longer needed."""
        try:
            for name, text in texts.items():
                (place / name).write_text(text)
        except OSError as error:
            wrong = wrong or error
        try:
            self._arrays.wait()
            if wrong is None:
                manifest.write(place, host=self._host, hosts=self._hosts, step=step, metrics=metrics)
        except Exception as error:  # tensorstore raises kinds of its own; whatever it was, training goes on
            wrong = wrong or error
        leftover: Exception | None = None
        try:
            if wrong is not None:
                self._save.fail(_line(wrong))
            self._barrier(f"{ticket}_written")
            if wrong is None and (why := self._save.failure()):
                wrong = peers.Elsewhere(why)
            try:
                if self._host == 0 and not self._prune(place):
                    wrong = wrong or peers.Elsewhere("another host's files are not there")
            finally:
                self._barrier(f"{ticket}_pruned")  # what is there after `wait` is the same for all
        except Exception as error:  # a peer that died (a kind of jaxlib's), or files that cannot be removed
            leftover = error
        # Last, for on a full disk this may raise too, and the other hosts must not be left waiting then.
        if wrong is not None:
            self._failed(step, wrong)
        if leftover is not None:
            self._report(f"checkpoint {step}: removing what is no longer needed failed: {_line(leftover)}")

    def _failed(self, step: int, error: BaseException | str) -> None:
        reason = error if isinstance(error, str) else _line(error)
        self._report(f"checkpoint {step} could not be written: {reason}; training goes on")

    def _prune(self, written: epath.Path) -> bool:
        """Removes all but the newest, the best and the one just written; or that one alone, where it is not finished.

        Returns:
            Whether it is.
        """
        if not manifest.hosts(written):
            written.rmtree()
            return False
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
        return True

    def _tell_unfinished(self, finished: Mapping[int, epath.Path]) -> None:
        newest = max(finished, default=-1)
        for step in sorted(self._places()):
            if step > newest:
                instead = f"using checkpoint {newest}" if finished else "there is none before it"
                self._report(f"checkpoint {step} has no manifest: its save was not finished; {instead}")

    def _problem(self, place: epath.Path) -> str:
        """What is wrong with a checkpoint; all hosts share the work and come to the same answer."""
        return peers.first_word(manifest.problem(place, host=self._host, hosts_now=self._hosts))

    def _read(self, step: int, place: epath.Path, like: State) -> tuple[State, dict]:
        banks = _banks(like)
        _check_same(step, json.loads((place / "leaves.json").read_text()), describe(like), banks)
        state = self._arrays.restore(place / "arrays", like, padded=banks)
        hosts = manifest.hosts(place)
        meta = decode((place / f"meta-{self._host if self._host < hosts else 0}.json").read_text())
        return state, meta

    def _barrier(self, name: str) -> None:
        # The distributed client's, for it needs no device: this runs beside the training steps.
        ocp.multihost.get_barrier_sync_fn()(key=f"jkd_checkpoint_{name}", timeout_ms=_BARRIER_TIMEOUT_MS)


def _directory(path: str | os.PathLike) -> epath.Path:
    """The directory, made where it is not there yet."""
    directory = epath.Path(path)
    if "://" not in str(directory):
        directory = directory.expanduser().resolve()  # for a remote path, epath would make that a local one
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except ImportError as error:
        raise MissingExtra(f"cannot write checkpoints to {directory}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot write checkpoints to {directory}: {_line(error)}") from error
    return directory


def _banks(like: State) -> list[str]:
    """The leaves that have a row for each example, and as many more as the mesh wants."""
    marks = jax.tree.map(lambda node: Bank(True) if _is_bank(node) else False, like, is_leaf=_is_bank)  # type: ignore[arg-type]
    return [name for name, mark in named(marks).items() if mark]


def _is_bank(node: object) -> bool:
    return isinstance(node, Bank)


def _check_same(step: int, saved: Mapping[str, str], wanted: Mapping[str, str], banks: Sequence[str]) -> None:
    names = list(dict.fromkeys((*wanted, *saved)))

    def kind(name: str, leaves: Mapping[str, str]) -> str | None:
        text = leaves.get(name)
        return text if text is None or name not in banks else re.sub(r"\[\d+", "[rows", text)

    differ = [name for name in names if kind(name, saved) != kind(name, wanted)]
    if differ:
        first = differ[0]
        there, here = saved.get(first, "not there"), wanted.get(first, "not there")
        raise InputError(
            f"checkpoint {step} is of another model or optimizer: {first} is {there} in the checkpoint, {here} in this run "
            f"({len(differ)} of {len(names)} arrays differ); use another workdir, or the config that it was made with"
        )


def _line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    system = re.search(r"([^:]+) \[os_error_code", text)  # tensorstore puts the whole way there before what the system said
    return (system[1].strip() if system else text)[:300]
