"""MLLD: every level against NumPy, its masks, and the two views."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import small
from scipy.special import log_softmax, softmax
from test_parity import FOLDER

from jkd.errors import InputError
from jkd.recipes import MLLD
from jkd.recipes.multilevel import median

SIDES = dict(student=small.echo("student"), teacher=small.echo("teacher"))
ROWS, CLASSES = 8, 6


def rows(count: int = ROWS, padding: int = 0) -> dict:
    rng = np.random.default_rng(0)
    weight = np.ones(count, np.float32)
    weight[count - padding :] = 0

    def logits():
        return {f"{side}_logits": (2 * rng.normal(size=(count, CLASSES))).astype(np.float32) for side in SIDES}

    labels = {"label": rng.integers(0, CLASSES, count).astype(np.int32), "weight": weight}
    return logits() | labels | {"strong": logits() | {"weight": weight}}


@pytest.mark.parametrize("padding", [0, 3])
def test_every_level_is_the_formula(padding):
    batch = rows(ROWS + padding, padding)
    found, recipe = small.Terms(MLLD(), batch, **SIDES), MLLD()
    z, t, z_strong, t_strong = (
        np.float64(part[f"{side}_logits"][:ROWS]) for part in (batch, batch["strong"]) for side in ("student", "teacher")
    )
    p = softmax(t, -1)
    unsure, rare = p.max(-1) <= np.median(p.max(-1)), p.sum(0) <= np.median(p.sum(0))
    assert (unsure.sum(), rare.sum()) == (ROWS / 2, CLASSES / 2)
    wanted = dict.fromkeys(("kd_weak", "kd_strong", "examples", "classes"), 0.0)
    for temperature in recipe.temperatures:
        for name, mine, theirs, mask in (("kd_weak", z, t, unsure), ("kd_strong", z_strong, t_strong, 1)):
            target = softmax(theirs / temperature, -1)
            kl = (target * (np.log(target) - log_softmax(mine / temperature, -1))).sum(-1)
            wanted[name] += temperature**2 * (mask * kl).sum() / ROWS
        q, p = softmax(z / temperature, -1), softmax(t / temperature, -1)
        wanted["examples"] += (unsure[:, None] * (q @ q.T - p @ p.T) ** 2).sum() / ROWS
        wanted["classes"] += (rare[:, None] * (q.T @ q - p.T @ p) ** 2).sum() / CLASSES
    for name, value in wanted.items():
        np.testing.assert_allclose(found.mean(name), value, rtol=1e-4, err_msg=name)
        assert found.terms[name][2] == np.float32(0.9)
    for name, mine in (("task", z), ("task_strong", z_strong)):
        own = -log_softmax(mine, -1)[np.arange(ROWS), batch["label"][:ROWS]].mean()
        np.testing.assert_allclose(found.mean(name), own, rtol=1e-5)


@pytest.mark.parametrize(("name", "term"), [("batch_gram_T1", "examples"), ("class_gram_T1", "classes")])
def test_without_masks_the_correlations_are_the_authors_numbers(name, term):
    stored = np.load(FOLDER / f"{name}.npz")
    logits = {f"{side}_logits": stored[f"in_{side}_logits"].astype(np.float32) for side in SIDES}
    count = len(logits["student_logits"])
    ones = {"label": np.zeros(count, np.int32), "weight": np.ones(count, np.float32)}
    found = small.Terms(MLLD(temperatures=(1.0,), masked=False), logits | ones | {"strong": logits | ones}, **SIDES)
    np.testing.assert_allclose(found.mean(term), stored["expected"], rtol=2e-5)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_median_is_of_what_is_kept(count):
    values = np.random.default_rng(count).normal(size=8)
    kept = np.arange(8) < count
    np.testing.assert_allclose(median(jnp.asarray(values), jnp.asarray(kept)), np.median(values[:count]), rtol=1e-6)


def test_a_batch_without_the_second_view_is_told():
    batch = rows()
    del batch["strong"]
    with pytest.raises(InputError, match="MLLD: the batch has no 'strong'; Run.augment"):
        small.Terms(MLLD(), batch, **SIDES)
