"""What a distillation method is: a frozen dataclass that says which terms make its loss, and rarely more.

A method writes `Recipe.terms`; one with learned or remembered state writes `Recipe.init` too; one that runs the networks in its
own way overrides `Recipe.forward`. The engine (`jkd.step`) takes every mean, gradient and update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jkd.errors import InputError
from jkd.schedules import Clock
from jkd.types import Array, Batch, Model, Outputs, Term, Tree

if TYPE_CHECKING:
    from jkd.context import Context


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vars:
    """What a recipe owns besides the networks.

    Args:
        params: ``{group: tree}``, trained. In `Recipe.terms` every group is there, ``student`` too.
        memory: any tree; read as it stood at the step's start, written once a step by `Recipe.remember`.
        buffers: ``{group: tree}`` for groups that are the weights of a network (a fake score, a peer).
    """

    params: dict[str, Tree] = dataclasses.field(default_factory=dict)
    memory: Tree = dataclasses.field(default_factory=dict)
    buffers: dict[str, Tree] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Models:
    """The networks of a step with their weights, as `Recipe.forward` sees them.

    A call answers ``(Outputs, models)``: the second holds the buffers that the call left (BatchNorm statistics), so that several
    calls follow each other without hidden state.

    Args:
        networks: ``student``, ``teacher`` (absent where there is none).
        params: ``{group: tree}`` as stored; replace an entry to run a network with other weights.
        buffers: ``{group: tree}``.
        memory: the recipe's memory at the step's start.
        clock: where the run stands.
        optimizer: ``{group: optax state}``, which `virtual` moves along.
        seed: key data of the run.
        call: how the engine runs a network (casting, gathering, rematerialising).
        move: how the engine would update a group; see `virtual`.
        follow: how the run's average would follow the student; see `averaged`.
    """

    networks: Mapping[str, Model]
    params: Mapping[str, Tree]
    buffers: Mapping[str, Tree]
    memory: Tree
    clock: Clock
    optimizer: Mapping[str, Any]
    seed: Array
    call: Callable[..., tuple[Outputs, Tree]]
    move: Callable[[Models, str, Tree], tuple[Tree, Any]]
    follow: Callable[[Models], Models]

    def apply(
        self,
        network: str | Model,
        batch: Any,
        *,
        group: str | None = None,
        part: str = "",
        taps: tuple[str, ...] | None = None,
        train: bool = False,
        key: Array | None = None,
    ) -> tuple[Outputs, Models]:
        """Runs a network on a batch.

        Args:
            network: its name, or a Model of the recipe's own.
            batch: the batch; the input of the part where ``part`` is given.
            group: whose weights it runs with; by default the group of the network's own name.
            part: path of a submodule to run alone, in evaluation mode (the teacher's head on the student's features).
            taps: paths to capture; None for the recipe's own.
            train, key: see `Model`.
        """
        if group is None:
            if not isinstance(network, str):
                raise TypeError("models.apply: say which group's weights a Model of your own runs with (group=…)")
            group = network
        outputs, buffers = self.call(self, network, group, part, batch, taps, train, key)
        return outputs, dataclasses.replace(self, buffers={**self.buffers, group: buffers})

    def student(self, batch: Batch, *, key: Array | None = None, train: bool = True, **options) -> tuple[Outputs, Models]:
        """The student in training mode, capturing the recipe's ``student_taps``."""
        return self.apply("student", batch, train=train, key=key, **options)

    def teacher(self, batch: Batch, *, key: Array | None = None, train: bool = False, **options) -> Outputs | None:
        """The teacher in evaluation mode, capturing ``teacher_taps``; None where the run has no teacher.

        An answer that was prepared earlier (``batch["teacher"]``: a cache, a rollout, a teacher elsewhere) stands in its place.
        """
        if "teacher" in batch:
            return batch["teacher"]
        if "teacher" not in self.networks:
            return None
        return self.apply("teacher", batch, train=train, key=key, **options)[0]

    def with_params(self, **groups: Tree) -> Models:
        """The same networks with other weights in some groups."""
        return dataclasses.replace(self, params={**self.params, **groups})

    def virtual(self, group: str, gradients: Tree) -> Models:
        """The networks after an update of ``group`` that is not kept (look-ahead teachers, one-step meta-gradients).

        Args:
            group: the group to move, by its own optimizer, whose state moves along from one virtual update to the next.
            gradients: a tree like ``params[group]``.
        """
        params, optimizer = self.move(self, group, gradients)
        ahead = self.with_params(**{group: params})
        return dataclasses.replace(ahead, optimizer={**self.optimizer, group: optimizer})

    def averaged(self) -> Models:
        """The networks after the run's average (`StudentEma`, the teacher here) has followed the student once more.

        The average that a forward hands back is kept, as buffers are; the step's own average follows it.

        Raises:
            InputError: the run's teacher is not its student's average.
        """
        return self.follow(self)

    def keys(self, batch: Batch) -> Array:
        """A random key for each example, ``[batch]``, that depends on the run's seed, the step and ``batch["index"]`` alone.

        So draws by example do not depend on how the batch is cut (the ``key`` of a forward does).
        """
        if "index" not in batch:
            raise InputError("draws by example need batch['index'] (which example each row is)")
        # step keys are folded from small numbers
        key = jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(self.seed), 2**32 - 1), self.clock.step)
        return jax.vmap(lambda index: jax.random.fold_in(key, index))(batch["index"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One gradient step inside a step; a recipe may have several (adversaries, fake scores, co-trained teachers).

    Updates run in order; each differentiates only its groups and sees the parameters that the one before left. What is None is
    the recipe's own.

    Args:
        groups: parameter groups that move; None for ``student`` and every group that `Recipe.init` made.
        forward, terms, observe, remember: see `Recipe`.
        combine: ``combine(gradients, *, clock, key) -> gradient`` in place of their sum. ``gradients`` are ``{term: {group:
            tree}}``, each of ``coef * mean`` over the whole global batch; what it returns is like one of them. It costs a
            backward pass, and a gradient in memory, for each term.
        every: runs at steps 0, every, 2·every, …
        when: ``when(memory, clock) -> bool``, and where this holds besides, of the memory as it stood at the step's start
            (players that wait for each other).
        name: prefix of its terms in the metrics; empty for none.
    """

    groups: tuple[str, ...] | None = None
    forward: Callable[..., Any] | None = None
    terms: Callable[..., dict[str, Term]] | None = None
    observe: Callable[..., Tree] | None = None
    remember: Callable[..., Tree] | None = None
    combine: Callable[..., Tree] | None = None
    every: int = 1
    when: Callable[[Tree, Clock], Array] | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A distillation method. Subclass it as a frozen, keyword-only dataclass; its fields are the method's hyperparameters.

    Args:
        student_taps: module paths whose outputs the method reads, ``outputs.taps[path]``.
        teacher_taps: likewise in the teacher.
    """

    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()

    citation: ClassVar[str] = ""
    """Authors, title, venue, year: one line for ``jkd recipes``."""
    family: ClassVar[str] = "other"
    needs_teacher: ClassVar[bool] = True
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "mechanism"
    """How far the implementation is held to the authors': their numbers, their formula, or the stated mechanism only."""
    requires: ClassVar[str] = ""
    """What else a run of it must have, a short phrase for ``jkd recipes``: a view, a stream, a head, a kind of teacher."""
    same_classes: ClassVar[bool] = True
    """Whether teacher and student must have as many classes."""
    teacher_gradient: ClassVar[Literal["stop", "through"]] = "stop"
    """``through`` lets gradients pass frozen teacher layers on their way to the student."""

    @property
    def couples_batch(self) -> bool:
        """True where the maths compares examples: microbatches would then change the method."""
        return False

    @property
    def updates(self) -> tuple[Update, ...]:
        return (Update(),)

    def init(self, key: Array, ctx: Context) -> Vars:
        """The recipe's own parameters and memory; shapes come from ``ctx``, and this is traced, so nothing is placed yet."""
        return Vars()

    def forward(self, models: Models, batch: Batch, key: Array) -> tuple[Any, Any, Models]:
        """``(student, teacher, models)``: whatever `terms` wants to see of the two sides, and the models with their buffers."""
        teacher = models.teacher(batch)
        student, models = models.student(batch, key=key)
        return student, teacher, models

    def terms(self, vars: Vars, student: Any, teacher: Any, batch: Batch, *, clock: Clock, key: Array) -> dict[str, Term]:
        """The summands of the loss by name; ``task`` is the one that needs labels."""
        raise InputError(f"{type(self).__name__} defines no terms(); a recipe is made of its terms")

    def observe(self, vars: Vars, student: Any, teacher: Any, batch: Batch) -> Tree:
        """What `remember` shall see of each example: leaves ``[batch, ...]``. No gradient passes."""
        return {}

    def remember(
        self, memory: Tree, observed: Tree, batch: Batch, *, terms: Mapping[str, Array], clock: Clock, key: Array
    ) -> Tree:
        """The new memory, once a step, from the *whole* batch however it was cut; ``terms`` are the means just taken."""
        return memory

    def deploy(self, models: Models) -> Model:
        """The product: what is evaluated, exported and handed to the next run. A Model that holds its weights."""
        return models.networks["student"].with_weights(models.params["student"], models.buffers["student"])

    def sampling(self, memory: Tree) -> np.ndarray | None:
        """Weights ``[train examples]`` for drawing the next batches, or None for all alike. Read at fixed steps only."""
        return None

    def prepare(self, models: Models, batch: Batch, key: Array) -> Batch:
        """Changes the augmented batch before the step sees it, in a jitted program of its own (rollouts, a teacher elsewhere).

        An answer of the teacher goes into ``batch["teacher"]``, an `Outputs`; `Models.teacher` then takes it from there. The
        loop runs it one batch ahead where it reads nothing that training changes.
        """
        return batch


def label_weight(batch: Batch) -> Array:
    """``weight * labelled``: the weight of every term that reads labels."""
    return batch["weight"] * batch["labelled"] if "labelled" in batch else batch["weight"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bank:
    """One row for every training example, kept in a recipe's memory and split over the mesh by rows.

    Args:
        rows: ``[capacity, ...]``; the capacity is the data's size rounded up to the mesh, so that rows split evenly.
    """

    rows: Array

    @classmethod
    def full(cls, ctx: Context, shape: tuple[int, ...] = (), fill: float = 0.0, dtype: Any = jnp.float32) -> Bank:
        """A bank for the run's training data, every row filled with ``fill``.

        Raises:
            InputError: the size of the training data is not known.
        """
        return cls(jnp.full((ctx.bank_rows, *shape), fill, dtype))

    def __getitem__(self, index: Array) -> Array:
        """Rows of these examples, ``[batch, ...]``."""
        return self.rows.at[index].get(mode="fill", fill_value=0)

    def write(self, index: Array, values: Array, weight: Array) -> Bank:
        """The bank with these examples' rows replaced; rows of weight 0 (padding) are dropped."""
        index = jnp.where(weight > 0, index, self.rows.shape[0])
        return Bank(self.rows.at[index].set(values.astype(self.rows.dtype), mode="drop"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combine(Recipe):
    """The sum of several recipes that each run the two networks once on the batch.

    Args:
        recipes: the members; their taps are captured together, their parameters and memory kept apart.

    Raises:
        InputError: a member has a ``forward``, ``updates``, ``deploy``, ``prepare`` or ``sampling`` of its own (it is no summand
            then), or two members have a term of the same name (a label term that counts twice, usually: switch one off).
    """

    recipes: tuple[Recipe, ...]

    family: ClassVar[str] = "general"
    citation: ClassVar[str] = "a sum of recipes"

    def __post_init__(self):
        for member in self.recipes:
            for hook in ("forward", "updates", "deploy", "prepare", "sampling"):
                if getattr(type(member), hook) is not getattr(Recipe, hook):
                    raise InputError(f"Combine: {type(member).__name__} has a {hook} of its own, so it is no summand")
        for side in ("student_taps", "teacher_taps"):
            taps = dict.fromkeys(tap for member in self.recipes for tap in getattr(member, side))
            object.__setattr__(self, side, tuple(taps))

    @property
    def needs_teacher(self) -> bool:  # type: ignore[override]
        return any(member.needs_teacher for member in self.recipes)

    @property
    def same_classes(self) -> bool:  # type: ignore[override]
        return any(member.same_classes for member in self.recipes)

    @property
    def teacher_gradient(self) -> Literal["stop", "through"]:  # type: ignore[override]
        return "through" if any(member.teacher_gradient == "through" for member in self.recipes) else "stop"

    @property
    def couples_batch(self) -> bool:
        return any(member.couples_batch for member in self.recipes)

    def _own(self, vars: Vars, place: int) -> Vars:
        def own(groups: Mapping[str, Tree]) -> dict[str, Tree]:
            shared = {group: tree for group, tree in groups.items() if ":" not in group}
            prefix = f"{place}:"
            return shared | {g.removeprefix(prefix): tree for g, tree in groups.items() if g.startswith(prefix)}

        return Vars(params=own(vars.params), memory=vars.memory[str(place)], buffers=own(vars.buffers))

    def init(self, key: Array, ctx: Context) -> Vars:
        params: dict[str, Tree] = {}
        buffers: dict[str, Tree] = {}
        memory = {}
        for place, member in enumerate(self.recipes):
            own = member.init(jax.random.fold_in(key, place), ctx)
            params |= {f"{place}:{group}": tree for group, tree in own.params.items()}
            buffers |= {f"{place}:{group}": tree for group, tree in own.buffers.items()}
            memory[str(place)] = own.memory
        return Vars(params=params, memory=memory, buffers=buffers)

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms: dict[str, Term] = {}
        for place, member in enumerate(self.recipes):
            more = member.terms(
                self._own(vars, place), student, teacher, batch, clock=clock, key=jax.random.fold_in(key, place)
            )
            if twice := terms.keys() & more.keys():
                raise InputError(
                    f"Combine: {' and '.join(type(m).__name__ for m in self.recipes)} have the same term {min(twice)!r}; "
                    "give one of them weight 0"
                )
            terms |= more
        return terms

    def observe(self, vars, student, teacher, batch):
        members = enumerate(self.recipes)
        return {str(i): member.observe(self._own(vars, i), student, teacher, batch) for i, member in members}

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return {
            str(i): member.remember(
                memory[str(i)], observed[str(i)], batch, terms=terms, clock=clock, key=jax.random.fold_in(key, i)
            )
            for i, member in enumerate(self.recipes)
        }
