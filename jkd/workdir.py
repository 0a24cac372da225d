"""The folder of an experiment: whose it is."""

from __future__ import annotations

import json
from typing import Any

import jax
from etils import epath

from jkd import fingerprint, peers
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


def claim(folder: epath.Path | None, experiment: Experiment) -> epath.Path | None:
    """Makes the folder and writes the resolved config into it, or checks that it holds this very config.

    A folder belongs to a config from its first checkpoint on; before that a mended config takes it over. Where arrays lie (meshes
    and rules) does not count: a run goes on with other devices. Several processes are held against each other first, and what
    one of them finds wrong is told by all.

    Args:
        folder: None makes and checks no folder.

    Raises:
        InputError: it cannot be written, it holds another config, or another process was started with one, or with other code
            (the message lists the differences).
    """
    wanted = fingerprint.to_json(experiment)
    peers.agree(wanted)
    if folder is None:
        return None
    wrong = _take(folder, wanted) if jax.process_index() == 0 else ""
    if wrong := peers.first_word(wrong):
        raise InputError(wrong)
    return folder


def _take(folder: epath.Path, wanted: Any) -> str:
    """Makes the folder this config's; says what is in the way, if something is."""
    file = folder / "config.json"
    try:
        if file.exists() and any(found for kind in ("checkpoints/*", "result.json") for found in folder.glob(f"*/{kind}")):
            there = json.loads(file.read_text())
            found = fingerprint.differences(fingerprint.anywhere(there), fingerprint.anywhere(wanted))
            if found:
                return f"workdir {folder} holds another config ({'; '.join(found[:5])}); give another --workdir"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, wanted)
    except (OSError, ImportError) as error:  # a remote file system may need a package of its own
        return f"workdir {folder} cannot be used: {error}"
    return ""


def write_json(file: epath.Path, value: Any) -> None:
    """Writes a file that is there whole or not at all, whenever the process is killed."""
    whole = file.with_name(f"{file.name}.tmp")
    whole.write_text(json.dumps(value, indent=1) + "\n")
    whole.replace(file)
