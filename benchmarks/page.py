"""Runs the pairs of docs/benchmarks.md one after the other, keeps what was measured, and writes the page's tables.

    python benchmarks/page.py --torch torchenv/bin/python --tunix tunixenv/bin/python   # all: half an hour on two quiet cores
    python benchmarks/page.py --only lm                                                 # those whose name holds this word
    python benchmarks/page.py --render                                                  # the tables from what is there

A pair whose interpreter is not given keeps its old row. How to make the two environments stands in the files of benchmarks/peers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, CHUNKED, STARTUP, PAGE = (
    HERE / "results" / "pairs.json",
    HERE / "results" / "chunked.jsonl",
    HERE / "results" / "startup.json",
    HERE.parent / "docs" / "benchmarks.md",
)

PAIRS = {
    "engine, vision": ("{jkd} kd_step.py vision jkd", "{jkd} kd_step.py vision plain"),
    "engine, lm": ("{jkd} kd_step.py lm jkd", "{jkd} kd_step.py lm plain"),
    "PyTorch, vision": ("{jkd} kd_step.py vision jkd", "{torch} peers/torch_kd_step.py"),
    "PyTorch, vision, cached teacher": ("{jkd} kd_step.py vision jkd --cached", "{torch} peers/torch_kd_step.py"),
    "tunix, lm": ("{jkd} lm_step.py", "{tunix} peers/tunix_step.py"),
    "TRL, JSD": ("{jkd} jsd_step.py", "{torch} peers/torch_jsd.py trl"),
    "Liger, JSD": ("{jkd} jsd_step.py", "{torch} peers/torch_jsd.py liger"),
}


def measure(first: str, second: str, rounds: int, interpreters: dict[str, str | None]) -> dict[str, Any]:
    """What benchmarks/pair.py says of two workers, with what it was measured on."""
    from losses import device_name

    from jkd import provenance

    def command(worker: str) -> str:
        python, _, rest = worker.partition(" ")
        return f"{shlex.quote(str(interpreters[python.strip('{}')]))} {rest}"

    run = [sys.executable, "pair.py", command(first), command(second), "--rounds", str(rounds)]
    found = json.loads(subprocess.run(run, cwd=HERE, capture_output=True, text=True, check=True).stdout)
    for side, worker in (("first", first), ("second", second)):
        found[side]["command"] = worker
    where = {"device": device_name(), "date": datetime.date.today().isoformat(), "revision": provenance.code_revision()}
    return found | where


def pairs(results: dict[str, Any]) -> str:
    """The table of pairs."""
    lines = [
        "| jkd beside | jkd, s | the other, s | ratio (smallest to largest of the rounds) | measured |",
        "|---|---|---|---|---|",
    ]
    for name in PAIRS:
        if (one := results.get(name)) is None:
            lines.append(f"| {name} | | | not measured | |")
            continue
        ratio = one["ratio"]
        lines.append(
            f"| {name} | {one['first']['median']:.3f} | {one['second']['median']:.3f} | **{ratio['median']:.2f}** "
            f"({ratio['low']:.2f} to {ratio['high']:.2f}, {ratio['rounds']}) | {one['date']}, {one['device']} |"
        )
    return "\n".join(lines)


def heads(lines: list[dict[str, Any]]) -> str:
    """The table of losses between heads beside whole logits."""
    rows = [
        "| | time beside whole logits (tenth to ninetieth percentile) | temporaries, MB | of whole logits, MB | part |",
        "|---|---|---|---|---|",
    ]
    for one in lines:
        what = f"head: {one['head']}" if "head" in one else f"step: {one['step']}"
        low, high = one["ratio_range"]
        own, other = (one[name] / 1e6 for name in ("temp_bytes", "whole_logits_temp_bytes"))
        rows.append(
            f"| {what} | **{one['ratio']:.2f}** ({low:.2f} to {high:.2f}) | {own:,.0f} | {other:,.0f} | 1/{other / own:.1f} |"
        )
    if lines:
        one = lines[0]
        rows += ["", f"{one['rows']} texts of {one['time']} tokens, {one['vocab']:,} classes, {one['dtype']}; {one['device']}."]
    return "\n".join(rows)


def startup(found: dict[str, Any]) -> str:
    """The table of first steps."""
    rows = ["| config | from | cold, s | warm, s | warm / cold | measured |", "|---|---|---|---|---|---|"]
    for config, one in found.items():
        for what, since in (("to_first_step", "the command"), ("step", "the run's start")):
            times, measured = one[what], f"{one['date']}, {one['device']}"
            rows.append(f"| {config} | {since} | {times['cold']:.1f} | {times['warm']:.1f} | {times['ratio']} | {measured} |")
    return "\n".join(rows)


def written(page: str) -> str:
    """The page with what is measured between its markers."""
    found, starts = (json.loads(file.read_text()) if file.exists() else {} for file in (RESULTS, STARTUP))
    lines = [json.loads(line) for line in CHUNKED.read_text().splitlines()] if CHUNKED.exists() else []
    for marker, table in (("pairs", pairs(found)), ("chunked", heads(lines)), ("startup", startup(starts))):
        pattern = rf"(<!-- {marker}: .*? -->\n).*?(<!-- /{marker} -->)"
        page = re.sub(pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", page, flags=re.S)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has PyTorch, Liger-Kernel and TRL")
    parser.add_argument("--tunix", metavar="PYTHON", help="an interpreter that has tunix and jkd")
    parser.add_argument("--only", default="", help="pairs whose name holds this")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--render", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    interpreters = {
        "jkd": sys.executable,
        **{
            name: path and str(Path(path).absolute()) for name, path in (("torch", arguments.torch), ("tunix", arguments.tunix))
        },
    }
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, (first, second) in PAIRS.items():
        known = all(interpreters[worker.partition(" ")[0].strip("{}")] for worker in (first, second))
        if known and arguments.only in name and not arguments.render:
            found[name] = measure(first, second, arguments.rounds, interpreters)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps({"pair": name, **found[name]["ratio"]}), flush=True)
    PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
