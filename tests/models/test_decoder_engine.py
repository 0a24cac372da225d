"""The decoder in the engine: split over fsdp it learns the same, and no program holds more than one layer whole."""

import dataclasses
import re

import jax
import numpy as np
import pytest
import tiny
from quick import fill

from jkd import Recipe, Run, Term, cache, losses, optim, recipes, sharding, tokens, trees
from jkd.cache import filling
from jkd.errors import InputError
from jkd.models import decoder
from jkd.resolve import make_context
from jkd.state import init_state, step_shapes
from jkd.step import make_eval_step, make_step

LAYERS = 3
CONFIG = decoder.Config(vocab=40, tokens=37, dim=32, depth=LAYERS, heads=4, kv_heads=2, hidden=64, window=5, query_norm=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(Recipe):
    """The smallest recipe for text: the cross-entropy of what comes next."""

    needs_teacher = False

    def terms(self, vars, student, teacher, batch, *, clock, key):
        labels, weight = tokens.next_tokens(batch)
        return {"task": Term(losses.cross_entropy(student.logits, labels), weight)}


@pytest.fixture(scope="module")
def trained():
    """One step of plain SGD on eight devices: the program's text, the step's metrics and the gradient."""
    numbers = np.random.default_rng(0)
    rows = {"tokens": numbers.integers(0, 37, (8, 12)).astype(np.int32), "weight": np.ones(8, np.float32)}
    rows["mask"] = (np.arange(12)[None] < numbers.integers(4, 13, (8, 1))).astype(np.int32)
    model = fill(CONFIG.build())
    run = Run(
        student=model,
        recipe=NextToken(),
        optimizer=optim.sgd(1.0, momentum=0.0),
        steps=1,
        batch_size=8,
        mesh=sharding.MeshShape(data=1, fsdp=8),
    )
    ctx = make_context(run, rows)
    program = make_step(ctx).lower(*step_shapes(ctx)).compile()
    state, frozen = init_state(ctx, jax.random.key(0))
    before = jax.device_get(state.params["student"])
    state, metrics = program(state, frozen, sharding.put_batch(rows, ctx.mesh))
    gradient = jax.tree.map(np.subtract, before, jax.device_get(state.params["student"]))
    return model, rows, program.as_text(), metrics, gradient


def test_it_learns_as_on_one_device(trained):
    model, rows, _, metrics, gradient = trained

    def loss(params):
        labels, weight = tokens.next_tokens(rows)
        values = losses.cross_entropy(model.apply(params, {}, rows, train=True)[0].logits, labels)
        return (values * weight).sum() / weight.sum()

    expected, theirs = jax.jit(jax.value_and_grad(loss))(model.params)
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs))
    for (path, found), wanted in zip(trees.flatten(gradient).items(), trees.flatten(theirs).values(), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * scale, err_msg=path)


def gathered(text):
    return [tuple(map(int, shape.split(","))) for shape in re.findall(r"= f32\[([\d,]+)\][^=]* all-gather\(", text)]


def layers_one_by_one(model, text):
    own = {tuple(leaf.shape[1:]) for leaf in jax.tree.leaves(model.params["layers"]) if leaf.size >= 1024}
    layers = [tuple(size for size in shape if size > 1) for shape in gathered(text)]
    assert own & set(layers) == own  # every split parameter of a layer is gathered …
    assert not any(LAYERS in shape for shape in gathered(text))  # … and never the stack


def test_layers_are_gathered_one_at_a_time(trained):
    layers_one_by_one(trained[0], trained[2])


def test_a_cache_is_filled_by_the_program_of_a_step(trained):
    """Layers are gathered one at a time, and kernels that XLA cannot split know the mesh; evaluation tells them too."""
    model, rows, *_ = trained
    known = []

    def apply(*args, **options):
        known.append(dict(jax.sharding.get_abstract_mesh().shape))
        return model.apply(*args, **options)

    run = Run(
        student=dataclasses.replace(model, apply=apply),
        recipe=NextToken(),
        optimizer=optim.sgd(1.0),
        steps=1,
        batch_size=8,
        mesh=sharding.MeshShape(data=1, fsdp=8),
    )
    ctx = make_context(run, rows)
    places = sharding.shardings(ctx.specs["student"], ctx.mesh)
    params = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), model.params, places)
    known.clear()
    program = filling.program(cache.TopK(k=4, vocab=37), ctx.student, run, ctx.mesh)
    compiled = program.lower(params, {}, rows, np.zeros(8, np.uint32)).compile()
    layers_one_by_one(model, compiled.as_text())
    state, frozen, batch = step_shapes(ctx)
    make_eval_step(ctx, lambda student, teacher, batch: student.hidden).eval_shape(state, frozen, batch)
    assert known == [{"data": 1, "fsdp": 8, "tensor": 1}] * 2


def context(*, student, teacher, recipe):
    rows = {"tokens": np.zeros((8, 12), np.int32), "weight": np.ones(8, np.float32)}
    run = Run(student=student, teacher=teacher, recipe=recipe, optimizer=optim.sgd(1.0), steps=1, batch_size=8)
    return make_context(run, rows)


def test_one_vocabulary_padded_in_two_ways_needs_no_flag():
    """As Qwen2.5's is: 151,936 rows of the small ones, 152,064 of the large ones, 151,665 tokens."""
    student, teacher = (dataclasses.replace(CONFIG, vocab=rows, tokens=151_665) for rows in (151_936, 152_064))
    ctx = context(student=student, teacher=teacher.build(), recipe=recipes.TokenKD())
    assert (ctx.classes, ctx.teacher_outputs.logits_shape) == (151_665, (8, 12, 151_665))
    assert (ctx.student_outputs.head.shape, ctx.teacher_outputs.head.shape) == ((32, 151_936), (32, 152_064))


def test_rows_that_only_pad_are_masked_on_both_sides():
    """Whatever stands in them: a step's loss is that of the 37 tokens, and its gradient leaves them alone."""
    shallow = dataclasses.replace(CONFIG, depth=1, remat=None)
    student, teacher = (fill(dataclasses.replace(shallow, vocab=rows).build()) for rows in (40, 48))
    for model in (student, teacher):
        model.params["head"]["kernel"] = np.asarray(model.params["head"]["kernel"]).copy()
        model.params["head"]["kernel"][:, 37:] = 9.0
    rows = {"tokens": np.random.default_rng(1).integers(0, 37, (8, 12)).astype(np.int32), "weight": np.ones(8, np.float32)}
    recipe = recipes.TokenKD(task_weight=0.5)
    run = Run(student=student, teacher=teacher, recipe=recipe, optimizer=tiny.UNIT, steps=1, batch_size=8)
    found = tiny.Engine(run, rows).train([rows])
    mine, theirs = (m.apply(m.params, {}, rows)[0].logits[:, :-1] for m in (student, teacher))
    wanted = losses.forward_kl(mine, theirs).mean() + 0.5 * losses.cross_entropy(mine, rows["tokens"][:, 1:]).mean()
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-5)
    before, after = found.start.params["student"], found.first.params["student"]
    np.testing.assert_array_equal(after["head"]["kernel"][:, 37:], before["head"]["kernel"][:, 37:])
    np.testing.assert_array_equal(after["embed"]["embedding"][37:], before["embed"]["embedding"][37:])
    assert not np.array_equal(after["head"]["kernel"][:, :37], before["head"]["kernel"][:, :37])


def test_two_tokenizers_are_refused():
    named = lambda letter: dataclasses.replace(fill(CONFIG.build()), tokenizer=letter * 64)  # noqa: E731
    context(student=named("a"), teacher=named("a"), recipe=recipes.KD(task_weight=0.0))
    with pytest.raises(InputError, match=r"tokenizers of student \(aaaaaaaa\) and teacher \(bbbbbbbb\) differ"):
        context(student=named("a"), teacher=named("b"), recipe=recipes.KD(task_weight=0.0))
