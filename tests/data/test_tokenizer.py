"""Tokenizers: bytes, files, and which of them mean the same."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from jkd import data
from jkd.data.tokenizer import Bytes, File, check_same
from jkd.errors import InputError

TEXT = "def naïve(x):\n\treturn '😀' * x\x00"


def trained(path, words=("the quick brown fox", "the lazy dog"), special=("<s>", "</s>"), config=None):
    """A small BPE tokenizer on disk."""
    path.mkdir(parents=True, exist_ok=True)
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = tokenizers.decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    fast.train_from_iterator([*words] * 3, trainer)
    fast.save(str(path / "tokenizer.json"))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    return File(path)


def test_bytes():
    codec = Bytes()
    tokens = codec.encode(TEXT)
    assert tokens.tolist() == list(TEXT.encode())
    assert tokens.dtype == np.int32
    assert codec.decode(codec.encode(TEXT, special=True)) == TEXT
    assert (codec.size, codec.begin, codec.end, codec.encode("a", special=True)[-1]) == (257, None, 256, 256)
    assert codec.decode(codec.encode(TEXT, special=True), special=True) == TEXT + "<|end|>"
    assert codec.decode([0xC3]) == "\ufffd"  # half a letter
    assert [len(one) for one in codec.encode_all(["a", "bc", ""])] == [1, 2, 0]


def test_bytes_on_disk_are_bytes(tmp_path):
    Bytes().save(tmp_path)
    file = File(tmp_path)
    np.testing.assert_array_equal(file.encode(TEXT), Bytes().encode(TEXT))
    assert file.decode(file.encode(TEXT)) == TEXT
    assert (file.size, file.end) == (257, 256)


def test_a_file(tmp_path):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    file = trained(tmp_path / "a", config=config)
    assert (file.begin, file.end, file.size) == (0, 1, 280)
    assert file.decode([0, *file.encode("the fox"), 1]) == "the fox"
    assert file.decode([0, *file.encode("the fox"), 1], special=True) == "<s>the fox</s>"
    assert len(file.encode("the quick")) < 4
    for one, other in zip(file.encode_all(["the", "lazy fox"]), ("the", "lazy fox"), strict=True):
        np.testing.assert_array_equal(one, file.encode(other))
    file.save(tmp_path / "b")
    assert File(tmp_path / "b" / "tokenizer.json").fingerprint == file.fingerprint
    assert File(tmp_path / "b").end == 1
    assert File(trained(tmp_path / "c").path).end is None


@pytest.mark.parametrize("config", [None, {"cls_token": "[CLS]", "sep_token": {"content": "[SEP]"}}, {"do_lower_case": True}])
def test_an_encoders_documents_stand_between_its_own_tokens(tmp_path, config):
    """As BERT has them: named as such, or told by the template in tokenizer.json alone."""
    fast = tokenizers.Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "fox": 4}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    if config is None or "cls_token" not in config:
        around = dict(pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
        fast.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", **around)
    fast.save(str(tmp_path / "tokenizer.json"))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    file = File(tmp_path)
    assert (file.begin, file.end) == (2, 3)
    held = data.documents(["fox fox", "fox"], length=8, layout="fit", tokenizer=file)
    assert held.train.records([0])[0]["tokens"].tolist() == [2, 4, 4, 3, 2, 4, 3, 0]


def test_fingerprints_tell_meaning_from_bytes_of_the_file(tmp_path):
    base = trained(tmp_path / "base", config={"eos_token": "</s>"})
    described = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    # as an instruct model has it: another end of text, another template, other formatting, merges in the older form
    instruct = tmp_path / "instruct"
    instruct.mkdir()
    described["model"]["merges"] = [" ".join(pair) for pair in described["model"]["merges"]]
    described["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (instruct / "tokenizer.json").write_text(json.dumps(described, indent=7))
    (instruct / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert File(instruct).fingerprint == base.fingerprint
    assert len(File(instruct).encode("the quick brown fox")) > 3  # truncation is the business of whoever makes rows
    others = [trained(tmp_path / "w", words=("a lazier dog",)), trained(tmp_path / "s", special=("</s>", "<s>")), Bytes()]
    described["added_tokens"][1]["special"] = False
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "tokenizer.json").write_text(json.dumps(described))
    prints = {base.fingerprint, File(tmp_path / "plain").fingerprint, *(other.fingerprint for other in others)}
    assert len(prints) == 5


def test_mismatch():
    check_same(data=None, student="a" * 64, teacher="a" * 64)
    check_same(student=None, teacher="b" * 64)
    with pytest.raises(InputError, match=r"tokenizers of data \(aaaaaaaa\) and teacher \(bbbbbbbb\) differ.*recipes.ULD"):
        check_same(data="a" * 64, student=None, teacher="b" * 64)


def test_wrong_files(tmp_path):
    with pytest.raises(InputError, match="tokenizer.json: no such file$"):
        File(tmp_path).encode("a")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match="the tokenizer.model there must be converted first"):
        _ = File(tmp_path).size
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json: no tokenizer"):
        _ = File(tmp_path).fingerprint
