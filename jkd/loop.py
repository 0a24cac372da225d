"""The loop: batches in, steps dispatched, numbers out, checkpoints kept. The step itself is `jkd.step`.

The device never waits for the host: while step n runs, batch n+1 is read and the metrics of step n-1 are fetched.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jkd import calls, compiler, debug, fingerprint, metrics, provenance, results, sharding, teachers
from jkd.cache import Cache
from jkd.check import check
from jkd.checkpoint import Checkpoints
from jkd.config import Experiment, Run, dependencies, every, needed_by_caches
from jkd.context import Context
from jkd.errors import InputError
from jkd.evaluate import Evaluation, make_evaluate
from jkd.feed import Feed
from jkd.hacking import Watch
from jkd.health import Health
from jkd.interrupts import Interrupts
from jkd.interrupts import Stopped as Stopped
from jkd.networks import models_of
from jkd.resolve import make_context
from jkd.results import Summary
from jkd.samples import Sample, sample
from jkd.state import Frozen, State, freeze, init_state, step_shapes
from jkd.step import deployed, make_term_gradients
from jkd.types import Batch, Model
from jkd.workdir import claim, write_json


class Failed(Exception):
    """Training cannot go on (a loss that is not finite)."""


class Listener:
    """What a training tells whoever watches it. The base class stays silent; override what you want to hear."""

    def run_started(self, name: str, ctx: Context, start: int) -> None:
        """A run begins, or goes on, after ``start`` updates."""

    def stepped(self, name: str, step: int, steps: int, values: Mapping[str, float], examples_per_s: float) -> None:
        """The metrics of an update have arrived (one update after it was dispatched)."""

    def evaluated(self, name: str, step: int, values: Mapping[str, float]) -> None:
        """An evaluation is done."""

    def message(self, text: str) -> None:
        """A line for the user."""

    def run_finished(self, name: str, summary: Summary) -> None:
        """A run is done."""

    def said(self, name: str, sample: Sample) -> None:
        """How the language model of a run that is done goes on with a text."""

    def skipped(self, name: str, summary: Summary) -> None:
        """A run was done already."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a training leaves.

    Args:
        state: the last run's final state.
        student: the last run's product (`Recipe.deploy`), a Model that holds its weights.
        metrics: the last run's final evaluation.
        summary: ``{run: {parameters, accuracy, nll, ece, agreement, examples_per_s, steps, params_sha256, …}}``.
        artifacts: every node's artifact by name.
    """

    state: State | None
    student: Model | None
    metrics: dict[str, float]
    summary: dict[str, Summary]
    artifacts: Mapping[str, Any]


def train(
    experiment: Experiment | Run, workdir: Any = None, *, listener: Listener | None = None, caches_only: bool = False
) -> Result:
    """Trains every run of an experiment, in order; what is finished in ``workdir`` is not trained again.

    Args:
        experiment: an Experiment, or a Run (which becomes an experiment with the one node ``student``).
        workdir: folder for checkpoints, metrics and ``summary.json``, local or remote (``gs://…``); None keeps nothing.
        listener: hears how it goes.
        caches_only: fill the caches that the runs read, and train only the runs whose answers these hold.

    Raises:
        InputError: a mistake in the experiment, or a ``workdir`` that holds another one.
        Stopped: SIGTERM or SIGINT came; the same call goes on from there.
        Failed: a loss is not finite.
    """
    experiment = Experiment(student=experiment) if isinstance(experiment, Run) else experiment
    listener = listener or Listener()
    folder = claim(None if workdir is None else epath.Path(workdir), experiment)
    if len(experiment.nodes) > 1:
        check(experiment)  # a mistake in the last run must not wait until the first has trained
    used = {name for node in experiment.nodes.values() for name in dependencies(node)}
    wanted = needed_by_caches(experiment) if caches_only else set(experiment.nodes)
    done: dict[str, _Finished] = {}
    artifacts = _Artifacts()
    with Interrupts() as interrupts:
        for name, node in experiment.nodes.items():
            filling = caches_only and isinstance(node, Run) and isinstance(node.teacher, Cache)
            if name not in wanted and not filling:
                continue
            if interrupts.stop():
                raise Stopped(name, 0, folder)
            if not isinstance(node, Run):
                with interrupts.lifted():  # what a function does is not saved, and it cannot be asked
                    node = node(**{needed: artifacts[needed] for needed in dependencies(node)})
            if not isinstance(node, Run):
                artifacts.add(name, node)
                continue
            run = _Training(name, node, artifacts, None if folder is None else folder / name, listener, interrupts)
            if filling:
                run.fill(whole=True)
            if name not in wanted:
                continue
            done[name] = finished = run.finished() or run.train()
            if name in used and finished.summary["agreement"] is None:
                finished.summary["agreement"] = 1.0  # it is what the others are held against
            artifacts.add(name, finished)
            if folder is not None and jax.process_index() == 0 and not caches_only:
                summary = {each: finished.summary for each, finished in done.items()}
                write_json(folder / "summary.json", summary)
    last = done[list(done)[-1]] if done else None
    state, student = last.load() if last else (None, None)
    summary = {name: finished.summary for name, finished in done.items()}
    return Result(state=state, student=student, metrics=last.metrics if last else {}, summary=summary, artifacts=artifacts)


@dataclasses.dataclass
class _Finished:
    """A run that is done; its weights are read back from its checkpoint only if somebody asks."""

    summary: Summary
    metrics: dict[str, float]
    load: Callable[[], tuple[State, Model]]


class _Artifacts(Mapping[str, Any]):
    """What nodes left, by name; the weights of a run that was done before are read when somebody asks for them."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}

    def add(self, name: str, artifact: Any) -> None:
        self._found[name] = artifact

    def __getitem__(self, name: str) -> Any:
        artifact = self._found[name]
        return artifact.load()[1] if isinstance(artifact, _Finished) else artifact

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


class _Training:
    """One run: builds its programs, and keeps what the loop needs between steps."""

    def __init__(
        self,
        name: str,
        run: Run,
        earlier: Mapping[str, Any],
        folder: epath.Path | None,
        listener: Listener,
        interrupts: Interrupts,
    ):
        self.config = fingerprint.to_json(run)  # as it was written down: the teacher by its name
        run = teachers.resolved(run, earlier)
        self.name, self.folder, self.listener, self.interrupts = name, folder, listener, interrupts
        self.cache, self.earlier = run.teacher if isinstance(run.teacher, Cache) else None, earlier
        self.ctx = make_context(run)
        self.run = self.ctx.run  # a cache's answers come with the data
        self.process = (jax.process_index(), jax.process_count())
        self.periodic, self.health = metrics.Periodic(), Health(run)
        self.hacking = Watch()
        self.checkpoints = None
        if folder is not None:
            self.checkpoints = Checkpoints(folder / "checkpoints", keep=run.keep, best=run.best, report=listener.message)

    def finished(self) -> _Finished | None:
        """The run as it ended, if it did."""
        if self.folder is None or not (self.folder / "result.json").exists():
            return None
        result = json.loads((self.folder / "result.json").read_text())
        self.listener.skipped(self.name, result["summary"])

        @_once
        def load() -> tuple[State, Model]:
            restored = self._restore()
            if restored is None or restored[2] < self.run.steps:
                return self.train().load()  # its last checkpoint is damaged: what came after the one before is trained again
            return restored[0], self._product(restored[0], freeze(self.ctx))

        return _Finished(result["summary"], result["metrics"], load)

    def fill(self, *, whole: bool = False) -> None:
        """Makes sure that the cache it reads, if it does, is there and fits; see `jkd.cache.filling.ready`."""
        if self.cache is not None:
            from jkd.cache import filling

            tell, stop = self.listener.message, self.interrupts.stop
            if not filling.ready(self.cache, self.ctx, self.earlier, tell, whole=whole, stop=stop):
                raise Stopped(self.name, 0, self.folder)

    def train(self) -> _Finished:
        self.fill()
        ctx, run, steps = self.ctx, self.run, self.run.steps
        restored = self._restore()
        if restored is None:
            state, frozen = init_state(ctx, jax.random.key(run.seed))
            start, weights = 0, None
        else:
            state, meta, start = restored
            frozen, weights = freeze(ctx), meta.get("sampling_weights")
            self.hacking = Watch(meta.get("hacking"))
        self.call, self.term_gradients = calls.make_call(ctx), compiler.jit(make_term_gradients(ctx), ctx.mesh)
        self.evaluation = make_evaluate(ctx)
        self.listener.run_started(self.name, ctx, start)
        if start == 0:
            self._check_teacher(state, frozen)
        feed = self.feed = Feed(ctx, self.process, start, weights)
        if feed.resamples(start):
            feed.resample(state, start)  # a checkpoint is written before the reading that its step is due
        folder = self.folder if self.process[0] == 0 else None
        writer = metrics.writers(folder, start, self.config, self.listener.message)
        ended: metrics.Ended = "failed"
        clock = metrics.Stopwatch(run.batch_size)
        evaluations = every(run.evaluate_every, steps)
        saves = every(run.checkpoint_every, steps) if self.checkpoints is not None else 0
        length = calls.lengths(run.steps_per_call, steps, (evaluations, saves, feed.period))
        pending: tuple[int, int, Any] | None = None
        evaluation = Evaluation()
        try:
            done = start
            while done < steps:
                step, count = done, length(done)
                batch = feed.next(state, frozen, step, count)
                state, values = self.call(state, frozen, batch, count)
                done = step + count
                if done < steps:
                    feed.read_ahead(state, frozen, done, length(done))
                if pending is not None:
                    self._arrived(*pending, writer, clock)
                pending = (step, count, values)
                stopping = self.interrupts.stop()
                evaluating = done == steps or (evaluations and done % evaluations == 0)
                saving = self.checkpoints is not None and (done == steps or (saves and done % saves == 0) or stopping)
                if evaluating or saving or stopping:
                    # no save, and no evaluation, of a step whose own numbers have not been seen
                    self._arrived(*pending, writer, clock)
                    pending = None
                    with clock.paused():
                        if evaluating:
                            evaluation = self._evaluate(state, frozen, calls.last(run, batch, count), done, writer)
                        if saving and self.checkpoints is not None:
                            self.checkpoints.save(
                                done, state, self._meta(done, feed.weights), evaluation.metrics if evaluating else None
                            )
                            writer.flush()
                if stopping and done < steps:
                    if self.checkpoints is not None:
                        self.checkpoints.wait()
                        done = max(self.checkpoints.steps(), default=0)  # an earlier one where this could not be written
                    ended = "stopped"
                    raise Stopped(self.name, done, self.folder)
                if done < steps and feed.resamples(done):
                    feed.resample(state, done)
            ended = "finished"
        finally:
            if self.checkpoints is not None:
                self.checkpoints.close()
            writer.close(ended)
            feed.close()
        if start == steps and self.evaluation is not None:  # killed between its last checkpoint and its result
            evaluation = self.evaluation(state, frozen)
        return self._finish(state, frozen, evaluation, clock)

    def _restore(self) -> tuple[State, dict[str, Any], int] | None:
        return None if self.checkpoints is None else self.checkpoints.restore(step_shapes(self.ctx)[0])

    def _meta(self, step: int, weights: np.ndarray | None) -> dict[str, Any]:
        meta: dict[str, Any] = {
            "position": step,  # global batches trained on
            "config": self.config,
            "hacking": self.hacking.state,
            "revision": provenance.code_revision(),
            "versions": provenance.package_versions(),
        }
        return meta if weights is None else meta | {"sampling_weights": weights}

    def _check_teacher(self, state: State, frozen: Frozen) -> None:
        floor = self.run.require_teacher_accuracy
        if "teacher" in frozen["params"] and self.run.data is not None:
            rows: Any = self.run.data.batches(self.run.batch_size, seed=self.run.seed, process=self.process)
            teachers.check_logits(self.ctx, state, frozen, sharding.put_batch(next(rows), self.ctx.mesh))
            rows.close()
        if floor is None:
            return
        found = self.evaluation(state, frozen).metrics if self.evaluation is not None else {}
        accuracy = found.get("teacher_accuracy")
        if accuracy is None:
            raise InputError(
                f"Run.require_teacher_accuracy = {floor}: nothing to measure it on; give a teacher with logits, and evaluation "
                "data with labels"
            )
        if not accuracy > floor:
            raise InputError(
                f"the teacher's accuracy is {accuracy:.4f}; Run.require_teacher_accuracy = {floor}: check its weights, its "
                "preprocess and the order of its classes"
            )

    def _arrived(self, step: int, count: int, values: Any, writer: metrics.Writer, clock: metrics.Stopwatch) -> None:
        """Metrics of ``count`` dispatched steps are here: look at them, write them, tell them."""
        arrived = {name: np.atleast_1d(value) for name, value in jax.device_get(values).items()}
        rate = clock.tick(count)
        for place in range(count):
            self._seen(step + place, {name: float(value[place]) for name, value in arrived.items()}, rate, writer)

    def _seen(self, step: int, found: dict[str, float], rate: float, writer: metrics.Writer) -> None:
        cause = self.health.cause(step, found)
        if cause is not None:
            if self.checkpoints is not None:
                self.checkpoints.wait()  # a save under way counts once it is on disk
            kept = self.checkpoints.steps() if self.checkpoints is not None else []
            last = f"the last good checkpoint is step {kept[-1]}" if kept else "there is no checkpoint yet"
            look = ""
            if self.folder is not None:
                look = "; " + debug.keep(self.folder, self.ctx, step, cause, self.feed.weights, self.process)
            raise Failed(f"{self.name}: step {step + 1} is not finite: {cause}; {last}{look}")
        found = self.periodic.fill(found)
        if (step + 1) % self.run.log_every == 0 or step == 0:
            writer.write(step + 1, {f"train/{name}": value for name, value in found.items()} | {"train/examples_per_s": rate})
        self.listener.stepped(self.name, step + 1, self.run.steps, found, rate)

    def _evaluate(self, state: State, frozen: Frozen, batch: Batch, step: int, writer: metrics.Writer) -> Evaluation:
        found = self.evaluation(state, frozen) if self.evaluation is not None else Evaluation()
        gradients = {name: float(value) for name, value in jax.device_get(self.term_gradients(state, frozen, batch)).items()}
        values = {f"eval/{name}": value for name, value in found.metrics.items()}
        writer.write(step, values | {f"gradient/{name}": value for name, value in gradients.items()})
        self.listener.evaluated(self.name, step, found.metrics)
        if told := self.hacking.see(step, found.metrics):
            self.listener.message(f"{self.name}: {told}")
        return found

    def _product(self, state: State, frozen: Frozen) -> Model:
        return deployed(self.ctx, models_of(self.ctx, state, frozen, ema=self.run.evaluate_ema))

    def _finish(self, state: State, frozen: Frozen, evaluation: Evaluation, clock: metrics.Stopwatch) -> _Finished:
        product = self._product(state, frozen)
        summary = results.summarise(self.ctx, product, state, evaluation, clock.mean())
        folder = self.folder if self.process[0] == 0 else None
        results.write(folder, self.ctx, summary, evaluation)
        self.listener.run_finished(self.name, summary)
        # the run is done by now, whatever becomes of this
        said = sample(self.ctx, product, state, frozen, lambda text: self.listener.message(f"{self.name}: {text}"))
        if said is not None:
            results.write(folder, self.ctx, summary, evaluation, said)
            self.listener.said(self.name, said)
        return _Finished(summary, evaluation.metrics, lambda: (state, product))


def _once(function: Callable[[], Any]) -> Callable[[], Any]:
    found: list[Any] = []

    def call() -> Any:
        if not found:
            found.append(function())
        return found[0]

    return call
