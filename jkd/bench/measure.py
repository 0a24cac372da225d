"""How fast a run goes, what binds it, and how far it is from what the hardware allows. docs/benchmarks.md defines each number."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jkd import chips, compiler, devices, flops, hlo, provenance, teachers
from jkd.bench import probe
from jkd.bench.compiling import listening
from jkd.bench.pairs import Ratio, Times, alternate
from jkd.bench.workload import Workload, stages
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
        why = skipped(experiment, found).get(only, f"there is no such run{nearest(only, found)}")
        raise InputError(f"--run {only}: {why}")
    return {only: found[only]}


def skipped(experiment: Experiment, runs: Mapping[str, Run]) -> dict[str, str]:
    """Why each node that is not among these runs cannot be timed."""
    return {
        name: "its teacher is made by a function"
        if isinstance(node, Run)
        else "it is a function of earlier nodes, and what it gives is known once they have run"
        for name, node in experiment.nodes.items()
        if name not in runs
    }


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
    work()
    peak = _peak(work)  # before anything runs that training does not
    operations, prepared = flops.of_step(ctx), flops.of_prepare(ctx)
    times, split = _timed(work, operations.teacher > 0, steps)
    loop, waited = (None, None) if work.made_up else work.loop(steps)
    if profile is not None:
        with jax.profiler.trace(profile):
            for _ in range(5):
                work()
    executed = flops.executed(ctx)
    shards = ctx.mesh.size
    peaks = _peaks(ctx)
    useful = operations.teacher + operations.student + prepared.teacher + prepared.student
    memory = _memory(work)
    terms = {
        "flops": _quotient(
            operations.total + prepared.total, shards, peaks["datasheet_flops_per_s"] or peaks["probed_flops_per_s"]
        ),
        "bytes": _quotient(_bytes(work), 1, peaks["datasheet_bytes_per_s"] or peaks["probed_bytes_per_s"]),
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
            "prepare": prepared.total,
            "executed": executed,
            "xla": _xla(work),
        },
        "peaks": peaks,
        "mfu": _utilisation(useful, times.median, shards, peaks),
        "hfu": _utilisation(executed, times.median, shards, peaks),
        "bound": {"seconds": bound, "binding": binding, "terms": terms},
        # blocked steps read no data
        "fraction_of_bound": bound / (loop if binding == "cache" and loop else times.median) if bound else None,
        "memory": memory | peak | {"examples_by_classes": _logits(work)},
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


def _timed(work: Workload, teacher: bool, steps: int) -> tuple[Times, dict[str, float | None]]:
    """Seconds of the whole step, and its parts by subtraction; None each where one call makes several steps.

    Parts are called one by one: what a call costs would be in theirs, and is shared in the step's.
    """
    parts = stages(work) if work.most == 1 else {}
    if not teacher:  # whatever the forward pass hands on of it, no loss reads it: the step does not run it
        parts.pop("teacher_forward", None)
    rounds = max(min(steps, 5), -(-steps // work.calls))
    *partial, whole = alternate([*parts.values(), work], rounds)
    times = Times.of(whole)
    names = ("prepare", "augment", "teacher_forward", "student_forward_backward", "update")
    if work.most > 1:
        return times, dict.fromkeys(names)
    medians = {name: Times.of(seconds).median for name, seconds in zip(parts, partial, strict=True)}
    earlier = medians.pop("prepare", 0.0)
    split: dict[str, float | None] = dict.fromkeys(names, 0.0)
    split["prepare"] = earlier
    medians = {name: earlier + seconds for name, seconds in medians.items()} | {"update": times.median}
    for name, seconds in medians.items():
        split[name], earlier = max(0.0, seconds - earlier), max(earlier, seconds)
    return times, split


def _peaks(ctx: Context) -> dict[str, Any]:
    """Of one device."""
    device = ctx.mesh.devices.flat[0]
    chip = chips.of_kind(device.device_kind)
    return {
        "datasheet_flops_per_s": None if chip is None else chip.peak(ctx.run.compute_dtype),
        "datasheet_bytes_per_s": None if chip is None else chip.memory_bandwidth,
        "probed_flops_per_s": _probed(lambda: probe.flops_per_s(device, ctx.run.compute_dtype)),
        "probed_bytes_per_s": _probed(lambda: probe.bytes_per_s(device)),
    }


def _probed(probe: Callable[[], float]) -> float | None:
    """None where the run has left it no room."""
    try:
        return probe()
    except Exception as error:
        if not devices.out_of_memory(error):
            raise
        return None


def _quotient(amount: float, count: int, rate: float | None) -> float | None:
    return None if rate is None else amount / (count * rate)


def _utilisation(operations: float, seconds: float, count: int, peaks: dict[str, Any]) -> dict[str, float | None]:
    return {
        which: None if (peak := peaks[f"{which}_flops_per_s"]) is None else operations / (seconds * count * peak)
        for which in ("datasheet", "probed")
    }


def _xla(work: Workload) -> float | None:
    cost = work.compiled.program.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return float(cost["flops"]) if cost and "flops" in cost else None


def _memory(work: Workload) -> dict[str, int]:
    """Bytes of one device, as the compiler says of the program of a call."""
    found = work.compiled.program.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def _peak(work: Workload) -> dict[str, Any]:
    """Bytes that were in use at most since the process began."""
    stats = work.ctx.mesh.devices.flat[0].memory_stats() or {}
    here = "peak_bytes_in_use" in stats
    return {
        "peak": stats["peak_bytes_in_use"] if here else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_of": "device" if here else "process",
    }


def _bytes(work: Workload) -> int:
    """What one step moves at least if no array stays in a cache: each argument and output once, a temporary twice."""
    program = work.compiled.program
    if work.most > 1:  # the program of a call has several batches, and reads the state for each of them
        program = compiler.jit(make_step(work.ctx), work.ctx.mesh).lower(*step_shapes(work.ctx)).compile()
    found = program.memory_analysis()
    return found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes + 2 * found.temp_size_in_bytes


def _logits(work: Workload) -> list[dict[str, Any]]:
    """The largest buffers of one row of classes (or of the vocabulary) for each of the batch's examples (or tokens)."""
    ctx = work.ctx
    if ctx.classes is None:
        return []
    rows = ctx.run.batch_size // (ctx.batch_shards * ctx.run.microbatches)
    time = ctx.raw_batch["tokens"].shape[-1] if "tokens" in ctx.raw_batch else 1

    def holds(shape: Sequence[int]) -> bool:
        before = [size for size in shape[:-1] if size > 1]
        # the last token of a text has no next one
        wanted = [[rows]] + [each for length in (time - 1, time) if length > 1 for each in ([rows, length], [rows * length])]
        return shape[-1:] == (ctx.classes,) and before in wanted

    every = hlo.distinct(hlo.buffers(work.compiled.program.as_text()))
    found = [buffer for buffer in every if buffer.op != "parameter" and holds(buffer.array.shape)]
    return [
        {"name": (buffer.of or buffer.op).replace("\\", ""), "array": str(buffer.array), "bytes": buffer.bytes}
        for buffer in found[:5]
    ]


def _cache_seconds(work: Workload) -> float | None:
    """Bytes of cached answers in a batch over the rate at which this host reads them with nothing else to do; None without a cache."""
    run = work.ctx.run
    if work.made_up or getattr(run.data, "answers", None) is None or run.data is None:
        return None
    rows: Any = run.data.batches(run.batch_size, seed=run.seed, process=(jax.process_index(), jax.process_count()))
    # Threads have batches ready: of what is timed, these must be few, and not at the start alone.
    ready = (getattr(run.data, "threads", None) or min(16, os.cpu_count() or 1)) + 1
    try:
        for _ in range(2 * ready):
            next(rows)
        start = time.perf_counter()
        for _ in range(4 * ready):
            next(rows)
        return (time.perf_counter() - start) / (4 * ready)
    finally:
        rows.close()
