"""What the processes of one training tell each other before and beside it; with one process alone each call answers at once."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its client: jax has no other way to say something without a device
from jax.errors import JaxRuntimeError
from jax.experimental import multihost_utils

from jkd import fingerprint, provenance
from jkd.errors import InputError

_ROOM = 1000
"""Bytes of a verdict: all processes must send as many."""
_PATIENCE_MS = 2000
"""How long a process waits for the others before it asks whether one has failed."""


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


class Elsewhere(Exception):
    """Another process failed at what all do together; says which and why."""


class Together:
    """Something that all processes do beside their training, such as a save, without a device; who fails says so to all.

    Args:
        name: the same in all processes, and never used before.
    """

    def __init__(self, name: str):
        self._name = f"jkd/{name}"
        self._client: Any = distributed.global_state.client if jax.process_count() > 1 else None

    def fail(self, why: str) -> None:
        """Tells the others, who shall not wait for this process. The first word of several counts."""
        if self._client is not None and not self.failure():
            said = f"process {jax.process_index()}: {why}"
            self._client.key_value_set(f"{self._name}/failed", said, allow_overwrite=True)

    def failure(self) -> str:
        """What the process said that failed; empty where none did."""
        try:
            return "" if self._client is None else self._client.key_value_try_get(f"{self._name}/failed")
        except JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return ""

    def meet(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all processes are here; no two places have the same ``key``.

        Raises:
            Elsewhere: one has failed.
            TimeoutError: one did not come in time.
        """
        if self._client is None:
            return
        until = time.monotonic() + timeout_ms / 1000
        if self._client.key_value_increment(f"{self._name}/{key}/here", 1) == jax.process_count():
            self._client.key_value_set(f"{self._name}/{key}/all", "here")
        while time.monotonic() < until:
            try:
                self._client.blocking_key_value_get(f"{self._name}/{key}/all", _PATIENCE_MS)
                return
            except JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if why := self.failure():
                raise Elsewhere(why)
        raise TimeoutError(f"another process did not come within {timeout_ms / 1000:,.0f} s")


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
