"""A `jkd.plan.Plan` as text: what a person reads before paying for the devices."""

from __future__ import annotations

from collections.abc import Sequence

from jkd import describe
from jkd.plan import Plan


def text(name: str, plan: Plan, *, price: float | None = None) -> str:
    """The whole report.

    Args:
        name: of the run.
        plan: what was found out.
        price: of one chip for an hour, in any currency.
    """
    parts = [_head(name, plan), _memory(plan), _work(plan), _collectives(plan), _time(plan), _whole(plan, price)]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def _head(name: str, plan: Plan) -> list[str]:
    ctx, chips = plan.ctx, len(plan.topology.devices)
    axes = ", ".join(f"{axis} {size}" for axis, size in ctx.mesh.shape.items())
    what = plan.topology.chip.name if plan.topology.chip else "cpu"
    kind = f"; {plan.topology.note}" if plan.topology.note else ""
    lines = [
        f"{name} on {plan.topology.name}: {chips} {what} chips, mesh {axes}{kind}",
        f"{type(ctx.recipe).__name__}, batch {ctx.run.batch_size}, {ctx.run.microbatches} microbatch(es), {ctx.run.compute_dtype}; "
        f"compiled in {plan.compile_s:.1f} s",
    ]
    if ctx.prepares:
        lines.append("the recipe's `prepare` (rollouts, …) is a program of its own, not counted here")
    if _rare(plan):
        lines.append(f"updates run every {_rare(plan)} steps; here all of them run")
    return lines


def _memory(plan: Plan) -> list[str]:
    total, chip = sum(plan.bytes_per_chip.values()), plan.topology.chip
    guess = () if plan.topology.exact else ("activations", "temporaries", "program")
    rows = [(f"{what}{' (estimate)' if what in guess else ''}", _bytes(size)) for what, size in plan.bytes_per_chip.items()]
    lines = ["memory of one chip", *_columns([*rows, ("all", _bytes(total))])]
    if chip is not None:
        word = "FITS" if plan.fits else "DOES NOT FIT"
        lines.append(f"{word}: {_bytes(total)} of {_bytes(chip.memory)} ({total / chip.memory:.1%})")
        if plan.fits and chip.platform == "gpu" and total > 0.75 * chip.memory:
            lines.append("JAX takes 75 % of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise")
    if plan.refusal:
        lines += ["the compiler says:", *(f"  {line}" for line in plan.refusal.splitlines()[:40] if line.strip())]
    if plan.largest:
        lines.append(_guess(plan, "largest buffers"))
    for buffer in plan.largest:
        shape, of = str(buffer.array), buffer.of.replace("\\'", "'") or buffer.op
        lines.append(f"  {shape:<28} {_bytes(buffer.bytes):>10}  {of}")
    return lines


def _work(plan: Plan) -> list[str]:
    work, chips = plan.work, len(plan.topology.devices)
    rows = [("teacher", work.teacher), ("student, forward", work.student_forward), ("student, backward", work.student_backward)]
    rows += [("other", work.other)] if work.other else []
    rows += [("computed again", again)] if (again := plan.executed - work.total) > 0.005 * work.total else []
    table = [(what, f"{flops:.3e}", f"{flops / chips:.3e}") for what, flops in [*rows, ("all", sum(f for _, f in rows))]]
    return ["floating-point operations of a step", *_columns([("", "all chips", "one chip"), *table])]


def _collectives(plan: Plan) -> list[str]:
    if not plan.traffic:
        return ["collectives of a step: " + ("not known" if plan.traffic is None else "none")]
    rows = [(t.kind, f"of {t.of}", f"{t.count}", _bytes(t.bytes), _bytes(t.sent)) for t in plan.traffic]
    theirs = sum(t.bytes for t in plan.traffic if t.of == "teacher")
    last = f"the teacher's: {_bytes(theirs)}" if theirs else "the teacher has none"
    head = ("kind", "", "count", "bytes", "sent by a chip")
    return [_guess(plan, "collectives of a step"), *_columns([head, *rows]), *([last] if plan.ctx.teacher is not None else [])]


def _time(plan: Plan) -> list[str]:
    if plan.seconds is None or plan.topology.chip is None:
        return ["time of a step: not predicted " + ("(the program does not fit)" if plan.refusal else "(no chip of the table)")]
    chip = plan.topology.chip
    rates = {
        "compute": f"{chip.peak(plan.ctx.run.compute_dtype) / 1e12:,.0f} TFLOP/s",
        "memory": f"{chip.memory_bandwidth / 1e9:,.0f} GB/s",
        "interconnect": f"{chip.link_bandwidth / 1e9:,.0f} GB/s ({chip.link})",
    }
    rows = [(what, _seconds(seconds), f"at {rates[what]}") for what, seconds in plan.seconds.items()]
    claim = "it takes no less" if plan.topology.exact else "memory traffic and collectives are an estimate"
    return [
        f"time of a step, at the chip's peaks and with perfect overlap: {claim}",
        *(f"  {what:<13} {seconds:>10}  {rate}" for what, seconds, rate in rows),
        f"predicted: {_seconds(plan.step_s or 0)}, bound by {plan.bound_by}",
        f"constants: {chip.source}",
    ]


def _whole(plan: Plan, price: float | None) -> list[str]:
    run = plan.ctx.run
    examples = run.steps * run.batch_size
    seen = f"{examples:,} examples"
    if "tokens" in plan.ctx.batch:
        seen += f", {examples * plan.ctx.batch['tokens'].shape[-1]:,} tokens"
    lines = [f"the whole run: {run.steps:,} steps, {seen}"]
    if plan.step_s is not None:
        hours = run.steps * plan.step_s / 3600
        spent = hours * len(plan.topology.devices)
        cost = f", {price * spent:,.2f} at {price:g} for a chip and an hour" if price is not None else ""
        least = "at least" if plan.topology.exact and not _rare(plan) else "about"
        lines.append(f"{least} {hours:.4g} hours, {spent:.4g} chip-hours{cost}; evaluation, compilation and data come on top")
    return lines


def _guess(plan: Plan, heading: str) -> str:
    return heading if plan.topology.exact else f"{heading} (estimate)"


def _rare(plan: Plan) -> str:
    """The periods of the updates, where not all run at every step."""
    every = [update.every for update in plan.ctx.updates]
    return ", ".join(map(str, every)) if max(every) > 1 else ""


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    return describe.columns(rows, right=range(1, len(rows[0])))


def _bytes(size: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size:,.0f} B"


def _seconds(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:,.2f} {unit}"
    return f"{seconds * 1e6:,.2f} µs"
