"""How fast a run goes, what binds it, and how far it is from what the hardware allows. docs/benchmarks.md defines each number."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import platform
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from jkd import chips, devices, flops, hlo, provenance, teachers
from jkd.bench import probe
from jkd.bench.compiling import listening
from jkd.bench.pairs import Ratio, Times, alternate
from jkd.bench.workload import Workload, bytes_of, stages
from jkd.config import Experiment, Run
from jkd.context import Context
from jkd.errors import InputError, nearest
from jkd.resolve import build
from jkd.state import step_shapes
from jkd.step import make_step
from jkd.types import Model

Measurement = dict[str, Any]
"""What `measure` found, ready for JSON; None where something cannot be told."""


def runs_of(experiment: Experiment, only: str | None = None) -> dict[str, Run]:
    """The runs of an experiment that can be stepped without training the earlier ones, by name.

    Args:
        only: this one alone.

    Raises:
        InputError: no run is called ``only``, or its teacher comes from a function of earlier runs.
    """
    found, students = dict[str, Run](), dict[str, Model]()
    for name, node in experiment.nodes.items():
        if isinstance(node, Run):
            students[name] = build(node.student)
            run = teachers.unweighted(node, students)
            if run is not None:
                found[name] = run
    if not found:
        raise InputError("no run can be timed before others have run: every teacher is made by a function of earlier nodes")
    if only is None:
        return found
    if only not in found:
        why = "its teacher is made by a function" if only in experiment.nodes else f"there is no such run{nearest(only, found)}"
        raise InputError(f"--run {only}: {why}")
    return {only: found[only]}


def measure(work: Workload, *, steps: int = 20, profile: str | None = None) -> Measurement:
    """Times a run's step whole and in parts, and puts it beside its own operations, bytes and the hardware's peaks.

    Args:
        work: the run.
        steps: calls that are timed one by one, after two that are not.
        profile: a folder for a trace of five steps that TensorBoard or xprof opens.
    """
    with listening() as heard:
        found = _measure(work, steps, profile)
    found["compile"]["compilations"] += heard.of(work.program_name)
    return found


def _measure(work: Workload, steps: int, profile: str | None) -> Measurement:
    ctx, run = work.ctx, work.ctx.run
    operations = flops.of_step(ctx)
    parts = stages(work)
    if not operations.teacher:  # whatever the forward pass hands on of it, no loss reads it: the step does not run it
        parts.pop("teacher_forward", None)
    order: list[Callable[[], float]] = [*(lambda part=part: _timed(part) for part in parts.values()), work]
    *partial, whole = alternate(order, steps)
    times = Times.of(whole)
    before = {name: Times.of(seconds).median for name, seconds in zip(parts, partial, strict=True)} | {"update": times.median}
    split, earlier = dict.fromkeys(("augment", "teacher_forward", "student_forward_backward", "update"), 0.0), 0.0
    for name, seconds in before.items():
        split[name], earlier = max(0.0, seconds - earlier), max(earlier, seconds)
    loop, waited = (None, None) if work.made_up else work.loop(steps)
    if profile is not None:
        with jax.profiler.trace(profile):
            for _ in range(5):
                work()
    executed = flops.of_program(make_step(ctx), *step_shapes(ctx))
    shards = ctx.mesh.size
    peaks = _peaks(ctx)
    useful = operations.teacher + operations.student
    memory = _memory(work)
    terms = {
        "flops": operations.total / (shards * (peaks["datasheet_flops_per_s"] or peaks["probed_flops_per_s"])),
        "bytes": (memory["arguments"] + memory["outputs"] - memory["aliased"] + 2 * memory["temporaries"])
        / (peaks["datasheet_bytes_per_s"] or peaks["probed_bytes_per_s"]),
        "cache": _cache_seconds(work),
    }
    binding = max(terms, key=lambda name: terms[name] or 0.0)
    bound = terms[binding]
    tokens = ctx.raw_batch.get("tokens")
    return {
        **about(work),
        "time_per_step": {**dataclasses.asdict(times), "in_loop": loop},
        "examples_per_s": run.batch_size / times.median,
        "tokens_per_s": None if tokens is None else float(np.prod(tokens.shape)) / times.median,
        "split": split | {"host_wait_for_data": waited},
        "flops": {
            "teacher": operations.teacher,
            "student": operations.student,
            "other": operations.other,
            "executed": executed,
            "xla": _xla(work),
        },
        "peaks": peaks,
        "mfu": _utilisation(useful, times.median, shards, peaks),
        "hfu": _utilisation(executed, times.median, shards, peaks),
        "bound": {"seconds": bound, "binding": binding, "terms": terms},
        "fraction_of_bound": bound / times.median if bound else None,
        "memory": memory,
        "compile": {
            "trace": work.compiled.trace,
            "lower": work.compiled.lower,
            "compile": work.compiled.compile,
            "persistent_cache_hit": work.compiled.hit,
            "compilations": work.heard.of(work.program_name),
        },
    }


def paired(first: Workload, second: Workload, *, rounds: int = 20) -> dict[str, Any]:
    """Two runs stepped in turn in one process: their times, and the ratio of the first's to the second's with its range."""
    a, b = alternate((first, second), rounds)
    return {
        "first": {**about(first), "time_per_step": dataclasses.asdict(Times.of(a))},
        "second": {**about(second), "time_per_step": dataclasses.asdict(Times.of(b))},
        "ratio": dataclasses.asdict(Ratio.of(a, b)),
    }


def sweep(name: str, run: Run, *, steps: int = 5) -> Iterator[dict[str, Any]]:
    """One row for each number of microbatches and choice of rematerialisation: seconds, bytes; or why it does not go.

    The run's own choices come first (``own``); no two rows' arrays are ever held together.
    """
    counts = [run.microbatches, *(count for count in (1, 2, 4, 8) if count != run.microbatches and run.batch_size % count == 0)]
    policies = [run.remat, *(policy for policy in (None, jax.checkpoint_policies.nothing_saveable) if policy is not run.remat)]
    for count in counts:
        for remat in policies:
            row = {
                "microbatches": count,
                "remat": "" if remat is None else getattr(remat, "__name__", str(remat)),
                "own": count == run.microbatches and remat is run.remat,
            }
            row |= _swept(name, dataclasses.replace(run, microbatches=count, remat=remat), steps)
            gc.collect()  # a program and its arrays may refer to each other
            yield row


def _swept(name: str, run: Run, steps: int) -> dict[str, Any]:
    try:
        work = Workload(name, run)
        (seconds,) = alternate([work], steps)
        memory = _memory(work)
    except InputError as error:
        return {"refused": str(error)}
    except Exception as error:
        if not devices.out_of_memory(error):
            raise
        return {"refused": f"out of memory {devices.asked_for(error)}".rstrip()}
    return {"median": Times.of(seconds).median, "temporaries": memory["temporaries"], "aliased": memory["aliased"]}


def about(work: Workload) -> dict[str, Any]:
    """What was measured, where and with what."""
    ctx, run = work.ctx, work.ctx.run
    device = ctx.mesh.devices.flat[0]
    return {
        "run": work.name,
        "method": type(run.recipe).__name__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind if device.platform != "cpu" else platform.machine(),
            "count": ctx.mesh.size,
        },
        "versions": provenance.package_versions(),
        "revision": provenance.code_revision(),
        "dtypes": {"compute": run.compute_dtype, "teacher": run.teacher_dtype},
        "shapes": {name: [str(leaf.dtype), *leaf.shape] for name, leaf in ctx.raw_batch.items() if hasattr(leaf, "shape")},
        "batch_size": run.batch_size,
        "microbatches": run.microbatches,
        "steps_per_call": run.steps_per_call,
        "made_up_batches": work.made_up or None,
    }


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _peaks(ctx: Context) -> dict[str, Any]:
    """Of one device."""
    device = ctx.mesh.devices.flat[0]
    chip = chips.of_kind(device.device_kind)
    return {
        "datasheet_flops_per_s": None if chip is None else chip.peak(ctx.run.compute_dtype),
        "datasheet_bytes_per_s": None if chip is None else chip.memory_bandwidth,
        "probed_flops_per_s": probe.flops_per_s(device, ctx.run.compute_dtype),
        "probed_bytes_per_s": probe.bytes_per_s(device),
    }


def _utilisation(operations: float, seconds: float, count: int, peaks: dict[str, Any]) -> dict[str, float | None]:
    return {
        which: None if (peak := peaks[f"{which}_flops_per_s"]) is None else operations / (seconds * count * peak)
        for which in ("datasheet", "probed")
    }


def _xla(work: Workload) -> float | None:
    cost = work.compiled.program.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float(cost["flops"]) if cost and "flops" in cost else None


def _memory(work: Workload) -> dict[str, Any]:
    """Bytes of one device: what the compiler says of the step, what was in use at most, and what holds logits of a whole batch."""
    found = work.compiled.program.memory_analysis()
    stats = work.ctx.mesh.devices.flat[0].memory_stats() or {}
    here = "peak_bytes_in_use" in stats
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "peak": stats["peak_bytes_in_use"] if here else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_of": "device" if here else "process",
        "examples_by_classes": _logits(work),
    }


def _logits(work: Workload) -> list[dict[str, Any]]:
    """The largest buffers with an axis of the batch's examples (or tokens) and one of the classes (or vocabulary)."""
    ctx = work.ctx
    if ctx.classes is None:
        return []
    text, rows = work.compiled.program.as_text(), ctx.run.batch_size // (ctx.batch_shards * ctx.run.microbatches)
    sizes = [rows] if "tokens" not in ctx.raw_batch else [rows, rows * ctx.raw_batch["tokens"].shape[-1]]
    found = [buffer for size in sizes for buffer in hlo.holding(text, [size, ctx.classes])]
    found.sort(key=lambda buffer: -buffer.bytes)
    return [{"name": buffer.of or buffer.op, "array": str(buffer.array), "bytes": buffer.bytes} for buffer in found[:5]]


def _cache_seconds(work: Workload, batches: int = 8) -> float | None:
    """Bytes of cached answers in a batch over the rate at which this host reads them with nothing else to do; None without a cache."""
    run = work.ctx.run
    if work.made_up or getattr(run.data, "answers", None) is None or run.data is None:
        return None
    rows: Any = run.data.batches(run.batch_size, seed=run.seed, process=(jax.process_index(), jax.process_count()))
    try:
        next(rows)
        start = time.perf_counter()
        for _ in range(batches):
            next(rows)
        rate = batches * bytes_of(work.ctx.raw_batch["teacher"]) / (time.perf_counter() - start)
    finally:
        rows.close()
    return bytes_of(work.ctx.raw_batch["teacher"]) / rate
