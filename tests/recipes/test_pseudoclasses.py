"""LELP: the projections against NumPy's principal components, the target's sums, and what a binary teacher still tells."""

from __future__ import annotations

import claims
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax

import jkd
from jkd import data, optim
from jkd.errors import InputError
from jkd.networks import models_of
from jkd.recipes import KD, LELP, Supervised, with_subclasses
from jkd.types import Model, Outputs

CLASSES, WIDTH, PARTS = 3, 7, 4
RNG = np.random.default_rng(3)
KERNEL = RNG.normal(size=(WIDTH, CLASSES)).astype(np.float32)
LABEL = RNG.integers(0, CLASSES, 90).astype(np.int32)
# far from 0, spread differently in each class
FEATURES = (50 + RNG.normal(size=(90, WIDTH)) * np.exp(RNG.normal(size=(CLASSES, WIDTH)))[LABEL]).astype(np.float32)
KNOWN = RNG.random(90) < 0.8


def linear() -> Model:
    """Logits are a linear map of the image itself, which is the tap ``features``."""

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        x = batch["image"].reshape(batch["image"].shape[0], -1)
        return Outputs(x @ params["head"]["kernel"], taps=dict.fromkeys(taps, x)), buffers

    params = {"head": {"kernel": KERNEL}}
    return Model(init=lambda key: (params, {}), apply=apply, params=params, buffers={}, name="linear")


def examples(known=KNOWN):
    image = FEATURES.reshape(-1, 1, 1, WIDTH)
    return data.arrays(image=image, label=LABEL, labelled=known, classes=CLASSES)


@pytest.fixture(scope="module")
def teacher():
    return with_subclasses(linear(), examples(), features="features", subclasses=PARTS, temperature=2.0, batch_size=32)


def heads(teacher, image):
    batch = {"image": image.reshape(-1, 1, 1, WIDTH)}
    outputs, _ = teacher.apply(teacher.params, teacher.buffers, batch)
    return np.float64(outputs.heads["subclasses"]), np.float64(outputs.logits)


def test_parts_lie_along_the_principal_components_that_the_last_layer_does_not_see(teacher):
    found = heads(teacher, FEATURES)[0]
    assert found.shape == (90, CLASSES, PARTS)
    half = PARTS // 2
    np.testing.assert_allclose(found[..., :half], -found[..., half:], atol=1e-5)
    null = np.eye(WIDTH) - KERNEL @ np.linalg.pinv(np.float64(KERNEL))
    for c in range(CLASSES):
        mine = (c == LABEL) & KNOWN
        own = np.float64(FEATURES[mine]) @ null
        centred = own - own.mean(0)
        along = found[mine][:, c, :half]
        # unit variance over the temperature, no correlation, and the span of the first two components
        np.testing.assert_allclose(along.T @ along / len(along), np.eye(half) / 4, atol=1e-3)
        left, values, _ = np.linalg.svd(centred, full_matrices=False)
        assert values[half - 1] > 1.01 * values[half]
        first = left[:, :half]
        np.testing.assert_allclose(first @ (first.T @ along), along, atol=2e-3)
    # what the last layer sees makes no difference
    beyond = FEATURES + np.float32(3 * KERNEL[:, 1])
    np.testing.assert_allclose(heads(teacher, beyond)[0], found, atol=2e-3)


def test_parts_sum_to_the_teachers_probabilities_and_the_product_to_the_students(teacher):
    rows = {"image": FEATURES[:32].reshape(-1, 1, 1, WIDTH), "label": LABEL[:32], "weight": np.ones(32, np.float32)}
    student = tiny.weights(claims.mlp(WIDTH, 8, CLASSES * PARTS))
    recipe = LELP(subclasses=PARTS, temperature=3.0)
    found = small.Terms(recipe, rows, student=student, teacher=teacher)
    parts, logits = heads(teacher, FEATURES[:32])
    mine = np.float64(student.apply(student.params, {}, rows)[0].logits)
    target = (softmax(logits, -1)[..., None] * softmax(parts, -1)).reshape(32, -1)
    np.testing.assert_allclose(target.reshape(32, CLASSES, PARTS).sum(-1), softmax(logits, -1), rtol=1e-6)
    hot = softmax(np.log(np.maximum(target, 1e-300)) / 3, -1)
    wanted = 9 * (hot * (np.log(np.maximum(hot, 1e-300)) - log_softmax(mine / 3, -1))).sum(-1).mean()
    np.testing.assert_allclose(found.mean("kd"), wanted, rtol=1e-4)
    merged = softmax(mine, -1).reshape(32, CLASSES, PARTS).sum(-1)
    np.testing.assert_allclose(found.mean("task"), -np.log(merged[np.arange(32), rows["label"]]).mean(), rtol=1e-5)
    product = recipe.deploy(models_of(found.ctx, found.state, found.frozen))
    answer = product.apply(product.params, product.buffers, rows)[0].logits
    np.testing.assert_allclose(softmax(np.float64(answer), -1), merged, rtol=1e-5)


WRONG = {
    "with_subclasses\\(subclasses=3\\): give an even number from 2 to 8": dict(subclasses=3),
    "with_subclasses\\(subclasses=10\\): give an even number from 2 to 8": dict(subclasses=10),
    "linear has no weights tail/kernel": dict(head="tail"),
    "class 2 has 1 labelled examples; 2 components need more": dict(
        data=examples((LABEL < 2) | (np.arange(90) == np.flatnonzero(LABEL == 2)[0]))
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_split_is_refused(message):
    with pytest.raises(InputError, match=message):
        with_subclasses(linear(), **dict(data=examples(), features="features", subclasses=PARTS) | WRONG[message])


@pytest.mark.parametrize(
    ("message", "outputs", "subclasses"),
    [("the student has 9 outputs; give it 3 x 4", 9, PARTS), ("the teacher splits each class in 4", 18, 6)],
)
def test_a_student_or_teacher_of_other_parts_is_refused(teacher, message, outputs, subclasses):
    rows = {"image": FEATURES.reshape(-1, 1, 1, WIDTH), "label": LABEL, "weight": np.ones(90, np.float32)}
    with pytest.raises(InputError, match=message):
        small.Terms(LELP(subclasses=subclasses), rows, student=claims.mlp(WIDTH, 8, outputs), teacher=teacher)


def test_a_teacher_that_does_not_split_is_refused():
    with pytest.raises(InputError, match=r"LELP\(subclasses=10\): the teacher does not split its classes; make it with"):
        small.Terms(LELP(), tiny.batch(), student=small.student(classes=50), teacher=small.teacher())


def test_a_node_of_an_experiment_splits_the_classes():
    digits = data.digits()
    shared = dict(data=digits, optimizer=optim.adamw(3e-3), batch_size=64, evaluate_every=0)
    experiment = jkd.Experiment(
        teacher=jkd.Run(student=claims.mlp(64, 32, 10), recipe=Supervised(), steps=100, **shared),
        subclasses=lambda teacher: with_subclasses(teacher, digits, features="body", subclasses=4),
        student=jkd.Run(student=claims.mlp(64, 32, 40), teacher="subclasses", recipe=LELP(subclasses=4), steps=100, **shared),
    )
    found = jkd.train(experiment).summary["student"]
    assert found["accuracy"] > 0.8
    assert found["agreement"] > 0.8


# --- few classes ---------------------------------------------------------------------------------------------------------------

CLOUDS, DIM = 20, 20


def halves(examples, *, seed):
    """Twenty clouds, ten of them in each of two classes: which cloud an example is from, no label tells."""
    image, cloud = claims.clusters(examples, seed=seed, classes=CLOUDS, dim=DIM)
    return image, (cloud % 2).astype(np.int32)


@pytest.mark.slow
def test_of_a_teacher_with_two_classes_the_split_tells_more_than_its_answer():
    """The teacher has seen many examples; both students few, and no label but through it."""
    image, label = halves(4000, seed=0)
    batch_size = 100
    network = claims.mlp(DIM, 64, 2)
    run = tiny.run(
        recipe=Supervised(), student=network, teacher=None, optimizer=optim.adamw(3e-3), steps=800, batch_size=batch_size
    )
    trial = claims.Trial(run, claims.rows(image, label, np.arange(batch_size)))
    master = network.with_weights(
        trial.student(claims.rows(image, label, i) for i in claims.epochs(len(image), batch_size, 20, 0)), {}
    )
    split = with_subclasses(master, data.arrays(image=image, label=label), features="body", subclasses=10)
    test = halves(2000, seed=99)
    few, steps = 200, 300

    def accuracy(recipe, teacher, outputs):
        run = tiny.run(
            recipe=recipe,
            student=claims.mlp(DIM, 64, outputs),
            teacher=teacher,
            optimizer=optim.adamw(3e-3),
            steps=steps,
            batch_size=few,
        )
        trial = claims.Trial(run, claims.rows(image, label, np.arange(few)))
        found = []
        for seed in range(3):
            own = np.random.default_rng(seed).choice(len(image), few, replace=False)
            student = trial.student((claims.rows(image, label, own) for _ in range(steps)), seed=seed)
            answers = trial.answers(student, test[0]).reshape(len(test[0]), 2, -1).sum(-1)
            found.append((answers.argmax(-1) == test[1]).mean())
        return np.array(found)

    plain = accuracy(KD(temperature=4.0, weight=1.0, task_weight=0.0), master, 2)
    parts = accuracy(LELP(weight=1.0, task_weight=0.0), split, 20)
    assert (parts > plain).all(), (parts, plain)
    assert parts.mean() > plain.mean() + 0.01, (parts, plain)
