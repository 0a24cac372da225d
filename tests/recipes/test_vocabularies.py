"""Two vocabularies: which place is compared with which, and that no numbering of either vocabulary matters."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from scipy.special import log_softmax, softmax
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

import jkd
from jkd import data, models, optim
from jkd.errors import InputError
from jkd.recipes import ULD, TokenKD
from jkd.recipes.vocabularies import counterparts
from jkd.resolve import make_context

MINE, THEIRS = 7, 11
TALKS = [f"the {one} {what} the {other}" for one in ("dog", "fox") for what in ("sees", "hears") for other in ("owl", "cat")]


def texts(rows: int = 8, *, seed: int = 0) -> dict:
    """A text in two alphabets: the teacher's has two letters for each of the student's first, so its rows are longer."""
    rng = np.random.default_rng(seed)
    batch = {"tokens": rng.integers(0, MINE, (rows, 6)), "teacher_tokens": rng.integers(0, THEIRS, (rows, 9))}
    batch |= {
        "loss_mask": np.arange(6)[None] >= 2 + np.zeros((rows, 1)),
        "teacher_loss_mask": np.arange(9)[None] >= 3 + np.zeros((rows, 1)),
    }
    batch = {name: value.astype(np.int32) for name, value in batch.items()}
    return tiny.batch(rows, seed=seed) | batch


def test_counted_tokens_meet_by_their_number_in_their_document():
    batch = {
        # the student counts 2..4 (predicted from 1..3) of the first document and both of the second that are predicted
        "tokens": [[5, 6, 7, 8, 9, 1, 2, 3]],
        "segment": [[1, 1, 1, 1, 1, 2, 2, 2]],
        "loss_mask": [[0, 0, 1, 1, 1, 1, 1, 1]],
        # the teacher has two more in the prompt, one token fewer in the answer, and one more in the second document
        "teacher_tokens": [[5, 5, 6, 6, 7, 8, 1, 2, 3, 4]],
        "teacher_segment": [[1, 1, 1, 1, 1, 1, 2, 2, 2, 2]],
        "teacher_loss_mask": [[0, 0, 0, 0, 1, 1, 1, 1, 1, 1]],
    }
    place, there = jax.device_get(counterparts({name: jnp.asarray(value) for name, value in batch.items()}))
    found = {mine: int(theirs) for mine, (theirs, ok) in enumerate(zip(place[0], there[0], strict=True)) if ok}
    assert found == {1: 3, 2: 4, 5: 6, 6: 7}
    with pytest.raises(InputError, match="no 'teacher_tokens'"):
        counterparts({"tokens": jnp.zeros((1, 3), jnp.int32)})


def test_the_terms_by_numpy_and_in_any_numbering_of_either_vocabulary():
    student = small.student(kind=small.chain)
    teacher = small.teacher(kind=small.chain, width=6, vocab=THEIRS)
    rows, recipe = texts(), ULD(temperature=2.0, weight=0.5)
    sides = dict(student=student, teacher=teacher)

    def logits(model, told):
        return np.float64(model.apply(model.params, {}, {"tokens": told})[0].logits)

    mine, theirs = logits(student, rows["tokens"]), logits(teacher, rows["teacher_tokens"])
    q, p = (np.sort(softmax(z / 2, -1), -1)[..., ::-1] for z in (mine, theirs))
    # the student predicts its answer from places 1..4, the teacher from 2..7: four of them meet
    gap = np.abs(np.pad(q[:, 1:5], ((0, 0), (0, 0), (0, THEIRS - MINE))) - p[:, 2:6]).sum(-1)
    nll = -np.take_along_axis(log_softmax(mine[:, 1:5], -1), rows["tokens"][:, 2:, None], -1)[..., 0]
    found = small.Terms(recipe, rows, **sides)
    np.testing.assert_allclose(found.mean("uld"), gap.mean(), rtol=1e-5)
    np.testing.assert_allclose(found.mean("task"), nll.mean(), rtol=1e-5)
    # another numbering of the teacher's vocabulary: its embedding, its head and the text in it
    order = np.random.default_rng(1).permutation(THEIRS)
    back = np.argsort(order)
    embed, head = teacher.params["embed"]["kernel"], teacher.params["head"]["kernel"]
    other = teacher.with_weights({"embed": {"kernel": embed[order]}, "head": {"kernel": head[:, order]}}, {})
    said = rows | {"teacher_tokens": back[rows["teacher_tokens"]].astype(np.int32)}
    again = small.Terms(recipe, said, student=student, teacher=other)
    np.testing.assert_allclose(again.mean("uld"), found.mean("uld"), rtol=1e-6)


def test_a_teacher_of_another_vocabulary_reads_its_own_text_and_is_learned_from():
    teacher = small.teacher(kind=small.chain, width=6, vocab=THEIRS)
    # surer of itself: what it gives to more tokens than the student has, no student can follow
    teacher = teacher.with_weights({**teacher.params, "head": {"kernel": 6 * teacher.params["head"]["kernel"]}}, {})
    run = tiny.run(
        recipe=ULD(task_weight=0.0),
        student=small.student(kind=small.chain),
        teacher=teacher,
        optimizer=optim.adamw(5e-2),
        batch_size=8,
        steps=60,
    )
    # the same text in other letters, behind two more of them
    rows = texts() | {"teacher_tokens": np.pad(texts()["tokens"] + 3, ((0, 0), (2, 0)))}
    rows["teacher_loss_mask"] = np.pad(rows["loss_mask"], ((0, 0), (2, 0)))
    made = tiny.Engine(run, rows)
    assert made.ctx.teacher_outputs.logits_shape == (8, 8, THEIRS)
    found = made.train([rows] * 60)
    assert found.losses[-1] < 0.5 * found.losses[0]


def test_a_recipe_of_one_vocabulary_still_refuses_two():
    sides = dict(student=small.student(kind=small.chain), teacher=small.teacher(kind=small.chain, vocab=THEIRS))
    with pytest.raises(InputError, match="the teacher has 11 classes, the student 7: TokenKD"):
        make_context(tiny.run(recipe=TokenKD(), batch_size=8, **sides), texts())


@pytest.mark.slow
def test_a_teacher_of_another_vocabulary_teaches_from_text(tmp_path):
    """From files to evaluation: bytes for the student, half as many tokens for its teacher."""
    pieces = Tokenizer(BPE())
    pieces.train_from_iterator(TALKS, BpeTrainer(vocab_size=60, special_tokens=["<end>"], show_progress=False))
    pieces.save(str(tmp_path / "tokenizer.json"))
    words = data.tokenizer.File(tmp_path)
    text = data.documents(TALKS, eval=TALKS, length=40, layout="fit", teacher_tokenizer=words, teacher_length=24)
    shape = dict(dim=8, depth=1, heads=2, hidden=16, remat=None)
    student, teacher = (models.decoder.Config(vocab=codec.size, **shape) for codec in (text.tokenizer, words))
    own = dataclasses.replace(teacher.build(), tokenizer=words.fingerprint)
    shared = dict(student=student, recipe=ULD(), data=text, optimizer=optim.sgd(0.1), batch_size=8, steps=2)
    found = jkd.train(jkd.Run(teacher=tiny.weights(own), **shared)).metrics
    assert np.isfinite(found["bits_per_byte"])
    assert "agreement" not in found
    with pytest.raises(InputError, match="tokenizers of teacher_tokenizer .* and teacher .* differ"):
        make_context(jkd.Run(teacher=dataclasses.replace(own, tokenizer="b" * 64), **shared))
