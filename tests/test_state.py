"""The state: what is in it, where each leaf lives, and that it is a plain tree."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from jkd import optim, sharding, trees
from jkd.config import Ema
from jkd.recipe import Bank, Recipe, Vars
from jkd.state import State, frozen_shapes, init_state, state_shapes, state_shardings, step_shapes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(Recipe):
    """Something in every field of the state."""

    needs_teacher: ClassVar[bool] = False
    terms = tiny.Plain.terms

    def init(self, key, ctx):
        kernel = jax.random.normal(key, (64, 64))
        memory = {"bank": Bank.full(ctx, (3,)), "count": jnp.int32(0)}
        return Vars(params={"projector": {"kernel": kernel}}, memory=memory, buffers={"projector": {"mean": jnp.zeros(4)}})


@pytest.fixture(scope="module")
def ctx():
    run = tiny.run(
        student=tiny.network(norm="batch"),
        recipe=Everything(),
        optimizer=optim.adamw(1e-3),
        ema=Ema(groups=("student", "projector")),
        mesh=tiny.FSDP,
    )
    return tiny.make_context(run, tiny.batch(), train_size=100)


@pytest.fixture(scope="module")
def made(ctx):
    return init_state(ctx, jax.random.key(0))


def test_the_state_is_created_in_its_places(ctx, made):
    state, frozen = made
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(state_shardings(ctx)), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    kernel = state.params["student"]["body"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    assert frozen["params"]["teacher"]["body"]["kernel"].sharding.spec == P(None, "fsdp")


def test_no_device_ever_holds_a_whole_parameter_while_the_state_is_made(ctx):
    from jkd import state

    init = jax.jit(lambda key: state._init(ctx, key, frozen_shapes(ctx), {}), out_shardings=state_shardings(ctx))
    memory = init.lower(jax.random.key(0)).compile().memory_analysis()
    whole = trees.nbytes(state_shapes(ctx))
    assert memory.output_size_in_bytes < whole / 3  # small leaves are repeated
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(state_shapes(ctx).params))
    assert memory.temp_size_in_bytes < largest * 2


def test_moments_and_averages_live_where_their_parameters_do(made):
    state, _ = made
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves((state.optimizer, state.ema)) if leaf.shape == (32, 64)}
    assert specs == {state.params["student"]["body"]["kernel"].sharding.spec} == {P(None, "fsdp")}


def test_shapes_and_places_are_known_without_making_anything(ctx, made):
    state, frozen = made
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)  # noqa: E731
    assert describe(state_shapes(ctx)) == describe(state)
    assert describe(frozen_shapes(ctx)) == describe(frozen)
    shapes = step_shapes(ctx)
    for shape, leaf in zip(jax.tree.leaves(shapes[:2]), jax.tree.leaves((state, frozen)), strict=True):
        assert leaf.sharding.is_equivalent_to(shape.sharding, leaf.ndim)
    assert all(leaf.sharding.spec == sharding.BATCH for leaf in jax.tree.leaves(shapes[2]))


def test_the_state_is_a_tree_that_comes_apart_and_together(made):
    state, _ = made
    leaves, structure = jax.tree.flatten(state)
    again = jax.tree.unflatten(structure, leaves)
    assert isinstance(again, State)
    assert tiny.identical(state, again)
    assert isinstance(again.memory["bank"], Bank)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    names = {field.name for field in dataclasses.fields(State)}
    assert names == {"step", "params", "optimizer", "buffers", "ema", "memory", "key"}
    assert set(state.buffers) == {"student", "projector"}


def test_no_two_leaves_share_memory(made):
    pointers = [shard.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made[0]) for shard in leaf.addressable_shards]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_seed_gives_the_same_first_state_on_any_number_of_devices(devices, made):
    run = tiny.run(student=tiny.network(norm="batch"), recipe=tiny.Plain(), teacher=None)
    ctx = tiny.make_context(run, tiny.batch(), devices=jax.devices()[:devices])
    found = init_state(ctx, jax.random.key(0))[0]
    assert tiny.identical(found.params["student"], made[0].params["student"])
    other = init_state(ctx, jax.random.key(1))[0]
    assert tiny.distance(other.params, found.params) > 0.1
    assert not np.array_equal(other.key, found.key)


def test_half_precision_weights_are_kept_in_float32():
    model = tiny.student()
    half = model.with_weights(*jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (model.params, model.buffers)))
    ctx = tiny.make_context(tiny.run(student=half), tiny.batch(), devices=jax.devices()[:1])
    state, _ = init_state(ctx, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert tiny.distance(state.params["student"], tiny.student().params) < 0.01


def test_the_teacher_is_no_part_of_the_state(made):
    state, frozen = made
    assert "teacher" not in state.params
    assert set(frozen) == {"params", "buffers"}
    assert tiny.identical(frozen["params"]["teacher"], tiny.teacher().params)
