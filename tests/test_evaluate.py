"""Metrics against NumPy, and sums that do not care how the set is cut."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jkd import data, models, sparse
from jkd.errors import InputError
from jkd.evaluate import BINS, detail, make_evaluate, measure, summarise
from jkd.recipe import Recipe
from jkd.resolve import make_context
from jkd.state import init_state
from jkd.types import Outputs, Term


def random_case(rows=200, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, rows, classes)).astype(np.float32) * 2
    label = rng.integers(0, classes, rows).astype(np.int32)
    weight = (rng.random(rows) < 0.9).astype(np.float32)
    return student, teacher, label, weight


def by_hand(logits, label, weight):
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    keep = weight > 0
    p, label = p[keep], label[keep]
    correct, confidence = p.argmax(-1) == label, p.max(-1)
    edges = np.linspace(0, 1, BINS + 1)
    ece = 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence >= low) & (confidence < high) if high < 1 else confidence >= low
        if inside.any():
            ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return correct.mean(), -np.log(p[np.arange(len(label)), label]).mean(), ece


def test_metrics_are_those_of_numpy():
    student, teacher, label, weight = random_case()
    batch = dict(label=jnp.asarray(label), weight=jnp.asarray(weight))
    found = summarise(measure(Outputs(jnp.asarray(student)), Outputs(jnp.asarray(teacher)), batch))
    # float32 sums of 200 numbers of size 1
    for prefix, logits in (("", student), ("teacher_", teacher)):
        wanted = by_hand(logits, label, weight)
        np.testing.assert_allclose([found[f"{prefix}{name}"] for name in ("accuracy", "nll", "ece")], wanted, rtol=1e-5)
    keep = weight > 0
    assert found["agreement"] == pytest.approx((student.argmax(-1) == teacher.argmax(-1))[keep].mean(), rel=1e-6)
    q, p = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (teacher, student))
    assert found["kl"] == pytest.approx((q * np.log(q / p)).sum(-1)[keep].mean(), rel=1e-5)


def test_batches_add_up_and_padding_does_not_count():
    student, teacher, label, weight = random_case()

    def sums(rows):
        batch = dict(label=jnp.asarray(label[rows]), weight=jnp.asarray(weight[rows]))
        return measure(Outputs(jnp.asarray(student[rows])), Outputs(jnp.asarray(teacher[rows])), batch)

    whole = summarise(sums(slice(None)))
    parts = jax.tree.map(jnp.add, sums(slice(0, 80)), sums(slice(80, None)))
    assert summarise(parts) == pytest.approx(whole, rel=1e-5)
    assert summarise(sums(np.flatnonzero(weight))) == pytest.approx(whole, rel=1e-5)


def test_details_count_every_class_and_bin_and_no_padding():
    student, teacher, label, weight = random_case()
    label[weight == 0] = -1  # padding may say anything

    def found(rows):
        batch = dict(label=jnp.asarray(label[rows]), weight=jnp.asarray(weight[rows]))
        return measure(Outputs(jnp.asarray(student[rows])), Outputs(jnp.asarray(teacher[rows])), batch)

    whole, keep = detail(found(slice(None))), weight > 0
    for prefix, logits in (("", student), ("teacher_", teacher)):
        correct = (logits.argmax(-1) == label)[keep]
        classes, bins = whole[f"{prefix}classes"], whole[f"{prefix}bins"]
        # counts are exact in float32
        assert classes["weight"] == np.bincount(label[keep], minlength=7).tolist()
        assert classes["correct"] == np.bincount(label[keep], correct, minlength=7).tolist()
        assert sum(bins["weight"]) == keep.sum()
        assert sum(bins["correct"]) == correct.sum()
        means = np.divide(bins["confidence"], bins["weight"], where=np.array(bins["weight"]) > 0, out=np.zeros(BINS))
        inside = (means == 0) | ((means >= np.arange(BINS) / BINS) & (means <= (np.arange(BINS) + 1) / BINS))
        assert inside.all()
    parts = detail(jax.tree.map(jnp.add, found(slice(0, 80)), found(slice(80, None))))
    assert parts["classes"] == whole["classes"]
    assert parts["bins"]["weight"] == whole["bins"]["weight"]


def test_unlabelled_rows_count_for_agreement_alone():
    student, teacher, label, _ = random_case()
    labelled = (np.arange(200) < 100).astype(np.float32)
    batch = dict(label=jnp.asarray(label), weight=jnp.ones(200), labelled=jnp.asarray(labelled))
    found = summarise(measure(Outputs(jnp.asarray(student)), Outputs(jnp.asarray(teacher)), batch))
    assert found["accuracy"] == pytest.approx((student.argmax(-1) == label)[:100].mean(), rel=1e-6)
    assert found["agreement"] == pytest.approx((student.argmax(-1) == teacher.argmax(-1)).mean(), rel=1e-6)


def test_a_perfectly_calibrated_and_a_certain_wrong_model():
    label = jnp.zeros(100, jnp.int32)
    certain_wrong = Outputs(jnp.tile(jnp.asarray([[-50.0, 50.0]]), (100, 1)))
    found = summarise(measure(certain_wrong, None, dict(label=label, weight=jnp.ones(100))))
    assert found["ece"] == pytest.approx(1)
    assert "agreement" not in found
    coin = Outputs(jnp.zeros((100, 2)))
    half = jnp.asarray(np.arange(100) % 2, jnp.int32)
    assert summarise(measure(coin, None, dict(label=half, weight=jnp.ones(100))))["ece"] == pytest.approx(0, abs=1e-6)


def test_what_needs_labels_is_left_out_where_there_are_none():
    student, teacher, label, _ = random_case()
    batch = dict(label=jnp.asarray(label), weight=jnp.ones(200), labelled=jnp.zeros(200))
    found = summarise(measure(Outputs(jnp.asarray(student)), Outputs(jnp.asarray(teacher)), batch))
    assert set(found) == {"agreement", "kl"}
    assert summarise(measure(Outputs(heads={"score": jnp.ones(200)}), None, batch)) == {}


def test_text_is_measured_token_by_token_in_pieces(monkeypatch):
    rng = np.random.default_rng(1)
    hidden, theirs = (rng.normal(size=(4, 9, 6)).astype(np.float32) for _ in range(2))
    head = rng.normal(size=(6, 11)).astype(np.float32)
    tokens = rng.integers(0, 11, (4, 9)).astype(np.int32)
    batch = dict(
        tokens=jnp.asarray(tokens),
        mask=jnp.asarray(np.arange(9)[None] < np.array([9, 9, 5, 0])[:, None]),
        segment=jnp.asarray(np.repeat([[1, 1, 1, 2, 2, 2, 2, 2, 2]], 4, 0)),
        bytes=jnp.full((4, 9), 1.5),
        label=jnp.zeros(4, jnp.int32),  # text has none, and data says 0
        labelled=jnp.zeros(4),
        weight=jnp.array([1.0, 1, 1, 0]),
    )
    student, teacher = (Outputs(hidden=jnp.asarray(x), head=jnp.asarray(head)) for x in (hidden, theirs))
    found = summarise(measure(student, teacher, batch))
    keep = [(row, t) for row, real in enumerate((9, 9, 5)) for t in range(real - 1) if t != 2]
    logits = np.stack([(hidden @ head)[row, t] for row, t in keep])
    label = np.array([tokens[row, t + 1] for row, t in keep])
    np.testing.assert_allclose(
        [found[name] for name in ("accuracy", "nll", "ece")], by_hand(logits, label, np.ones(len(keep))), rtol=1e-5
    )
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / np.log(2) / 1.5, rel=1e-6)
    agree = logits.argmax(-1) == np.stack([(theirs @ head)[row, t] for row, t in keep]).argmax(-1)
    assert found["agreement"] == pytest.approx(agree.mean(), rel=1e-6)
    # in pieces of the time axis: the same
    monkeypatch.setattr("jkd.sparse.BLOCKS", 3)
    monkeypatch.setattr("jkd.sparse.by_position", functools.partial(sparse.by_position, whole=1))
    assert summarise(measure(student, teacher, batch)) == pytest.approx(found, rel=1e-5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Near(Recipe):
    """The hidden state's square, a stand-in for losses of hidden states."""

    needs_teacher: ClassVar[bool] = False
    column: str = "features"

    def terms(self, vars, student, teacher, batch, *, clock, key):
        if self.column not in batch:
            raise InputError(f"batch has no {self.column!r}")
        return {"near": Term(jnp.mean(student.hidden**2, -1), batch["weight"], 0.25)}


@pytest.mark.parametrize("column", ["features", "strong"])
def test_a_student_without_logits_is_measured_by_its_recipes_terms(column):
    def network(params, features, train):
        return Outputs(hidden=params["scale"][None] * features + train)  # moved while it is trained

    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 6)).astype(np.float32)
    student = models.from_function(network, {"scale": jnp.full(6, 2.0)}, inputs=lambda batch: batch["features"])
    run = tiny.run(
        student=student,
        teacher=None,
        recipe=Near(column=column),
        data=data.arrays(features=features, eval=dict(features=features[:21])),
        augment=() if column == "features" else (lambda batch, key: batch | {column: batch["features"]},),
        batch_size=16,
    )
    ctx = make_context(run)
    found = make_evaluate(ctx)(*init_state(ctx, jax.random.key(0))).metrics
    # of examples that lack what the recipe reads of training batches there is nothing to say
    wanted = {"term/near": np.mean(4 * features[:21] ** 2)} if column == "features" else {}
    assert found == pytest.approx(wanted, rel=1e-6)
