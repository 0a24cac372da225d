"""What a user writes down: `Run` (one training) and `Experiment` (named runs and functions between them)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from jkd.cache import Cache
from jkd.errors import InputError, nearest
from jkd.optim import Optimizer
from jkd.recipe import Recipe
from jkd.schedules import Schedule
from jkd.sharding import MeshShape, Rules
from jkd.types import Model

if TYPE_CHECKING:
    from jkd.data import Data


class ModelConfig(Protocol):
    """A network still to be built: its hyperparameters, and ``build() -> Model``."""

    def build(self) -> Model: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ema:
    """Exponential moving average of parameters, kept in float32: ``ema = decay * ema + (1 - decay) * params``.

    Args:
        decay: number or schedule.
        warmup: use ``min(decay, 1 - 1/(step + 1))``, so that the first steps are a plain mean.
        groups: which parameter groups are averaged. Buffers of these groups are averaged by the same rule.
    """

    decay: float | Schedule = 0.999
    warmup: bool = False
    groups: tuple[str, ...] = ("student",)

    def __post_init__(self):
        if not callable(self.decay) and not (isinstance(self.decay, (int, float)) and 0 <= self.decay <= 1):
            raise InputError(f"Ema.decay = {self.decay!r}: give a number from 0 to 1 or a schedule")


@dataclasses.dataclass(frozen=True)
class StudentEma:
    """As a run's teacher: the moving average of its own student (`Run.ema` says how it moves)."""


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """As a run's teacher: several teachers, whose probabilities or logits are averaged.

    Each member's own logits are ``heads["0"]``, ``heads["1"]``, … of the teacher's Outputs, for recipes that read them apart.

    Args:
        members: Models, model configs, or names of earlier nodes of the experiment.
        mean: what is averaged; None for nothing, where members know different classes.
    """

    members: tuple[Model | ModelConfig | str, ...]
    mean: Literal["probabilities", "logits"] | None = "probabilities"


METRICS = (
    *("accuracy", "nll", "bits_per_byte", "ece", "agreement", "kl"),
    *("teacher_accuracy", "teacher_nll", "teacher_bits_per_byte", "teacher_ece"),
    *("oracle_agreement", "oracle_kl"),
)
"""What an evaluation may give (`jkd.evaluate`), and so what `Run.best` may name."""

Teacher = Model | ModelConfig | Ensemble | StudentEma | Cache | str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Args:
        student: the network that learns: a Model (with weights, or to be initialised), or a config that builds one.
        recipe: the method.
        optimizer: one for every group, or ``{group: Optimizer}`` where ``"*"`` stands for the groups not named.
        steps: number of updates.
        teacher: a Model, the name of an earlier node of the experiment, `Ensemble`, `StudentEma`, `jkd.cache.Cache`, or None.
        oracle: a network that the teacher stands for, as `teacher` names one; no step sees it. Evaluation gives ``oracle_kl`` and
            ``oracle_agreement`` beside the teacher's, and the run says where the student nears the one by leaving the other.
        data: what is trained and evaluated on; may be None where batches are fed by hand.
        batch_size: examples of the global batch.
        augment: functions ``(batch, key) -> batch`` on the global batch, on the device, in this order. Both sides see the result.
        seed: of initialisation, data order and every draw.
        ema: a moving average of the student.
        trainable: globs on the student's parameter paths (``!`` takes out); what they leave out never moves and has no optimizer
            state.
        compute_dtype: of forward and backward passes; parameters, optimizer and average stay float32.
        teacher_dtype: in which a frozen teacher's parameters are kept.
        remat: a policy of ``jax.checkpoint_policies``: what the student's forward pass may keep for the backward pass.
        microbatches: pieces that a batch is cut into; the update is the same for any number.
        steps_per_call: steps that the device runs for each call from the host, at most: for networks so small that the call costs
            more than they do. The same steps and numbers; that many batches lie on the device. A call ends early where there is
            something to do between steps (an evaluation, a checkpoint, a reading of `Recipe.sampling`).
        microbatch_statistics: ``local`` allows microbatches with networks or methods that couple examples, whose statistics then
            are each microbatch's own (another algorithm).
        mesh: how the devices are arranged.
        rules: where the student's and the recipe's parameters are stored.
        teacher_rules: where the teacher's are.
        evaluate_every: steps between evaluations (an int), or a fraction of the run (a float); 0 for the end only.
        checkpoint_every: likewise, for checkpoints.
        log_every: steps between logged metrics.
        keep: checkpoints that stay.
        best: metric of the evaluation whose best checkpoint stays besides; a leading ``-`` means smaller is better.
        sample_every: steps between readings of `Recipe.sampling`.
        require_teacher_accuracy: stop before training where the teacher's accuracy on the evaluation data is not above this.
        evaluate_ema: evaluate and hand on the average in the student's place.
    """

    student: Model | ModelConfig
    recipe: Recipe
    optimizer: Optimizer | Mapping[str, Optimizer]
    steps: int
    teacher: Teacher = None
    oracle: Model | ModelConfig | Ensemble | str | None = None
    data: Data | None = None
    batch_size: int = 128
    augment: tuple[Callable[..., Any], ...] = ()
    seed: int = 0
    ema: Ema | None = None
    evaluate_ema: bool = False
    trainable: tuple[str, ...] = ("*",)
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Callable[..., Any] | None = None
    microbatches: int = 1
    steps_per_call: int = 1
    microbatch_statistics: Literal["global", "local"] = "global"
    mesh: MeshShape = MeshShape()
    rules: Rules = ()
    teacher_rules: Rules = ()
    evaluate_every: int | float = 0.25
    checkpoint_every: int | float = 0.25
    log_every: int = 50
    keep: int = 2
    best: str | None = None
    sample_every: int = 1000
    require_teacher_accuracy: float | None = None

    def __post_init__(self):
        _check_run(self)


class Experiment:
    """Named nodes in order: a `Run`, or a function whose arguments are the names of earlier nodes.

    ``Experiment(teacher=Run(…), student=Run(…, teacher="teacher"))``. A run's artifact is its product, a Model with weights; a
    function's artifact is what it returns, and may be handed on as a Run (a node made from what was learned so far).

    Raises:
        InputError: a name that no earlier node has.
    """

    def __init__(self, **nodes: Run | Callable[..., Any]):
        self.nodes = nodes
        earlier: list[str] = []
        for name, node in nodes.items():
            for needed in dependencies(node):
                if needed not in earlier:
                    raise InputError(f"{name}: no earlier node is called {needed!r}{nearest(needed, earlier)}")
            earlier.append(name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Experiment) and self.nodes == other.nodes

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Experiment({', '.join(self.nodes)})"


def dependencies(node: Run | Callable[..., Any]) -> tuple[str, ...]:
    """The names of the nodes that a node reads."""
    if isinstance(node, Run):
        teacher = node.teacher.teacher if isinstance(node.teacher, Cache) else node.teacher
        sides = (teacher, node.oracle)
        members = [member for side in sides for member in (side.members if isinstance(side, Ensemble) else (side,))]
        return tuple(dict.fromkeys(member for member in members if isinstance(member, str)))
    if callable(node):
        return tuple(inspect.signature(node).parameters)
    raise InputError(f"a node of an Experiment is a Run or a function, not {type(node).__name__}")


def needed_by_caches(experiment: Experiment) -> set[str]:
    """The nodes whose answers the caches of an experiment hold, and what these need."""
    wanted: set[str] = set()
    for name, node in reversed(experiment.nodes.items()):
        if name in wanted or isinstance(node, Run) and isinstance(node.teacher, Cache):
            wanted |= set(dependencies(node))
    return wanted


def every(value: int | float, steps: int) -> int:
    """``evaluate_every`` and ``checkpoint_every`` in steps; a fraction is rounded up so that it never becomes 0."""
    if isinstance(value, float):
        return max(1, -(-int(value * steps * 1_000_000) // 1_000_000)) if value else 0
    return value


def _check_run(run: Run) -> None:
    def refuse(field: str, fix: str) -> None:
        raise InputError(f"Run.{field} = {getattr(run, field)!r}: {fix}")

    for field in ("steps", "batch_size", "microbatches", "steps_per_call", "log_every", "keep", "sample_every"):
        value = getattr(run, field)
        if not isinstance(value, int) or isinstance(value, bool):
            refuse(field, "give a whole number")
        if value < 1:
            refuse(field, "give at least 1")
    for field in ("evaluate_every", "checkpoint_every"):
        value = getattr(run, field)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or value < 0
            or (isinstance(value, float) and value > 1)
        ):
            refuse(field, "give a number of steps (int) or a fraction of the run (float between 0 and 1)")
    for field, kind in (("recipe", Recipe), ("mesh", MeshShape), ("ema", Ema | None), ("seed", int)):
        if not isinstance(getattr(run, field), kind):  # type: ignore[arg-type]
            refuse(field, f"give a {getattr(kind, '__name__', kind)}")
    optimizers = run.optimizer.values() if isinstance(run.optimizer, Mapping) else (run.optimizer,)
    if not all(isinstance(optimizer, Optimizer) for optimizer in optimizers):
        refuse("optimizer", "give one made by jkd.optim (optim.from_optax takes any optax transformation)")
    for field in ("compute_dtype", "teacher_dtype"):
        if getattr(run, field) not in ("float32", "bfloat16"):
            refuse(field, "give 'float32' or 'bfloat16' (float16 would need its loss scaled)")
    if run.microbatch_statistics not in ("global", "local"):
        refuse("microbatch_statistics", "give 'global' or 'local'")
    if not isinstance(run.student, Model) and not hasattr(run.student, "build"):
        refuse("student", "give a Model (models.from_nnx, …) or a model config (models.resnet.cifar(…), …)")
    averaged = run.ema is not None and "student" in run.ema.groups
    if isinstance(run.teacher, StudentEma) and not averaged:
        refuse("ema", "a teacher that is the student's average needs Run.ema=Ema(…) with the group 'student'")
    if run.evaluate_ema and not averaged:
        refuse("ema", "evaluate_ema needs Run.ema=Ema(…) with the group 'student'")
    if run.seed < 0:
        refuse("seed", "give a whole number that is not negative")
    if not isinstance(run.augment, (tuple, list)) or not all(callable(function) for function in run.augment):
        refuse("augment", "give a tuple of functions (batch, key) -> batch")
    if run.remat is not None and not callable(run.remat):
        refuse("remat", "give a policy of jax.checkpoint_policies")
    if run.best is not None and run.best.removeprefix("-") not in METRICS:
        refuse("best", f"no such metric{nearest(run.best.removeprefix('-'), METRICS)}")
