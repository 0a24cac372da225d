"""Every file in configs/ is complete: shrunk, it resolves and its step traces, with no data at hand."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from jkd import configfile, teachers
from jkd.cache import Cache, filling
from jkd.config import Experiment, Run, dependencies
from jkd.resolve import build, make_context
from jkd.state import state_shapes, step_shapes
from jkd.step import make_step

FOLDER = Path(__file__).parent.parent / "configs"


QUICK = ("digits",)
# one of each kind of node: all methods of the first have been trained (docs/methods.md), and of the second those that read logits
# alone know nothing of its networks
SETS = {
    "digits_methods": ['methods=("kd", "ab", "crd", "mlld", "mean_teacher")'],
    "cifar100_table": ['methods=("kd", "at", "cc", "ab", "ofd", "reviewkd", "simkd")'],
}


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in QUICK else [pytest.mark.slow], id=path.stem)
        for path in sorted(FOLDER.glob("*.py"))
    ],
)
def test_config_traces(path):
    experiment = configfile.shrink(configfile.resolve(configfile.load(path), SETS.get(path.stem, [])))
    earlier = {}
    for name, node in experiment.nodes.items():
        made = not isinstance(node, Run)
        if made:  # from what came before it
            node = node(**{needed: earlier[needed] for needed in dependencies(node)})
            assert isinstance(node, Run), f"{name}: no test of other function nodes here yet"
        run = dataclasses.replace(node, teacher=earlier[node.teacher]) if isinstance(node.teacher, str) else node
        run = configfile.shrink(Experiment(made=run)).nodes["made"] if made else run
        ctx = make_context(run)
        if isinstance(run.teacher, Cache):
            assert filled(run.teacher, ctx, earlier) == {name: leaf.shape for name, leaf in read(ctx.batch["teacher"]).items()}
        earlier[name] = ctx.student
        # of these shapes make_step has the trace already
        state, metrics = make_step(ctx).eval_shape(*step_shapes(ctx))
        assert metrics["loss"].shape == ()
        assert jax.tree.structure(state) == jax.tree.structure(state_shapes(ctx))


def filled(cache, ctx, earlier):
    """Shapes of what the teacher's answers to a batch are kept as; the codec must be of this teacher's classes."""
    teacher = teachers.named(cache.teacher, earlier) if isinstance(cache.teacher, str) else build(cache.teacher)
    batch = {name: leaf for name, leaf in ctx.raw_batch.items() if name != "teacher"}
    draws = jax.ShapeDtypeStruct(batch["weight"].shape, np.uint32)
    found = filling.program(cache.codec, teacher, ctx.run, ctx.mesh).eval_shape(teacher.params, teacher.buffers, batch, draws)
    return {name: leaf.shape for name, leaf in found.items()}


def read(answer):
    """Arrays of a cache's answer by the names that its codec has for them."""
    sparse = answer.heads.get("topk", answer.heads.get("sampled"))
    return {"logits": answer.logits} if sparse is None else sparse


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_config_says_its_command_hardware_and_result(path):
    text = configfile.load(path).__globals__["__doc__"]
    assert f"jkd train configs/{path.name}" in text
    assert "easured" in text
    assert any(word in text for word in ("CPU", "GPU", "TPU"))
