"""What a run's train step would need and take on devices that are not here, from the program compiled for them.

The program is the run's own, lowered with shapes and compiled ahead of time; no weight is made. Memory, collectives and their bytes
are read from it. The predicted time is a roofline's: the slowest of arithmetic at the chip's peak, of memory traffic and of the
interconnect, as if they overlapped perfectly, so a step takes no less where the program is the device's own. For GPUs it is not:
their compiler chooses kernels by trying them, and where it cannot do without, the CPU's program stands in (`Topology.note`); what is
read from either is an estimate.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Sequence
from typing import Any

from jkd import describe, flops, hlo, teachers
from jkd.config import Experiment, Run
from jkd.context import Context
from jkd.errors import InputError, nearest
from jkd.resolve import build
from jkd.state import step_shapes
from jkd.step import make_step
from jkd.topology import Topology, by_cpu

LARGEST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind and one owner, of one step.

    Args:
        kind: one of `jkd.hlo.KINDS`.
        bytes: of the whole arrays, all of them together.
        count: how many of them run.
        of: the parameter group whose network they belong to, or ``step``.
        sent: bytes that each device sends.
    """

    kind: str
    bytes: int
    count: int
    of: str
    sent: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What was found out; None where it is not known.

    Args:
        topology: what was compiled for.
        ctx: the run.
        fits: whether one chip's memory holds it all.
        bytes_per_chip: ``{part: bytes}``; their sum is what a chip must hold.
        largest: the largest buffers of the program.
        work: operations of one step, in which every update runs, by whose they are.
        executed: operations of that step, recomputed ones too.
        traffic: collectives by kind and owner.
        seconds: the three times of the roofline: ``compute``, ``memory``, ``interconnect``.
        compile_s: seconds that the compiler took.
        refusal: what the compiler said where the program does not fit.
        program: the compiled program's text (`jkd.hlo` reads it); empty where it does not fit.
    """

    topology: Topology
    ctx: Context
    fits: bool | None
    bytes_per_chip: dict[str, int]
    largest: list[hlo.Buffer]
    work: flops.Work
    executed: float
    traffic: list[Traffic] | None
    seconds: dict[str, float] | None
    compile_s: float
    refusal: str = ""
    program: str = dataclasses.field(default="", repr=False)

    @property
    def bound_by(self) -> str | None:
        return max(self.seconds, key=lambda what: self.seconds[what]) if self.seconds else None  # type: ignore[index]

    @property
    def step_s(self) -> float | None:
        return max(self.seconds.values()) if self.seconds else None

    def as_json(self) -> dict[str, Any]:
        """What ``--json`` writes."""
        return {
            "chips": len(self.topology.devices),
            "mesh": dict(self.ctx.mesh.shape),
            "fits": self.fits,
            "bytes_per_chip": self.bytes_per_chip,
            "flops_per_step": {"teacher": self.work.teacher, "student": self.work.student},
            "collectives": None if self.traffic is None else [_row(each) for each in self.traffic],
            "predicted_step_s": self.step_s,
            "bound_by": self.bound_by,
            "compile_s": self.compile_s,
        }


def plan(run: Run, topology: Topology) -> Plan:
    """Compiles a run's train step for a topology and reads what it needs.

    Args:
        run: its teacher may lack weights, and is a name no more (`pick`).
        topology: `jkd.topology.of`.

    Raises:
        InputError: what `jkd.make_context` refuses, or a mesh that the devices do not make.
    """
    ctx = describe.context(run, topology.devices)
    step, shapes = make_step(ctx), step_shapes(ctx)
    started = time.perf_counter()
    refusal, compiled = "", None
    try:
        compiled = step.lower(*shapes).compile(topology.options or None)  # type: ignore[attr-defined]  # a jitted function
    except Exception as error:
        if topology.instead:
            return plan(run, by_cpu(topology, str(error).partition("\n")[0][:100]))
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error)
    compile_s = time.perf_counter() - started
    text = compiled.as_text() if compiled is not None else ""
    parts = _bytes(ctx, compiled, text, refusal)
    chip, chips = topology.chip, len(topology.devices)
    found = _traffic(ctx, hlo.collectives(text)) if compiled is not None else None
    executed = flops.of_program(step, *shapes)
    seconds = None
    if chip is not None and found is not None:
        seconds = {
            "compute": executed / chips / chip.peak(run.compute_dtype),
            "memory": hlo.traffic(text) / chip.memory_bandwidth,
            "interconnect": sum(each.sent for each in found) / chip.link_bandwidth,
        }
    fits = None if chip is None else compiled is not None and sum(parts.values()) <= chip.memory
    return Plan(
        topology=topology,
        ctx=ctx,
        fits=fits,
        bytes_per_chip=parts,
        largest=hlo.distinct(hlo.buffers(text))[:LARGEST] if text else [],
        work=flops.of_step(ctx, mean=False),
        executed=executed,
        traffic=found,
        seconds=seconds,
        compile_s=round(compile_s, 3),
        refusal=refusal,
        program=text,
    )


def pick(experiment: Experiment, name: str | None = None) -> tuple[str, Run]:
    """A run of an experiment with networks for the names of its teachers, none of which has weights.

    Args:
        experiment: what a config gives.
        name: of the run; by default ``student``, else the last one that has a teacher, else the last.

    Raises:
        InputError: no such run, or a teacher whose shapes are known only when a function has run.
    """
    runs = {name: node for name, node in experiment.nodes.items() if isinstance(node, Run)}
    if not runs:
        raise InputError("the experiment has no run to plan: its nodes are functions")
    if name is None:
        taught = [each for each, run in runs.items() if run.teacher is not None]
        name = "student" if "student" in runs else (taught or list(runs))[-1]
    if name not in runs:
        raise InputError(f"--run {name}: no such run{nearest(name, runs)}")
    run = runs[name]
    students = {each: build(one.student) for each, one in runs.items()} if run.teacher is not None else {}
    resolved = teachers.unweighted(run, students)
    if resolved is None:
        raise InputError(f"{name}: its teacher is what the node {run.teacher!r} gives; shapes are known when that has run")
    return name, resolved


def _row(traffic: Traffic) -> dict[str, Any]:
    return {name: getattr(traffic, name) for name in ("kind", "bytes", "count", "of")}


def _bytes(ctx: Context, compiled: Any, text: str, refusal: str) -> dict[str, int]:
    """What lies in one chip's memory, by what it is; of the program only what the compiler tells."""
    owners = {"params": "parameters", "optimizer": "optimizer", "ema": "average", "memory": "memory", "batch": "batch"}
    parts = dict.fromkeys(("parameters", "optimizer", "teacher"), 0)
    for part in describe.memory(ctx):
        frozen = part.name.endswith("(frozen)")
        owner = "teacher" if frozen else owners.get(part.name.partition(" ")[0], "parameters")
        parts[owner] = parts.get(owner, 0) + part.per_device
    if compiled is None:
        return parts | {"temporaries": refused(refusal, sum(parts.values()))}
    stats = compiled.memory_analysis()
    arguments = stats.argument_size_in_bytes
    parts["padding"] = max(0, arguments - sum(parts.values()))  # of tiles, where the platform has them
    activations = min(hlo.kept(text), stats.temp_size_in_bytes)
    out = max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes)
    parts["activations"] = activations
    parts["temporaries"] = stats.temp_size_in_bytes - activations + out
    parts["program"] = stats.generated_code_size_in_bytes
    return parts


def refused(message: str, known: int) -> int:
    """Bytes of temporaries that a program wanted, as a compiler says that it found no room for it; 0 where it does not say.

    Args:
        message: the compiler's.
        known: bytes of everything else.
    """
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    if found := re.search(r"temporaries \(([\d.]+)([KMGT]?)\)", message):
        return int(float(found[1]) * scale[found[2]])
    if found := re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of", message):
        return max(0, int(float(found[1]) * scale[found[2]]) - known)
    return 0


def _traffic(ctx: Context, found: Sequence[hlo.Collective]) -> list[Traffic]:
    groups = dict.fromkeys((*ctx.networks, *ctx.groups))
    sums: dict[tuple[str, str], Traffic] = {}
    for one in found:
        if one.devices == 1:
            continue
        scopes = re.split(r"[/()]", one.of)
        of = next((group for group in groups if group in scopes), "step")
        before = sums.get((one.kind, of), Traffic(kind=one.kind, bytes=0, count=0, of=of, sent=0.0))
        sums[one.kind, of] = dataclasses.replace(
            before, bytes=before.bytes + one.total, count=before.count + one.count, sent=before.sent + one.sent
        )
    return sorted(sums.values(), key=lambda each: -each.bytes)
