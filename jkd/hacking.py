"""Teacher hacking: the student nears its teacher by what the teacher has wrong.

Beside the teacher (the proxy) a run may name an oracle, which the teacher stands for (`Run.oracle`). Evaluation then gives ``kl`` to
the one and ``oracle_kl`` to the other. Where the first falls and the second rises, the student learns the teacher's own mistakes:
more fresh examples, or examples that teacher or student make while training goes on, help; further passes over the same do not.

Source: Tiapkin et al., "On Teacher Hacking in Language Model Distillation", 2025, arXiv:2502.02671, proxy and golden metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RISE = 0.05
"""How much of its best value ``oracle_kl`` must rise by before it is told: what noise of an evaluation set should not reach."""


class Watch:
    """Sees a run's evaluations in turn.

    Args:
        kept: the ``state`` of a watch that saw those before a restart.
    """

    def __init__(self, kept: Mapping[str, Any] | None = None) -> None:
        step, *values = (kept or {}).get("best") or (0,)
        self._best: tuple[int, float, float] | None = (step, values[0], values[1]) if values else None
        self._told = bool((kept or {}).get("told"))

    @property
    def state(self) -> dict[str, Any]:
        """What it remembers, as JSON."""
        return {"best": self._best, "told": self._told}

    def see(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A line where the student has begun to leave the oracle while it nears the teacher, told once; else None.

        Args:
            step: of the evaluation.
            metrics: of the evaluation, see `jkd.evaluate.summarise`.
        """
        if not {"kl", "oracle_kl"} <= metrics.keys():
            return None
        proxy, golden = float(metrics["kl"]), float(metrics["oracle_kl"])
        if self._best is None or golden <= self._best[2]:
            self._best = step, proxy, golden
            return None
        since, proxy_then, golden_then = self._best
        if self._told or proxy >= proxy_then or golden <= golden_then * (1 + RISE):
            return None
        self._told = True
        return (
            f"teacher hacking: since step {since} the student has neared its teacher (KL {proxy_then:.4g} to {proxy:.4g}) and left "
            f"the oracle (KL {golden_then:.4g} to {golden:.4g}); train on fresh examples, or stop there"
        )
