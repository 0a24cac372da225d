"""Where numbers go while a run trains (writers behind one protocol), and how fast it goes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

from etils import epath

Ended = Literal["finished", "stopped", "failed"]
"""How a run came to its end; one that was stopped will go on."""


class Writer(Protocol):
    """Takes scalars by name. What it cannot write it keeps and tries again: nothing that it does may end a training."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, ended: Ended = "finished") -> None: ...


class JsonLines:
    """``metrics.jsonl``: one object for each call, ``{"step": …, name: value}``; numbers that are not finite become null.

    What cannot be written (the disk is full, say) is kept, and tried again with the next `flush`.

    Args:
        path: local or remote. Lines from steps after ``start`` (a resumed run trains them again) are dropped.
        start: the step that the run starts from.
    """

    def __init__(self, path: epath.Path, start: int = 0):
        self._path = path
        self._lines: list[str] = []
        if path.exists():
            self._lines = [line for line in path.read_text().splitlines() if line and _step(line) <= start]
            path.write_text("".join(line + "\n" for line in self._lines))
        self._new: list[str] = []

    def write(self, step: int, values: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._new.append(json.dumps({"step": step, **finite}))

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            if "://" not in str(self._path):
                _append(self._path, "".join(line + "\n" for line in self._new).encode())
            elif self._new:  # object stores have no append
                self._path.write_text("".join(line + "\n" for line in self._lines + self._new))
                self._lines += self._new
            self._new = []

    def close(self, ended: Ended = "finished") -> None:
        self.flush()


def _append(path: epath.Path, content: bytes) -> None:
    """All of it or, where that raises OSError, nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while content:
                content = content[file.write(content) or 0 :]
        except OSError:
            file.truncate(size)
            raise


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):
        return 1 << 62  # a line that a kill cut short: drop it


class TensorBoard:
    """TensorBoard event files in a local folder; entries after ``start`` are marked as purged.

    Written here and not by tensorboardX's thread: when that meets a full disk it dies, and whoever flushes waits for ever.
    """

    def __init__(self, folder: epath.Path, start: int = 0):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._event, self._new, self._flushed = Event, b"", time.monotonic()
        self._add(file_version="brain.Event:2")
        if start:
            self._add(step=start + 1, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **fields: Any) -> None:
        from tensorboardX.record_writer import masked_crc32c

        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        for part in (struct.pack("<Q", len(data)), data):  # a TFRecord: its length, then itself, each with a checksum
            self._new += part + struct.pack("<I", masked_crc32c(part))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self._add(
            step=step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        )
        if time.monotonic() - self._flushed > 30:  # somebody may be watching
            self.flush()

    def flush(self) -> None:
        self._flushed = time.monotonic()
        with contextlib.suppress(OSError):  # tried again with the next
            _append(self._path, self._new)
            self._new = b""

    def close(self, ended: Ended = "finished") -> None:
        self.flush()


class Several:
    """All writers at once."""

    def __init__(self, *writers: Writer):
        self._writers = writers

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        for writer in self._writers:
            writer.write(step, {name: float(value) for name, value in values.items()})

    def flush(self) -> None:
        for writer in self._writers:
            writer.flush()

    def close(self, ended: Ended = "finished") -> None:
        for writer in self._writers:
            writer.close(ended)


def writers(
    folder: epath.Path | None, start: int, config: Any = None, tell: Callable[[str], None] = lambda line: None
) -> Several:
    """The writers of a run: JSON lines anywhere, TensorBoard where the folder is local, the trackers that ``JKD_TRACK`` names
    (`jkd.tracking`, which says what the arguments are); none without a folder.
    """
    if folder is None:
        return Several()
    from jkd import tracking

    found: list[Writer] = [JsonLines(folder / "metrics.jsonl", start)]
    if "://" not in str(folder):
        found.append(TensorBoard(folder, start))
    return Several(*found, *tracking.writers(folder, start, config, tell))


class Periodic:
    """Fills in the terms of updates that run at every n-th step only: between, their last known values stand."""

    def __init__(self) -> None:
        self._known: dict[str, float] = {}

    def fill(self, found: Mapping[str, float]) -> dict[str, float]:
        """A step's metrics without its ``ran/…`` flags and without the numbers of updates that have not run yet."""
        values = {name: value for name, value in found.items() if not name.startswith("ran/")}
        for flag, ran in found.items():
            if flag.startswith("ran/"):
                for name in (f"{kind}/{flag.removeprefix('ran/')}" for kind in ("term", "coef", "share")):
                    value = values.pop(name)
                    if ran:
                        self._known[name] = value
        return values | self._known


class Stopwatch:
    """Examples a second, without compilation (the first two calls), evaluations and saves."""

    def __init__(self, batch_size: int):
        self._batch_size, self._ticks, self._steps, self._spent = batch_size, 0, 0, 0.0
        self._last: float | None = None
        self._recent = 0.0

    def tick(self, steps: int = 1) -> float:
        """A call of so many steps has arrived; answers the examples per second of the last steps (0 until they can be told)."""
        now = time.perf_counter()
        if self._ticks >= 2 and self._last is not None:
            took = now - self._last
            self._spent, self._steps = self._spent + took, self._steps + steps
            share = 0.95**steps
            self._recent = share * self._recent + (1 - share) * took / steps if self._recent else took / steps
        self._ticks, self._last = self._ticks + 1, now
        return self._batch_size / self._recent if self._recent else 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count."""
        start = time.perf_counter()
        yield
        if self._last is not None:
            self._last += time.perf_counter() - start

    def mean(self) -> float | None:
        """Examples per second over the whole run, or None where it was too short."""
        return self._steps * self._batch_size / self._spent if self._spent else None
