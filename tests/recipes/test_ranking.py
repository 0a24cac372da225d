"""Rankings: documents of a query (Margin-MSE) and classes (PLD)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from scipy.special import logsumexp, softmax
from test_parity import FOLDER

from jkd.errors import InputError
from jkd.recipe import Vars
from jkd.recipes import PLD, MarginMSE
from jkd.schedules import Clock
from jkd.types import Outputs

SIDES = dict(student=small.echo("student"), teacher=small.echo("teacher"))


def pairs(student_positive, student_negative, teacher_positive, teacher_negative) -> dict:
    def part(mine, theirs):
        weight = np.ones(len(mine), np.float32)
        return {"student_logits": np.float32(mine)[:, None], "teacher_logits": np.float32(theirs)[:, None], "weight": weight}

    return part(student_positive, teacher_positive) | {"negative": part(student_negative, teacher_negative)}


def stored():
    found = np.load(FOLDER / "margin_mse.npz")
    names = ("student_positive", "student_negative", "teacher_positive", "teacher_negative")
    return [found[f"in_{name}"] for name in names], found["expected"]


def test_margin_mse_is_the_authors_number():
    scores, expected = stored()
    np.testing.assert_allclose(small.Terms(MarginMSE(), pairs(*scores), **SIDES).mean("margin"), expected, rtol=2e-5)


def test_margin_mse_sees_no_offset_of_a_query():
    scores, expected = stored()
    offset = np.linspace(-3, 3, len(scores[0]))
    moved = [scores[0] + offset, scores[1] + offset, scores[2] + 7, scores[3] + 7]
    np.testing.assert_allclose(small.Terms(MarginMSE(), pairs(*moved), **SIDES).mean("margin"), expected, rtol=1e-4)


def test_a_score_may_be_a_head_of_its_own():
    scores = [np.arange(4.0) * k for k in (1, 2, 3, 5)]
    one = [Outputs(jnp.zeros((4, 3)), heads={"score": jnp.array(values)}) for values in scores]
    rows = {"weight": jnp.ones(4)}
    terms = MarginMSE().terms(Vars(), (one[0], one[1]), (one[2], one[3]), rows, clock=Clock(0, 1, 0.0), key=None)
    np.testing.assert_allclose(terms["margin"].values, ((scores[0] - scores[1]) - (scores[2] - scores[3])) ** 2)


def test_margin_mse_needs_the_other_documents():
    with pytest.raises(InputError, match="MarginMSE: the batch has no 'negative'"):
        small.Terms(MarginMSE(), {"student_logits": np.zeros((4, 1)), "weight": np.ones(4)}, **SIDES)


def random_rows(count: int = 12, classes: int = 5) -> dict:
    rng = np.random.default_rng(0)
    logits = {f"{side}_logits": rng.normal(size=(count, classes)).astype(np.float32) * 2 for side in SIDES}
    return logits | {"label": rng.integers(0, classes, count).astype(np.int32), "weight": np.ones(count, np.float32)}


def test_pld_is_the_formula():
    rows = random_rows()
    wanted = []
    for z, t, label in zip(np.float64(rows["student_logits"]), np.float64(rows["teacher_logits"]), rows["label"], strict=True):
        order = [label, *(c for c in np.argsort(-t) if c != label)]
        p = softmax(t)
        wanted.append(sum(p[c] * (logsumexp(z[order[k:]]) - z[c]) for k, c in enumerate(order)))
    np.testing.assert_allclose(small.Terms(PLD(), rows, **SIDES).mean("pld"), np.mean(wanted), rtol=1e-5)


def test_pld_with_a_certain_teacher_is_cross_entropy():
    rows = random_rows()
    rows["teacher_logits"] = np.where(np.eye(5)[rows["label"]] > 0, 60.0, 0.0).astype(np.float32)
    z = np.float64(rows["student_logits"])
    wanted = (logsumexp(z, -1) - z[np.arange(12), rows["label"]]).mean()
    np.testing.assert_allclose(small.Terms(PLD(), rows, **SIDES).mean("pld"), wanted, rtol=1e-5)


def test_plds_gradient_sums_to_nothing_and_it_is_convex():
    rows = random_rows()

    def loss(z):
        teacher = Outputs(jnp.asarray(rows["teacher_logits"]))
        return PLD().terms(Vars(), Outputs(z), teacher, rows, clock=Clock(0, 1, 0.0), key=None)["pld"].values.sum()

    z = jnp.asarray(rows["student_logits"])
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(z).sum(-1), 0, atol=1e-5)
    hessian = np.asarray(jax.jit(jax.hessian(loss))(z))
    for i in range(len(z)):
        assert np.linalg.eigvalsh(hessian[i, :, i]).min() > -1e-5


def test_pld_counts_labelled_rows_alone():
    rows = random_rows() | {"labelled": (np.arange(12) % 2).astype(np.float32)}
    np.testing.assert_array_equal(small.Terms(PLD(), rows, **SIDES).terms["pld"][1], rows["labelled"])
