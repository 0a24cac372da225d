"""Which schedule, and how large its blocks: a cost model of a few lines, overridden by ``schedule=``.

A block holds a sixteenth of the logits, so all of its buffers together are a small part of one array of whole logits, or as many as
the head's gradient takes room, which is there anyway; within that, blocks are as large as a matrix product needs to run at full
speed. The cost of a schedule is

    multiply-adds + balance * bytes that sums over blocks move (read and written, and so is what is added),

balance being how many multiply-adds the device does while it moves a byte. With N tokens, V columns, dims s and t (of student and
teacher), U = N V s, W = N V t, and n blocks:

- tokens, weights known: ``3 U + W``; else logits are computed again for the backward pass: ``4 U + 2 W``. The sums are those of the
  head's gradient: ``n * 16 V s`` bytes.
- vocabulary: ``(2 + sweeps) U + sweeps * W``, sweeps 2 where one tells all values (`ForwardKL`, `ReverseKL`, `CrossEntropy`), else 3.
  The sums are those of the hidden states' gradient: ``n * 16 N s`` bytes.

So tokens are walked, unless there are few of them for the size of the head. An `Each` can only be walked by tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jkd.losses.chunked.parts import Each
from jkd.losses.chunked.sweeps import Problem
from jkd.losses.chunked.tokens import Tokens
from jkd.losses.chunked.vocabulary import Vocabulary

Schedule = Tokens | Vocabulary

BLOCKS = 16
"""Blocks that the logits are cut into where nothing speaks for more or fewer."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the model knows of a device.

    Args:
        balance: multiply-adds in the time of a byte.
        fewest, most: tokens of a block: a product of fewer waits for memory, one of more is no faster.
        tile: logits that arithmetic takes at a time, so that what it leaves between two operations stays in a cache; None where the
            compiler fuses operations.
    """

    balance: float
    fewest: int
    most: int
    tile: int | None


MACHINES = {"cpu": Machine(16.0, 64, 256, 1 << 19)}
"""By platform."""
ACCELERATOR = Machine(64.0, 128, 1024, None)


def machine(mesh: Any) -> Machine:
    """Of the devices of a mesh, or of the default ones."""
    device = getattr(mesh, "abstract_device", None)
    return MACHINES.get(getattr(device, "platform", None) or jax.default_backend(), ACCELERATOR)


def choose(problem: Problem, *, weighted: bool) -> Schedule:
    """The cheaper schedule.

    Args:
        problem: what is to be computed.
        weighted: whether the tokens' weights are known.
    """
    device = machine(problem.mesh)
    tokens, columns = problem.tokens // problem.shards, problem.student.kernel.shape[-1] // problem.lanes
    anyway = problem.student.hidden.shape[1] // len(problem.sides)
    rows = min(max(-(-tokens // BLOCKS), min(max(device.fewest, anyway), -(-tokens // 2))), device.most)
    by_tokens = Tokens(rows, None if device.tile is None else max(1, device.tile // (rows * problem.shards)))
    if any(isinstance(part, Each) for part in problem.parts):
        return by_tokens
    width = max(1, -(-columns // BLOCKS))
    student, teacher = (tokens * columns * side.hidden.shape[1] for side in (*problem.sides, problem.student)[:2])
    teacher = 0 if problem.teacher is None else teacher
    sweeps = 2 if problem.single else 3
    moved = 16 * problem.student.hidden.shape[1]
    costs: dict[Schedule, float] = {
        by_tokens: (3 * student + teacher if weighted else 4 * student + 2 * teacher)
        + device.balance * -(-tokens // rows) * moved * columns,
        Vocabulary(width * problem.lanes): (2 + sweeps) * student
        + sweeps * teacher
        + device.balance * -(-columns // width) * moved * tokens,
    }
    return min(costs, key=lambda schedule: costs[schedule])
