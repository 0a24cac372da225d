"""Self-distillation from within one network: USKD."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import small
import tiny
from test_parity import FOLDER
from test_twoheads import with_identity

from jkd.errors import InputError
from jkd.recipes import USKD


def test_uskds_term_is_the_authors_number():
    stored = np.load(FOLDER / "uskd.npz")
    logits = {f"{name}_logits": stored[f"in_{name}_logits"].astype(np.float32) for name in ("student", "weak")}
    count, classes = logits["student_logits"].shape
    rows = logits | {"label": stored["in_labels"].astype(np.int32), "weight": np.ones(count, np.float32)}
    recipe = USKD(student_taps=("weak_logits",), alpha=1.0, beta=0.1, mu=0.005)
    found = with_identity(recipe, rows, "weak_head", classes, student=small.echo("student"), teacher=None)
    np.testing.assert_allclose(found.mean("own"), stored["expected"], rtol=2e-5)


def test_the_weak_head_learns_from_its_own_labels_alone():
    """Its order of the classes is a target: no gradient comes back through it."""
    gradients = []
    for beta in (0.1, 0.0):
        run = tiny.run(
            recipe=USKD(student_taps=("early",), beta=beta), student=small.student(), teacher=None, optimizer=tiny.UNIT
        )
        gradients.append(tiny.Engine(run).gradient(tiny.batch()))
    assert tiny.distance(*(gradient["weak_head"] for gradient in gradients)) < 1e-6
    assert tiny.distance(*(gradient["student"]["head"] for gradient in gradients)) > 1e-3
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients[0]["weak_head"]))


def test_uskd_needs_one_earlier_layer():
    with pytest.raises(InputError, match="USKD: student_taps = \\(\\): give one"):
        USKD()
