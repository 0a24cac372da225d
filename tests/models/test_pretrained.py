"""Published weights: answers as `transformers` gives them, files as it writes them, and every way in which a directory is wrong.

tests/golden/pretrained is made by tests/make_pretrained.py, which also says how `transformers` reads what is written here.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from quick import jit
from safetensors.numpy import load_file, save_file

from jkd import data, fingerprint, models
from jkd.errors import InputError
from jkd.models import decoder, pretrained
from jkd.models.pretrained import gemma, llama, preprocess
from jkd.models.pretrained.layout import Layout
from jkd.sharding import MeshShape
from jkd.types import Preprocess

GOLDEN = Path(__file__).parent.parent / "golden" / "pretrained"
DECODERS = ("llama", "llama3", "qwen2", "qwen3", "gemma2", "gemma3")
ENCODERS = ("bert", "bert_encoder", "bert_masked", "roberta", "roberta_encoder")
IMAGES = ("vit", "resnet", "resnet_basic")
ALL = (*DECODERS, *ENCODERS, *IMAGES)


def one_device():
    return MeshShape(data=1).build(jax.devices()[:1])


def load(name, **options):
    return models.from_pretrained(GOLDEN / name, **{"mesh": one_device()} | options)


@pytest.fixture(scope="module")
def answers():
    return lambda name: dict(np.load(GOLDEN / name / "answers.npz"))


@pytest.mark.parametrize("name", ALL)
def test_answers_are_those_of_transformers(name, answers):
    model, known = load(name), answers(name)
    batch = {key: known[key] for key in ("tokens", "mask", "token_type") if key in known}
    if name in IMAGES:  # as transformers resized them; they come as 0..1
        normal = model.preprocess
        batch = {"image": known["pixels"] * np.float32(normal.std) + np.float32(normal.mean)}

    def run(weights):
        outputs = model.apply(*weights, batch)[0]
        return {"logits": outputs.logits} if outputs.has_logits else {"hidden": outputs.hidden, **outputs.heads}

    found = jit(run)((model.params, model.buffers))
    for kind, value in found.items():
        expected = known[kind]
        assert expected.std() > 0.3
        real = known["mask"][..., None] > 0 if expected.ndim == 3 else True
        np.testing.assert_allclose(np.where(real, value, 0), np.where(real, expected, 0), rtol=1e-4, atol=1e-4, err_msg=kind)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_images_are_prepared_as_transformers_does(name, answers):
    """Resized, the middle cut out, normalised. PIL rounds to bytes twice on the way, and cuts what overshoots in between."""
    model, known = load(name), answers(name)
    pixels = np.asarray(jit(model.preprocess)(known["image"]))
    assert pixels.shape == known["pixels"].shape
    off = np.abs(pixels - known["pixels"]) * np.float32(model.preprocess.std) * 255
    assert off.mean() < 0.4
    assert off.max() < 6


@pytest.mark.parametrize("name", ALL)
def test_what_is_written_is_what_was_read(name, tmp_path):
    model = load(name)
    models.save_pretrained(model, tmp_path, largest=20_000, extra={"eos_token_id": 2})
    theirs = load_file(GOLDEN / name / "model.safetensors")
    files = sorted(tmp_path.glob("*.safetensors"))
    ours = {key: value for file in files for key, value in load_file(file).items()}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    written, original = (json.loads((path / "config.json").read_text()) for path in (tmp_path, GOLDEN / name))
    assert (written["architectures"], written["model_type"]) == (original["architectures"], original["model_type"])
    assert written["eos_token_id"] == 2
    again = models.from_pretrained(tmp_path, mesh=one_device())
    assert again.config == model.config
    assert again.preprocess == model.preprocess
    jax.tree.map(np.testing.assert_array_equal, (again.params, again.buffers), (model.params, model.buffers))


def test_parts_are_read_where_they_go():
    """Eight devices; every one holds, and has read, its own block."""
    whole = load("qwen3").params
    parts = load("qwen3", mesh=MeshShape(data=2, fsdp=2, tensor=2), rules=decoder.RULES).params
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    query = parts["layers"]["attention"]["query"]["kernel"]
    assert query.shape == (2, 16, 4, 8)
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 8, 2, 8)}
    half = load("qwen3", dtype=jnp.bfloat16).params["embed"]["embedding"]
    np.testing.assert_array_equal(half, whole["embed"]["embedding"].astype(jnp.bfloat16))


class Read:
    """A tensor that knows how much of it was asked for."""

    def __init__(self, array):
        self.array, self.seen = array, 0

    def __getitem__(self, index):
        found = self.array[index]
        self.seen += found.size
        return found


@pytest.mark.parametrize(
    ("text", "shape", "block", "read"),
    [
        ("(head k) dim -> dim head k", (6, 4, 2), np.s_[0:3, 1:3, :], 12),
        ("(head k) dim -> dim head k", (6, 4, 2), np.s_[:, :, 1:2], 48),  # half a head is cut from whole ones
        ("dim (head k) -> head k dim", (4, 2, 6), np.s_[2:4, :, 0:2], 8),
        ("out in h w -> h w in out", (3, 2, 4, 5), np.s_[:, :, 0:2, 4:5], 12),
        ("dim -> dim", (7,), (slice(2, 5),), 3),
    ],
)
def test_layouts_read_no_more_than_the_block_needs(text, shape, block, read):
    layout, parameter = Layout.parse(text), np.arange(np.prod(shape)).reshape(shape)
    file = layout.write(parameter)
    assert file.shape == layout.file_shape(shape)
    tensor = Read(file)
    np.testing.assert_array_equal(layout.read(tensor, shape, block), parameter[block])
    assert tensor.seen == read


def test_a_layout_is_pytorchs_linear_map():
    weight, x = np.arange(24.0).reshape(6, 4), np.arange(4.0)
    kernel = Layout.parse("(head k) dim -> dim head k").read(weight, (4, 3, 2), np.s_[:, :, :])
    np.testing.assert_array_equal(np.einsum("d,dhk->hk", x, kernel).ravel(), weight @ x)


# The fields of config.json that matter, as published for transformers 4, and the number of parameters on the model's page.
PUBLISHED = {
    "Llama-3.2-1B": (
        1_235_814_400,
        "LlamaForCausalLM",
        dict(
            hidden_act="silu", hidden_size=2048, intermediate_size=8192, num_attention_heads=32, num_hidden_layers=16,
            num_key_value_heads=8, head_dim=64, vocab_size=128256, rms_norm_eps=1e-5, tie_word_embeddings=True,
            max_position_embeddings=131072, rope_theta=500000.0, attention_bias=False, mlp_bias=False, pretraining_tp=1,
            rope_scaling=dict(
                factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
                rope_type="llama3",
            ),
        ),
    ),
    "Qwen2.5-0.5B": (
        494_032_768,
        "Qwen2ForCausalLM",
        dict(
            hidden_act="silu", hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_hidden_layers=24,
            num_key_value_heads=2, vocab_size=151936, rms_norm_eps=1e-6, tie_word_embeddings=True, max_window_layers=24,
            max_position_embeddings=32768, rope_theta=1000000.0, sliding_window=32768, use_sliding_window=False,
        ),
    ),
    "Qwen3-0.6B": (
        596_049_920,
        "Qwen3ForCausalLM",
        dict(
            hidden_act="silu", hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_hidden_layers=28,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, rms_norm_eps=1e-6, tie_word_embeddings=True,
            max_position_embeddings=40960, rope_theta=1000000, rope_scaling=None, sliding_window=None,
            use_sliding_window=False, max_window_layers=28, attention_bias=False,
        ),
    ),
    "gemma-2-2b": (
        2_614_341_888,
        "Gemma2ForCausalLM",
        dict(
            hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=2304, intermediate_size=9216,
            num_attention_heads=8, num_hidden_layers=26, num_key_value_heads=4, head_dim=256, vocab_size=256000,
            rms_norm_eps=1e-6, max_position_embeddings=8192, rope_theta=10000.0, sliding_window=4096,
            query_pre_attn_scalar=256, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, attention_bias=False,
        ),
    ),
    "gemma-3-1b": (
        999_885_952,
        "Gemma3ForCausalLM",
        dict(
            hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912, num_attention_heads=4,
            num_hidden_layers=26, num_key_value_heads=1, head_dim=256, vocab_size=262144, rms_norm_eps=1e-6,
            max_position_embeddings=32768, rope_theta=1000000, rope_local_base_freq=10000, rope_scaling=None,
            sliding_window=512, sliding_window_pattern=6, query_pre_attn_scalar=256, attn_logit_softcapping=None,
            final_logit_softcapping=None, attention_bias=False,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, architecture, fields = PUBLISHED[name]
    family = next(family for family in pretrained.FAMILIES if family.architecture == architecture)
    config = family.read(fields)
    model = models.from_config({"architectures": [architecture], **fields})
    assert model.config == config
    assert sum(leaf.size for leaf in jax.tree.leaves(model.params)) == parameters
    assert family.holds(config)
    assert next(family for family in pretrained.FAMILIES if family.holds(config)).architecture == architecture


def test_windows_of_published_models():
    gemma2, gemma3 = (
        gemma.GEMMA2.read(PUBLISHED["gemma-2-2b"][2]),
        gemma.GEMMA3.read(PUBLISHED["gemma-3-1b"][2]),
    )
    assert gemma2.windowed == (True, False) * 13
    assert [number for number, local in enumerate(gemma3.windowed) if not local] == [5, 11, 17, 23]
    assert (gemma3.rope.theta, gemma3.local_rope.theta, gemma3.window) == (1e6, 1e4, 512)
    assert llama.QWEN2.read(PUBLISHED["Qwen2.5-0.5B"][2]).window is None


def test_a_config_written_by_hand_finds_its_family():
    shape = dict(vocab=24, dim=16, depth=2, heads=4, hidden=24)
    assert pretrained.describing(decoder.Config(**shape)).architecture == "LlamaForCausalLM"
    assert pretrained.describing(decoder.Config(**shape, qkv_bias=True, tokens=20)).architecture == "Qwen2ForCausalLM"
    assert pretrained.describing(decoder.Config(**shape, query_norm=True, window=4)).architecture == "Qwen3ForCausalLM"
    with pytest.raises(InputError, match="none of LlamaForCausalLM, .* describes this Config"):
        pretrained.describing(decoder.Config(**shape, sandwich_norm=True))


def test_another_head_on_a_published_trunk():
    """A classifier is drawn on an encoder that was trained to fill in masked tokens; its pooled token's map is not there."""
    options = dict(architecture="BertForSequenceClassification", changes={"classes": 5}, fresh=("pool/*", "classifier/*"))
    model, masked = load("bert_masked", **options, key=jax.random.key(0)), load("bert_masked")
    assert model.params["classifier"]["kernel"].shape == (16, 5)
    assert model.params["classifier"]["kernel"].std() > 0.01
    jax.tree.map(np.testing.assert_array_equal, model.params["layers"], masked.params["layers"])
    trunk = load("bert", architecture="BertModel")
    assert "classifier" not in trunk.params
    np.testing.assert_array_equal(trunk.params["pool"]["linear"]["kernel"], load("bert").params["pool"]["linear"]["kernel"])
    with pytest.raises(InputError, match="classifier/bias is drawn, so give key="):
        load("bert_masked", **options)
    with pytest.raises(InputError, match="tensors bert.pooler.dense.bias, bert.pooler.dense.weight are missing for BertModel"):
        load("bert_masked", architecture="BertModel")


def test_as_a_model_config():
    lazy = models.Pretrained(directory=GOLDEN / "llama", mesh=MeshShape(data=1, fsdp=1, tensor=8), changes={"remat": None})
    assert "llama" in json.dumps(fingerprint.to_json(lazy))
    assert models.from_config(GOLDEN / "llama").params["norm"]["scale"].shape == (16,)
    assert not models.from_config(json.loads((GOLDEN / "llama" / "config.json").read_text())).initialised
    built = lazy.build()
    jax.tree.map(np.testing.assert_array_equal, built.params, load("llama").params)
    assert len(built.params["norm"]["scale"].sharding.device_set) == 8


def test_names_of_the_first_berts(tmp_path):
    shutil.copytree(GOLDEN / "bert", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    old = lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # noqa: E731
    renamed = {old(name): value for name, value in tensors.items()} | {"bert.embeddings.position_ids": np.arange(24)[None]}
    assert renamed.keys() - tensors.keys() != {"bert.embeddings.position_ids"}
    save_file(renamed, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, models.from_pretrained(tmp_path, mesh=one_device()).params, load("bert").params)


def test_rows_beyond_the_tokenizer_are_no_classes(tmp_path, answers):
    """Two paddings of one vocabulary answer in one shape; transformers' first 40 logits are ours."""
    words = {f"w{number}": number for number in range(40)}
    shutil.copytree(GOLDEN / "llama", tmp_path, dirs_exist_ok=True)
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    model, known = models.from_pretrained(tmp_path, mesh=one_device()), answers("llama")
    assert model.config.tokens == 40
    assert model.tokenizer == data.tokenizer.File(tmp_path).fingerprint
    padded = {key: np.pad(value, ((0, 8), (0, 0))) for key, value in (("embedding", model.params["embed"]["embedding"]),)}
    wider = dataclasses.replace(model.config, vocab=56).build()
    head = np.pad(model.params["head"]["kernel"], ((0, 0), (0, 8)), constant_values=7.0)
    wide = {**model.params, "embed": padded, "head": {"kernel": jnp.asarray(head)}}
    batch = {"tokens": known["tokens"], "mask": known["mask"]}
    answer = jit(
        lambda *both: [one.apply(params, {}, batch)[0].logits for one, params in zip((model, wider), both, strict=True)]
    )
    narrow, broad = answer(model.params, wide)
    assert narrow.shape == broad.shape == (3, 20, 40)
    np.testing.assert_allclose(narrow, broad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(narrow[0], known["logits"][0, :, :40], rtol=1e-4, atol=1e-4)


def test_a_tokenizer_goes_with_the_weights(tmp_path):
    models.save_pretrained(load("llama"), tmp_path, tokenizer=data.tokenizer.Bytes(), extra={"use_cache": False})
    described = json.loads((tmp_path / "config.json").read_text())
    assert (described["bos_token_id"], described["eos_token_id"], described["use_cache"]) == (None, 256, False)
    assert data.tokenizer.File(tmp_path).end == 256


PREPROCESS = {
    "deit": (
        dict(do_center_crop=True, crop_size=dict(height=224, width=224), size=dict(shortest_edge=256), resample=3),
        Preprocess(size=(224, 224), mean=(0.5,), std=(0.5,), method="bicubic", crop=224 / 256),
    ),
    "resnet": (
        dict(crop_pct=0.875, size=224, resample=3, feature_extractor_type="ConvNextFeatureExtractor"),
        Preprocess(size=(224, 224), mean=(0.5,), std=(0.5,), method="bicubic", crop=0.875),
    ),
    "large": (dict(crop_pct=1.0, size=dict(shortest_edge=384)), Preprocess(size=(384, 384), mean=(0.5,), std=(0.5,))),
    "old": (dict(size=96, do_normalize=False), Preprocess(size=(96, 96))),
    "none": (dict(do_resize=False), Preprocess(mean=(0.5,), std=(0.5,))),
}


@pytest.mark.parametrize("name", PREPROCESS)
def test_published_preprocessing(name):
    fields, expected = PREPROCESS[name]
    found = preprocess.read(dict(image_mean=[0.5], image_std=[0.5]) | fields)
    assert found == expected
    again = preprocess.read(preprocess.write(found))
    three = lambda values: tuple(values) * 3  # noqa: E731
    assert again == dataclasses.replace(found, mean=three(found.mean), std=three(found.std))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(resample=0), "resample = 0 is not supported"),
        (dict(rescale_factor=1.0), "rescale_factor = 1.0 is not supported"),
        (
            dict(do_center_crop=True, crop_size=8, size=dict(height=9, width=9)),
            "do_center_crop with size = .* only shortest_edge",
        ),
    ],
)
def test_other_preprocessing_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        preprocess.read(dict(image_mean=[0.5], image_std=[0.5], size=8) | fields)
    with pytest.raises(InputError, match="Preprocess.crop = 0.0: give a share of the image"):
        Preprocess(crop=0.0)


def wrong(change):
    """A copy of the Llama fixture with its tensors changed."""

    def make(directory):
        tensors = load_file(GOLDEN / "llama" / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return make


def described(**fields):
    def make(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return make


NORM, HEAD = "model.norm.weight", "lm_head.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong(lambda t: t.pop(NORM)), f"tensor {NORM} is missing for LlamaForCausalLM"),
        (wrong(lambda t: [t.pop(NORM), t.pop(HEAD)]), f"tensors {HEAD}, {NORM} are missing"),
        (wrong(lambda t: t.update(extra=t[NORM])), "tensor extra is not part of LlamaForCausalLM as config.json describes it"),
        (wrong(lambda t: t.update({HEAD: t[HEAD][:40]})), rf"{HEAD} has shape \[40, 16\], but config.json asks for \[48, 16\]"),
        (
            described(architectures=["LlamaForCausalLMs"]),
            "architecture is 'LlamaForCausalLMs'; did you mean 'LlamaForCausalLM'",
        ),
        (described(architectures=[]), "architecture is not named; there are"),
        (described(hidden_act="gelu"), "hidden_act = 'gelu' is not supported, only 'silu'"),
        (
            described(rope_parameters=dict(rope_type="yarn", rope_theta=1e4)),
            "rope_type = 'yarn' is not supported, only 'default'",
        ),
        (lambda directory: (directory / "config.json").write_text("{"), "config.json: is no JSON"),
        (lambda directory: (directory / "config.json").unlink(), "config.json: no such file"),
        (lambda directory: (directory / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda directory: (directory / "model.safetensors").write_bytes(b"0" * 100), "model.safetensors: is damaged"),
        (
            lambda directory: (directory / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
            "b.safetensors is missing, though model.safetensors.index.json names it",
        ),
    ],
)
def test_a_wrong_directory_is_named(spoil, message, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(GOLDEN / "llama", directory)
    spoil(directory)
    with pytest.raises(InputError, match=message):
        models.from_pretrained(directory, mesh=one_device())


def test_a_tied_model_may_hold_its_head_as_well(tmp_path):
    shutil.copytree(GOLDEN / "qwen3", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {HEAD: tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    model = models.from_pretrained(tmp_path, mesh=one_device(), changes={"remat": None})
    assert model.config.tied
    assert model.config.remat is None


def test_what_cannot_be_written(tmp_path):
    model = load("llama")
    with pytest.raises(InputError, match="holds no weights"):
        models.save_pretrained(model.config.build(), tmp_path)
    with pytest.raises(InputError, match="holds weights already"):
        models.save_pretrained(model, GOLDEN / "llama")
    with pytest.raises(InputError, match="none of .* describes this"):
        models.save_pretrained(dataclasses.replace(model, config=None), tmp_path)
