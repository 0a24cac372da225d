"""What the processes of one training tell each other before and beside it; with one process alone each call answers at once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jkd import fingerprint, provenance
from jkd.errors import InputError

_ROOM = 1000
"""Bytes of a verdict: all processes must send as many."""


def from_first(text: str) -> str:
    """The first process's text, in all of them."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    mine = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(mine)).decode()


def first_word(text: str) -> str:
    """The text of the first process that has one, in all of them; empty where none has. At most 1,000 bytes."""
    if jax.process_count() == 1:
        return text
    mine = np.frombuffer(text.encode()[:_ROOM].ljust(_ROOM), np.uint8)
    lines = [bytes(row).decode(errors="ignore").strip() for row in multihost_utils.process_allgather(mine)]
    return next(filter(None, lines), "")


def agree(config: Any) -> None:
    """All processes were started with this config and run the same code, or all are refused.

    Args:
        config: as `fingerprint.to_json` gives it.

    Raises:
        InputError: in every process, with the differences between the first process and the first that differs from it.
    """
    if jax.process_count() == 1:
        return
    mine = {
        "config": config,
        "code": _code(),
        "revision": provenance.code_revision(),
        "versions": provenance.package_versions(),
    }
    digest = np.frombuffer(hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest(), np.uint8)
    if len(np.unique(multihost_utils.process_allgather(digest), axis=0)) == 1:
        return
    found = fingerprint.differences(json.loads(from_first(json.dumps(mine))), mine)
    listed = "; ".join(line.removeprefix("config.") for line in found[:5])
    unlike = f"process {jax.process_index()} was started with another config or other code than process 0 ({listed}"
    raise InputError(f"{first_word(unlike if found else '')}); start all with the same command and the same revision")


def _code() -> str:
    """A checksum of jkd's own files: two checkouts that were edited call themselves by the same revision."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
