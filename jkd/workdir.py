"""The folder of an experiment: whose it is."""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath

from jkd import fingerprint
from jkd.config import Experiment
from jkd.errors import InputError


def at(path: str) -> epath.Path:
    """The folder that a path or URL names.

    Raises:
        InputError: a URL of a kind that is not known.
    """
    try:
        return epath.Path(path)
    except (KeyError, ValueError) as error:
        raise InputError(f"workdir {path} cannot be used: no file system is known for {error}") from error


def claim(folder: epath.Path, experiment: Experiment) -> epath.Path:
    """Makes the folder and writes the resolved config into it, or checks that it holds this very config.

    A folder belongs to a config from its first checkpoint on; before that a mended config takes it over.

    Raises:
        InputError: it cannot be written, it holds another config, or another process was started with one (the message lists the
            differences).
    """
    wanted = fingerprint.to_json(experiment)
    file = folder / "config.json"
    if jax.process_index() == 0:
        try:
            if file.exists() and any(found for kind in ("checkpoints/*", "result.json") for found in folder.glob(f"*/{kind}")):
                _compare(
                    json.loads(file.read_text()), wanted, f"workdir {folder} holds another config", "give another --workdir"
                )
            else:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(file, wanted)
        except (OSError, ImportError) as error:  # a remote file system may need a package of its own
            raise InputError(f"workdir {folder} cannot be used: {error}") from error
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"claim {folder}")
        mine = f"process {jax.process_index()} was started with another config than process 0"
        _compare(json.loads(file.read_text()), wanted, mine, "start all with the same command")
    return folder


def write_json(file: epath.Path, value: Any) -> None:
    """Writes a file that is there whole or not at all, whenever the process is killed."""
    whole = file.with_name(f"{file.name}.tmp")
    whole.write_text(json.dumps(value, indent=1) + "\n")
    whole.replace(file)


def _compare(there: Any, wanted: Any, what: str, fix: str) -> None:
    if there != wanted:
        raise InputError(f"{what} ({'; '.join(fingerprint.differences(there, wanted)[:5])}); {fix}")
