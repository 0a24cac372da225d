"""What `jkd export` writes is what was trained, and is read without jkd; tests/make_pretrained.py says how `transformers` reads it."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file

import jkd.export
from jkd import Ema, Run, data, models, optim, recipes
from jkd.cli import main
from jkd.errors import InputError
from jkd.export import Differs, export
from jkd.replay import Stand, experiment_of, stand
from jkd.resolve import make_context
from jkd.state import init_state
from jkd.types import Outputs

GOLDEN = Path(__file__).parent / "golden" / "pretrained"
needs_programs = pytest.mark.skipif(
    importlib.util.find_spec("flatbuffers") is None,
    reason="jax.export writes programs with flatbuffers, which is not installed",
)
PAGE = (Path(__file__).parent.parent / "docs" / "export.md").read_text(encoding="utf-8")
(LOAD,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
ELSEWHERE = (
    LOAD
    + """
import sys

import numpy as np

folder, inputs = Path(sys.argv[1]), dict(np.load(sys.argv[2]))
assert sorted(inputs) == sorted(json.loads((folder / "card.json").read_text())["program"]["inputs"])
np.savez(sys.argv[3], **load(folder)(**inputs))
assert not [name for name in sys.modules if name.partition(".")[0] in ("jkd", "flax")]
"""
)


def standing(student, examples, **fields):
    run = Run(
        **dict(student=student, recipe=recipes.Supervised(), data=examples, optimizer=optim.sgd(0.1), steps=1, batch_size=8)
        | fields
    )
    ctx = make_context(run)
    state, frozen = init_state(ctx, jax.random.key(0))
    if state.ema:  # an average that has moved
        state.ema["student"]["params"] = jax.tree.map(lambda leaf: leaf + 0.5, state.ema["student"]["params"])
    return Stand("student", ctx, state, frozen, 1)


def elsewhere(folder, inputs, tmp_path):
    """What a process that has never heard of jkd makes of the directory, as docs/export.md says it."""
    np.savez(tmp_path / "inputs.npz", **inputs)
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(tmp_path / "inputs.npz"), str(tmp_path / "answers.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(np.load(tmp_path / "answers.npz"))


@needs_programs
def test_any_network_by_path_and_as_a_program_for_batches_of_any_size(tmp_path, monkeypatch):
    here = standing(models.mlp.Config(features=64, hidden=(4,), classes=10), data.digits(), ema=Ema())
    said = []
    export(here, tmp_path / "out", said=said.append)
    params = here.state.params["student"]
    found = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(found["params/head/kernel"], params["head"]["kernel"])
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["tensors"] == sorted(found)
    assert card["program"]["inputs"] == {"image": {"shape": ["batch", 8, 8, 1], "dtype": "uint8"}}
    assert card["program"]["outputs"] == {"logits": {"shape": ["batch", 10], "dtype": "float32"}}
    assert card["program"]["platforms"] == ["cpu", "cuda", "tpu"]
    assert card["run"] == {"name": "student", "step": 1, "steps": 1, "average": False}
    assert "batches of any size" in said[1]
    assert "read back: answers differ by" in said[2]

    image = next(here.ctx.run.data.eval_batches(3))["image"]
    answers = elsewhere(tmp_path / "out", {"image": image}, tmp_path)
    wanted = here.product().apply(params, {}, {"image": image})[0].logits
    np.testing.assert_allclose(answers["logits"], wanted, rtol=1e-5, atol=1e-5)

    with pytest.raises(InputError, match="is there and not empty; give another directory"):
        export(here, tmp_path / "out")
    # the average, in half the bytes, in several files
    with monkeypatch.context() as small:
        small.setattr(jkd.export, "_LARGEST", 100)
        export(here, tmp_path / "half", ema=True, dtype="bfloat16", said=said.append)
    assert "bfloat16 changes the answers by" in said[-1]
    index = json.loads((tmp_path / "half" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    half = load_file(tmp_path / "half" / index["params/head/kernel"])["params/head/kernel"]
    assert half.dtype == jnp.bfloat16
    average = jax.tree.map(lambda leaf: (leaf + 0.5).astype(jnp.bfloat16), params)
    np.testing.assert_array_equal(half, average["head"]["kernel"])
    exec(LOAD, names := {})
    wanted = here.product().apply(average, {}, {"image": image})[0].logits
    found = names["load"](tmp_path / "half")(image=image)["logits"]
    np.testing.assert_allclose(found, wanted, rtol=2e-2, atol=2e-2 * np.abs(wanted).max())
    # a file that is not what was written is found out
    honest = jkd.export._tensors
    monkeypatch.setattr(jkd.export, "_tensors", lambda folder: {k: v + 1 for k, v in honest(folder).items()})
    with pytest.raises(Differs, match="read back, the answers differ"):
        export(here, tmp_path / "wrong", said=said.append)


@needs_programs
def test_a_published_family_goes_back_with_its_company(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in (GOLDEN / "qwen3").glob("*.[js]*"):
        (source / file.name).write_bytes(file.read_bytes())
    for name in ("generation_config.json", "chat_template.jinja"):
        (source / name).write_text("{}")
    tokens = np.arange(16 * 12).reshape(16, 12) % 48
    examples = data.arrays(tokens=tokens, mask=np.ones_like(tokens), label=np.zeros(16, int), classes=48)
    here = standing(models.Pretrained(directory=source), examples)
    out = tmp_path / "out"
    export(here, out, said=lambda line: None)
    # the very tensors that came in, under the names that they had
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    assert {"config.json", "generation_config.json", "chat_template.jinja"} <= {file.name for file in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    card = json.loads((out / "card.json").read_text())
    assert sorted(card["program"]["inputs"]) == ["mask", "tokens"]
    # and the program takes them as they are
    inputs = {"tokens": tokens[:2].astype(np.int32), "mask": np.ones((2, 12), np.int32)}
    answers = elsewhere(out, inputs, tmp_path)
    model = here.product()
    wanted = jax.jit(lambda *weights: model.apply(*weights, inputs)[0].logits)(model.params, model.buffers)
    np.testing.assert_allclose(answers["logits"], wanted, rtol=1e-4, atol=1e-5)


@needs_programs
def test_a_network_that_counts_its_batch_is_written_for_one_size(tmp_path):
    def apply(params, buffers, batch, *, taps=(), train=False, key=None):
        rows = batch["image"].reshape(len(batch["image"]), -1).astype(jnp.float32)  # len() wants a number
        return Outputs(rows @ params["kernel"]), buffers

    def init(key):
        return {"kernel": jnp.ones((64, 10))}, {}

    params, buffers = jax.eval_shape(init, jax.random.key(0))
    model = jkd.Model(init=init, apply=apply, params=params, buffers=buffers)
    said = []
    export(standing(model, data.digits()), tmp_path / "out", said=said.append)
    assert json.loads((tmp_path / "out" / "card.json").read_text())["program"]["inputs"]["image"]["shape"] == [4, 8, 8, 1]
    assert "batches of 4" in said[1]


@needs_programs
def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "from jkd import Run, data, models, optim, recipes\n"
        "def config():\n"
        "    mlp = models.mlp.Config(features=64, hidden=(4,), classes=10)\n"
        "    return Run(student=mlp, recipe=recipes.Supervised(), data=data.digits(), optimizer=optim.sgd(0.1), steps=1,\n"
        "               batch_size=32, evaluate_every=0)\n"
    )
    assert main(["train", "mine.py", "--workdir", "w"]) == 0
    assert main(["export", "w", "out"]) == 0
    capsys.readouterr()
    trained = stand(experiment_of(epath.Path("w")), epath.Path("w"), None, print)
    found = load_file("out/model.safetensors")["params/head/kernel"]
    np.testing.assert_array_equal(found, trained.state.params["student"]["head"]["kernel"])
    for argv, line in (
        (["export", "w", "out"], "out is there and not empty"),
        (["export", "w", "new", "--run", "studnt"], "w: no run is called 'studnt'; did you mean 'student'?"),
        (["export", "w", "new", "--ema"], "--ema: the run student keeps no average of its student"),
        (["export", "nowhere", "new"], "nowhere holds no config that jkd train recorded"),
    ):
        assert main(argv) == 2
        assert line in capsys.readouterr().err
    assert not Path("new").exists()
