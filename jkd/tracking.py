"""Writers to experiment trackers, behind `jkd.metrics.Writer`: Weights & Biases and MLflow.

They are asked for by the environment, as these tools are everywhere, so that a config and its folder stay the same: ``JKD_TRACK``
names them (``wandb``, ``mlflow``, or both with a comma), and their own variables say where to (``WANDB_PROJECT``, ``WANDB_MODE``,
``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``). A run that is resumed goes on in the same tracked run, whose id lies in its
folder.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from jkd.errors import InputError, MissingExtra, nearest

if TYPE_CHECKING:
    from jkd.metrics import Writer  # which opens these

VARIABLE, RECORD = "JKD_TRACK", "tracking.json"


def writers(folder: epath.Path, start: int, config: Any) -> list[Writer]:
    """The trackers that the environment asks for; none where it asks for none.

    Args:
        folder: of the run (``workdir/run``): names it, and keeps the ids of its tracked runs.
        start: the step that the run starts from.
        config: the run's config as JSON.

    Raises:
        InputError: ``JKD_TRACK`` names no tracker.
        MissingExtra: it is not installed.
    """
    wanted = [name for name in os.environ.get(VARIABLE, "").replace(" ", "").split(",") if name]
    for name in wanted:
        if name not in _WRITERS:
            raise InputError(f"{VARIABLE}={os.environ[VARIABLE]}: no tracker {name!r}{nearest(name, _WRITERS)}")
    if not wanted:
        return []
    ids = _ids(folder, wanted)
    return [_WRITERS[name](ids[name], f"{folder.parent.name}/{folder.name}", start, config) for name in wanted]


def _ids(folder: epath.Path, wanted: list[str]) -> dict[str, str]:
    """An id for each tracker, made once for a folder."""
    file = folder / RECORD
    known: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    new = {name: uuid.uuid4().hex[:12] for name in wanted if name not in known}
    if new:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known | new, indent=1) + "\n")
    return known | new


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

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"jkd_step": step, **values})

    def flush(self) -> None:
        """Its own process sends what is written."""

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """MLflow. Values are held until the next flush, which sends them in one call."""

    _AT_ONCE = 1000  # what a call may hold

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
        self._held: list[Any] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._held += [self._metric(key, value, now, step) for key, value in values.items() if math.isfinite(value)]
        if len(self._held) >= self._AT_ONCE:
            self.flush()

    def flush(self) -> None:
        while self._held:
            some, self._held = self._held[: self._AT_ONCE], self._held[self._AT_ONCE :]
            self._client.log_batch(self._run, metrics=some)

    def close(self) -> None:
        self.flush()
        self._client.set_terminated(self._run)


_WRITERS: dict[str, Any] = {"wandb": WandB, "mlflow": MLflow}


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """What is a number, a word or nothing, by its path; long values are cut, and lists are left out."""
    if isinstance(config, Mapping):
        found: dict[str, str] = {}
        for name, value in config.items():
            found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
        return found
    return {} if isinstance(config, list) else {prefix or "value": str(config)[:250]}
