"""HARD: the affine maps, whose turn it is, what each player does to the loss, and shifts that a student learns to bear."""

from __future__ import annotations

import functools

import claims
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax

from jkd import optim
from jkd.errors import InputError
from jkd.networks import models_of
from jkd.recipes import HARD, KD, Affine
from jkd.types import Model, Outputs

STILL = -1e9  # the logarithm of no spread


def keys(count):
    return jax.vmap(jax.random.key)(jnp.arange(count))


def moved(image, mean, log_spread=STILL):
    params = {"mean": jnp.asarray(mean, jnp.float32), "log_spread": jnp.full((2, 3), log_spread)}
    return np.asarray(jax.jit(Affine())(params, image, keys(len(image))))


def test_the_affine_maps_are_shifts_turns_and_scales_of_the_plane():
    image = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    still = np.zeros((2, 3))
    np.testing.assert_allclose(moved(image, still), image, atol=1e-5)
    # places are -1 to 1 over 4 rows and 6 columns: what was one row below and two columns to the right comes here
    shifted = moved(image, [[0, 0, 2 / 4], [0, 0, 2 * 2 / 6]])
    np.testing.assert_allclose(shifted[:, :3, :4], image[:, 1:, 2:], atol=1e-5)
    np.testing.assert_allclose(shifted[:, 3], 0, atol=1e-5)
    np.testing.assert_allclose(shifted[:, :, 4:], 0, atol=1e-5)
    # A = -I turns by half a circle; A = 0 shows the middle everywhere
    np.testing.assert_allclose(moved(image, [[-2, 0, 0], [0, -2, 0]]), image[:, ::-1, ::-1], atol=1e-5)
    middle = image[:, 1:3, 2:4].mean((1, 2), keepdims=True)
    np.testing.assert_allclose(moved(image, [[-1, 0, 0], [0, -1, 0]]), np.broadcast_to(middle, image.shape), atol=1e-5)
    drawn = moved(np.repeat(image[:1], 2, 0), still, np.log(0.2))
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1


def kl(p, q):
    return (softmax(p, -1) * (log_softmax(p, -1) - log_softmax(q, -1))).sum(-1)


def test_both_players_terms_are_of_the_same_images():
    recipe, rows = HARD(temperature=2.0, disagreement=0.5, constancy=3.0), tiny.batch()
    found = small.Terms(recipe, rows, student=small.student(), teacher=small.teacher())

    @jax.jit
    def seen(state, frozen):
        """The images, and what the augmentor makes of them."""
        models = models_of(found.ctx, state, frozen)
        student, teacher, _ = recipe.contest(models, rows, jax.random.key(0))
        terms = recipe.harder(None, student, teacher, rows, clock=models.clock, key=None)
        return recipe.augmentor(state.params["augmentor"], rows["image"], models.keys(rows)), terms

    image, terms = seen(found.state, found.frozen)
    assert np.abs(image - rows["image"]).max() > 0.1

    def answers(model, image):
        return np.float64(model.apply(model.params, {}, {**rows, "image": image})[0].logits) / 2

    mine, theirs = (answers(model, image) for model in (small.student(), small.teacher()))
    np.testing.assert_allclose(found.mean("kd"), 4 * kl(theirs, mine).mean(), rtol=1e-4)
    np.testing.assert_allclose(terms["disagreement"].values, 4 * kl(theirs, mine), rtol=1e-4)
    np.testing.assert_allclose(
        terms["change"].values, 4 * kl(answers(small.teacher(), rows["image"]), theirs), rtol=1e-3, atol=1e-6
    )
    assert (float(terms["disagreement"].coef), float(terms["change"].coef)) == (-0.5, 3.0)


def test_the_players_take_turns_and_each_does_its_part():
    """Deterministic maps and one batch, so that the loss is of one function: it falls in every turn of the student, and in every
    turn of the augmentor it rises."""
    recipe = HARD(augmentor=Affine(spread=1e-6), temperature=4.0, lower=0.3, upper=0.6, patience=8, constancy=0.0)
    run = tiny.run(
        recipe=recipe, student=small.student(), teacher=small.teacher(), optimizer=optim.adamw(1e-2, weight_decay=0.0), steps=60
    )
    found = tiny.Engine(run).train([tiny.batch()] * 60)
    turns = []
    for metrics in found.metrics:
        player = "student" if metrics["ran/kd"] else "augmentor"
        assert metrics["ran/augmentor.disagreement"] == metrics["ran/augmentor.change"] == (player == "augmentor")
        if not turns or turns[-1][0] != player:
            turns.append((player, []))
        turns[-1][1].append(float(metrics["term/kd" if player == "student" else "term/augmentor.disagreement"]))
    assert [player for player, _ in turns[:3]] == ["student", "augmentor", "student"]
    for place, (player, values) in enumerate(turns[:-1]):
        if player == "student":
            assert values[-1] < recipe.lower <= min(values[:-1], default=1)
        else:
            assert values[-1] > recipe.upper or len(values) == recipe.patience
            assert max(values[:-1], default=0) <= recipe.upper
            # what comes next is measured after the augmentor's last step
            assert turns[place + 1][1][0] > values[0]


@pytest.mark.parametrize("wrong", [dict(lower=0.5, upper=0.5), dict(lower=-1.0)])
def test_thresholds_in_the_wrong_order_are_refused(wrong):
    with pytest.raises(InputError, match=r"HARD\(lower="):
        HARD(**wrong)


def test_answers_prepared_for_other_images_are_refused():
    rows = tiny.batch() | {"teacher": Outputs(np.zeros((tiny.ROWS, tiny.CLASSES), np.float32))}
    with pytest.raises(InputError, match="HARD asks the teacher about images of its own"):
        small.Terms(HARD(), rows, student=small.student(), teacher=small.teacher())


# --- a teacher that does not mind shifts ---------------------------------------------------------------------------------------

SIDE, GLYPHS = 12, 5
# 3x3 fields of 2x2 pixels, black or white
SHAPES = np.random.default_rng(5).choice([-1.0, 1.0], size=(GLYPHS, 3, 3)).repeat(2, 1).repeat(2, 2).astype(np.float32)


def matcher() -> Model:
    """Finds glyphs wherever they are: logits are the best match over all places."""

    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        kernel = params["shapes"].transpose(1, 2, 0)[:, :, None]
        dims = ("NHWC", "HWIO", "NHWC")
        match = jax.lax.conv_general_dilated(batch["image"], kernel, (1, 1), "SAME", dimension_numbers=dims)
        return Outputs(jax.nn.logsumexp(match, axis=(1, 2))), buffers

    params = {"shapes": SHAPES / 4}
    return Model(init=lambda key: (params, {}), apply=apply, params=params, buffers={}, name="matcher")


def glyphs(count, *, seed, shift):
    """Glyphs at the middle, or up to ``shift`` pixels from it."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, GLYPHS, count).astype(np.int32)
    image = 0.1 * rng.normal(size=(count, SIDE, SIDE, 1)).astype(np.float32)
    corner = 3 + rng.integers(-shift, shift + 1, (count, 2))
    for one, (top, left), which in zip(image, corner, label, strict=True):
        one[top : top + 6, left : left + 6, 0] += SHAPES[which]
    return image, label


TRAIN, TEST = glyphs(200, seed=0, shift=0), glyphs(1000, seed=1, shift=2)
SLOW, FAST = optim.adamw(3e-3), optim.adamw(3e-2, weight_decay=0.0)


@functools.cache
def trained(recipe):
    """What two seeds make of images at the middle, which are all that a student is given: the run's trial, and the parameters."""
    batch_size, steps = 50, 300
    run = tiny.run(
        recipe=recipe,
        student=claims.mlp(SIDE * SIDE, 64, GLYPHS),
        teacher=matcher(),
        batch_size=batch_size,
        steps=steps,
        optimizer={"student": SLOW, "augmentor": FAST} if isinstance(recipe, HARD) else SLOW,
    )
    size = len(TRAIN[1])
    trial = claims.Trial(run, claims.rows(*TRAIN, np.arange(batch_size)), train_size=size)
    found = []
    for seed in range(2):
        batches = claims.epochs(size, batch_size, steps * batch_size // size, seed)
        found.append(jax.device_get(trial.trained((claims.rows(*TRAIN, i) for i in batches), seed=seed).params))
    return trial, found


def choices(image):
    teacher = matcher()
    return np.asarray(teacher.apply(teacher.params, {}, {"image": image})[0].logits).argmax(-1)


@pytest.mark.slow
def test_a_student_without_convolutions_learns_from_hard_augmentations_to_bear_shifts():
    """The teacher is asked about more than the images at the middle by HARD alone."""
    assert (choices(TEST[0]) == TEST[1]).mean() > 0.95

    def accuracy(recipe):
        trial, players = trained(recipe)
        return np.array([(trial.answers(params["student"], TEST[0]).argmax(-1) == TEST[1]).mean() for params in players])

    plain, hard = accuracy(KD(temperature=1.0, weight=1.0, task_weight=0.0)), accuracy(HARD())
    assert (hard > plain + 0.3).all(), (hard, plain)


@pytest.mark.slow
def test_constancy_keeps_the_teachers_choice_on_hard_augmentations():
    """Without it the augmentor finds images that the teacher too takes for another glyph."""
    image = np.tile(TRAIN[0], (5, 1, 1, 1))
    augment = jax.jit(Affine())

    def kept(recipe):
        _, players = trained(recipe)
        hard = [np.asarray(augment(params["augmentor"], image, keys(len(image)))) for params in players]
        return np.array([(choices(one) == choices(image)).mean() for one in hard])

    held, free = kept(HARD()), kept(HARD(constancy=0.0))
    assert (held >= 0.9).all(), held
    assert free.mean() < held.mean() - 0.2, (held, free)
