"""The configs for people's own data and published weights, end to end on stand-ins made here: look, train, report, export, reload."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from jkd import data, models
from jkd.cli import main
from jkd.export import _said

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "pretrained"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{% if message.role == 'assistant' %}{% generation %}{{ message.content }}."
    "{% endgeneration %}{% else %}{{ message.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def letters(directory):
    """A tokenizer of 48 tokens: end of text, and letters for what the texts here are written with."""
    alphabet = sorted(set(pre_tokenizers.ByteLevel.alphabet()) & set("abcdefghijklmnopqrstuvwxyz0123456789[].,+=ĠĊ"))
    assert len(alphabet) <= 47
    fast = Tokenizer(BPE({"<end>": 0} | {letter: place for place, letter in enumerate(alphabet, start=1)}, []))
    fast.pre_tokenizer, fast.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast.add_special_tokens(["<end>"])
    fast.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


def published(family, directory):
    """A tiny random network as its family is published, with a tokenizer where it reads text."""
    shutil.copytree(GOLDEN / family, directory, ignore=shutil.ignore_patterns("answers.npz"))
    if family != "vit":
        letters(directory)
    return directory


def lived(config, run="student", **parameters):
    """`jkd data`, `train`, `report` and `export` of a config of this repository, and what the exported directory holds."""
    sets = [part for name, value in parameters.items() for part in ("--set", f"{name}={value}")]
    path = config if config.endswith(".py") else str(ROOT / "configs" / f"{config}.py")
    assert main(["data", path, *sets, "--rows", "1"]) == 0
    assert main(["train", path, *sets, "--workdir", "w"]) == 0
    assert main(["report", "w"]) == 0
    assert "<svg" in Path("w/report.html").read_text()
    assert main(["export", "w", "out", "--run", run]) == 0
    found = json.loads(Path("w", run, "result.json").read_text())["metrics"]
    assert all(np.isfinite(value) for value in found.values())
    return found


def answers(inputs):
    """What the exported program says, with the exported weights."""
    program = jax_export.deserialize(bytearray(Path("out/model.stablehlo").read_bytes()))
    return jax.jit(program.call)(load_file("out/model.safetensors"), inputs)


def reloaded():
    """The exported directory as a Model, once its answers are those of the program beside it to inputs drawn as the card says."""
    again, rng = models.from_pretrained("out"), np.random.default_rng(0)
    asked = json.loads(Path("out/card.json").read_text())["program"]["inputs"].items()
    shapes = {name: [size if isinstance(size, int) else 2 for size in about["shape"]] for name, about in asked}
    most = {"image": 256, "tokens": 32, "token_type": 2}
    inputs = {name: rng.integers(0, most.get(name, 2), shapes[name]).astype(about["dtype"]) for name, about in asked}
    inputs |= {name: np.ones_like(inputs[name]) for name in ("mask", "segment") if name in inputs}
    found = jax.jit(lambda weights: _said(again.apply(*weights, inputs)[0]))((again.params, again.buffers))
    for name, answer in answers(inputs).items():
        assert answer.std() > 0
        np.testing.assert_allclose(answer, found[name], rtol=1e-4, atol=1e-5, err_msg=name)
    return again


@pytest.mark.slow
def test_own_networks(capsys):
    found = lived("own_models", steps=12, batch_size=64, width=4, hidden=8)
    assert 0 <= found["agreement"] <= 1
    image = next(data.digits().eval_batches(3))["image"]
    assert answers({"image": image})["logits"].shape == (3, 10)
    assert "control" in capsys.readouterr().out


@pytest.mark.slow
def test_equinox_modules_as_their_page_brings_them_in():
    pytest.importorskip("equinox")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "equinox.md").read_text(), re.S)
    Path("mine.py").write_text("\n".join(blocks))
    found = lived("mine.py", steps=12, batch_size=64)
    assert 0 <= found["agreement"] <= 1
    assert sorted(load_file("out/model.safetensors"))[0] == "params/layers.0.bias"
    image = next(data.digits().eval_batches(3))["image"]
    assert answers({"image": image})["logits"].shape == (3, 10)


@pytest.mark.slow
def test_vit_into_a_small_vit_on_an_image_folder(capsys):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("bright", "dark")):
        Path("photos", name).mkdir(parents=True)
        for number in range(40):
            pixels = rng.integers(0, 128, (20 + number % 5, 24, 3)) + 127 * (1 - label)
            Image.fromarray(pixels.astype(np.uint8)).save(f"photos/{name}/{number}.png")
    Path("photos/dark/broken.png").write_bytes(b"no image")
    teacher = published("vit", Path("vit"))
    small = dict(size=16, patch=8, width=16, depth=1, heads=2, compute_dtype="float32")
    with pytest.warns(UserWarning, match=r"1 of \d+ files are broken and left out: dark/broken.png"):
        found = lived("vit_folder", images="photos", teacher=teacher, steps=6, tuning_steps=4, batch_size=16, **small)
    assert {"accuracy", "teacher_accuracy", "agreement", "kl"} <= found.keys()
    with Image.open("vit_folder-data.png") as sheet:
        assert sheet.width > 400
    assert json.loads(Path("out/config.json").read_text())["architectures"] == ["ViTForImageClassification"]
    assert reloaded().config.classes == 2


@pytest.mark.slow
def test_qwen3_into_a_smaller_one_on_chats(capsys):
    teacher, student = published("qwen3", Path("big")), published("qwen3", Path("small"))
    (student / "chat_template.jinja").write_text(TEMPLATE)
    for name, numbers in (("train", range(8, 60)), ("eval", range(4))):
        talks = [[("user", f"{one}+1="), ("assistant", f"{one + 1}")] for one in numbers]
        lines = [json.dumps({"messages": [dict(role=role, content=said) for role, said in talk]}) for talk in talks]
        Path(f"{name}.jsonl").write_text("\n".join(lines))
    places = dict(teacher=teacher, student=student, chats="train.jsonl", eval_chats="eval.jsonl")
    found = lived("qwen3_chats", **places, steps=3, batch_size=8, length=64, compute_dtype="float32", teacher_dtype="float32")
    assert {"bits_per_byte", "teacher_bits_per_byte"} <= found.keys()
    asked, said = re.search(r"\[user\](\d+)\+1=\[assistant\]«(\d+)\.", capsys.readouterr().out).groups()
    assert int(asked) + 1 == int(said)  # the answer alone is counted
    assert Path("out/chat_template.jinja").read_text() == TEMPLATE
    assert json.loads(Path("out/config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    assert data.tokenizer.File("out").fingerprint == data.tokenizer.File(student).fingerprint
    before, after = load_file(student / "model.safetensors"), load_file("out/model.safetensors")
    assert before.keys() == after.keys()
    assert any(np.any(before[name] != after[name]) for name in before)
    reloaded()


@pytest.mark.slow
def test_bert_into_a_minilm_on_text(capsys):
    teacher = published("bert_encoder", Path("bert"))
    Path("texts").mkdir()
    for number in range(12):
        Path(f"texts/{number}.txt").write_text(" ".join(f"text {number} says {word}." for word in ("this", "that")))
    shape = dict(width=16, depth=1, heads=4, teacher_layer=1, relation_heads=4, length=24)
    texts = {"texts": "texts/1*.txt", "eval_texts": "texts/[2-9].txt", "folder": "tokens"}
    found = lived("bert_base_minilm", teacher=teacher, **texts, **shape, steps=3, batch_size=8)
    assert {"term/relation0", "term/relation1", "term/relation2"} <= found.keys()
    assert json.loads(Path("out/config.json").read_text())["architectures"] == ["BertModel"]
    assert reloaded().config.dim == 16
