"""What a recipe remembers, how banks are kept, and what a sum of recipes may hold."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jkd import optim, sharding
from jkd.config import Run
from jkd.errors import InputError
from jkd.recipe import Bank, Recipe, Update, Vars
from jkd.recipes import DKD, KD, Combine, Supervised
from jkd.types import Term

EXAMPLES = 100
LAYOUTS = {
    "4 microbatches": (1, {"microbatches": 4}),
    "8 devices": (8, {}),
    "fsdp, 2 microbatches": (8, {"mesh": tiny.FSDP, "microbatches": 2}),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembers(Recipe):
    """Follows its own earlier answers to each example (temporal ensembling), and keeps count and a running loss."""

    needs_teacher: ClassVar[bool] = False

    def init(self, key, ctx):
        memory = {"answers": Bank.full(ctx, (ctx.classes,), fill=1.0), "steps": jnp.int32(0), "loss": jnp.float32(0)}
        return Vars(memory=memory)

    def terms(self, vars, student, teacher, batch, *, clock, key):
        earlier = vars.memory["answers"][batch["index"]]
        return {
            "follow": Term(jnp.square(student.logits - earlier), batch["weight"]),
            "steps": Term(jnp.broadcast_to(vars.memory["steps"], batch["weight"].shape), batch["weight"], 0.0),
        }

    def observe(self, vars, student, teacher, batch):
        return {"answers": student.logits}

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return {
            "answers": memory["answers"].write(batch["index"], observed["answers"], batch["weight"]),
            "steps": memory["steps"] + 1,
            "loss": 0.5 * memory["loss"] + 0.5 * terms["follow"],
        }

    def sampling(self, memory):
        return np.abs(np.asarray(memory["answers"].rows)).sum(-1)[:EXAMPLES]


def rows(seed=0):
    batch = tiny.batch(seed=seed, ragged=True)
    order = np.random.default_rng(seed).permutation(EXAMPLES)[: tiny.ROWS]
    return batch | {"index": np.where(batch["weight"] > 0, order, order[0]).astype(np.int32)}


def engine(layout=None, **fields):
    devices, laid_out = LAYOUTS[layout] if layout else (1, {})
    run = tiny.run(recipe=Remembers(), teacher=None, **fields | laid_out)
    return tiny.Engine(run, rows(), devices=devices, train_size=EXAMPLES)


@pytest.fixture(scope="module")
def whole():
    return engine().train([rows(0), rows(1), rows(0)])


def test_memory_is_written_with_the_rows_that_count_and_no_others(whole):
    batch, ctx = rows(), engine().ctx
    answers = ctx.student.apply(ctx.student.params, {}, batch)[0].logits
    wanted = np.ones((EXAMPLES, tiny.CLASSES), np.float32)
    real = batch["weight"] > 0
    wanted[batch["index"][real]] = answers[real]
    np.testing.assert_allclose(whole.first.memory["answers"].rows, wanted, rtol=1e-5, atol=1e-6)
    assert not real.all()


def test_memory_is_read_as_it_stood_when_the_step_began(whole):
    assert [int(metrics["term/steps"]) for metrics in whole.metrics] == [0, 1, 2]
    expected = 0.0
    for metrics in whole.metrics:
        expected = 0.5 * expected + 0.5 * float(metrics["term/follow"])
    np.testing.assert_allclose(whole.state.memory["loss"], expected, rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_the_same_however_the_batch_is_cut_and_placed(layout, whole):
    found = engine(layout).train([rows(0), rows(1), rows(0)])
    bank = found.state.memory["answers"].rows
    assert bank.shape[0] == (104 if LAYOUTS[layout][0] == 8 else 100)
    np.testing.assert_allclose(bank[:EXAMPLES], whole.state.memory["answers"].rows, rtol=1e-4, atol=1e-5)
    assert (bank[EXAMPLES:] == 1).all()
    np.testing.assert_allclose(found.losses, whole.losses, rtol=1e-5)
    assert found.state.memory["steps"] == 3


def test_banks_are_split_by_rows_and_stay_so():
    made = engine("8 devices")
    state, _ = made.step(made.fresh(), made.frozen, made.put(rows()))
    bank = state.memory["answers"].rows
    assert bank.sharding.spec == sharding.BATCH
    assert {shard.data.shape for shard in bank.addressable_shards} == {(13, tiny.CLASSES)}
    assert state.memory["steps"].sharding.is_fully_replicated


def test_sampling_gives_one_weight_for_each_training_example(whole):
    assert Remembers().sampling(whole.state.memory).shape == (EXAMPLES,)
    assert KD().sampling({}) is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoUpdates(Remembers):
    @property
    def updates(self):
        return (Update(name="first"), Update(name="second"))


def test_two_updates_of_a_step_read_the_same_memory_and_both_write():
    made = tiny.Engine(tiny.run(recipe=TwoUpdates(), teacher=None), rows(), train_size=EXAMPLES)
    found = made.train([rows(), rows()])
    seen = [[int(metrics[f"term/{name}.steps"]) for name in ("first", "second")] for metrics in found.metrics]
    assert seen == [[0, 0], [2, 2]]
    assert found.state.memory["steps"] == 4
    # the second update differentiates at the parameters that the first left
    assert found.metrics[0]["term/first.follow"] != found.metrics[0]["term/second.follow"]


def test_an_index_outside_the_bank_reads_zeros_and_writes_nothing():
    bank = Bank(jnp.arange(4.0))
    np.testing.assert_array_equal(bank[jnp.array([1, 9])], [1, 0])
    written = bank.write(jnp.array([2, 9, 0]), jnp.array([7.0, 8.0, 9.0]), jnp.array([0.5, 1.0, 0.0]))
    np.testing.assert_array_equal(written.rows, [0, 1, 7, 3])


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeakMemory(Recipe):
    needs_teacher: ClassVar[bool] = False

    def init(self, key, ctx):
        return Vars(memory={"mean": jnp.asarray(0.0), "python": 0.0})

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return {"square": Term(jnp.square(student.logits - vars.memory["mean"]), batch["weight"])}

    def remember(self, memory, observed, batch, *, terms, clock, key):
        return {"mean": jnp.where(clock.step > 1, 1.0, 2.0), "python": jnp.asarray(1.0)}


def test_memory_made_of_python_numbers_does_not_compile_again():
    made = tiny.Engine(tiny.run(recipe=WeakMemory(), teacher=None))
    made.train(tiny.batches(3))
    assert made.step._cache_size() == 1


# --- sums of recipes ---------------------------------------------------------------------------------------------------------


def test_members_of_a_sum_keep_their_parameters_memory_and_optimizers_apart():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Scaled(Recipe):
        name: str
        needs_teacher: ClassVar[bool] = False

        def init(self, key, ctx):
            scale = jnp.ones((ctx.classes, 1))
            return Vars(
                params={"scale": {"kernel": scale}}, memory={"steps": jnp.int32(0)}, buffers={"scale": {"two": 2 * scale}}
            )

        def terms(self, vars, student, teacher, batch, *, clock, key):
            scaled = student.logits @ vars.params["scale"]["kernel"] + vars.buffers["scale"]["two"].sum()
            return {self.name: Term(jnp.square(scaled), batch["weight"], 1 + vars.memory["steps"])}

        def remember(self, memory, observed, batch, *, terms, clock, key):
            return {"steps": memory["steps"] + 1}

    both = Combine(recipes=(Scaled(name="a"), Combine(recipes=(Scaled(name="b"), KD()))))
    optimizers = {"scale": optim.sgd(0.1), "student": optim.sgd(0.0)}
    made = tiny.Engine(tiny.run(recipe=both, optimizer=optimizers))
    found = made.train(tiny.batches(2))
    assert {"term/a", "term/b", "term/kd", "term/task"} < found.metrics[0].keys()
    assert set(found.state.params) == {"student", "0:scale", "1:0:scale"}
    assert not tiny.identical(found.start.params["1:0:scale"], found.first.params["1:0:scale"])
    assert [float(metrics["coef/b"]) for metrics in found.metrics] == [1, 2]


def test_two_members_with_the_same_term_are_refused():
    with pytest.raises(InputError, match="KD and Supervised have the same term 'task'"):
        tiny.Engine(tiny.run(recipe=Combine(recipes=(KD(), Supervised()))))
    with pytest.raises(InputError, match="have the same term 'task'"):
        tiny.Engine(tiny.run(recipe=Combine(recipes=(DKD(), KD()))))


def hooked(hook):
    return dataclasses.make_dataclass(
        "Hooked", [], bases=(KD,), frozen=True, kw_only=True, namespace={hook: lambda self, *args: None}
    )()


@pytest.mark.parametrize("hook", ["forward", "deploy", "prepare", "sampling"])
def test_a_recipe_with_a_hook_of_its_own_is_no_summand(hook):
    with pytest.raises(InputError, match=f"Hooked has a {hook} of its own"):
        Combine(recipes=(hooked(hook),))


def test_a_sum_needs_a_teacher_where_a_member_does():
    assert Combine(recipes=(KD(), Supervised())).needs_teacher
    assert not Combine(recipes=(Supervised(),)).needs_teacher
    with pytest.raises(InputError, match="needs a teacher"):
        tiny.Engine(tiny.run(recipe=Combine(recipes=(KD(task_weight=0.0), Supervised())), teacher=None))


def test_a_sum_compares_classes_where_a_member_does():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Features(Recipe):
        same_classes: ClassVar[bool] = False

    assert not Combine(recipes=(Features(), Features())).same_classes
    assert Combine(recipes=(Features(), KD())).same_classes


def test_recipes_are_values():
    assert KD(temperature=2.0) == KD(temperature=2.0) != KD()
    with pytest.raises(dataclasses.FrozenInstanceError):
        KD().temperature = 1.0
    assert {field.name for field in dataclasses.fields(Run)} >= {"student", "teacher", "recipe"}
