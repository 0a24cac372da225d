"""What `jkd plan` says of a program: the laws of its collectives, its bytes and operations, and that TPUs are compiled for."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from jkd import configfile, data, hlo, losses, plan, plantext, topology, trees
from jkd.cli import main, parser
from jkd.config import Experiment
from jkd.errors import InputError, MissingExtra
from jkd.recipe import Recipe, Update
from jkd.recipes import KD
from jkd.sharding import MeshShape
from jkd.types import Term

ROWS, WIDE, CLASSES = 256, 128, 40
FSDP = MeshShape(data=1, fsdp=8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Related(Recipe):
    """Labels, and the distances between the examples of a batch, which every device must know."""

    couples_batch = True

    def terms(self, vars, student, teacher, batch, *, clock, key):
        return {
            "task": Term(losses.cross_entropy(student.logits, batch["label"]), batch["weight"]),
            "distance": Term(losses.rkd_distance(student.logits, teacher.logits), batch["weight"]),
        }


@functools.cache
def planned(name: str) -> plan.Plan:
    fields = {
        "data": {},
        "fsdp": {"mesh": FSDP},
        "remat": {"mesh": FSDP, "remat": jax.checkpoint_policies.nothing_saveable},
        "related": {"recipe": Related()},
        "coupled": {"student": tiny.student(width=WIDE, classes=CLASSES, norm="batch")},
    }[name]
    networks = dict(
        student=tiny.student(width=WIDE, classes=CLASSES), teacher=tiny.teacher(width=96, classes=CLASSES), batch_size=ROWS
    )
    run = tiny.run(**networks | fields)
    rows = tiny.batch(ROWS, classes=CLASSES)
    examples = data.arrays(image=rows["image"], label=rows["label"])
    gpus = topology.of("gpu:h100x8")
    return plan.plan(dataclasses.replace(run, data=examples), topology.by_cpu(gpus, "asked to") if gpus.instead else gpus)


def bytes_of(made: plan.Plan, *kinds: str, of: str | None = None) -> int:
    assert made.traffic is not None
    return sum(each.bytes for each in made.traffic if each.kind in kinds and of in (None, each.of))


def student_bytes(made: plan.Plan, *, split: bool = False) -> int:
    leaves, specs = trees.flatten(made.ctx.params["student"]), trees.flatten(made.ctx.specs["student"])
    return sum(leaf.size * 4 for path, leaf in leaves.items() if not split or "fsdp" in specs[path])


def test_under_data_parallelism_gradients_alone_travel():
    made = planned("data")
    assert not [each for each in made.traffic if each.of == "teacher"]
    assert bytes_of(made, "all-reduce", "reduce-scatter") == pytest.approx(student_bytes(made), rel=0.01)
    rest = sum(each.bytes for each in made.traffic) - bytes_of(made, "all-reduce", "reduce-scatter", of="student")
    assert rest <= 0.01 * student_bytes(made)
    assert "the teacher has none" in plantext.text("student", made)


@pytest.mark.parametrize(("name", "times"), [("fsdp", 1), ("remat", 2)])
def test_under_fsdp_parameters_are_gathered_once_and_again_where_the_forward_pass_is_repeated(name, times):
    made = planned(name)
    split = student_bytes(made, split=True)
    assert split > 0.9 * student_bytes(made)
    assert bytes_of(made, "all-reduce", "reduce-scatter") == pytest.approx(student_bytes(made), rel=0.01)
    teacher = trees.flatten(made.ctx.params["teacher"])
    theirs = sum(leaf.size * 4 for leaf in teacher.values() if leaf.size >= 1024)
    assert bytes_of(made, "all-gather") == pytest.approx(times * split + theirs, rel=0.01)
    if jax.__version_info__ < (0, 11):  # whose XLA leaves the scope out of a gather's name
        assert bytes_of(made, "all-gather", of="teacher") == pytest.approx(theirs, rel=0.01)
    known = bytes_of(made, "all-gather", "all-reduce", "reduce-scatter")
    assert sum(each.bytes for each in made.traffic) == known  # nothing travels in another way
    assert abs(known - times * split - theirs - student_bytes(made)) <= 0.01 * known  # nor does anything else


@functools.cache
def language(mesh: MeshShape, remat: bool, *sets: str) -> plan.Plan:
    """The language config's own shapes, so many rows that its losses walk blocks of logits."""
    run = plan.pick(configfile.resolve(configfile.load("lm_stdlib"), ["student.batch_size=32", *sets]))[1]
    policy = jax.checkpoint_policies.nothing_saveable if remat else None
    return plan.plan(dataclasses.replace(run, mesh=mesh, remat=policy), topology.of("cpu:8"))


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "tied"), [(False, False), (True, True)])
def test_a_language_config_keeps_the_same_laws(remat, tied):
    """Layers that are scanned, whose kernels are gathered one at a time, and a loss in blocks."""
    made = language(FSDP, remat, f"student.student.tied={tied}")
    split = student_bytes(made, split=True)
    theirs = trees.flatten(made.ctx.specs["teacher"])
    teacher = sum(4 * leaf.size for path, leaf in trees.flatten(made.ctx.params["teacher"]).items() if "fsdp" in theirs[path])
    gathered = (1 + remat) * split
    assert bytes_of(made, "all-gather") == pytest.approx(gathered + teacher, rel=0.01)
    reduced = student_bytes(made)  # a table that is embedding and head at once counts once
    assert bytes_of(made, "all-reduce", "reduce-scatter") == pytest.approx(reduced, rel=0.01)
    total = sum(each.bytes for each in made.traffic)
    assert abs(total - gathered - teacher - reduced) <= 0.01 * total


def test_batchnorm_tells_its_statistics_and_no_features():
    made = planned("coupled")
    gradients = bytes_of(made, "all-reduce", "reduce-scatter") - student_bytes(made)
    assert 0 < gradients <= 16 * WIDE * 4  # means, variances and their gradients, one number for each feature
    assert not [each for each in made.traffic if each.kind not in ("all-reduce", "reduce-scatter")]
    assert not hlo.holding(made.program, [ROWS])


def test_relations_gather_one_answer_of_each_example_and_nothing_else_does():
    made = planned("related")
    gathered = bytes_of(made, "all-gather")
    answers = ROWS * CLASSES * 4
    assert 0 < gathered <= 4 * answers  # of teacher and student, forward and backward
    assert made.work.student > 0
    for name in ("data", "fsdp", "remat"):
        other = planned(name)
        assert not hlo.holding(other.program, [ROWS]), "a device holds rows of others"
        assert not [each for each in other.traffic if each.kind == "all-gather" and each.of == "step"]
    assert hlo.holding(made.program, [ROWS, CLASSES])


def test_bytes_of_what_stays_are_exact():
    for name, share in (("data", 1), ("fsdp", 8)):
        made = planned(name)
        parameters = sum(
            leaf.size * 4 // (share if "fsdp" in spec else 1)
            for leaf, spec in zip(
                trees.flatten(made.ctx.params["student"]).values(),
                trees.flatten(made.ctx.specs["student"]).values(),
                strict=True,
            )
        )
        assert made.bytes_per_chip["parameters"] == parameters
        assert parameters <= made.bytes_per_chip["optimizer"] <= parameters + 16  # SGD's momentum, and a counter
        # the compiler's count of the program's arguments is this one
        assert made.bytes_per_chip["padding"] <= 64
    assert planned("fsdp").bytes_per_chip["teacher"] < planned("data").bytes_per_chip["teacher"] / 4


def test_operations_are_those_of_the_networks():
    made = planned("data")
    student, teacher = (ROWS * 2 * (32 * width + width * CLASSES) for width in (WIDE, 96))
    assert made.work.teacher == pytest.approx(teacher, rel=0.05)
    # the first layer's input needs no gradient
    assert made.work.student == pytest.approx(3 * student - ROWS * 2 * 32 * WIDE, rel=0.05)


def test_the_figures_that_json_keeps():
    made = planned("data")
    found = json.loads(json.dumps(made.as_json()))
    wanted = "chips mesh fits bytes_per_chip flops_per_step collectives predicted_step_s bound_by compile_s"
    assert list(found) == wanted.split()
    assert (found["chips"], found["mesh"], found["fits"]) == (8, {"data": 8, "fsdp": 1, "tensor": 1}, True)
    assert set(found["flops_per_step"]) == {"teacher", "student"}
    assert all(set(row) == {"kind", "bytes", "count", "of"} for row in found["collectives"])
    assert found["predicted_step_s"] == max(made.seconds.values()) == made.seconds[found["bound_by"]]
    assert found["compile_s"] > 0
    chip = made.topology.chip
    assert made.seconds["compute"] == pytest.approx(made.executed / 8 / chip.tf32)
    reduced = bytes_of(made, "all-reduce")
    assert made.seconds["interconnect"] == pytest.approx(2 * 7 / 8 * reduced / chip.link_bandwidth)


def test_the_text_says_whether_it_fits_how_long_and_how_dear():
    made = planned("data")
    text = plantext.text("student", made, price=2.0)
    assert "gpu:h100x8: 8 h100 chips, mesh data 8" in text
    assert "FITS: " in text
    assert f"bound by {made.bound_by}" in text
    assert "5 steps, 1,280 examples" in text
    assert "at 2 for a chip and an hour" in text
    small = dataclasses.replace(made, fits=False, seconds=None, traffic=None, refusal="Used 20.0G of 15.75G hbm.")
    assert "DOES NOT FIT" in plantext.text("student", small)
    assert "Used 20.0G of 15.75G hbm." in plantext.text("student", small)
    assert "collectives of a step: not known" in plantext.text("student", small)
    assert small.as_json()["collectives"] is None  # there may be some
    assert dataclasses.replace(made, traffic=[]).as_json()["collectives"] == []


def test_what_another_compiler_says_is_an_estimate():
    """For GPUs the CPU's compiler stands in: no line of what it decided is told as a fact or as a bound."""
    stood_in = planned("data")
    assert not stood_in.topology.exact
    own = dataclasses.replace(stood_in, topology=dataclasses.replace(stood_in.topology, exact=True))
    guesses = [
        *(f"  {part} (estimate)" for part in ("activations", "temporaries", "program")),
        "largest buffers (estimate)",
        "collectives of a step (estimate)",
        "perfect overlap: memory traffic and collectives are an estimate",
        "about ",
    ]
    for made, found, left in (
        (stood_in, guesses, ("takes no less", "at least")),
        (own, ("takes no less", "at least"), guesses),
    ):
        text = plantext.text("student", made)
        assert all(f"{words}" in text for words in found)
        assert not any(f"{words}" in text for words in left)
    for exact in ("parameters", "optimizer", "teacher"):
        assert f"  {exact} (estimate)" not in plantext.text("student", stood_in)


def test_updates_that_do_not_run_at_every_step_are_told():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Often(KD):
        @property
        def updates(self):
            return (Update(), Update(every=4, name="rare"))

    made = planned("data")
    assert "here all of them run" not in plantext.text("student", made)
    rare = dataclasses.replace(made.ctx, run=dataclasses.replace(made.ctx.run, recipe=Often()))
    assert "updates run every 1, 4 steps; here all of them run" in plantext.text("student", dataclasses.replace(made, ctx=rare))


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (40.25G) exceeds available HBM (15.75G).",
            40.25 * 2**30,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5 * 2**30 - 1000),
        ("RESOURCE_EXHAUSTED: no room", 0),
    ],
)
def test_what_a_program_wanted_that_does_not_fit(message, size):
    assert plan.refused(message, 1000) == size


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v7:2x2", "--topology v7:2x2: give v5e:16x16"),
        ("cpu:0", "--topology cpu:0: give"),
        ("gpu:h100", "--topology gpu:h100: give"),
        ("gpu:h10x8", "no chip 'h10' is known; did you mean 'h100'"),
        ("gpu:v5ex8", "v5e is no GPU"),
        ("cpu:4096", "4096 devices are wanted"),
    ],
)
def test_a_topology_that_there_is_not(name, message):
    with pytest.raises(InputError, match=message):
        topology.of(name)


def test_the_run_that_is_planned():
    teacher, student = tiny.run(teacher=None), tiny.run(teacher="teacher")
    both = Experiment(teacher=teacher, student=student)
    name, run = plan.pick(both)
    assert (name, run.teacher.name) == ("student", teacher.student.name)
    assert plan.pick(both, "teacher")[0] == "teacher"
    assert (
        plan.pick(Experiment(first=teacher, taught=dataclasses.replace(student, teacher="first"), last=teacher))[0] == "taught"
    )
    with pytest.raises(InputError, match=r"--run studnt: no such run; did you mean 'student'"):
        plan.pick(both, "studnt")
    with pytest.raises(InputError, match="its teacher is what the node 'made' gives"):
        plan.pick(Experiment(made=lambda: None, student=tiny.run(teacher="made")))


TPU = importlib.util.find_spec("libtpu") is not None
needs_tpu = pytest.mark.skipif(not TPU, reason="the TPU's compiler is not installed: pip install 'jkd[tpu]'")


@pytest.mark.skipif(TPU, reason="the TPU's compiler is installed")
def test_without_the_tpus_compiler_the_install_command_is_told():
    with pytest.raises(MissingExtra, match=r"pip install 'jkd\[tpu\]'"):
        topology.of("v5e:16x16")


@needs_tpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "name", "chips", "sets"),
    [
        ("digits", "v5e:16x16", 256, ["*.batch_size=1024"]),
        ("digits", "v6e:4x4", 16, ["*.batch_size=1024"]),
        ("lm_stdlib", "v5p:4x4x8", 128, ["batch_size=256"]),
        (
            "lm_stdlib",
            "v5p:4x4x8",
            128,
            ["batch_size=256", "student.student.tied=False", "student.mesh.data=16", "student.mesh.fsdp=8"],
        ),
    ],
)
def test_a_config_compiles_for_a_pod(config, name, chips, sets):
    """A vision and a language config, data parallel and split: the real compiler's program keeps the laws."""
    run = plan.pick(configfile.resolve(configfile.load(config), sets))[1]
    made = plan.plan(run, topology.of(name))
    assert made.as_json()["chips"] == chips
    assert made.fits
    assert made.bytes_per_chip["parameters"] >= trees.nbytes(made.ctx.params["student"]) / made.ctx.mesh.shape["fsdp"]
    gathered = dict.fromkeys(made.ctx.params, 0)
    for one in hlo.collectives(made.program):
        if one.kind == "all-gather":
            (group,) = [each for each in gathered if each in re.split(r"[/()]", one.of)]
            gathered[group] += one.count * one.devices * sum(math.prod(array.shape) for array in one.arrays)
    # in numbers: where a product rounds what it reads to bfloat16, the TPU's compiler rounds first and gathers half the bytes
    for group, params in made.ctx.params.items():
        specs = trees.flatten(made.ctx.specs[group])
        assert gathered[group] == sum(leaf.size for path, leaf in trees.flatten(params).items() if "fsdp" in specs[path])
    student = made.ctx.params["student"]
    assert bytes_of(made, "all-reduce", "reduce-scatter") == pytest.approx(trees.nbytes(student), rel=0.01)
    assert made.seconds is not None
    assert np.isfinite(list(made.seconds.values())).all()


@needs_tpu
@pytest.mark.slow
def test_a_program_that_does_not_fit_is_told_and_not_a_crash():
    run = plan.pick(configfile.resolve(configfile.load("digits"), ["student.batch_size=16777216"]))[1]
    made = plan.plan(run, topology.of("v5e:2x2"))
    assert made.fits is False
    assert sum(made.bytes_per_chip.values()) > made.topology.chip.memory
    assert made.as_json()["predicted_step_s"] is None
    assert made.as_json()["collectives"] is None
    assert "DOES NOT FIT" in plantext.text("student", made)


@needs_tpu
def test_a_slice_that_no_tpu_has():
    with pytest.raises(InputError, match="the TPU compiler knows no such slice"):
        topology.of("v5e:3x5")


def test_the_page_holds_what_the_commands_print():
    """The outputs in docs/pods.md are written by docs/pods.py; here their form is held, and that none is from another version."""
    module = importlib.util.spec_from_file_location("pods", Path(__file__).parent.parent / "docs" / "pods.py")
    pods = importlib.util.module_from_spec(module)
    module.loader.exec_module(pods)
    found = pods.blocks(pods.PAGE.read_text(encoding="utf-8"))
    assert len(found) == 3
    for command, block in found:
        assert f"$ {command}\n" in block, "run: python docs/pods.py"
        parser().parse_args(shlex.split(command)[1:])
        for line in (
            "memory of one chip",
            "floating-point operations of a step",
            "collectives of a step",
            "predicted: ",
            "FITS: ",
        ):
            assert f"\n{line}" in block
        assert pods.block(command, block.partition(f"$ {command}\n")[2].removesuffix("\n```\n<!-- /plan -->")) == block


CONFIG = """
from jkd import Experiment, Run, data, models, optim, recipes

def config(*, steps=20):
    shared = dict(data=data.digits(), steps=steps, optimizer=optim.adamw(1e-3), batch_size=32)
    teacher, student = (models.mlp.Config(features=64, hidden=(width,), classes=10) for width in (32, 8))
    return Experiment(
        teacher=Run(student=teacher, recipe=recipes.Supervised(), **shared),
        student=Run(student=student, teacher="teacher", recipe=recipes.KD(), **shared),
    )
"""


def test_the_command(tmp_path, capsys):
    (tmp_path / "small.py").write_text(CONFIG)
    sets = ["--set", "steps=30", "--set", "student.mesh.fsdp=8", "--set", "student.mesh.data=1"]
    kept = tmp_path / "plan.json"
    assert main(["plan", str(tmp_path / "small.py"), "--topology", "cpu:8", *sets, "--json", str(kept)]) == 0
    assert "student on cpu:8: 8 cpu chips, mesh data 1, fsdp 8, tensor 1" in capsys.readouterr().out
    found = json.loads(kept.read_text())
    assert (found["chips"], found["fits"], found["predicted_step_s"]) == (8, None, None)
    assert {row["of"] for row in found["collectives"] if row["kind"] == "all-gather"} == {"teacher"}  # 2,048 scalars
    assert main(["plan", str(tmp_path / "small.py"), "--topology", "v7:2x2"]) == 2
    assert "give v5e:16x16" in capsys.readouterr().err
