"""Trains configs/digits_methods.py over several seeds; writes JSON here, and the table and the picture of docs/methods.md.

python benchmarks/digits_methods.py --workdir runs/methods   # three seeds, about 40 minutes on one core; stopped, it goes on
python benchmarks/digits_methods.py --render                 # the table from the JSON that is there
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "digits_methods.json"
PICTURE = ROOT / "docs" / "digits_methods.png"
PAGE = ROOT / "docs" / "methods.md"
COMMAND = "python benchmarks/digits_methods.py --workdir runs/methods"


def measure(workdir: Path, seeds: int, sets: Sequence[str] = (), picture: Path = PICTURE) -> dict[str, Any]:
    """Trains what is not trained yet, and says what `jkd report` says; the picture is written beside."""
    from jkd import provenance, report

    train = [sys.executable, "-m", "jkd", "train", str(ROOT / "configs" / "digits_methods.py")]
    subprocess.run([*train, "--seeds", str(seeds), "--workdir", str(workdir), *sets], check=True)
    groups = report.compare(report.read([workdir]))
    picture.write_bytes(report.png(groups))
    runs = json.loads(report.as_json(groups))[0]["runs"]
    return {
        "command": COMMAND,
        "device": f"CPU ({platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores)",
        "date": datetime.date.today().isoformat(),
        "revision": provenance.code_revision(),
        "runs": {name: {**run, "seeds": run["seeds"]["finished"]} for name, run in runs.items()},
    }


def render(results: dict[str, Any]) -> str:
    """The page's table, best gain first, teacher and control on top."""
    runs = {name: run for name, run in results["runs"].items() if run["role"] != "stage"}
    seeds = max(run["seeds"] for run in runs.values())
    order = {"teacher": 0, "control": 1, "method": 2}
    names = sorted(runs, key=lambda name: (order[runs[name]["role"]], -_mean(runs[name], "gain", 0.0)))
    lines = [
        "| | accuracy, % | gain over the control, points | published gain (CIFAR-100) | agreement, % | NLL, nats | ECE, % "
        "| examples/s | extra parameters |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {name} | {' | '.join(_cells(runs[name], results['runs'].get(f'{name}_initial')))} |" for name in names),
        "",
    ]
    gains = {name: run["metrics"]["gain"] for name, run in runs.items() if run["role"] == "method"}
    worse = [name for name in names if name in gains and gains[name]["mean"] + (gains[name]["std"] or 0) < 0]
    unclear = [
        name for name in names if name in gains and name not in worse and gains[name]["mean"] - (gains[name]["std"] or 0) <= 0
    ]
    lines += [
        f"Mean ± standard deviation over {seeds} seeds. Worse than the control by more than a deviation: {_named(worse)}. Not told "
        f"apart from it: {_named(unclear)}. Measured on {results['date']} on a {results['device']} by `{results['command']}`.",
    ]
    return "\n".join(lines)


def _cells(run: dict[str, Any], initial: dict[str, Any] | None) -> list[str]:
    """``initial`` is the stage that only initialises the student: what it trains beside the student is of the method."""
    own = run["role"] == "method"
    published = run["published"] or {}
    gain = published["accuracy"] - published["control"] if own and published.get("control") is not None else None
    return [
        _cell(run, "accuracy", 100, 1),
        _cell(run, "gain", 100, 1, "+") if own else "",
        "" if gain is None else f"{gain:+.2f}",
        _cell(run, "agreement", 100, 1),
        _cell(run, "nll", 1, 3),
        _cell(run, "ece", 100, 1),
        f"{sorted(run['metrics']['examples_per_s']['values'])[run['seeds'] // 2]:,.0f}",
        f"{max(_mean(each, 'extra_parameters', 0) for each in (run, initial or run)):,.0f}" if own else "",
    ]


def _cell(run: dict[str, Any], name: str, scale: float, digits: int, sign: str = "") -> str:
    if name not in run["metrics"]:
        return ""
    stat = run["metrics"][name]
    spread = "" if stat["std"] is None else f" ± {scale * stat['std']:.{digits}f}"
    return f"{scale * stat['mean']:{sign}.{digits}f}{spread}"


def _mean(run: dict[str, Any], name: str, missing: float) -> float:
    return run["metrics"][name]["mean"] if name in run["metrics"] else missing


def _named(names: list[str]) -> str:
    return ", ".join(names) or "none"


def written(page: str, table: str) -> str:
    """The page with the table between its markers."""
    return re.sub(r"(<!-- results: .*? -->\n).*?(<!-- /results -->)", lambda m: f"{m[1]}{table}\n{m[2]}", page, flags=re.S)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, default=Path("runs/methods"))
    parser.add_argument("--render", action="store_true", help="measure nothing; render the JSON that is there")
    parser.add_argument(
        "--tiny", action="store_true", help="eight steps of each run, one method; the table is printed: does it run?"
    )
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        sets = ["--set", 'methods=("kd",)', "--set", "*.steps=8"]
        with tempfile.TemporaryDirectory() as folder:
            print(render(measure(Path(folder), 1, sets, Path(folder) / PICTURE.name)))
        return
    if not arguments.render:
        RESULTS.write_text(json.dumps(measure(arguments.workdir, arguments.seeds), indent=1) + "\n")
    PAGE.write_text(written(PAGE.read_text(), render(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
