"""TransKD: the fusion in NumPy, and what the patch embeddings' terms move."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax
from test_parity import conv3, normed, of, relu, terms_of

from jkd.errors import InputError
from jkd.recipes import TransKD
from jkd.resolve import make_context

STAGES = (*small.TAPS, *small.PRE)
BOTH = dict(student_taps=STAGES, teacher_taps=STAGES, embedding_weights=(0.1, 1.0))


def channel_wise(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Mean over examples and channels of the KL between softmaxes over positions."""
    s, t = (x.reshape(len(x), -1, x.shape[-1]) for x in (mine, theirs))
    return (softmax(t, 1) * (log_softmax(t, 1) - log_softmax(s, 1))).sum(1).mean()


def fused(found, maps: list[np.ndarray]) -> list[np.ndarray]:
    """Two levels, by hand."""

    def part(level, name):
        return of(found, "projector", "fusion", str(level), name)

    early, late = (normed(x @ part(i, "in")["kernel"][0, 0]) for i, x in enumerate(maps))
    times = early.shape[1] // late.shape[1]
    larger = late.repeat(times, 1).repeat(times, 2)
    pool = (early + larger).mean((1, 2))
    hidden = relu(normed(pool @ part(0, "squeeze")["kernel"]))
    both = (hidden @ part(0, "select")["kernel"] + part(0, "select")["bias"]).reshape(len(pool), 2, -1)
    share = softmax(both, 1)[:, :, None, None]
    mixed = early * share[:, 0] + larger * share[:, 1]
    return [normed(conv3(x, part(i, "out")["kernel"])) for i, x in enumerate((mixed, late))]


def test_transkd_fuses_levels_by_channel_and_aligns_embeddings():
    rows = tiny.batch(8)
    found = terms_of(TransKD(**BOTH, middle=7), rows)
    mine, theirs = (small.taps(network, rows, *STAGES) for network in (small.student(), small.teacher()))
    for i, (x, wanted) in enumerate(zip(fused(found, mine[:2]), theirs[:2], strict=True)):
        assert x.shape == wanted.shape
        np.testing.assert_allclose(found.mean(f"fusion{i}"), channel_wise(x, wanted), rtol=1e-4)
        assert found.terms[f"fusion{i}"][2] == 1
    assert of(found, "projector", "fusion", "0", "squeeze")["kernel"].shape == (7, 32)
    for i, (x, wanted, share) in enumerate(zip(mine[2:], theirs[2:], (0.1, 1.0), strict=True)):
        align = of(found, "projector", "embedding", str(i))
        aligned = x @ align["kernel"] + align["bias"]
        np.testing.assert_allclose(found.mean(f"embedding{i}"), ((aligned - wanted) ** 2).mean(), rtol=1e-5)
        np.testing.assert_allclose(found.terms[f"embedding{i}"][2], share, rtol=1e-6)
    assert found.terms.keys() == {"task", "fusion0", "fusion1", "embedding0", "embedding1"}


def test_an_embeddings_term_moves_the_patch_embedding_and_its_map_alone():
    recipe = TransKD(
        student_taps=("late", "early"), teacher_taps=("late", "early"), embedding_weights=(1.0,), weight=0.0, task_weight=0.0
    )
    networks = dict(student=small.student(), teacher=small.teacher())
    gradient = tiny.Engine(tiny.run(recipe=recipe, optimizer=tiny.UNIT, **networks)).gradient(tiny.batch())
    moved = {"student": {"early"}, "projector": {"embedding"}}
    for group, parts in moved.items():
        for name, tree in gradient[group].items():
            sizes = [np.abs(leaf).max() for leaf in jax.tree.leaves(tree)]
            assert all(size > 1e-4 for size in sizes) if name in parts else max(sizes) == 0, (group, name)


def test_labels_may_be_those_of_pixels():
    rng = np.random.default_rng(0)
    rows = {"student_logits": rng.normal(size=(4, 3, 3, 5)).astype(np.float32), "weight": np.ones(4, np.float32)}
    rows |= {"label": rng.integers(0, 5, (4, 3, 3)).astype(np.int32)}
    rows |= {tap: rng.normal(size=(4, 3, 3, 2)).astype(np.float32) for tap in ("mine", "theirs")}
    recipe = TransKD(student_taps=("mine",), teacher_taps=("theirs",), embedding_weights=())
    found = small.Terms(recipe, rows, student=small.echo("student"), teacher=small.echo("teacher"))
    wanted = -np.take_along_axis(log_softmax(np.float64(rows["student_logits"]), -1), rows["label"][..., None], -1).mean()
    np.testing.assert_allclose(found.mean("task"), wanted, rtol=1e-5)
    assert found.terms.keys() == {"task", "fusion0"}


def test_mistakes_are_told():
    with pytest.raises(InputError, match="TransKD: 2 student_taps and 2 teacher_taps; .* then 4 patch embeddings"):
        TransKD(student_taps=small.TAPS, teacher_taps=small.TAPS)
    recipe = TransKD(student_taps=("pool",), teacher_taps=("pool",), embedding_weights=())
    with pytest.raises(InputError, match="'pool' gives \\(32, 12\\) and \\(32, 16\\): a stage is \\[batch, height, width"):
        make_context(tiny.run(recipe=recipe, student=small.student(), teacher=small.teacher()), tiny.batch())
