"""A run as something that steps: compiled with the times that took, its state made, batches at hand."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import calls, compiler, flops, sharding
from jkd.bench.compiling import listening
from jkd.bench.pairs import Times, alternate
from jkd.config import Run
from jkd.context import Context
from jkd.data.batch import check_batch
from jkd.describe import context as context_of
from jkd.errors import InputError
from jkd.feed import Feed
from jkd.networks import models_of, seen, step_key
from jkd.prepare import make_prepare
from jkd.state import Frozen, State, frozen_sides, init_state, step_shapes
from jkd.step import cut, make_gradients
from jkd.types import Batch, Model, Tree

BATCHES = 2
"""Different batches that take turns while steps are timed."""
PREPARED = 8
"""Steps at least whose mean is one time, where a recipe prepares batches."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The step's program, and what it took to make it.

    Args:
        call: the jitted function.
        program: compiled, with its analyses and text.
        trace: seconds from Python to a jaxpr.
        lower: from there to StableHLO.
        compile: from there to a program, or until it was found in the persistent cache.
        hit: whether it was found there.
    """

    call: Callable[..., Any]
    program: Any
    trace: float
    lower: float
    compile: float
    hit: bool


def compile_step(ctx: Context) -> Compiled:
    """The program that training would call, compiled ahead of time; calling it finds this."""
    most = ctx.run.steps_per_call
    start = time.perf_counter()
    call = calls.make_program(ctx)
    state, frozen, batch = step_shapes(ctx)
    arguments: tuple[Any, ...] = (state, frozen, batch)
    if most > 1:
        place = NamedSharding(ctx.mesh, P(None, *sharding.BATCH))
        stack = jax.tree.map(lambda one: jax.ShapeDtypeStruct((most, *one.shape), one.dtype, sharding=place), batch)
        arguments = (state, frozen, stack, jax.ShapeDtypeStruct((), jnp.int32))
    traced = call.trace(*arguments)
    after_trace = time.perf_counter()
    lowered = traced.lower()
    after_lower = time.perf_counter()
    with listening() as heard:
        program = lowered.compile()
    compiled = time.perf_counter() - after_lower
    return Compiled(call, program, after_trace - start, after_lower - after_trace, compiled, heard.hits > 0)


class Workload:
    """A run that can be stepped and timed.

    A teacher that an earlier run would train, and every network that holds no weights yet, gets random ones: what a step costs
    does not depend on them. Batches are the run's own where its data (and cache) is on this machine, else made up in their shapes.

    Args:
        name: of the run.
        run: with its teacher resolved (`jkd.teachers.unweighted`).
    """

    def __init__(self, name: str, run: Run):
        if run.data is None:
            raise InputError(f"{name}: Run.data = None, so there is nothing to time")
        with listening() as self.heard:
            self.name, self.ctx = name, with_weights(context_of(run))
            self.compiled = compile_step(self.ctx)
            self.state, self.frozen = init_state(self.ctx, jax.random.key(run.seed))
        self.most = run.steps_per_call
        prepare = make_prepare(self.ctx)
        self.prepare = None if prepare is None else prepare[0]
        period = math.lcm(*(update.every for update in self.ctx.updates))
        self.calls = period // math.gcd(period, self.most)
        if self.prepare is not None:  # which may do its work at some steps only, by chance
            self.calls *= -(-PREPARED // self.calls)
        self._batches, self.made_up = self._read()
        self._turn = 0

    @property
    def raw_batch(self) -> Batch:
        """One batch as the data gives it."""
        return self._batches[0] if self.most == 1 else calls.last(self.ctx.run, self._batches[0], 1)

    @property
    def batch(self) -> Batch:
        """One batch as the step sees it."""
        return self._prepared(self.raw_batch)

    def _prepared(self, batch: Batch) -> Batch:
        return batch if self.prepare is None else self.prepare(self.state, self.frozen, batch, jnp.int32(self._turn))

    @property
    def program_name(self) -> str:
        """What JAX calls the program of a call."""
        return "step" if self.most == 1 else "steps"

    def _read(self) -> tuple[list[Batch], str]:
        """Batches, and why they are made up, if they are."""
        run, mesh = self.ctx.run, self.ctx.mesh
        try:
            assert run.data is not None
            rows: Any = run.data.batches(run.batch_size, seed=run.seed, process=(jax.process_index(), jax.process_count()))
            try:
                read, why = [[next(rows) for _ in range(self.most)] for _ in range(BATCHES)], ""
            finally:
                if hasattr(rows, "close"):
                    rows.close()
            for each in itertools.chain(*read):
                check_batch(each, self.ctx.classes)
        except InputError as error:
            read, why = [[made_up(self.ctx, seed)] * self.most for seed in range(BATCHES)], str(error)
        if self.most > 1:
            return [sharding.put_batches(each, mesh) for each in read], why
        return [sharding.put_batch(each[0], mesh) for each in read], why

    def __call__(self) -> float:
        """Steps, as often as it takes until every update has had its turn, and waits each time; the mean seconds of a step."""
        seconds = 0.0
        for _ in range(self.calls):
            start = time.perf_counter()
            self.dispatch()
            jax.block_until_ready((self.state, self.metrics))
            seconds += time.perf_counter() - start
        return seconds / (self.calls * self.most)

    def dispatch(self, batch: Batch | None = None) -> None:
        """Calls the device once and waits for nothing; without a batch on one that is at hand, which is prepared first."""
        if batch is None:
            self._turn += 1
            batch = self._prepared(self._batches[self._turn % len(self._batches)])
        more = () if self.most == 1 else (jnp.int32(self.most),)
        self.state, self.metrics = self.compiled.call(self.state, self.frozen, batch, *more)

    def loop(self, count: int) -> tuple[float, float]:
        """Seconds for each step of calls made as training makes them, and by how much batches at hand would be quicker (not below 0).

        Args:
            count: calls of each kind, in three rounds that take turns.
        """
        most, turn, length = self.most, 0, -(-count // 3)
        feed = Feed(self.ctx, (jax.process_index(), jax.process_count()), 0, None)

        def run(reads: bool) -> float:
            nonlocal turn
            start, before = time.perf_counter(), None
            for _ in range(length):
                self.dispatch(feed.next(self.state, self.frozen, turn * most, most) if reads else None)
                if reads:
                    turn += 1
                    feed.read_ahead(self.state, self.frozen, turn * most, most)
                jax.block_until_ready(before)  # training looks at a step's numbers while the next one runs
                before = self.metrics
            jax.block_until_ready(self.state)
            return (time.perf_counter() - start) / (length * most)

        try:
            at_hand, reading = alternate([lambda: run(False), lambda: run(True)], 3, drop=1)
        finally:
            feed.close()
        seconds = Times.of(reading).median
        return seconds, max(0.0, seconds - Times.of(at_hand).median)


def with_weights(ctx: Context) -> Context:
    """The context with random weights for the frozen networks that have none, in the dtype that the run keeps them in."""
    networks, dtype = dict(ctx.networks), jnp.dtype(ctx.run.teacher_dtype)

    def init(network: Model, key: Any) -> Any:
        # Cast within the program: beside a copy in float32 a large teacher's weights would need three times their room.
        params, buffers = network.init(key)
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, params
        ), buffers

    for side in frozen_sides(ctx):
        if not (network := networks[side]).initialised:
            specs = ctx.specs[side], jax.tree.map(lambda _: P(), network.buffers)
            made = jax.jit(functools.partial(init, network), out_shardings=sharding.shardings(specs, ctx.mesh))
            weights = made(jax.random.key(0))
            networks[side] = network.with_weights(*weights)
    return dataclasses.replace(ctx, networks=networks)


def made_up(ctx: Context, seed: int) -> Batch:
    """A batch in NumPy of the shapes that the run's data would give."""
    rng = np.random.default_rng(seed)

    def leaf(keys: Any, shape: Any) -> np.ndarray:
        name = str(getattr(keys[-1], "key", getattr(keys[-1], "name", "")))
        if name in ("weight", "labelled", "mask", "loss_mask", "bytes", "segment"):
            return np.ones(shape.shape, shape.dtype)
        if name in ("index", "position"):
            return np.broadcast_to(np.arange(shape.shape[-1]), shape.shape).astype(shape.dtype)
        if jnp.issubdtype(shape.dtype, jnp.integer):
            most = 256 if name == "image" else ctx.classes or 2
            return rng.integers(0, most, shape.shape).astype(shape.dtype)
        return rng.normal(size=shape.shape).astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, ctx.raw_batch)


def stages(work: Workload) -> dict[str, Callable[[], float]]:
    """Parts of the step as programs of their own; each answers its seconds, the mean of all steps.

    ``prepare`` by itself; the others each with what comes before it: augmentation, teacher, gradients.
    """
    ctx, batch = work.ctx, work.batch
    made: dict[str, list[tuple[Callable[..., Tree], float]]] = {}
    for only, share in flops.phases(ctx):
        for name, program in _programs(only).items():
            made.setdefault(name, []).append((program, share))

    def timed(programs: list[tuple[Callable[..., Tree], float]]) -> float:
        return sum(share * _seconds(program, work.state, work.frozen, batch) for program, share in programs)

    found: dict[str, Callable[[], float]] = {}
    if work.prepare is not None:
        steps = itertools.count()

        def prepare() -> float:
            given = [(work.state, work.frozen, work.raw_batch, jnp.int32(next(steps))) for _ in range(work.calls)]
            return sum(_seconds(work.prepare, *each) for each in given) / work.calls

        found["prepare"] = prepare
    return found | {name: functools.partial(timed, programs) for name, programs in made.items()}


def _programs(ctx: Context) -> dict[str, Callable[..., Tree]]:
    def views(state: State, frozen: Frozen, batch: Batch) -> Batch:
        return seen(ctx, batch, step_key(state))

    def teacher(state: State, frozen: Frozen, batch: Batch) -> Tree:
        batch, key = views(state, frozen, batch), step_key(state)
        models = models_of(ctx, state, frozen)

        def answer(update: Any, piece: Batch) -> Tree:
            return update.forward(models, piece, key)[1]

        count = ctx.run.microbatches
        if count == 1:
            return [answer(update, batch) for update in ctx.updates]
        pieces = jax.tree.map(lambda rows: cut(rows, count), batch)
        return [jax.lax.map(lambda piece, update=update: answer(update, piece), pieces) for update in ctx.updates]

    programs: dict[str, Callable[..., Tree]] = {}
    if ctx.run.augment and not ctx.prepares:
        programs["augment"] = compiler.jit(views, ctx.mesh)
    if ctx.teacher_outputs is not None:
        programs["teacher_forward"] = compiler.jit(teacher, ctx.mesh)
    programs["student_forward_backward"] = compiler.jit(make_gradients(ctx), ctx.mesh)
    return programs


def _seconds(program: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    return time.perf_counter() - start
