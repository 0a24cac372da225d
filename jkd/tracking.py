"""Experiment trackers behind one `jkd.metrics.Writer`: Weights & Biases and MLflow.

They are asked for by the environment, as these tools are everywhere, so that a config and its folder stay the same: ``JKD_TRACK``
names them (``wandb``, ``mlflow``, or both with a comma), and their own variables say where to (``WANDB_PROJECT``, ``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``). A run that is resumed goes on in the same tracked run, whose id lies in its
folder. A tracker that cannot be reached costs no training: see `Outbox`.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from etils import epath

from jkd.errors import FAILED, FINISHED, STOPPED, InputError, MissingExtra, nearest

if TYPE_CHECKING:
    from jkd.metrics import Ended  # which opens these

VARIABLE, RECORD = "JKD_TRACK", "tracking.json"
OFTEN, PATIENCE, TIMES = 30.0, 60.0, 20
"""Seconds between two sendings; the least after one that failed, and how many times as long as that took."""
AT_ONCE, MOST = 100, 20_000
"""Rows that a call sends, and most that are held."""


class Row(NamedTuple):
    """What is known of a step, and when that was (milliseconds since 1970)."""

    step: int
    time: int
    values: Mapping[str, float]


class Tracker(Protocol):
    """A tracked run. Its class opens it: ``(identity, name, start, config)``."""

    def send(self, rows: Sequence[Row]) -> None:
        """Rows may come twice, where it was not known whether they had arrived."""
        ...

    def end(self, ended: Ended) -> None: ...


def writers(folder: epath.Path, start: int, config: Any, tell: Callable[[str], None] = lambda line: None) -> list[Outbox]:
    """The trackers that the environment asks for; none where it asks for none.

    Args:
        folder: of the run (``workdir/run``): names it, and keeps the ids of its tracked runs.
        start: the step that the run starts from.
        config: the run's config as JSON.
        tell: takes a line where a tracker cannot be reached.

    Raises:
        InputError: ``JKD_TRACK`` names no tracker.
        MissingExtra: it is not installed.
    """
    wanted = [name for name in os.environ.get(VARIABLE, "").replace(" ", "").split(",") if name]
    for name in wanted:
        if name not in TRACKERS:
            raise InputError(f"{VARIABLE}={os.environ[VARIABLE]}: no tracker {name!r}{nearest(name, TRACKERS)}")
    if not wanted:
        return []
    ids = _ids(folder, wanted)
    title = _title(folder)
    return [Outbox(name, functools.partial(TRACKERS[name], ids[name], title, start, config), tell) for name in wanted]


def _title(folder: epath.Path) -> str:
    """``digits/student``, and of one of several seeds ``digits/seed0/student``."""
    above = folder.parent
    return "/".join([above.parent.name] * bool(re.fullmatch(r"seed\d+", above.name)) + [above.name, folder.name])


def _ids(folder: epath.Path, wanted: list[str]) -> dict[str, str]:
    """An id for each tracker, made once for a folder."""
    file = folder / RECORD
    known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    new = {name: uuid.uuid4().hex[:12] for name in wanted if name not in known}
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known | new, indent=1) + "\n")
    return known | new


class Outbox:
    """A `jkd.metrics.Writer` that holds what a tracker has not taken yet.

    It is sent every `OFTEN` seconds and with each checkpoint. Where that fails, one line says so, training goes on, and it is tried
    again with what came since, after a minute or twenty times as long as the failure took: an outage costs a twentieth of the time
    at most. Of the oldest rows beyond `MOST` the tracker learns nothing; ``metrics.jsonl`` has them all.

    Args:
        name: the tracker's.
        open: opens the tracked run.
        tell: takes the line.

    Raises:
        InputError: opening it does (a package is missing, say).
    """

    def __init__(self, name: str, open: Callable[[], Tracker], tell: Callable[[str], None]):
        self._name, self._open, self._tell = name, open, tell
        self._rows: deque[Row] = deque(maxlen=MOST)
        self._tracker: Tracker | None = None
        self._down = self._told = False
        self._next = 0.0
        self.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._rows.append(Row(step, int(time.time() * 1000), dict(values)))
        if len(self._rows) >= AT_ONCE or time.monotonic() >= self._next:
            self.flush()

    def flush(self) -> None:
        if not self._down or time.monotonic() >= self._next:
            self._try(self._send)

    def close(self, ended: Ended = "finished") -> None:
        if self._down and ended == "stopped":
            return  # who was told to stop has no time to wait for it
        self._try(self._send)
        self._try(lambda: None if self._tracker is None else self._tracker.end(ended))

    def _send(self) -> None:
        self._tracker = self._tracker or self._open()
        while self._rows:
            some = list(self._rows)[:AT_ONCE]
            self._tracker.send(some)
            for _ in some:
                self._rows.popleft()

    def _try(self, action: Callable[[], None]) -> None:
        start = time.monotonic()
        try:
            action()
            self._down, self._next = False, time.monotonic() + OFTEN
        except InputError:
            raise
        except Exception as error:  # each tracker has kinds of its own
            took = time.monotonic() - start
            self._down, self._next = True, time.monotonic() + max(PATIENCE, TIMES * took)
            if not self._told:
                self._told = True
                line = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self._tell(f"{self._name} cannot be reached ({line}); training goes on, and metrics.jsonl has what it misses")


class WandB:
    """Weights & Biases. Steps that a resumed run trains again are told once more under ``jkd_step``, its axis; the last counts."""

    def __init__(self, identity: str, name: str, start: int, config: Any):
        try:
            import wandb
        except ImportError as error:
            raise MissingExtra(f"{VARIABLE}=wandb: pip install 'jkd[wandb]'") from error
        self._run = wandb.init(id=identity, name=name, resume="allow", config=config, reinit="create_new")
        # its own step only ever grows: a resumed run could not say what it had said before it was killed
        self._run.define_metric("jkd_step")
        self._run.define_metric("*", step_metric="jkd_step")

    def send(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log({"jkd_step": row.step, **row.values})

    def end(self, ended: Ended) -> None:
        if ended == "stopped":
            self._run.mark_preempting()  # it will go on
        self._run.finish(exit_code={"finished": FINISHED, "stopped": STOPPED, "failed": FAILED}[ended])


class MLflow:
    """MLflow. What it has been told already it knows by name, step, time and value."""

    def __init__(self, identity: str, name: str, start: int, config: Any):
        try:
            from mlflow import MlflowClient, entities, tracking
        except ImportError as error:
            raise MissingExtra(f"{VARIABLE}=mlflow: pip install 'jkd[mlflow]'") from error
        self._metric = entities.Metric
        self._client = MlflowClient(tracking_uri=tracking.get_tracking_uri())
        title = os.environ.get("MLFLOW_EXPERIMENT_NAME", "jkd")
        experiment = self._client.get_experiment_by_name(title)
        place = self._client.create_experiment(title) if experiment is None else experiment.experiment_id
        # ids are the server's own, so ours is a tag
        found = self._client.search_runs([place], f"tags.jkd_id = '{identity}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
        else:
            self._run = self._client.create_run(place, run_name=name, tags={"jkd_id": identity}).info.run_id
            params = [entities.Param(key, value) for key, value in _flat(config).items()]
            for first in range(0, len(params), 100):  # what a call may hold
                self._client.log_batch(self._run, params=params[first : first + 100])

    def send(self, rows: Sequence[Row]) -> None:
        told = [
            self._metric(name, value, row.time, row.step)
            for row in rows
            for name, value in row.values.items()
            if math.isfinite(value)
        ]
        for first in range(0, len(told), 1000):  # what a call may hold
            self._client.log_batch(self._run, metrics=told[first : first + 1000])

    def end(self, ended: Ended) -> None:
        status = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[ended]
        self._client.set_terminated(self._run, status=status)


TRACKERS: dict[str, Callable[[str, str, int, Any], Tracker]] = {"wandb": WandB, "mlflow": MLflow}


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """What is a number, a word or nothing, by its path; long values are cut, and lists are left out."""
    if isinstance(config, Mapping):
        found: dict[str, str] = {}
        for name, value in config.items():
            found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
        return found
    return {} if isinstance(config, list) else {prefix or "value": str(config)[:250]}
