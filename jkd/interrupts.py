"""A wish to stop: from a signal in one process, from the scheduler's notice to any of several."""

from __future__ import annotations

import signal
import threading
from typing import Any

import jax


class Interrupts:
    """SIGTERM and SIGINT as a wish to stop after the step that runs; a second one ends the process at once.

    With several processes jax.distributed owns SIGTERM: all of them learn at the same step that one was told to stop.
    """

    def __init__(self) -> None:
        self._wish = False
        self._asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._wished)
        return self

    def _wished(self, number: int, frame: Any) -> None:
        self._wish = True
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def stop(self) -> bool:
        """Whether to stop after the step that runs; every process asks once a step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            # counted over all runs of an experiment: the agreed point is a number that all have yet to reach
            self._asked += 1
            return multihost_utils.reached_preemption_sync_point(self._asked)
        return self._wish

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
