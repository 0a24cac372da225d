"""SALT: a teacher early, then none; the sharpened target; which rows are learnable; and that a weak teacher must go in time."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax

from jkd import data, optim, schedules
from jkd.errors import InputError
from jkd.recipes import SALT, learnable

STUDENT = small.student(kind=small.chain)
TEACHER = small.teacher(kind=small.chain, width=6)
WIDE = small.chain(width=small.VOCAB)


def rows_of(told: np.ndarray) -> dict:
    size = len(told)
    return {"tokens": told.astype(np.int32), "weight": np.ones(size, np.float32), "index": np.arange(size, dtype=np.int32)}


def drawn(table: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Texts of eight tokens in which token i is followed by j with the table's chances."""
    rng = np.random.default_rng(seed)
    told = [rng.integers(0, len(table), rows)]
    for _ in range(7):
        told.append((np.cumsum(table[told[-1]], -1) < rng.random((rows, 1))).sum(-1).clip(max=len(table) - 1))
    return np.stack(told, 1)


def test_the_target_is_sharpened_and_the_two_terms_share_one():
    rows = rows_of(np.random.default_rng(0).integers(0, small.VOCAB, (8, 6)))
    found = small.Terms(SALT(weight=0.6, sharpness=0.25), rows, student=STUDENT, teacher=TEACHER)
    mine, theirs = (np.float64(m.apply(m.params, {}, rows)[0].logits)[:, :-1] for m in (STUDENT, TEACHER))
    soft = -(softmax(theirs / 0.25, -1) * log_softmax(mine, -1)).sum(-1)
    nll = -np.take_along_axis(log_softmax(mine, -1), rows["tokens"][:, 1:, None], -1)
    np.testing.assert_allclose(found.mean("kd"), soft.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.mean("task"), nll.mean(), rtol=1e-5)
    np.testing.assert_allclose([float(found.terms[name][2]) for name in ("kd", "task")], [0.6, 0.4], rtol=1e-6)


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return softmax(2.5 * np.random.default_rng(0).normal(size=(small.VOCAB, small.VOCAB)), -1)


def run_of(recipe, table, steps):
    """A teacher that is right about three quarters of what follows, and wrong about the rest."""
    weak = 0.75 * table + 0.25 * np.roll(table, 1, axis=1)
    eye = 10 * np.eye(small.VOCAB)
    teacher = WIDE.with_weights({"embed": {"kernel": np.float32(eye)}, "head": {"kernel": np.float32(np.log(weak))}}, {})
    student = tiny.weights(WIDE, seed=3)
    return tiny.run(recipe=recipe, student=student, teacher=teacher, optimizer=optim.adamw(2e-2), batch_size=8, steps=steps)


def test_with_the_teacher_early_it_begins_better_and_without_it_later_it_ends_better(table):
    """The claim in small, over three orders of the data: KL to the source after a tenth of the steps, and at the end."""
    steps, early = 240, 24
    recipes = {
        "salt": SALT(weight=0.8, until=0.15, sharpness=1.0),
        "always": SALT(weight=0.8, until=1.0, sharpness=1.0),
        "never": SALT(weight=0.8, until=0.0, sharpness=1.0),
    }
    log_table = np.log(table)

    def distance(params) -> float:
        said = WIDE.apply(params, {}, {"tokens": np.arange(small.VOCAB)[None]})[0].logits[0]
        return float((table * (log_table - np.asarray(jax.nn.log_softmax(said)))).sum(-1).mean())

    found = {}
    for name, recipe in recipes.items():
        made = tiny.Engine(run_of(recipe, table, steps), rows_of(drawn(table, 8, 0)))
        scores = []
        for seed in range(3):
            state = made.fresh()
            for step in range(steps):
                state, metrics = made.step(state, made.frozen, made.put(rows_of(drawn(table, 8, 1000 * seed + step))))
                if step + 1 == early:
                    scores.append([distance(jax.device_get(state.params["student"]))])
            scores[-1].append(distance(jax.device_get(state.params["student"])))
        found[name] = np.array(scores)
        ran = {key: float(value) for key, value in metrics.items() if key.startswith("ran/")}
        assert ran["ran/kd"] == (1.0 if name == "always" else 0.0)
        assert ran["ran/alone.task"] == 1 - ran["ran/kd"]
    assert (found["salt"][:, 0] < found["never"][:, 0]).all(), found
    assert (found["salt"][:, 1] < 0.6 * found["always"][:, 1]).all(), found


def test_hard_but_learnable_rows_score_highest():
    """A teacher that says n + 1 after n: a row it knows, one that it takes for its second choice, and one that it never would."""
    size = small.VOCAB
    logits = 6.0 * np.roll(np.eye(size), 1, axis=1) + 4.0 * np.roll(np.eye(size), 2, axis=1)
    model = WIDE.with_weights({"embed": {"kernel": np.float32(10 * np.eye(size))}, "head": {"kernel": np.float32(logits)}}, {})
    told = np.array([[0, 1, 2, 3, 4], [0, 2, 4, 6, 1], [0, 3, 6, 2, 5]])
    records = [{"tokens": row.astype(np.int32)} for row in told]

    class Rows:
        classes = None

        def __len__(self):
            return len(records)

        def columns(self):
            return None

        def records(self, indices):
            return [records[i] for i in indices]

        def example(self):
            return records[0]

    text = data.Data(train=Rows())
    scores = learnable(model, text, k=2, batch_size=2)
    log_probs = log_softmax(logits[0])
    np.testing.assert_allclose(scores, [-log_probs[1], -log_probs[2], 0], rtol=1e-4)
    kept = data.subset(text, np.argsort(-scores)[:1])
    np.testing.assert_array_equal(kept.train.records([0])[0]["tokens"], told[1])


@pytest.mark.parametrize(
    ("message", "fields"), [("SALT.until = 1.5", {"until": 1.5}), ("SALT.sharpness = 0", {"sharpness": 0})]
)
def test_what_cannot_be_is_refused(message, fields):
    with pytest.raises(InputError, match=message):
        SALT(**fields)


def test_the_weight_may_fall():
    falls = SALT(weight=schedules.Linear(0.5, 0.0))
    found = small.coefs(falls, rows_of(np.zeros((8, 5))), student=STUDENT, teacher=TEACHER)
    assert found == {"kd": 0.5, "task": 0.5}
