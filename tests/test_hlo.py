"""Reading compiled programs: snippets as XLA writes them on several platforms, and programs compiled here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jkd import hlo
from jkd.sharding import MeshShape

LAYERS, ROWS, WIDE = 3, 16, 24

# A loop of 5 turns in a loop of 2, as the TPU compiler writes it: the numbers of turns stand in the conditions.
NESTED = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}, num_partitions=16

%add.clone (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %y)
}

%inner.body (p.1: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %gte.2 = bf16[8,16]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %all-gather.1 = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%gte.2), \
replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_1'}, dimensions={1}, \
metadata={op_name="jit(step)/jvp(teacher)/while/body/squeeze" stack_frame_id=9}
  %slice.1 = bf16[8,16]{1,0} slice(%all-gather.1), slice={[0:8], [0:16]}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%gte.1, %slice.1)
}

%inner.condition (p.2: (s32[], bf16[8,16])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(5)
  %p.2 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %gte.3 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%gte.3, %constant.5), direction=LT
}

%all-reduce-scatter.1 (p.3: f32[8,64]) -> f32[8,16] {
  %p.3 = f32[8,64]{1,0} parameter(0)
  %all-reduce.7 = f32[8,64]{1,0} all-reduce(%p.3), replica_groups=[4,4]<=[16], to_apply=%add.clone
  ROOT %dynamic-slice.1 = f32[8,16]{1,0} dynamic-slice(%all-reduce.7), dynamic_slice_sizes={8,16}
}

%outer.body (p.4: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p.4 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  %while.1 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) while(%p.4), condition=%inner.condition, body=%inner.body
  %gte.4 = bf16[8,16]{1,0} get-tuple-element(%while.1), index=1
  %broadcast.1 = f32[8,64]{1,0} broadcast(%gte.4), dimensions={0}
  %scatter.1 = f32[8,16]{1,0} fusion(%broadcast.1), kind=kCustom, calls=%all-reduce-scatter.1, metadata={op_name="jit(step)/add"}
  ROOT %tuple.2 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) tuple(%gte.4, %gte.4)
}

%outer.condition (p.5: (s32[], bf16[8,16])) -> pred[] {
  %p.5 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (state: f32[8,16]) -> f32[8,16] {
  %state = f32[8,16]{1,0:T(8,128)} parameter(0), metadata={op_name="state.params['student']"}
  %convert.1 = bf16[8,16]{1,0} convert(%state)
  %counter = s32[]{:T(128)} constant(0)
  %tuple.3 = (s32[]{:T(128)}, bf16[8,16]{1,0}) tuple(%counter, %convert.1)
  %while.2 = (s32[]{:T(128)}, bf16[8,16]{1,0}) while(%tuple.3), condition=%outer.condition, body=%outer.body, \
backend_config={"known_trip_count":{"n":"2"}}
  %all-reduce-start.1 = f32[8,16]{1,0} all-reduce-start(%state), \
replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}, to_apply=%add.clone, \
metadata={op_name="jit(step)/transpose(jvp(student))/dot_general"}
  %all-reduce-done.1 = f32[8,16]{1,0} all-reduce-done(%all-reduce-start.1)
  ROOT %add.9 = f32[8,16]{1,0} add(%all-reduce-done.1, %state)
}
"""


def test_loops_fusions_and_asynchronous_pairs_are_counted_as_they_run():
    found = {one.kind: one for one in hlo.collectives(NESTED)}
    gather, scatter, reduce = found["all-gather"], found["reduce-scatter"], found["all-reduce"]
    assert len(hlo.collectives(NESTED)) == 3
    assert (gather.kind, gather.bytes, gather.count, gather.devices) == ("all-gather", 8 * 64 * 2, 5 * 2, 4)
    assert gather.of == "jit(step)/jvp(teacher)/while/body/squeeze"
    assert gather.total == 10 * 1024
    assert gather.sent == 10 * 1024 * 3 / 4  # a device has a quarter of it
    assert (scatter.kind, scatter.bytes, scatter.count, scatter.devices) == ("reduce-scatter", 8 * 64 * 4, 2, 4)
    assert (reduce.kind, reduce.bytes, reduce.count, reduce.devices) == ("all-reduce", 8 * 16 * 4, 1, 4)
    assert reduce.sent == 2 * 512 * 3 / 4


def test_buffers_are_what_is_written_to_main_memory():
    found = {(one.op, one.array.dtype, one.array.shape) for one in hlo.buffers(NESTED)}
    assert ("parameter", "f32", (8, 16)) in found  # the entry's arguments are
    assert ("all-gather", "bf16", (8, 64)) not in found  # lies in a TPU's vector memory
    assert ("all-reduce", "f32", (8, 64)) not in found  # within a fusion
    assert ("broadcast", "f32", (8, 64)) in found
    assert not {op for op, *_ in found} & {"tuple", "get-tuple-element", "while", "all-reduce-done"}
    assert [one.bytes for one in hlo.buffers(NESTED)][:2] == [8 * 64 * 4, 8 * 16 * 4]
    assert {one.bytes for one in hlo.buffers(NESTED, smallest=512)} == {2048, 512}


def test_memory_traffic_is_what_operations_read_and_write_as_often_as_they_run():
    entry = (512 + 256) + (512 + 512) + (512 + 512 + 512)  # convert, all-reduce, add
    outer = (256 + 2048) + (2048 + 512)  # broadcast, and the fusion, within which nothing moves
    inner = 256 + 2 * 256  # the all-gather writes to vector memory; a slice reads what it keeps
    assert hlo.traffic(NESTED) == entry + 2 * outer + 10 * inner + 2 * 9  # and a condition's comparison


# What is read stands among the results of three of these, and nobody holds it twice.
STARTED = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

ENTRY %main (p: f32[8,16]) -> f32[8,64] {
  %p = f32[8,16]{1,0:T(8,128)} parameter(0)
  %near = (f32[8,16]{1,0:T(8,128)S(1)}, f32[8,16]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p)
  %near.1 = f32[8,16]{1,0:T(8,128)S(1)} copy-done(%near)
  %far = (f32[8,16]{1,0:T(8,128)}, f32[8,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%near.1)
  %far.1 = f32[8,16]{1,0:T(8,128)} copy-done(%far)
  %gather = (f32[8,16]{1,0:T(8,128)}, f32[8,64]{1,0:T(8,128)}) all-gather-start(%p), replica_groups={}, dimensions={1}
  %gather.1 = f32[8,64]{1,0:T(8,128)} all-gather-done(%gather)
  %sum = f32[8,16]{1,0:T(8,128)} all-reduce-start(%far.1), replica_groups={}, to_apply=%add
  %sum.1 = f32[8,16]{1,0:T(8,128)} all-reduce-done(%sum)
  ROOT %last = f32[8,64]{1,0:T(8,128)} add(%gather.1, %gather.1)
}
"""


def test_what_a_started_operation_only_reads_is_no_buffer_of_its_own():
    found = [(one.op, one.bytes) for one in hlo.buffers(STARTED)]
    small, large = 8 * 16 * 4, 8 * 64 * 4
    wanted = [
        ("all-gather-start", large),
        ("add", large),
        ("parameter", small),
        ("copy-start", small),
        ("all-reduce-start", small),
    ]
    assert found == wanted
    copies = small + small  # one reads main memory, the other writes it
    assert hlo.traffic(STARTED) == copies + (small + large) + (small + small) + 3 * large


# One of two branches runs, in a loop of 3: the first tells more, the second moves more.
EITHER = """\
HloModule jit_step, is_scheduled=true, num_partitions=4

%tells (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%a), replica_groups={}, to_apply=%add
}

%moves (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  %small = f32[2]{0} all-reduce(%b), replica_groups={}, to_apply=%add
  %wide = f32[64]{0} broadcast(%small), dimensions={}
  ROOT %cut = f32[8]{0} slice(%wide), slice={[0:8]}
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %c = (s32[], f32[8]{0}) parameter(0)
  %turn = s32[] get-tuple-element(%c), index=0
  %row = f32[8]{0} get-tuple-element(%c), index=1
  %either = f32[8]{0} conditional(%turn, %row, %row), branch_computations={%tells, %moves}
  ROOT %next = (s32[], f32[8]{0}) tuple(%turn, %either)
}

%condition (d: (s32[], f32[8])) -> pred[] {
  %d = (s32[], f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %loop = (s32[], f32[8]{0}) while(%p), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_of_a_conditions_branches_the_dearest_counts():
    (found,) = hlo.collectives(EITHER)
    assert (found.bytes, found.count) == (8 * 4, 3)
    reduces, spreads, cuts = (8 + 2) * 4, (2 + 64) * 4, 2 * 8 * 4
    assert hlo.traffic(EITHER) == 3 * (reduces + spreads + cuts)
    assert {one.bytes for one in hlo.buffers(EITHER, smallest=8)} == {8, 32, 256}  # at one time or another there are all


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("f32[8,128]{1,0:T(8,128)}", [("f32", (8, 128), 4096)]),
        ("f32[8,128]{1,0:T(8,128)S(1)}", []),  # a TPU's vector memory
        ("bf16[3]{0}", [("bf16", (3,), 6)]),
        ("pred[5]", [("pred", (5,), 5)]),
        ("f8e4m3fn[16]{0}", [("f8e4m3fn", (16,), 16)]),
        ("s4[7]{0}", [("s4", (7,), 4)]),
        ("c64[2]{0}", [("c64", (2,), 16)]),
        ("f32[]{:T(128)}", [("f32", (), 4)]),
        ("(f32[2]{0}, /*index=1*/(s8[3]{0}, token[]))", [("f32", (2,), 8), ("s8", (3,), 3), ("token", (), 0)]),
    ],
)
def test_types_and_their_sizes(written, wanted):
    text = f"HloModule m\n\nENTRY %main (p: f32[]) -> f32[] {{\n  ROOT %p = {written} parameter(0)\n}}\n"
    found = hlo.buffers(text, smallest=0)
    assert [(one.array.dtype, one.array.shape, one.bytes) for one in found] == wanted


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", 2),
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", 4),
        ("replica_groups={}", 8),
    ],
)
def test_the_devices_of_a_group_however_they_are_written(groups, devices):
    text = (
        "HloModule m, num_partitions=8\n\nENTRY main (p: f32[2]) -> f32[16] {\n  p = f32[2]{0} parameter(0)\n"
        f"  ROOT all-gather = f32[16]{{0}} all-gather(p), {groups}, dimensions={{0}}\n}}\n"
    )
    (found,) = hlo.collectives(text)
    assert (found.devices, found.bytes) == (devices, 8 * devices)


@pytest.fixture(scope="module")
def scanned() -> str:
    """A stack of layers under scan, its weights over eight devices, forward and backward; one softmax at the end."""
    mesh = MeshShape(data=1, fsdp=8).build()

    def loss(weights, rows):
        def layer(rows, weight):
            return jnp.tanh(rows @ jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, P()))), None

        with jax.named_scope("student"):
            return jax.nn.logsumexp(jax.lax.scan(layer, rows, weights)[0], axis=-1).sum()

    places = NamedSharding(mesh, P(None, None, "fsdp")), NamedSharding(mesh, P("fsdp"))
    shapes = (LAYERS, WIDE, WIDE), (8 * ROWS, WIDE)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape, place in zip(shapes, places, strict=True)]
    return jax.jit(jax.grad(loss), out_shardings=places[0]).lower(*given).compile().as_text()


def test_a_scanned_layer_counts_as_often_as_there_are_layers(scanned):
    found = hlo.collectives(scanned)
    weights = LAYERS * WIDE * WIDE * 4
    gathered = [one for one in found if one.kind == "all-gather"]
    reduced = [one for one in found if one.kind in ("all-reduce", "reduce-scatter")]
    assert sum(one.total for one in gathered) == weights  # kept whole for the backward pass
    assert sum(one.total for one in reduced) == weights
    assert {one.count for one in gathered + reduced} == {LAYERS}
    assert {one.devices for one in found} == {8}
    assert all("student" in one.of for one in gathered)


def test_buffers_of_a_compiled_program_are_one_devices(scanned):
    assert [one.array.shape for one in hlo.buffers(scanned) if one.op == "parameter" and "rows" in one.of] == [(ROWS, WIDE)]
    assert hlo.holding(scanned, [LAYERS, ROWS, WIDE])  # what the backward pass needs of every layer
    assert not hlo.holding(scanned, [8 * ROWS])  # nobody's rows are another's
    assert not hlo.holding(scanned, [LAYERS, WIDE, WIDE, WIDE])


def test_what_the_forward_pass_keeps_is_what_the_backward_pass_reads(scanned):
    outputs, weights = LAYERS * ROWS * WIDE * 4, LAYERS * WIDE * WIDE * 4
    assert outputs <= hlo.kept(scanned) <= 2 * (outputs + weights)
    assert hlo.kept(NESTED) == 0
