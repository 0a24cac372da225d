"""Runs the pairs of docs/benchmarks.md one after the other, keeps what was measured, and writes the page's tables.

    python benchmarks/page.py --torch torchenv/bin/python --tunix tunixenv/bin/python   # all: half an hour on two quiet cores
    python benchmarks/page.py --only lm                                                 # those whose name holds this word
    python benchmarks/page.py --render                                                  # the tables from what is there
    python benchmarks/page.py --tiny                                                    # smallest shapes, one round: does it run?

A pair whose interpreter is not given keeps its old row. The two environments are those of torch.txt and tunix.txt in peers.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, CHUNKED, STARTUP, ENGINE, SMALL, ACCELERATOR = (
    HERE / "results" / name
    for name in ("pairs.json", "chunked.jsonl", "startup.json", "engine.json", "small.json", "accelerator.jsonl")
)
PAGE = HERE.parent / "docs" / "benchmarks.md"

PAIRS = {
    "engine, vision": ("{jkd} kd_step.py vision jkd", "{jkd} kd_step.py vision plain"),
    "engine, lm": ("{jkd} kd_step.py lm jkd", "{jkd} kd_step.py lm plain"),
    "XLA's own choice, vision": ("{jkd} kd_step.py vision jkd", "{jkd} kd_step.py vision jkd --untold"),
    "PyTorch, vision": ("{jkd} kd_step.py vision jkd", "{torch} peers/torch_kd_step.py"),
    "PyTorch, vision, cached teacher": ("{jkd} kd_step.py vision jkd --cached", "{torch} peers/torch_kd_step.py"),
    "tunix, lm": ("{jkd} lm_step.py", "{tunix} peers/tunix_step.py"),
    "TRL, JSD": ("{jkd} jsd_step.py", "{torch} peers/torch_jsd.py trl"),
    "Liger, JSD": ("{jkd} jsd_step.py", "{torch} peers/torch_jsd.py liger"),
}


def measure(first: str, second: str, rounds: int, interpreters: dict[str, str | None]) -> dict[str, Any]:
    """What benchmarks/pair.py says of two workers, with what it was measured on."""
    from kept import where

    def command(worker: str) -> str:
        python, _, rest = worker.partition(" ")
        return f"{shlex.quote(str(interpreters[python.strip('{}')]))} {rest}"

    run = [sys.executable, "pair.py", command(first), command(second), "--rounds", str(rounds)]
    found = json.loads(subprocess.run(run, cwd=HERE, stdout=subprocess.PIPE, text=True, check=True).stdout)
    for side, worker in (("first", first), ("second", second)):
        found[side]["command"] = worker
    return found | where()


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
            f"({ratio['low']:.2f} to {ratio['high']:.2f}, {ratio['rounds']}) | {_measured(one)} |"
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
            times = one[what]
            rows.append(
                f"| {config} | {since} | {times['cold']:.1f} | {times['warm']:.1f} | {times['ratio']} | {_measured(one)} |"
            )
    return "\n".join(rows)


def engine(found: dict[str, Any]) -> str:
    """The table of the engine's step beside the one by hand."""
    rows = [
        "| | operations | bytes | temporaries | processor time: least, median (range) | a call comes back after, µs "
        "| difference in parts of the step | measured |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for what, one in found.items():
        counts = " | ".join(f"{one[name]:.4f}" for name in ("operations", "bytes", "temporaries"))
        spent, (own, other) = one["processor"], one["call_us"]
        times = (
            f"**{spent['least']:.3f}**, {spent['median']:.3f} ({spent['low']:.3f} to {spent['high']:.3f}, {spent['rounds']})"
        )
        part = f"{100 * one['call_part']:+.2f} %"
        rows.append(f"| {what} | {counts} | {times} | {own:,.0f}, by hand {other:,.0f} | {part} | {_measured(one)} |")
    return "\n".join(rows)


def small(found: dict[str, Any]) -> str:
    """The table of small networks and small data."""
    rows = ["| | before | after | times quicker (smallest to largest of the rounds) | measured |", "|---|---|---|---|---|"]
    if one := found.get("calls"):
        before, after = (f"{1e3 * seconds:.3f} ms" for seconds in one["step_s"])
        name = f"{one['per_call']} steps in a call"
        rows.append(f"| {name} | {before} | {after} | {_range(one['ratio'])} | {_measured(one)} |")
        before, after = (f"{1e3 * seconds:.3f} ms" for seconds in one["in_loop_s"])
        rows.append(f"| the same as training calls them | {before} | {after} | **{one['in_loop']:.1f}** | {_measured(one)} |")
    if one := found.get("input"):
        before, after = (f"{one[name]:,.0f} examples/s" for name in ("grain_records_per_s", "jkd_examples_per_s"))
        rows.append(f"| batches of digits, beside grain | {before} | {after} | {_range(one['ratio'])} | {_measured(one)} |")
    return "\n".join(rows)


def accelerators(lines: list[dict[str, Any]]) -> str:
    """The table of what benchmarks/accelerator.py told."""
    if not lines:
        return "Accelerators: **not measured**."
    rows = ["| | goal | reached | how quick | memory | measured |", "|---|---|---|---|---|---|"]
    for line in lines:
        goal, one = line["goal"], line["measured"]
        measured = f"{_measured(line)}, jax {line['versions']['jax']}, `{line['command']}`"
        if line["what"] == "head":
            for each in one["losses"]:
                low, high = each["ratio_range"]
                reached = f"**{each['ratio']:.2f}** ({low:.2f} to {high:.2f})"
                speed = f"{each['ms']:.1f} ms, whole {each['whole_logits_ms']:.1f} ms"
                room = f"{each['temp_bytes'] / 2**30:.2f} GiB, whole {each['whole_logits_temp_bytes'] / 2**30:.2f} GiB"
                rows.append(
                    f"| head: {each['head']} | time <= {goal} of whole logits' | {reached} | {speed} | {room} | {measured} |"
                )
            continue
        which = "datasheet" if one["mfu"]["datasheet"] is not None else "probed"
        rate = f"{one['tokens_per_s']:,.0f} tokens/s" if one["tokens_per_s"] else f"{one['examples_per_s']:,.0f} images/s"
        speed = f"{1e3 * one['time_per_step']['median']:.1f} ms a step, {rate}"
        reached = f"**{one['mfu'][which]:.3f}** of the {which} peak (HFU {one['hfu'][which]:.3f})"
        room = f"{one['memory']['peak'] / 2**30:.1f} GiB at most"
        rows.append(f"| {line['what']} | MFU >= {goal:.2f} | {reached} | {speed} | {room} | {measured} |")
    return "\n".join(rows)


def _measured(one: dict[str, Any]) -> str:
    return f"{one['date']}, {one['device']}"


def _range(ratio: dict[str, Any]) -> str:
    return f"**{ratio['median']:.1f}** ({ratio['low']:.1f} to {ratio['high']:.1f}, {ratio['rounds']})"


def _read(file: Path) -> Any:
    """A file's JSON, or that of its lines; empty where nothing was measured."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text or "{}")


def written(page: str) -> str:
    """The page with what is measured between its markers."""
    tables = {
        "pairs": pairs(_read(RESULTS)),
        "engine": engine(_read(ENGINE)),
        "small": small(_read(SMALL)),
        "accelerator": accelerators(_read(ACCELERATOR)),
        "chunked": heads(_read(CHUNKED)),
        "startup": startup(_read(STARTUP)),
    }
    for marker, table in tables.items():
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
    parser.add_argument("--tiny", action="store_true", help="smallest shapes, one round, nothing is kept")
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
            if arguments.tiny:
                first, second = (f"{worker} --tiny" for worker in (first, second))
            found[name] = measure(first, second, 1 if arguments.tiny else arguments.rounds, interpreters)
            if not arguments.tiny:
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
            print(json.dumps({"pair": name, **found[name]["ratio"]}), flush=True)
    if not arguments.tiny:
        PAGE.write_text(written(PAGE.read_text()))


if __name__ == "__main__":
    main()
