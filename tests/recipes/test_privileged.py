"""LAD: the labels' channel, both recipes' numbers, and what a teacher that sees it is good for."""

from __future__ import annotations

import dataclasses

import claims
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax

from jkd import optim
from jkd.errors import InputError
from jkd.networks import models_of
from jkd.recipes import LAD, LADTeacher, NoisedLabels, Supervised
from jkd.types import Model, Outputs, Term

SIDE = tiny.IMAGE[0]


def by_pixel(rows: int = 8, seed: int = 0) -> dict:
    """Labels for every pixel; -1 and 7 are no classes."""
    batch = tiny.batch(rows, seed=seed)
    label = np.random.default_rng(seed).choice([-1, 0, 1, 2, 3, 4, 7], (rows, SIDE, SIDE)).astype(np.int32)
    return batch | {"label": label, "weight": tiny.batch(rows, ragged=True, seed=seed)["weight"]}


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_a_class_has_one_number_in_an_image_and_another_in_the_next():
    label = by_pixel(2)["label"]
    clean = NoisedLabels(network=small.dense(channels=3), classes=5, noise=0.0, scale=10.0).channel(label, keys(2))
    which = (-1, 0, 1, 2, 3, 4, 7)
    pairs = zip(np.asarray(clean), label, strict=True)
    numbers = [{one: np.unique(image[own == one]) for one in which} for image, own in pairs]
    for found in numbers:
        assert all(len(values) == 1 for values in found.values())
        assert found[-1] == found[7]  # pixels without a label are alike
        assert len({float(values[0]) for values in found.values()}) == 6
    assert abs(numbers[0][0] - numbers[1][0]) > 0.1
    noisy = NoisedLabels(network=small.dense(channels=3), classes=5, noise=0.5, scale=10.0).channel(label, keys(2))
    assert 2 < np.std(noisy - clean) < 8


def test_the_network_sees_the_channel_behind_the_image_and_the_same_one_at_every_evaluation():
    network, rows = small.dense(channels=3), by_pixel(4)
    given = NoisedLabels(network=network, classes=5)
    params = tiny.weights(network).params
    for key, batch in ((keys(4), rows), (keys(4, seed=3), rows | {"keys": keys(4, seed=3)})):
        image = np.concatenate([rows["image"], given.channel(rows["label"], key)[..., None]], -1)
        wanted = network.apply(params, {}, {"image": image})[0].logits
        np.testing.assert_allclose(given.build().apply(params, {}, batch)[0].logits, wanted, rtol=1e-6)
    bytes_ = {"image": np.full((4, SIDE, SIDE, 2), 255, np.uint8), "label": rows["label"]}
    ones = {"image": np.ones((4, SIDE, SIDE, 2), np.float32), "label": rows["label"]}
    first, second = (given.build().apply(params, {}, batch)[0].logits for batch in (bytes_, ones))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("batch", [tiny.batch(4), {"image": tiny.batch(4)["image"]}])
def test_labels_of_another_shape_are_refused(batch):
    with pytest.raises(
        InputError, match=r"NoisedLabels: batch\['label'\] (is \[4\]|is missing); give one label for each pixel"
    ):
        small.privileged().apply(tiny.weights(small.privileged()).params, {}, batch)


def distance(theirs, mine, temperature=4.0):
    """CWD of each image: T² KL over the positions, the mean over the classes."""
    theirs, mine = (np.float64(z).reshape(len(z), -1, z.shape[-1]) / temperature for z in (theirs, mine))
    log_p, log_q = log_softmax(theirs, 1), log_softmax(mine, 1)
    return temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(1).mean(-1)


def labels_loss(logits, rows):
    """The mean over the pixels of all images that have a label."""
    known = (rows["label"] >= 0) & (rows["label"] < 5)
    nll = -np.take_along_axis(log_softmax(np.float64(logits), -1), np.where(known, rows["label"], 0)[..., None], -1)[..., 0]
    weight = rows["weight"][:, None, None] * rows["labelled"][:, None, None] * known
    return (nll * weight).sum() / weight.sum()


def average(values, rows):
    return (values * rows["weight"]).sum() / rows["weight"].sum()


def test_the_teachers_terms_are_of_two_draws():
    rows, network = by_pixel(), small.student(kind=small.privileged)
    found = small.Terms(LADTeacher(), rows, student=network, teacher=None)
    own = models_of(found.ctx, found.state, found.frozen).keys(rows)
    drawn = [rows | {"keys": jax.vmap(lambda key, place=place: jax.random.fold_in(key, place))(own)} for place in range(2)]
    first, second = (network.apply(network.params, {}, batch)[0].logits for batch in drawn)
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_allclose(found.mean("task"), labels_loss(first, rows), rtol=1e-5)
    np.testing.assert_allclose(found.mean("second_task"), labels_loss(second, rows), rtol=1e-5)
    wanted = average(distance(first, second) + distance(second, first), rows)
    np.testing.assert_allclose(found.mean("consistency"), wanted, rtol=1e-4)
    assert [found.terms[name][2] for name in ("task", "second_task", "consistency")] == [1, 1, 5]


def test_the_students_terms():
    rows, student, teacher = by_pixel(), small.student(kind=small.dense), small.teacher(kind=small.privileged)
    found = small.Terms(LAD(), rows, student=student, teacher=teacher)
    own = models_of(found.ctx, found.state, found.frozen).keys(rows)
    theirs = teacher.apply(teacher.params, {}, rows | {"keys": own})[0].logits
    mine = student.apply(student.params, {}, rows)[0].logits
    np.testing.assert_allclose(found.mean("task"), labels_loss(mine, rows), rtol=1e-5)
    np.testing.assert_allclose(found.mean("kd"), average(distance(theirs, mine), rows), rtol=1e-4)
    assert [found.terms[name][2] for name in ("task", "kd")] == [1, 3]


def test_each_draw_is_the_detached_target_of_the_other():
    """The gradient of the consistency, which through both sides would be another."""
    rows, network = by_pixel(), small.student(kind=small.privileged)
    found = small.Terms(LADTeacher(), rows, student=network, teacher=None)
    own = models_of(found.ctx, found.state, found.frozen).keys(rows)
    drawn = [rows | {"keys": jax.vmap(lambda key, place=place: jax.random.fold_in(key, place))(own)} for place in range(2)]

    def engine(params):
        terms = small.evaluate(found.ctx, dataclasses.replace(found.state, params={"student": params}), found.frozen, rows)
        return Term(*terms["consistency"][:2]).mean()

    def by_hand(params, held):
        first, second = (network.apply(params, {}, batch)[0].logits for batch in drawn)
        fixed = [network.apply(held, {}, batch)[0].logits for batch in drawn]

        def towards(target, mine):
            log_p, log_q = (jax.nn.log_softmax(z.reshape(8, -1, 5) / 4, 1) for z in (target, mine))
            return 16 * (jnp.exp(log_p) * (log_p - log_q)).sum(1).mean(-1)

        return Term(towards(fixed[1], first) + towards(fixed[0], second), rows["weight"]).mean()

    gradients = jax.jit(lambda params: (jax.grad(engine)(params), jax.grad(by_hand)(params, params)))(network.params)
    tiny.close(*gradients, 1e-4)


# --- regions of four gray levels, under so much noise that where a region ends is hard to see -----------------------------------

PIXELS, LEVELS, WIDE = 8, 4, 8


def segmenter(channels: int) -> Model:
    """Three 3x3 convolutions and a linear map for each pixel."""
    shapes = {str(i): (3, 3, WIDE if i else channels, WIDE) for i in range(3)}

    def init(key):
        def layer(place, shape):
            spread = np.sqrt(2 / np.prod(shape[:-1]))
            return {"kernel": spread * jax.random.normal(jax.random.fold_in(key, place), shape), "bias": jnp.zeros(shape[-1])}

        params = {name: layer(int(name), shape) for name, shape in shapes.items()}
        return params | {"head": layer(3, (WIDE, LEVELS))}, {}

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        x, dims = batch["image"].astype(jnp.float32), ("NHWC", "HWIO", "NHWC")
        for name in shapes:
            x = jax.lax.conv_general_dilated(x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=dims)
            x = jax.nn.relu(x + params[name]["bias"].reshape(1, 1, 1, -1))
        return Outputs(x @ params["head"]["kernel"] + params["head"]["bias"].reshape(1, 1, 1, -1)), buffers

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    return Model(init=init, apply=apply, params=params, buffers=buffers, name="segmenter")


def scenes(count, *, seed):
    """Two rectangles before a background, each of any level."""
    rng = np.random.default_rng(seed)
    label = np.repeat(rng.integers(0, LEVELS, (count, 1, 1)), PIXELS * PIXELS).reshape(count, PIXELS, PIXELS).astype(np.int32)
    for one in label:
        for _ in range(2):
            high, wide = rng.integers(3, 6, 2)
            top, left = rng.integers(0, PIXELS - high + 1), rng.integers(0, PIXELS - wide + 1)
            one[top : top + high, left : left + wide] = rng.integers(0, LEVELS)
    image = label / (LEVELS - 1) + 0.5 * rng.normal(size=label.shape)
    return image[..., None].astype(np.float32), label


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clean(NoisedLabels):
    """The labels as they are."""

    def channel(self, label, keys):
        return label / (LEVELS - 1)


@pytest.mark.slow
def test_noised_labels_make_a_better_teacher_and_clean_ones_a_useless_one():
    """Twenty images: with noise the teacher beats a network without labels, and so does the student that learns from it."""
    size, steps, seeds = 20, 300, range(2)
    train, test = scenes(size, seed=0), scenes(500, seed=99)

    def trained(recipe, student, teacher=None):
        run = tiny.run(
            recipe=recipe, student=student, teacher=teacher, optimizer=optim.adamw(3e-3), steps=steps, batch_size=size
        )
        trial = claims.Trial(run, claims.rows(*train, np.arange(size)), train_size=size)
        params = [trial.student((claims.rows(*train, i) for i in claims.epochs(size, size, steps, s)), seed=s) for s in seeds]

        def right(own):
            answer = trial.ctx.student.apply(own, {}, {"image": test[0], "label": test[1]})[0].logits
            return (np.asarray(answer).argmax(-1) == test[1]).mean()

        return np.array([right(own) for own in params]), trial.ctx.student.with_weights(params[0], {})

    plain, _ = trained(Supervised(), segmenter(1))
    found = {}
    for kind, given in (
        ("noised", NoisedLabels(network=segmenter(2), classes=LEVELS, scale=1.0)),
        ("clean", Clean(network=segmenter(2), classes=LEVELS)),
    ):
        master, teacher = trained(LADTeacher(), given)
        found[kind] = master, trained(LAD(), segmenter(1), teacher)[0]
    (noised, good), (clean, useless) = found["noised"], found["clean"]
    assert (noised > plain + 0.02).all(), (plain, found)
    assert (good > plain + 0.02).all(), (plain, found)
    assert (clean > 0.9).all(), (plain, found)
    assert useless.mean() < plain.mean() + 0.015 < good.mean() - 0.015, (plain, found)
