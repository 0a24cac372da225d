"""Folders as `jkd train` leaves them, written by hand: what reports read, without a training."""

from __future__ import annotations

import json
from pathlib import Path


def run(teacher=None, **fields) -> dict:
    """A `Run` as config.json has it."""
    return {"class": "jkd.config:Run", "teacher": teacher, "seed": 0, "steps": 20, "recipe": {"class": "x:KD"}, **fields}


def leave(folder: Path, config: dict, results: dict, lines: dict | None = None) -> Path:
    """Writes an experiment.

    Args:
        folder: where to; made.
        config: runs by name.
        results: ``result.json`` by run, of those that are finished.
        lines: ``metrics.jsonl`` by run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in config:
        (folder / name).mkdir()
        if name in results:
            (folder / name / "result.json").write_text(json.dumps({"metrics": {}, "details": {}} | results[name]))
        text = "".join(json.dumps(line) + "\n" for line in (lines or {}).get(name, ()))
        (folder / name / "metrics.jsonl").write_text(text)
    return folder
