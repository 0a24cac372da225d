"""A measurement as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jkd.bench.pairs import Ratio

_PARTS = {
    "prepare": "prepare (rollouts)",
    "augment": "augmentation",
    "teacher_forward": "teacher forward",
    "student_forward_backward": "student forward and backward",
    "update": "update",
    "host_wait_for_data": "host wait for data",
}


def text(found: dict[str, Any]) -> str:
    """One run: what `jkd.bench.measure.measure` found."""
    times, memory, compiled, peaks = (found[name] for name in ("time_per_step", "memory", "compile", "peaks"))
    bound, operations = found["bound"], found["flops"]
    per_call = f", {found['steps_per_call']} steps per call" if found["steps_per_call"] > 1 else ""
    pieces = f", {found['microbatches']} microbatches" if found["microbatches"] > 1 else ""
    rows = [
        (
            "time per step",
            f"{_ms(times['median'])} median, {_ms(times['min'])} min, {_ms(times['p90'])} p90 of {times['steps']}",
        ),
        ("in a loop", "-" if times["in_loop"] is None else f"{_ms(times['in_loop'])} per step"),
        ("examples/s", f"{found['examples_per_s']:,.0f}"),
    ]
    if found["tokens_per_s"] is not None:
        rows.append(("tokens/s", f"{found['tokens_per_s']:,.0f}"))
    rows += [
        (f"  {_PARTS[name]}", _ms(seconds))
        for name, seconds in found["split"].items()
        if seconds or (name == "update" and seconds is not None)
    ]
    rows += [
        (
            "FLOPs of a step",
            f"teacher {operations['teacher']:.3e}, student {operations['student']:.3e}"
            + (f", prepare {operations['prepare']:.3e}" if operations["prepare"] else ""),
        ),
        ("peak", f"{_tera(peaks['datasheet_flops_per_s'])} datasheet, {_tera(peaks['probed_flops_per_s'])} probed"),
        ("MFU", _shares(found["mfu"])),
        ("HFU", _shares(found["hfu"])),
        ("bound", f"{_ms(bound['seconds'])} by {bound['binding']}: {_percent(found['fraction_of_bound'])} of it reached"),
        (
            "memory",
            ", ".join(f"{name} {_mib(memory[name])}" for name in ("arguments", "outputs", "aliased", "temporaries"))
            + f"; peak of the {memory['peak_of']} {_mib(memory['peak'])}",
        ),
    ]
    rows += [
        ("  examples x classes", f"{one['array']} {_mib(one['bytes'])} {one['name']}") for one in memory["examples_by_classes"]
    ]
    hit = ", from the persistent cache" if compiled["persistent_cache_hit"] else ""
    spent = ", ".join(f"{name} {compiled[name]:.2f} s" for name in ("trace", "lower", "compile"))
    rows.append(("compile", f"{spent}{hit}; compilations: {compiled['compilations']}"))
    device, dtypes = found["device"], found["dtypes"]
    title = (
        f"{found['run']}: {found['method']} on {device['count']} {device['platform']} ({device['kind']}), batch "
        f"{found['batch_size']}, {dtypes['compute']}{pieces}{per_call}"
    )
    lines = [title, *_columns(rows)]
    if found["made_up_batches"]:
        lines.append(f"  batches are made up: {found['made_up_batches']}")
    return "\n".join(lines)


def pair(found: dict[str, Any]) -> str:
    """What `jkd.bench.measure.paired` found."""
    lines = []
    for which in ("first", "second"):
        one, times = found[which], found[which]["time_per_step"]
        lines.append(f"{which}: {one['run']}, {one['method']}: {_ms(times['median'])} median, {_ms(times['min'])} min")
    return "\n".join([*lines, f"first / second: {Ratio(**found['ratio'])}"])


def swept(row: dict[str, Any]) -> str:
    """A line of `jkd.bench.measure.sweep`; a star marks what the run says itself."""
    name = f"{'*' if row['own'] else ' '} microbatches {row['microbatches']}, remat {row['remat'] or 'none':<17}"
    if "refused" in row:
        return f"{name} refused: {row['refused']}"
    return f"{name} {_ms(row['median']):>11}  temporaries {_mib(row['temporaries'])}  aliased {_mib(row['aliased'])}"


def _columns(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.3f} ms"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.2f} MiB"


def _tera(rate: float | None) -> str:
    return "no" if rate is None else f"{rate / 1e12:,.3f} TFLOP/s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _shares(shares: dict[str, float | None]) -> str:
    return ", ".join(f"{_percent(share)} of the {which} peak" for which, share in shares.items() if share is not None)
