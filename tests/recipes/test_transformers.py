"""MiniLM and MiniLMv2: the numbers, by projections of either form, and on vision transformers of different shapes."""

from __future__ import annotations

import claims
import jax
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax
from sklearn.datasets import load_digits
from test_parity import FOLDER

from jkd import models, optim, recipes, schedules
from jkd.errors import InputError
from jkd.recipes import MiniLM, MiniLMv2
from jkd.resolve import make_context
from jkd.step import make_step

ECHOES = dict(student=small.echo("student"), teacher=small.echo("teacher"))
MINE, THEIRS = (tuple(f"{side}_{name}" for name in small.QKV) for side in ("student", "teacher"))
LENGTHS = (5, 3, 1, 4)
PACKED = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0], [4, 0, 0, 0, 0], [1, 2, 2, 2, 0]], np.int32)


def projections(*, student: tuple[int, int], teacher: tuple[int, int], axis: bool = True, seed: int = 0) -> dict:
    """A batch whose entries are the projections of four examples of up to five tokens; ``(heads, dim)`` of each side."""
    rng = np.random.default_rng(seed)
    rows: dict = {"weight": np.ones(4, np.float32), "mask": (np.arange(5) < np.array(LENGTHS)[:, None]).astype(np.int32)}
    for names, shape in ((MINE, student), (THEIRS, teacher)):
        for name in names:
            array = rng.normal(size=(4, 5, *shape)).astype(np.float32)
            rows[name] = array if axis else array.reshape(4, 5, -1)
    return rows


def rows_kl(teacher: np.ndarray, student: np.ndarray) -> float:
    """Mean over rows of the KL between their softmaxes."""
    return (softmax(teacher, -1) * (log_softmax(teacher, -1) - log_softmax(student, -1))).sum(-1).mean()


def relations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return x @ y.T / np.sqrt(x.shape[-1])


def documents(rows: dict) -> list[list[np.ndarray]]:
    """Places of each document, row by row."""
    segment = rows.get("segment", rows["mask"])
    return [[np.flatnonzero(row == number) for number in np.unique(row[row > 0])] for row in segment]


def over_rows(rows: dict, value) -> float:
    """The mean over rows of the mean over their tokens of ``value(row, places)`` of each document by itself."""
    each = [np.average([value(i, at) for at in own], weights=[len(at) for at in own]) for i, own in enumerate(documents(rows))]
    return float(np.mean(each))


def minilm(rows: dict, heads: int) -> tuple[float, float]:
    """The two terms by loops over rows, documents and heads, float64."""

    def of_heads(one_head):
        def value(i, at):
            cut = [np.float64(rows[name][i, at].reshape(len(at), heads, -1)) for name in (*MINE, *THEIRS)]
            return np.mean([one_head(*(array[:, h] for array in cut)) for h in range(heads)])

        return over_rows(rows, value)

    attention = of_heads(lambda q, k, v, q_t, k_t, v_t: rows_kl(relations(q_t, k_t), relations(q, k)))
    return attention, of_heads(lambda q, k, v, q_t, k_t, v_t: rows_kl(relations(v_t, v_t), relations(v, v)))


@pytest.mark.parametrize(("axis", "packed"), [(True, False), (False, True)])
def test_minilm_compares_head_by_head_over_the_real_tokens_of_a_document(axis, packed):
    rows = projections(student=(3, 2), teacher=(3, 4), axis=axis) | ({"segment": PACKED} if packed else {})
    given = {} if axis else dict(student_heads=3, teacher_heads=3)
    found = small.Terms(MiniLM(student_taps=MINE, teacher_taps=THEIRS, **given), rows, **ECHOES)
    assert found.terms.keys() == {"attention", "values"}
    np.testing.assert_allclose([found.mean("attention"), found.mean("values")], minilm(rows, 3), rtol=1e-5)


def test_minilm_does_not_see_a_rotation_of_a_head_nor_its_width():
    """Rotated into more dimensions; what the smaller divisor takes away is given back. Another rotation in each head."""
    rng, (heads, narrow, wide) = np.random.default_rng(1), (3, 2, 5)
    rows = projections(student=(heads, wide), teacher=(heads, narrow))
    of_scores, of_values = (np.linalg.qr(rng.normal(size=(heads, wide, narrow)))[0].swapaxes(1, 2) for _ in range(2))
    for mine, theirs, turn in zip(MINE, THEIRS, (of_scores, of_scores, of_values), strict=True):
        rows[mine] = (np.einsum("bthd,hde->bthe", rows[theirs], turn) * (wide / narrow) ** 0.25).astype(np.float32)
    found = small.Terms(MiniLM(student_taps=MINE, teacher_taps=THEIRS), rows, **ECHOES)
    assert abs(found.mean("attention")) < 1e-6
    assert abs(found.mean("values")) < 1e-6
    rows["student_value"][..., 0] *= -2
    other = small.Terms(MiniLM(student_taps=MINE, teacher_taps=THEIRS), rows, **ECHOES)
    assert other.mean("values") > 1e-2


def test_minilmv2s_term_is_the_authors_number():
    stored = np.load(FOLDER / "self_relation_kl.npz")
    rows = {name: stored[f"in_{name}"] for name in ("student_vectors", "teacher_vectors")}
    rows |= {"mask": stored["in_token_mask"].astype(np.int32), "weight": np.ones(2, np.float32)}
    recipe = MiniLMv2(student_taps=("student_vectors",), teacher_taps=("teacher_vectors",), relation_heads=3)
    found = small.Terms(recipe, rows, **ECHOES)
    np.testing.assert_allclose(found.mean("relation0"), stored["expected"], rtol=2e-5)


def test_minilmv2_cuts_sides_with_other_heads_alike_and_gives_each_relation_a_third():
    rows = projections(student=(2, 6), teacher=(3, 8)) | {"segment": PACKED}
    recipe = MiniLMv2(student_taps=MINE, teacher_taps=THEIRS, relation_heads=4)
    found = small.Terms(recipe, rows, **ECHOES)
    for i, (mine, theirs) in enumerate(zip(MINE, THEIRS, strict=True)):

        def value(row, at, mine=mine, theirs=theirs):
            s, t = (np.float64(rows[name][row, at].reshape(len(at), 4, -1)) for name in (mine, theirs))
            return np.mean([rows_kl(relations(t[:, h], t[:, h]), relations(s[:, h], s[:, h])) for h in range(4)])

        np.testing.assert_allclose(found.mean(f"relation{i}"), over_rows(rows, value), rtol=1e-5)
        np.testing.assert_allclose(found.terms[f"relation{i}"][2], 1 / 3, rtol=1e-6)


def vit(dim: int, heads: int, depth: int, **changes) -> models.vit.Config:
    given = dict(size=(8, 8), patch=2, dim=dim, heads=heads, depth=depth, classes=10, channels=1, mlp_ratio=2.0)
    return models.vit.Config(**given | changes)


def last(config: models.vit.Config) -> tuple[str, ...]:
    return tuple(f"blocks/{config.depth - 1}/attention/{name}" for name in small.QKV)


def test_a_vision_transformer_of_another_shape_takes_over_the_relations_without_a_label():
    big, little = (vit(*shape, size=(4, 4)) for shape in ((24, 4, 1), (16, 2, 1)))
    teacher = tiny.weights(big.build(), seed=1)
    recipe = MiniLMv2(student_taps=last(little), teacher_taps=last(big), relation_heads=4)
    rows = {"image": np.random.default_rng(0).normal(size=(16, 4, 4, 1)).astype(np.float32), "weight": np.ones(16, np.float32)}
    run = tiny.run(
        recipe=recipe,
        student=tiny.weights(little.build()),
        teacher=teacher,
        optimizer=optim.adamw(1e-2),
        steps=30,
        batch_size=16,
    )
    found = tiny.Engine(run, rows).train([rows] * 30)
    assert found.losses[-1] < 0.5 * found.losses[0]


def refused(recipe, student, teacher, message):
    rows = projections(student=student, teacher=teacher, axis=len(student) == 2)
    ctx = make_context(tiny.run(recipe=recipe, batch_size=4, **ECHOES), rows, devices=jax.devices()[:1])
    with pytest.raises(InputError, match=message):
        make_step(ctx)  # traced, not compiled


BOTH = dict(student_taps=MINE, teacher_taps=THEIRS)


def test_mistakes_are_told():
    with pytest.raises(InputError, match="MiniLM: teacher_taps = \\(\\): give three: query, key and value"):
        MiniLM(student_taps=MINE)
    with pytest.raises(InputError, match="MiniLMv2: teacher_taps = .*: give as many on each side"):
        MiniLMv2(student_taps=MINE, teacher_taps=THEIRS[:2])
    with pytest.raises(InputError, match="MiniLMv2: student_taps = \\(\\)"):
        MiniLMv2()
    refused(MiniLM(**BOTH), (2, 6), (3, 4), "the student has 2 attention heads, the teacher 3; MiniLMv2 cuts")
    refused(MiniLM(**BOTH), (12,), (12,), "MiniLM.student_heads = None: give the number of attention heads")
    refused(MiniLM(**BOTH, student_heads=3), (2, 6), (2, 6), "MiniLM.student_heads = 3: .* has 2 heads; leave it out")
    refused(MiniLMv2(**BOTH), (2, 6), (3, 8), "MiniLMv2.relation_heads = 48: .* divide the widths of both sides, \\(12, 24\\)")


@pytest.mark.slow
def test_a_student_that_took_over_the_relations_learns_a_task_from_few_labels_better():
    """The claim in small: distilled without a label, then fine-tuned; against the same fine-tuning from the same first weights."""
    examples, few, size = 1400, 100, 32
    digits = load_digits()
    image, label = (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)
    big, little = vit(32, 4, 1, patch=4), vit(16, 2, 1, patch=4)

    def trial(config, steps, recipe, teacher=None):
        run = tiny.run(
            student=config.build(),
            teacher=teacher,
            recipe=recipe,
            optimizer=optim.adamw(schedules.WarmupCosine(5e-3)),
            steps=steps,
            batch_size=size,
        )
        made = claims.Trial(run, claims.rows(image, label, np.arange(size)))

        def train(pool, *, seed, params=None):
            rng = np.random.default_rng(seed)
            return made.student(
                (claims.rows(image, label, rng.choice(pool, size)) for _ in range(steps)), seed=seed, params=params
            )

        return train

    @jax.jit
    def right(params):
        logits = little.build().apply(params, {}, {"image": image[examples:]})[0].logits
        return (logits.argmax(-1) == label[examples:]).mean()

    trained = big.build().with_weights(trial(big, 150, recipes.Supervised())(examples, seed=0), {})
    relations = MiniLMv2(student_taps=last(little), teacher_taps=last(big), relation_heads=8)
    distil, tune = trial(little, 150, relations, trained), trial(little, 60, recipes.Supervised())
    for seed in (0, 1):
        some = np.random.default_rng(seed).choice(examples, few, replace=False)
        distilled = right(tune(some, seed=seed, params=distil(examples, seed=seed)))
        scratch = right(tune(some, seed=seed))
        assert distilled > scratch + 0.1, (distilled, scratch)
