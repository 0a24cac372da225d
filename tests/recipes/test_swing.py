"""SwingKD: temperature and noise by privacy, the same noise at every step, and what a student then tells of a secret."""

from __future__ import annotations

import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax

from jkd import optim
from jkd.errors import InputError
from jkd.recipes import SwingKD

VOCAB, PUBLIC, SECRETS = 40, 16, 8


def rows_of(tokens: np.ndarray, privacy: np.ndarray) -> dict:
    size = len(tokens)
    rows = {"tokens": tokens.astype(np.int32), "privacy": np.broadcast_to(privacy, tokens.shape).astype(np.float32)}
    return rows | {"weight": np.ones(size, np.float32), "index": np.arange(size, dtype=np.int32)}


def test_temperature_and_noise_follow_privacy():
    """By NumPy where nothing is private, and where T alone is; with noise the divergence is another, the same at each step."""
    sides = dict(student=small.student(kind=small.chain), teacher=small.teacher(kind=small.chain, width=6))
    told = np.random.default_rng(0).integers(0, small.VOCAB, (8, 5))
    privacy = np.array([0, 0.5, 0, 1, 0.25])
    rows = rows_of(told, privacy)
    found = small.Terms(SwingKD(temperature=2.0, swing=3.0, noise=0.0, task_weight=0.5), rows, **sides)
    mine, theirs = (np.float64(m.apply(m.params, {}, rows)[0].logits)[:, :-1] for m in sides.values())
    t = (2.0 + 3.0 * privacy[1:])[None, :, None]  # of the token that is predicted
    p, log_q = log_softmax(theirs / t, -1), log_softmax(mine / t, -1)
    kl = (np.exp(p) * (p - log_q)).sum(-1) * t[..., 0] ** 2
    np.testing.assert_allclose(found.mean("kd"), kl.mean(), rtol=1e-4)
    nll = -np.take_along_axis(log_softmax(mine, -1), told[:, 1:, None], -1)[..., 0]
    weight = np.broadcast_to(1 - privacy[1:], nll.shape)
    np.testing.assert_allclose(found.mean("task"), np.average(nll, weights=weight), rtol=1e-5)
    noisy = [small.Terms(SwingKD(temperature=2.0, swing=3.0, noise=2.0), rows, **sides).terms["kd"][0] for _ in range(2)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    difference = np.abs(noisy[0][:, :-1] - kl)
    assert difference[:, 1].max() < 1e-4  # before a token that is not private
    assert (difference[:, [0, 2, 3]].mean(0) > 1e-2).all()


def test_a_secret_is_exposed_less_at_the_same_loss_on_everything_else():
    """Eight canaries: after token 16 + i the teacher expects one secret token. Exposure is log2 of the candidates less log2 of the
    rank of the secret among them; loss is the cross-entropy of what is not private."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(VOCAB, VOCAB))
    table[:PUBLIC, PUBLIC:] -= 12
    secret = rng.choice(np.arange(PUBLIC), SECRETS, replace=False)
    table[PUBLIC : PUBLIC + SECRETS, PUBLIC:] -= 12
    table[PUBLIC + np.arange(SECRETS), secret] += 6
    eye = np.float32(10 * np.eye(VOCAB))
    teacher = small.chain(width=VOCAB, vocab=VOCAB).with_weights(
        {"embed": {"kernel": eye}, "head": {"kernel": np.float32(table)}}, {}
    )
    student = teacher.with_weights({"embed": {"kernel": eye}, "head": {"kernel": np.zeros((VOCAB, VOCAB), np.float32)}}, {})
    # a row is public text, then a canary and its secret
    told = rng.integers(0, PUBLIC, (SECRETS, 34))
    told[:, -2], told[:, -1] = PUBLIC + np.arange(SECRETS), secret
    rows = rows_of(told, np.arange(34)[None] == 33)
    wanted = log_softmax(table[:PUBLIC], -1)
    seen = np.unique(told[:, :-3])

    def measured(recipe):
        run = tiny.run(
            recipe=recipe,
            student=student,
            teacher=teacher,
            optimizer=optim.adamw(1e-1),
            batch_size=8,
            steps=150,
            trainable=("head/*",),
        )
        params = tiny.Engine(run, rows).train([rows] * 150).state.params["student"]
        says = np.asarray(
            small.chain(width=VOCAB, vocab=VOCAB).apply(params, {}, {"tokens": np.arange(VOCAB)[None]})[0].logits[0]
        )
        candidates = says[PUBLIC : PUBLIC + SECRETS, :PUBLIC]
        rank = 1 + (candidates > candidates[np.arange(SECRETS), secret][:, None]).sum(-1)
        loss = -(softmax(table[:PUBLIC], -1) * log_softmax(says[:PUBLIC], -1)).sum(-1)[seen].mean()
        return np.mean(np.log2(PUBLIC) - np.log2(rank)), loss

    exposed, loss = measured(SwingKD(swing=0.0, noise=0.0))
    hidden, swung = measured(SwingKD(swing=2.0, noise=12.0))
    best = -(np.exp(wanted) * wanted).sum(-1)[seen].mean()
    assert exposed > 0.9 * np.log2(PUBLIC)
    assert hidden < 0.5 * exposed, (hidden, exposed)
    assert abs(swung / loss - 1) < 0.02
    assert loss < 1.02 * best


def test_what_the_batch_lacks_is_told():
    rows = rows_of(np.zeros((8, 4)), np.zeros(4))
    del rows["privacy"]
    with pytest.raises(InputError, match="SwingKD reads batch\\['privacy'\\]"):
        small.Terms(SwingKD(), rows, student=small.student(kind=small.chain), teacher=small.teacher(kind=small.chain))
