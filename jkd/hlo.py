"""Reads a compiled program's text (`compiled.as_text()`): what devices tell each other, and what lies in their memory.

The text is of one device's program after partitioning and scheduling: shapes are of what this device holds. What stands in a loop's
body counts as often as the loop runs, so a layer under `jax.lax.scan` counts as many times as there are layers; of a condition's
branches, of which one runs, the dearest counts.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type: ``f32[8,128]``. ``space`` 0 is the device's main memory; a TPU has others, closer to its units."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or ["0"])[0])
        return -(-math.prod(self.shape) * bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Args:
        kind: one of `KINDS`.
        bytes: of the whole array: what an all-gather gives, what a reduce-scatter or an all-reduce takes.
        count: how often a step runs it.
        of: the operation's name in JAX, scopes included (``jit(step)/jvp(student)/dot_general``).
        devices: how many of them take part in each group.
        arrays: what it takes, on one device.
    """

    kind: str
    bytes: int
    count: int
    of: str
    devices: int
    arrays: tuple[Array, ...]

    @property
    def total(self) -> int:
        """Bytes in a step."""
        return self.bytes * self.count

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, where the algorithm is the usual one on a ring."""
        others = (self.devices - 1) / self.devices
        rounds = {"all-reduce": 2 * others, "all-gather": others, "reduce-scatter": others, "all-to-all": others}
        return self.total * rounds.get(self.kind, 1.0)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array that an operation writes to memory, or an argument of the program."""

    array: Array
    op: str
    of: str

    @property
    def bytes(self) -> int:
        return self.array.bytes


def collectives(text: str) -> list[Collective]:
    """Every collective of a program, in the order of the text. Loops whose number of turns only the data know count once."""
    program = _parse(text)
    callers = {called: one for body in program.computations.values() for one in body for _, called in one.computations()}
    found, chains = [], set[tuple[str, str]]()

    def told(name: str) -> float:
        there = [one for one in program.computations[name] if one.op.removesuffix("-start") in KINDS]
        return sum(array.bytes for one in there for array in one.arrays)

    for name, times in _times(program, cost=told).items():
        results = {each.name: each.arrays for each in program.computations[name]}
        for one in program.computations[name]:
            kind = one.op.removesuffix("-start")
            if kind not in KINDS:
                continue
            if chain := re.search(r'channel_id=(\d+).*chain_id="(\d+)"', one.rest):
                # a TPU moves pieces of one collective in several fusions, each of which shows it whole
                if chain.groups() in chains:
                    continue
                chains.add((chain[1], chain[2]))
            arrays = tuple(array for operand in one.operands for array in results.get(operand, ()))
            devices = _group(one.rest, program.partitions)
            size = sum(array.bytes for array in arrays) * (devices if kind == "all-gather" else 1)
            if "all-reduce-scatter" in name and kind == "all-reduce":
                kind = "reduce-scatter"  # one fusion on a TPU: each device keeps its part of the sum
            of = one.of or (callers[name].of if name in callers else "")
            found.append(Collective(kind, size, times, of, devices, arrays))
    return found


def buffers(text: str, *, smallest: int = 1) -> list[Buffer]:
    """What a program holds in main memory at one time or another, the largest first; an operation that is fused holds nothing.

    Args:
        smallest: buffers of fewer bytes are left out.
    """
    program = _parse(text)
    found = []
    for name in _times(program, fused=False):
        known = {one.name: one for one in program.computations[name]}
        for one in known.values():
            if one.op in _NAMES_ONLY or one.op.endswith("-done") or (one.op == "parameter" and name != program.entry):
                continue
            made = _made(one, _operands(one, known))
            found += [Buffer(array, one.op, one.of) for array in made if array.space == 0 and array.bytes >= smallest]
    return sorted(found, key=lambda buffer: -buffer.bytes)


def distinct(found: Iterable[Buffer]) -> list[Buffer]:
    """One of each type and name, in their order."""
    return list({(buffer.array, buffer.of): buffer for buffer in found}.values())


def holding(text: str, sizes: Sequence[int]) -> list[Buffer]:
    """Buffers that have an axis of each of these sizes (``holding(text, [tokens, vocabulary])``), the largest first.

    Sizes are one device's: a batch of 512 over 8 devices is 64.
    """
    wanted = collections.Counter(sizes)
    return [buffer for buffer in buffers(text) if wanted <= collections.Counter(buffer.array.shape)]


def traffic(text: str) -> int:
    """Bytes that a device reads from main memory and writes to it in one run of a program, as its operations are fused.

    Of an array that a scan cuts a layer from, or puts one into, the layer counts.
    """
    program = _parse(text)

    @functools.cache
    def moved(name: str) -> int:
        known = {one.name: one for one in program.computations[name]}
        return sum(_moved(program, one, known) for one in known.values() if one.works)

    return sum(times * moved(name) for name, times in _times(program, fused=False, cost=moved).items())


def kept(text: str) -> int:
    """Bytes that the forward pass leaves in main memory for the backward pass, by the operations' names: an estimate.

    An array counts that JAX made under ``jvp`` and that an operation under ``transpose`` reads.
    """
    program = _parse(text)
    total = 0
    for name in _times(program, fused=False):
        known = program.computations[name]
        users = collections.defaultdict(list)
        for one in known:
            for operand in one.operands:
                users[operand].append(one)

        def backward(name: str, users: dict[str, list[_Instruction]] = users) -> bool:
            found = users.get(name, ())
            return any("transpose(" in one.of or (one.op in ("tuple", "bitcast") and backward(one.name)) for one in found)

        made = [one for one in known if "jvp(" in one.of and "transpose(" not in one.of]
        loops = {one.name for one in known if one.op == "while"}
        made = [one for one in made if one.works or (one.op == "get-tuple-element" and loops & set(one.operands))]
        total += sum(array.bytes for one in made if backward(one.name) for array in one.arrays if array.space == 0)
    return total


def _moved(program: _Program, one: _Instruction, known: dict[str, _Instruction]) -> int:
    """Bytes that one operation reads and writes."""

    def size(arrays: Sequence[Array]) -> int:
        return sum(array.bytes for array in arrays if array.space == 0)

    operands = _operands(one, known)
    if one.op in _CUTS:
        return 2 * size(one.arrays)
    if one.op == "dynamic-update-slice":
        return 2 * size(operands[1])
    if one.op != "fusion":
        return size(_made(one, operands)) + sum(map(size, operands))
    body = next((program.computations.get(called, []) for _, called in one.computations()), [])
    within = {each.name: each for each in body}
    written = size(one.arrays)
    for each in body:
        if each.op == "dynamic-update-slice" and (whole := within.get(each.operands[0])) and whole.op == "parameter":
            place = int(whole.operands[0])
            written -= size(operands[place]) - 2 * size(within[each.operands[1]].arrays)
            operands[place] = ()
    for each in body:
        readers = [reader for reader in body if each.name in reader.operands]
        if each.op == "parameter" and readers and all(r.op in _CUTS and r.operands[0] == each.name for r in readers):
            place = int(each.operands[0])
            operands[place] = tuple(array for reader in readers for array in reader.arrays) if operands[place] else ()
    return max(written, 0) + sum(map(size, operands))


def _operands(one: _Instruction, known: dict[str, _Instruction]) -> list[tuple[Array, ...]]:
    """The arrays of each operand, which stands in the same computation."""
    return [known[name].arrays if name in known else () for name in one.operands]


def _made(one: _Instruction, operands: Sequence[tuple[Array, ...]]) -> tuple[Array, ...]:
    """The arrays that an operation writes: one that only starts something names what it reads among its results too."""
    if one.op == "copy-start":  # (copy, source, …)
        return one.arrays[:1]
    reads = tuple(array for arrays in operands for array in arrays)
    # (operands, results, …); an all-reduce-start has results alone, of the same types
    again = one.op.endswith("-start") and len(one.arrays) > len(reads) and one.arrays[: len(reads)] == reads
    return one.arrays[len(reads) :] if again else one.arrays


_CUTS = {"dynamic-slice", "slice", "gather"}
# These name memory that another operation wrote.
_NAMES_ONLY = {"tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "optimization-barrier", "after-all"}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    arrays: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    rest: str

    @property
    def of(self) -> str:
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def works(self) -> bool:
        """Whether it reads or writes memory by itself."""
        return self.op not in _NAMES_ONLY and self.op not in ("parameter", "constant") and not self.op.endswith("-done")

    def computations(self) -> Iterator[tuple[str, str]]:
        """``(attribute, computation)`` of all that this instruction calls; a reduction's function apart, which moves nothing."""
        if self.op not in ("while", "conditional", "call", "fusion", "custom-call") and not self.op.endswith("-start"):
            return
        names = r"(body|condition|calls|to_apply|branch_computations|true_computation|false_computation|called_computations)"
        for attribute, several, single in re.findall(rf"\b{names}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.rest):
            if attribute == "to_apply" and self.op != "call":
                continue
            for name in (several or single).split(","):
                yield attribute, name.strip().lstrip("%")


@dataclasses.dataclass(frozen=True)
class _Program:
    computations: dict[str, list[_Instruction]]
    entry: str
    partitions: int


@functools.lru_cache(maxsize=2)
def _parse(text: str) -> _Program:
    computations: dict[str, list[_Instruction]] = {}
    entry, body = "", list[_Instruction]()
    for line in text.splitlines():
        if line[:1] == " ":
            if (one := _instruction(line)) is not None:
                body.append(one)
        elif line.endswith("{") and (found := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            body = computations.setdefault(found[2], [])
            entry = found[2] if found[1] else entry
    head = text.partition("\n")[0]
    counts = [int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)]
    return _Program(computations, entry, max(counts, default=1))


def _instruction(line: str) -> _Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    end = _closing(line, found.end()) if line[found.end()] == "(" else line.find(" ", found.end())
    op = re.match(r" ?([\w\-]+)(?=\()", line[end:])
    if not op:
        return None
    opened = end + op.end()
    closed = _closing(line, opened)
    operands = re.findall(r"%?([\w.\-]+)(?=[,)])", line[opened:closed])
    return _Instruction(found[1], _arrays(line[found.end() : end]), op[1], tuple(operands), line[closed:])


def _closing(line: str, opened: int) -> int:
    """The place after the parenthesis that closes the one at ``opened``."""
    depth = 0
    for found in re.finditer(r"[()]", line[opened:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return opened + found.end()
    return len(line)


def _arrays(written: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?", written):
        space = re.search(r"S\((\d+)\)", layout)
        found.append(Array(dtype, tuple(int(n) for n in re.findall(r"\d+", dims)), int(space[1]) if space else 0))
    return tuple(found)


def _times(program: _Program, *, fused: bool = True, cost: Callable[[str], float] | None = None) -> dict[str, int]:
    """How often a run of the program enters each computation; those of fusions on demand.

    ``cost`` is of one computation by itself: of a condition's branches only the dearest is then entered.
    """
    times: collections.Counter[str] = collections.Counter()

    def entered(one: _Instruction) -> list[tuple[str, int]]:
        if one.op == "fusion" and not fused:
            return []
        found = [(called, where) for where, called in one.computations() if called in program.computations]
        if one.op == "conditional" and cost is not None:
            return [(max((called for called, _ in found), key=dear), 1)] if found else []
        return [(called, _turns(program, one) if where == "body" else 1) for called, where in found]

    @functools.cache
    def dear(name: str) -> float:
        inner = [each for one in program.computations[name] for each in entered(one)]
        return cost(name) + sum(turns * dear(called) for called, turns in inner) if cost is not None else 0

    def enter(name: str, count: int) -> None:
        times[name] += count
        for one in program.computations.get(name, ()):
            for called, turns in entered(one):
                enter(called, count * turns)

    enter(program.entry, 1)
    return dict(times)


def _turns(program: _Program, loop: _Instruction) -> int:
    """How often a while loop runs: as XLA says, else the one number that its counter is compared with; 1 where neither is known."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(found[1])
    condition = dict(loop.computations()).get("condition", "")
    limits = [
        int(one.operands[0])
        for one in program.computations.get(condition, ())
        if one.op == "constant" and one.operands and one.operands[0].isdigit()
    ]
    return limits[0] if len(limits) == 1 else 1


def _group(rest: str, partitions: int) -> int:
    """Devices in a replica group, in any of the ways it is written; all of them where it is left empty."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", found[2]))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(found[2])
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(found[1].split(","))
    return partitions
