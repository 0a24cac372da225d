"""TinyBERT and DistilBERT by NumPy, which layers learn from which, and ERNIE-Tiny's stages."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import small
import tiny
from rows import LAYERS
from scipy.special import log_softmax, softmax

from jkd import optim
from jkd.config import Experiment, Run, dependencies
from jkd.data import MaskTokens, digits
from jkd.errors import InputError
from jkd.recipes import DistilBERT, Supervised, TinyBERT, ernie_tiny, evenly
from jkd.resolve import make_context

ECHOES = dict(student=small.echo("student"), teacher=small.echo("teacher"))
LENGTHS = (5, 3, 1, 4)
REAL = np.arange(5) < np.array(LENGTHS)[:, None]
PACKED = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0], [4, 0, 0, 0, 0], [1, 2, 2, 2, 0]], np.int32)


def features(seed: int = 0) -> dict:
    """Two layers' queries and keys of three heads, two hidden states of one width, and logits, of each side."""
    rng = np.random.default_rng(seed)
    rows: dict = {"weight": np.array([1, 2, 0.5, 0], np.float32), "mask": REAL.astype(np.int32)}
    for side in ("student", "teacher"):
        dim = 2 if side == "student" else 4
        for layer in range(2):
            for name in ("query", "key"):
                rows[f"{side}_{name}{layer}"] = rng.normal(size=(4, 5, 3, dim)).astype(np.float32)
            rows[f"{side}_hidden{layer}"] = rng.normal(size=(4, 5, 6)).astype(np.float32)
        rows[f"{side}_logits"] = rng.normal(size=(4, 7)).astype(np.float32)
    return rows


def taps(side: str) -> dict:
    return {
        f"{side}_hidden": tuple(f"{side}_hidden{i}" for i in range(2)),
        f"{side}_attention": tuple((f"{side}_query{i}", f"{side}_key{i}") for i in range(2)),
    }


def test_tinyberts_numbers():
    rows = features() | {"segment": PACKED}
    recipe = TinyBERT(**taps("student"), **taps("teacher"), projector=None, weight=1.0, soft_weight=0.5, temperature=2.0)
    found = small.Terms(recipe, rows, **ECHOES)
    assert set(found.terms) == {"attention0", "attention1", "hidden0", "hidden1", "soft"}

    def scores(side, i, row, head):
        q, k = (np.float64(rows[f"{side}_{name}{i}"][row, : LENGTHS[row], head]) for name in ("query", "key"))
        return q @ k.T / np.sqrt(q.shape[-1])

    weight = rows["weight"]
    for i in range(2):
        each = []
        for row, length in enumerate(LENGTHS):
            segment = PACKED[row, :length]
            alike = segment[:, None] == segment[None]  # pairs of one document alone
            each.append(
                np.mean([np.square(scores("student", i, row, h) - scores("teacher", i, row, h))[alike] for h in range(3)])
            )
        assert found.mean(f"attention{i}") == pytest.approx(np.average(each, weights=weight), rel=1e-5)
        gap = np.square(np.float64(rows[f"student_hidden{i}"]) - rows[f"teacher_hidden{i}"]).mean(-1)
        assert found.mean(f"hidden{i}") == pytest.approx(np.average(gap, weights=weight[:, None] * REAL), rel=1e-5)
    # the authors' line: (- softmax(teacher / T) * log_softmax(student / T)).mean()
    student, teacher = (np.float64(rows[f"{side}_logits"]) / 2.0 for side in ("student", "teacher"))
    soft = -(softmax(teacher, -1) * log_softmax(student, -1)).mean(-1)
    assert found.mean("soft") == pytest.approx(np.average(soft, weights=weight), rel=1e-5)
    assert float(found.terms["soft"][2]) == 0.5


def test_one_linear_map_serves_every_layer():
    run = tiny.run(
        recipe=TinyBERT(**LAYERS),
        batch_size=8,
        student=small.student(kind=small.reader, depth=1, width=6),
        teacher=small.teacher(kind=small.reader, width=8),
    )
    ctx = make_context(run, tiny.batch(8) | {"tokens": np.zeros((8, 5), np.int32)})
    assert {name: leaf.shape for name, leaf in ctx.vars.params["projector"].items()} == {"kernel": (6, 8), "bias": (8,)}


def test_layers_are_paired_evenly():
    assert evenly(4, 12) == (2, 5, 8, 11)
    assert evenly(6, 6) == tuple(range(6))
    with pytest.raises(InputError, match="evenly\\(5, 12\\)"):
        evenly(5, 12)


def test_distilberts_numbers():
    rng = np.random.default_rng(1)
    rows = features() | {"tokens": rng.integers(0, 7, (4, 5)), "label": rng.integers(0, 7, (4, 5))}
    rows["masked"] = (rng.random((4, 5)) < 0.5) & REAL
    for side in ("student", "teacher"):
        rows[f"{side}_logits"] = rng.normal(size=(4, 5, 7)).astype(np.float32)
    recipe = DistilBERT(student_taps=("student_hidden0",), teacher_taps=("teacher_hidden0",))
    found = small.Terms(recipe, rows, **ECHOES)
    student, teacher = (np.float64(rows[f"{side}_logits"]) for side in ("student", "teacher"))
    real = rows["weight"][:, None] * REAL
    kl = 4 * (softmax(teacher / 2, -1) * (log_softmax(teacher / 2, -1) - log_softmax(student / 2, -1))).sum(-1)
    nll = -np.take_along_axis(log_softmax(student, -1), rows["label"][..., None], -1)[..., 0]
    h, t = (np.float64(rows[f"{side}_hidden0"]) for side in ("student", "teacher"))
    cosine = (h * t).sum(-1) / np.linalg.norm(h, axis=-1) / np.linalg.norm(t, axis=-1)
    assert found.mean("kd") == pytest.approx(np.average(kl, weights=real), rel=1e-5)
    assert found.mean("task") == pytest.approx(np.average(nll, weights=real * rows["masked"]), rel=1e-5)
    assert found.mean("cosine") == pytest.approx(np.average(1 - cosine, weights=real), rel=1e-5)
    assert [float(found.terms[name][2]) for name in ("kd", "task", "cosine")] == [5, 2, 1]


def test_masking_hides_a_share_of_the_real_tokens_and_remembers_them():
    rows, hide = 400, MaskTokens(mask=9, vocab=12, rate=0.2, never=(3,))
    told = np.random.default_rng(0).integers(0, 9, (rows, 20)).astype(np.int32)
    real = np.broadcast_to(np.arange(20) < 15, told.shape)
    found = jax.device_get(jax.jit(hide)({"tokens": told, "mask": real}, jax.random.key(0)))
    chosen = found["masked"] == 1
    assert not chosen[~real].any()
    assert not chosen[told == 3].any()
    # 5300 candidates: a standard deviation is 0.006 of the rate, 0.015 of a fate's share
    assert abs(chosen[real & (told != 3)].mean() - 0.2) < 0.02
    assert abs((found["tokens"][chosen] == 9).mean() - (0.8 + 0.1 / 12)) < 0.05
    assert abs((found["tokens"][chosen] == told[chosen]).mean() - (0.1 + 0.1 / 12)) < 0.04
    np.testing.assert_array_equal(found["tokens"][~chosen], told[~chosen])
    np.testing.assert_array_equal(found["label"], told)


def test_ernie_tinys_stages_change_one_thing_at_a_time_and_hand_the_student_on():
    latent, hard = TinyBERT(**LAYERS), TinyBERT(**LAYERS, soft_weight=1.0, task_weight=1.0)
    general, task = digits(), digits(labelled=0.1)
    run = Run(student=small.student(), recipe=hard, optimizer=optim.sgd(0.1), steps=7, data=task)
    nodes = ernie_tiny("bert", run, latent, pretrained="pretrained", finetuned="finetuned", general=general, steps=(4, 5, 6))
    shared = dict(student=small.student(), recipe=Supervised(), optimizer=optim.sgd(0.1), steps=1)
    experiment = Experiment(pretrained=Run(**shared), finetuned=Run(**shared), **nodes)
    assert list(nodes) == ["bert_gd", "bert_ged", "bert_tad", "bert"]
    assert [dependencies(node) for node in nodes.values()] == [
        ("pretrained",),
        ("bert_gd", "finetuned"),
        ("bert_ged", "finetuned"),
        ("bert_tad", "finetuned"),
    ]
    assert list(experiment.nodes)[2:] == list(nodes)
    teacher = small.teacher()
    made, left = [nodes["bert_gd"]], small.student(width=5)
    for before, name in (("bert_gd", "bert_ged"), ("bert_ged", "bert_tad"), ("bert_tad", "bert")):
        made.append(nodes[name](**{before: left, "finetuned": teacher}))
        assert made[-1].student is left  # so it begins at least where the stage before ended
        assert made[-1].teacher is teacher
    assert [one.recipe for one in made] == [latent, latent, latent, hard]
    assert [one.data for one in made] == [general, general, task, task]
    assert [one.steps for one in made] == [4, 5, 6, 7]


MISTAKES = {
    "TinyBERT: no taps": TinyBERT,
    "TinyBERT: 1 taps student_hidden, 0 teacher_hidden": lambda: TinyBERT(student_hidden=("a",)),
    "DistilBERT: student_taps = \\(\\)": DistilBERT,
    "MaskTokens.rate = 0": lambda: MaskTokens(mask=0, vocab=2, rate=0.0),
    "MaskTokens.mask = 2": lambda: MaskTokens(mask=2, vocab=2),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_what_cannot_be_is_refused(message):
    with pytest.raises(InputError, match=message):
        MISTAKES[message]()


def test_what_a_batch_or_a_side_lacks_is_told():
    rows = features() | {"tokens": np.zeros((4, 5), np.int32)}
    with pytest.raises(InputError, match="DistilBERT reads batch\\['masked'\\].*MaskTokens"):
        small.Terms(DistilBERT(cosine_weight=0.0), rows, **ECHOES)
    rows["student_query0"] = rows["student_query0"][:, :, :2]
    rows["student_key0"] = rows["student_key0"][:, :, :2]
    with pytest.raises(InputError, match="the student has 2 attention heads, the teacher 3; MiniLMv2"):
        small.Terms(TinyBERT(**taps("student"), **taps("teacher"), projector=None), rows, **ECHOES)
