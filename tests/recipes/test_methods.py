"""What single methods do beyond their terms: memories, products, stages, and the mistakes they tell."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny

import jkd
from jkd import data, losses, models, optim
from jkd.config import Experiment, Run, dependencies
from jkd.errors import InputError
from jkd.recipes import AB, CRD, FSP, FT, KD, OFD, SRRL, Combine, DeiT, Match, SimKD, Standardized, Supervised, two_stages
from jkd.recipes.projectors import Linear
from jkd.resolve import make_context
from jkd.step import make_eval_step

LATE = dict(student_taps=("late",), teacher_taps=("late",))
POOL = dict(student_taps=("pool",), teacher_taps=("pool",))
EXAMPLES = 64


def engine(recipe, *, student=None, train_size=EXAMPLES, **fields) -> tiny.Engine:
    networks = dict(student=student or small.student(), teacher=small.teacher())
    run = tiny.run(recipe=recipe, optimizer=optim.sgd(0.05), **networks, **fields)
    return tiny.Engine(run, train_size=train_size)


# --- CRD ---------------------------------------------------------------------------------------------------------------------


def test_crds_memory_is_that_of_the_loss_with_scales_of_the_first_batch():
    recipe = CRD(**POOL, dim=8, negatives=12)
    made = engine(recipe)
    first, second = (tiny.batch(seed=seed) for seed in (0, 1))
    found = made.train([first, second])
    start, memory = found.start.memory, found.first.memory
    assert (start["student_scale"], start["teacher_scale"]) == (-1, -1)

    def embedded(side, network, params):
        (pool,) = small.taps(network, first, "pool", params=params)
        one = found.start.params["projector"][side]
        return jnp.asarray(pool @ one["kernel"] + one["bias"], jnp.float32)

    mine = embedded("student", small.student(), found.start.params["student"])
    theirs = embedded("teacher", small.teacher(), None)
    start = jax.tree.map(jnp.asarray, start)
    held = {side: start[side].rows for side in ("student", "teacher")} | {k: v for k, v in start.items() if "scale" in k}
    negatives = recipe._negatives(start, jnp.asarray(first["index"]))
    values, wanted = losses.crd(mine, theirs, jnp.asarray(first["index"]), negatives, held)
    np.testing.assert_allclose(found.metrics[0]["term/crd"], values.mean(), rtol=1e-5)
    for side in ("student", "teacher"):
        np.testing.assert_allclose(memory[side].rows, wanted[side], atol=1e-6)
        np.testing.assert_allclose(memory[f"{side}_scale"], wanted[f"{side}_scale"], rtol=1e-5)
        assert found.state.memory[f"{side}_scale"] == memory[f"{side}_scale"]  # the second batch leaves it
    changed = (memory["student"].rows != start["student"].rows).any(1)
    assert set(np.flatnonzero(changed)) == set(first["index"])


def test_crds_classes_are_remembered_and_padding_and_unlabelled_rows_are_not():
    rows = tiny.batch(ragged=True)
    memory = engine(CRD(**POOL, dim=8, negatives=4)).train([rows]).first.memory
    known = (rows["weight"] > 0) & (rows["labelled"] > 0)
    np.testing.assert_array_equal(memory["label"][: tiny.ROWS], np.where(known, rows["label"], -1))
    assert (memory["label"][tiny.ROWS :] == -1).all()


def test_crds_negatives_are_others_and_of_other_classes():
    labels = np.random.default_rng(0).integers(0, 10, 500).astype(np.int32)
    index = np.arange(0, 500, 7)
    key = jax.random.key_data(jax.random.key(3))

    def draw(label, redraws, key=key):
        recipe = CRD(**POOL, negatives=200, redraws=redraws)
        return np.asarray(recipe._negatives({"key": key, "label": jnp.asarray(label)}, jnp.asarray(index)))

    found = draw(labels, 2)
    assert (found != index[:, None]).all()
    assert (found >= 0).all()
    assert (found < 500).all()
    same = (labels[found] == labels[index][:, None]).mean()
    assert abs((labels[draw(labels, 0)] == labels[index][:, None]).mean() - 0.1) < 0.02
    assert same < 0.005  # one in a thousand: a class of ten, three draws
    assert len({tuple(row) for row in found}) == len(index)
    other = jax.random.key_data(jax.random.key(4))
    assert (draw(labels, 2, other) != found).mean() > 0.9
    unknown = draw(np.full(500, -1, np.int32), 2)
    assert abs((labels[unknown] == labels[index][:, None]).mean() - 0.1) < 0.02


def test_crds_banks_are_the_same_on_a_mesh_that_does_not_divide_the_data():
    networks = dict(student=small.student(), teacher=small.teacher(), optimizer=optim.sgd(0.05))
    run = tiny.run(recipe=CRD(**POOL, dim=8, negatives=12), **networks)
    one, eight = (tiny.Engine(run, devices=devices, train_size=100).train(tiny.batches(2)) for devices in (1, 8))
    np.testing.assert_allclose(eight.losses, one.losses, rtol=1e-5)
    for side in ("student", "teacher"):
        assert eight.state.memory[side].rows.shape == (104, 8)
        np.testing.assert_allclose(eight.state.memory[side].rows[:100], one.state.memory[side].rows, atol=1e-5)


def test_crd_and_kd_are_a_sum():
    recipe = Combine(recipes=(CRD(**POOL, dim=8, negatives=4), KD(weight=1.0, task_weight=0.0)))
    metrics = engine(recipe).train([tiny.batch()]).metrics[0]
    assert {"term/task", "term/crd", "term/kd"} <= metrics.keys()


def test_crd_needs_data_of_known_size():
    with pytest.raises(InputError, match="CRD keeps a row for each example"):
        engine(CRD(**POOL), train_size=None)


# --- products ----------------------------------------------------------------------------------------------------------------


def test_simkds_product_is_student_projector_and_the_teachers_head():
    made = engine(SimKD(**LATE))
    found = made.train(tiny.batches(3))
    state, rows = found.state, tiny.batch(seed=9)
    measure = make_eval_step(made.ctx, lambda student, teacher, batch: (student.logits, teacher.logits))
    logits, _ = measure(state, made.frozen, made.put(rows))
    (x,) = small.taps(small.student(), rows, "late", params=state.params["student"])
    for i in range(3):
        layer, running = state.params["projector"][str(i)], state.buffers["projector"][str(i)]
        kernel = np.float64(layer["kernel"])
        if i == 1:
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = sum(padded[:, a : a + 2, b : b + 2] @ kernel[a, b] for a in range(3) for b in range(3))
        else:
            x = x @ kernel[0, 0]
        x = (x - running["mean"]) / np.sqrt(running["variance"] + 1e-5) * layer["scale"] + layer["shift"]
        x = np.maximum(x, 0)
    head = small.teacher().params["head"]
    np.testing.assert_allclose(logits, x.mean((1, 2)) @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-4)
    assert not np.allclose(running["mean"], 0)


def test_simkds_product_is_a_network_like_any_other():
    made = engine(SimKD(**LATE, batch_norm=False))
    state = made.train([tiny.batch()]).state
    from jkd.step import models_of

    product = made.ctx.recipe.deploy(models_of(made.ctx, state, made.frozen))
    assert product.initialised
    assert set(product.params) == {"student", "projector", "head"}
    assert not product.couples_batch
    outputs, buffers = product.apply(product.params, product.buffers, tiny.batch(), taps=("early",))
    assert outputs.taps["early"].shape == (tiny.ROWS, 4, 4, 6)
    assert jax.tree.structure(buffers) == jax.tree.structure(product.buffers)
    # it may be distilled from in its turn
    again = tiny.run(recipe=KD(), student=small.student(), teacher=product)
    make_context(again, tiny.batch(), devices=jax.devices()[:1])


def test_simkd_averages_a_larger_map_down_before_the_projector():
    recipe = SimKD(student_taps=("early",), teacher_taps=("late",))
    found = small.Terms(recipe, tiny.batch(8), student=small.student(), teacher=small.teacher())
    assert found.terms["match"][0].shape == (8, 2, 2)


def test_simkd_takes_vectors_too():
    found = small.Terms(SimKD(**POOL), tiny.batch(8), student=small.student(), teacher=small.teacher())
    assert found.terms["match"][0].shape == (8,)


def test_deits_product_is_the_mean_of_two_probabilities():
    student = small.student(token=True)
    made = engine(DeiT(), student=student)
    rows = tiny.batch()
    logits = make_eval_step(made.ctx, lambda student, teacher, batch: student.logits)(made.fresh(), made.frozen, made.put(rows))
    outputs, _ = student.apply(student.params, {}, rows)
    wanted = (jax.nn.softmax(outputs.logits) + jax.nn.softmax(outputs.heads["distillation"])) / 2
    np.testing.assert_allclose(np.exp(logits), wanted, rtol=1e-5)


# --- gradients and stages ----------------------------------------------------------------------------------------------------


def test_fts_paraphraser_learns_from_reconstruction_alone():
    tied = engine(FT(**LATE)).train([tiny.batch()]).first.params["paraphraser"]
    free = engine(FT(**LATE, weight=0.0, task_weight=0.0)).train([tiny.batch()]).first.params["paraphraser"]
    assert tiny.distance(tied, free) < 1e-6


def test_two_stages_hand_the_student_on():
    shared = dict(student=small.network(), teacher="teacher", optimizer=optim.sgd(0.1), steps=100)
    first = AB(student_taps=small.PRE, teacher_taps=small.PRE)
    nodes = two_stages("ab", Run(recipe=Supervised(), **shared), first, steps=30, batch_size=64)
    teacher = Run(student=small.network(), recipe=Supervised(), optimizer=optim.sgd(0.1), steps=1)
    experiment = Experiment(teacher=teacher, **nodes)
    assert list(experiment.nodes) == ["teacher", "ab_initial", "ab"]
    assert dependencies(experiment.nodes["ab"]) == ("ab_initial", "teacher")
    initial = experiment.nodes["ab_initial"]
    assert (initial.recipe, initial.steps, initial.batch_size) == (first, 30, 64)
    then = experiment.nodes["ab"](ab_initial=small.student(), teacher=small.teacher())
    assert then.student is small.student()
    assert then.teacher is small.teacher()
    assert (then.recipe, then.steps, then.batch_size) == (Supervised(), 100, 128)


def test_two_stages_train_one_after_the_other():
    teacher = models.mlp.Config(features=64, hidden=(16,), classes=10)
    student = models.mlp.Config(features=64, hidden=(8,), classes=10)
    shared = dict(data=data.digits(), optimizer=optim.adamw(3e-3), batch_size=64, evaluate_every=0, checkpoint_every=0)
    hint = Match(student_taps=("layers/0",), teacher_taps=("layers/0",), projector=Linear(), task_weight=0.0)
    then = Run(student=student, teacher="teacher", recipe=KD(), steps=1, **shared)
    experiment = Experiment(
        teacher=Run(student=teacher, recipe=Supervised(), steps=2, **shared), **two_stages("both", then, hint, steps=60)
    )
    found = jkd.train(experiment)
    initial, last = (found.artifacts[name].params["layers"]["0"]["linear"]["kernel"] for name in ("both_initial", "both"))
    assert 0 < tiny.distance(last, initial) < 0.1  # one step away from where the first stage ended


# --- mistakes ----------------------------------------------------------------------------------------------------------------

TWO = dict(student_taps=small.TAPS, teacher_taps=small.TAPS)
PRE = dict(student_taps=small.PRE, teacher_taps=small.PRE)
MADE_WRONG = {
    "CRD.*one on each side": lambda: CRD(**TWO),
    "CRD.*student_taps = \\(\\)": CRD,
    "FSP.*at least two": lambda: FSP(**LATE),
    "FT.*give one": lambda: FT(**TWO),
    "SimKD.*give one": lambda: SimKD(**TWO),
    "OFD: 0 teacher_norms for 2 teacher_taps": lambda: OFD(**PRE),
    "Standardized: SimKD has a forward of its own": lambda: Standardized(recipe=SimKD(**LATE)),
    "Combine: SRRL has a forward of its own": lambda: Combine(recipes=(SRRL(**LATE),)),
}


@pytest.mark.parametrize("message", MADE_WRONG)
def test_a_recipe_that_cannot_be_is_refused(message):
    with pytest.raises(InputError, match=message):
        MADE_WRONG[message]()


USED_WRONG = {
    "FT.*needs feature maps": FT(**POOL),
    "OFD.teacher_norms: the teacher has no BatchNorm .* at 'head'": OFD(**PRE, teacher_norms=("early", "head")),
    "SimKD.teacher_head: the teacher has no parameters under 'classifier'": SimKD(**LATE, teacher_head="classifier"),
    "SRRL.teacher_head": SRRL(**LATE, teacher_head="classifier"),
    "DeiT: the student's Outputs have no heads\\['distillation'\\]": DeiT(),
}


@pytest.mark.parametrize("message", USED_WRONG)
def test_what_does_not_fit_the_networks_is_told_before_the_first_step(message):
    with pytest.raises(InputError, match=message):
        engine(USED_WRONG[message])
