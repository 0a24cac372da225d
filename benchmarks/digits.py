"""Trains configs/digits.py over several seeds and writes what it measured: JSON here, the table and the picture in the README.

python benchmarks/digits.py            # five seeds, several minutes
python benchmarks/digits.py --render   # the README's table from the JSON that is there
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "digits.json"
README, PICTURE = ROOT / "README.md", ROOT / "docs" / "digits.png"
ROWS = ("teacher", "control", "student")


def measure(seeds: int, sets: Sequence[str] = (), picture: Path = PICTURE) -> dict:
    """Summaries of every seed, with what they were measured on; draws them too."""
    import jax
    from etils import epath

    import jkd
    from jkd import configfile, provenance, report

    config = configfile.load(ROOT / "configs" / "digits.py")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        workdirs = [epath.Path(folder) / str(seed) for seed in range(seeds)]
        for seed, workdir in enumerate(workdirs):
            found.append(jkd.train(configfile.resolve(config, [f"seed={seed}", *sets]), workdir).summary)
            print(json.dumps({"seed": seed, **{name: found[-1][name]["accuracy"] for name in ROWS}}), flush=True)
        picture.write_bytes(report.png(report.compare(report.read(workdirs))))
    return {
        "command": "python benchmarks/digits.py",
        "device": _device(jax.devices()[0]),
        "date": datetime.date.today().isoformat(),
        "revision": provenance.code_revision(),
        "seeds": found,
    }


def _device(device) -> str:
    if device.platform != "cpu":
        return device.device_kind
    import os
    import platform

    return f"CPU ({platform.machine()}, {os.cpu_count()} cores)"


def render(results: dict) -> str:
    """The README's table, from the JSON."""
    seeds = results["seeds"]

    def cell(name: str, key: str, scale: float, digits: int) -> str:
        values = [scale * summary[name][key] for summary in seeds]
        return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"

    lines = [
        "| | parameters | accuracy, % | NLL, nats | ECE, % | agreement with the teacher, % | examples/s (median) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ROWS:
        speed = statistics.median(summary[name]["examples_per_s"] for summary in seeds)
        columns = [cell(name, "accuracy", 100, 1), cell(name, "nll", 1, 3), cell(name, "ece", 100, 1)]
        columns.append(cell(name, "agreement", 100, 1))
        lines.append(f"| {name} | {seeds[0][name]['parameters']:,} | {' | '.join(columns)} | {speed:,.0f} |")
    gain = statistics.mean(100 * (s["student"]["accuracy"] - s["control"]["accuracy"]) for s in seeds)
    gap = statistics.mean(100 * (s["teacher"]["accuracy"] - s["student"]["accuracy"]) for s in seeds)
    lines += [
        "",
        f"Mean ± standard deviation over {len(seeds)} seeds: the student is {gain:.1f} points above the control, which saw the same "
        f"labels for as many steps, and {gap:.1f} below its teacher. Measured on {results['date']} on a {results['device']} by "
        f"`{results['command']}`.",
    ]
    return "\n".join(lines)


def written(readme: str, table: str) -> str:
    """The README with the table between its markers."""
    return re.sub(r"(<!-- results: .*? -->\n).*?(<!-- /results -->)", lambda m: f"{m[1]}{table}\n{m[2]}", readme, flags=re.S)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--render", action="store_true", help="measure nothing; render the JSON that is there")
    parser.add_argument(
        "--tiny", action="store_true", help="eight steps of each run, two seeds; the table is printed: does it run?"
    )
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        with tempfile.TemporaryDirectory() as folder:
            print(render(measure(2, ["*.steps=8"], Path(folder) / PICTURE.name)))
        return
    if not arguments.render:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(arguments.seeds), indent=1) + "\n")
    README.write_text(written(README.read_text(), render(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
