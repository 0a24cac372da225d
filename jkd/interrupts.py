"""A wish to stop: from a signal in one process, from the scheduler's notice to any of several."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

_ENDS: dict[int, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class Stopped(Exception):
    """A signal came; the state is saved and the same call resumes it.

    Args:
        run: which.
        step: how many updates it has made; 0 where it was yet to begin, or to go on.
        workdir: where they are saved.
    """

    def __init__(self, run: str, step: int, workdir: epath.Path | None):
        self.run, self.step, self.workdir = run, step, workdir
        super().__init__(f"stopped {run} at step {step}" if step else f"stopped before {run}")


class Interrupts:
    """SIGTERM and SIGINT as a wish to stop after the step that runs; a second one ends the process at once.

    With several processes jax.distributed owns SIGTERM, and is handed SIGINT: all of them learn at the same step that one was told
    to stop.
    """

    def __init__(self) -> None:
        self._wish = False
        self._asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._wished)
        return self

    def _wished(self, number: int, frame: Any) -> None:
        for each in self._before:
            signal.signal(each, _ENDS[each])
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._wish = True

    def stop(self) -> bool:
        """Whether to stop after the step that runs; every process asks as often as the others. Once true, it stays."""
        if jax.process_count() > 1 and not self._wish:
            from jax.experimental import multihost_utils

            # counted over all runs of an experiment: the agreed point is a number that all have yet to reach, and is met only once
            self._asked += 1
            self._wish = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._wish

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Signals do what they did before: for what saves nothing and cannot be asked to stop."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
