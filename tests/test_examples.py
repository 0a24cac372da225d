"""`jkd data`: texts with what counts, images as both sides see them."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from PIL import Image

from jkd import Experiment, Run, data, models, optim, recipes
from jkd.cli import main
from jkd.data import Flip
from jkd.examples import GAP, HEAD, SIDE, TITLE, show
from jkd.types import Preprocess

SHARED = dict(recipe=recipes.Supervised(), optimizer=optim.sgd(0.1), steps=1, batch_size=4)


def test_what_is_counted_of_a_text_is_marked():
    talk = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "1+1=", "completion": "2"}]
    model = models.mlp.Config(features=4, classes=2)
    packed = data.documents(talk, length=24, layout="fit")
    plain = data.documents(["all of it"], length=24, layout="pad")
    text, sheet = show(
        Experiment(
            one=Run(student=model, data=packed, **SHARED),
            two=Run(student=model, data=packed, **SHARED),
            three=Run(student=model, data=plain, **SHARED),
            four=lambda one: Run(student=model, data=plain, **SHARED),
            five=Run(student=model, **SHARED),
        ),
        rows=1,
    )
    assert sheet is None
    lines = text.splitlines()
    assert lines[0] == "one: documents, 1 to train on, 0 to evaluate on"
    # a row holds both; an end of text is counted with the completion, and shows as what it is
    assert "  of 48 real tokens in this batch 16 are counted (33%)" in lines
    assert sorted(line.strip() for line in lines if "«" in line and "=" in line) == ["1+1=«2<|end|>»", "2+2=«4<|end|>»"]
    assert "two: as one" in lines
    # the first token is predicted from nothing
    assert "    a«ll of it<|end|>»" in lines
    # no run of the experiment is passed over in silence
    assert any(re.match("four: a function, .*<lambda>; a run that it makes is known when it has run", line) for line in lines)
    assert "five: no data" in lines


@pytest.mark.parametrize(
    ("template", "shown"),
    [
        ("<|im_start|>A:{{ m.content }}<|im_end|>", "<|im_start|>A:«yes<|im_end|>»"),
        ("<|im_start|>A:{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>", "<|im_start|>A:«yes»<|im_end|>"),
    ],
    ids=["counts the end of the turn", "forgets it"],
)
def test_whether_the_end_of_a_turn_is_counted_can_be_seen(template, shown, tmp_path):
    special = {"<|im_start|>": 0, "<|im_end|>": 1}
    letters = {letter: number for number, letter in enumerate(sorted(set("U:hiA:yes")), start=2)}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(special | letters, []))
    fast.decoder = tokenizers.decoders.Fuse()
    fast.add_special_tokens(list(special))
    fast.save(str(tmp_path / "tokenizer.json"))
    whole = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + template + "{% else %}<|im_start|>U:{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>A:{% endif %}"
    )
    talk = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}]
    made = data.documents(talk, tokenizer=data.tokenizer.File(tmp_path), template=whole, length=32, layout="pad")
    text, _ = show(Experiment(one=Run(student=models.mlp.Config(features=4, classes=2), data=made, **SHARED)), rows=1)
    assert text.splitlines()[-1].strip() == "<|im_start|>U:hi<|im_end|>" + shown


def test_the_sheet_has_every_side_of_every_example(tmp_path):
    image = np.zeros((8, 6, 6, 3), np.uint8)
    image[:, :, :3] = 255  # white on the left
    examples = data.arrays(image=image, label=np.arange(8) % 2, classes=2)
    small = models.vit.Config(size=(12, 12), patch=6, dim=8, depth=1, heads=1, classes=2, preprocess=Preprocess(size=(12, 12)))
    student = models.mlp.Config(features=108, classes=2)
    text, sheet = show(
        Experiment(
            teacher=Run(student=small, data=examples, **SHARED),
            student=Run(student=student, teacher="teacher", data=examples, augment=(Flip(1.0),), **SHARED),
        ),
        rows=2,
    )
    assert "student: arrays, 8 to train on, 0 to evaluate on, 2 classes" in text
    page = np.asarray(Image.open(io.BytesIO(sheet)))
    # two lines of teacher's run (given, student), two of the student's (given, augmented, student, teacher)
    assert page.shape[1] == 4 * (SIDE + GAP) + GAP
    assert page.shape[0] == 2 * HEAD + 4 * (TITLE + SIDE + GAP) + GAP

    def cell(down, across):
        top, left = GAP + 2 * HEAD + down * (TITLE + SIDE + GAP) + TITLE, GAP + across * (SIDE + GAP)
        return page[top : top + SIDE, left : left + SIDE]

    given, augmented, own, theirs = (cell(2, across) for across in range(4))
    assert given[SIDE // 2, 5].tolist() == [255] * 3
    assert given[SIDE // 2, -5].tolist() == [0] * 3
    np.testing.assert_array_equal(augmented, given[:, ::-1])
    np.testing.assert_array_equal(own, augmented)
    assert theirs[SIDE // 2, 5].tolist() == [0] * 3


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "digits", "--rows", "1"]) == 0
    out, err = capsys.readouterr()
    assert "digits, 1,437 to train on, 360 to evaluate on, 10 classes" in out
    assert err == "wrote digits-data.png\n"
    with Image.open("digits-data.png") as page:
        assert page.format == "PNG"
    assert main(["data", "digits", "--rows", "0"]) == 2
    assert "--rows 0: give at least 1" in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["digits-data.png"]
