"""Small random models of every published family, and what `transformers` answers for them: tests/golden/pretrained.

Not part of the tests, which need no PyTorch. To make the fixtures again, in an environment of its own:

    python3 -m venv /tmp/peer && /tmp/peer/bin/pip install torch==2.13.0 transformers==5.23.0 pillow
    /tmp/peer/bin/python tests/make_pretrained.py

To see that `transformers` loads what jkd writes (jkd writes every fixture's model again, transformers answers once more):

    python tests/make_pretrained.py --save /tmp/written
    /tmp/peer/bin/python tests/make_pretrained.py --load /tmp/written
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden" / "pretrained"
TEXT = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
GROUPED = TEXT | dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0)
MASKED = TEXT | dict(max_position_embeddings=24, type_vocab_size=2, layer_norm_eps=1e-5)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=100.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
THREE = GROUPED | dict(num_hidden_layers=3, layer_types=["sliding_attention", "full_attention", "sliding_attention"])

MODELS = {
    "llama": ("LlamaForCausalLM", GROUPED | dict(attention_bias=True, mlp_bias=True)),
    "llama3": ("LlamaForCausalLM", GROUPED | dict(rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", GROUPED | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | dict(head_dim=8, tie_word_embeddings=True)),
    "gemma2": (
        "Gemma2ForCausalLM",
        THREE
        | dict(head_dim=8, sliding_window=6, query_pre_attn_scalar=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        THREE
        | dict(
            head_dim=8,
            sliding_window=6,
            query_pre_attn_scalar=5,
            rope_parameters={
                "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
                "sliding_attention": dict(rope_type="default", rope_theta=100.0),
            },
        ),
    ),
    "bert": ("BertForSequenceClassification", MASKED | dict(num_labels=3)),
    "bert_encoder": ("BertModel", MASKED),
    "bert_masked": ("BertForMaskedLM", MASKED),
    "roberta": ("RobertaForSequenceClassification", MASKED | dict(num_labels=3, pad_token_id=1)),
    "roberta_encoder": ("RobertaModel", MASKED | dict(pad_token_id=1)),
    "vit": (
        "ViTForImageClassification",
        dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=[8, 12],
            patch_size=4,
            num_labels=3,
        ),
    ),
    "resnet": (
        "ResNetForImageClassification",
        dict(embedding_size=4, hidden_sizes=[16, 32], depths=[1, 2], layer_type="bottleneck", num_labels=3),
    ),
    "resnet_basic": (
        "ResNetForImageClassification",
        dict(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 1], layer_type="basic", num_labels=3),
    ),
}
DECODERS = ("llama", "llama3", "qwen2", "qwen3", "gemma2", "gemma3")
IMAGES = ("vit", "resnet", "resnet_basic")


def inputs(name, seed=0):
    """Tokens with padding on the right and, where positions are relative, on the left; or images."""
    numbers = np.random.default_rng(seed)
    if name in IMAGES:
        return {"image": numbers.integers(0, 256, (2, 24, 32, 3)).astype(np.uint8)}
    batch = {"tokens": numbers.integers(2, 48, (3, 20)).astype(np.int32), "mask": np.ones((3, 20), np.int32)}
    batch["mask"][1, 13:] = 0
    if name in DECODERS:
        batch["mask"][2, :4] = 0
    else:
        batch["token_type"] = (np.arange(20)[None] > np.array([[5], [9], [30]])).astype(np.int32)
    # transformers finds RoBERTa's padding by its id
    batch["tokens"] = np.where(batch["mask"] > 0, batch["tokens"], MODELS[name][1].get("pad_token_id", 0))
    return batch


def answers(name, model, batch, directory):
    """What transformers says, as NumPy by name."""
    import torch

    with torch.no_grad():
        if name in IMAGES:
            from transformers import AutoImageProcessor

            processor = AutoImageProcessor.from_pretrained(directory)
            pixels = processor(list(batch["image"]), return_tensors="pt")["pixel_values"]
            found = {"pixels": pixels.permute(0, 2, 3, 1), "logits": model(pixels).logits}
        else:
            arguments = {"input_ids": batch["tokens"], "attention_mask": batch["mask"]}
            if "token_type" in batch:
                arguments["token_type_ids"] = batch["token_type"]
            out = model(**{key: torch.from_numpy(value).long() for key, value in arguments.items()})
            found = {"logits": out.logits} if hasattr(out, "logits") else {"hidden": out[0], "pooled": out[1]}
    return {key: value.numpy() for key, value in found.items()}


def make():
    import torch
    import transformers

    shutil.rmtree(GOLDEN, ignore_errors=True)
    for number, (name, (kind, fields)) in enumerate(MODELS.items()):
        torch.manual_seed(number)
        cls = getattr(transformers, kind)
        config = cls.config_class(**fields)
        config._attn_implementation = "eager"
        model = cls(config).eval()
        for path, leaf in [*model.named_parameters(), *model.named_buffers()]:
            # away from the initial values: scales around 1, biases and means around 0, variances positive
            if path.endswith("running_var"):
                leaf.data = 0.5 + torch.rand_like(leaf)
            elif leaf.dim() == 1 and path.endswith("weight") and "gemma" not in name:
                leaf.data = 1 + 0.3 * torch.randn_like(leaf)
            elif leaf.dim() == 1 and leaf.is_floating_point() and "freq" not in path:
                leaf.data = 0.3 * torch.randn_like(leaf)
            elif leaf.dim() > 1 and leaf.is_floating_point():
                fan_in = leaf[0].numel() if "embed" not in path else 4
                leaf.data = torch.randn_like(leaf) / fan_in**0.5
        model.save_pretrained(GOLDEN / name)
        (GOLDEN / name / "generation_config.json").unlink(missing_ok=True)
        if name in IMAGES:
            write_preprocessor(name)
        batch = inputs(name)
        np.savez_compressed(GOLDEN / name / "answers.npz", **batch, **answers(name, model, batch, GOLDEN / name))
        print(name, sum(file.stat().st_size for file in (GOLDEN / name).iterdir()), "bytes")


def write_preprocessor(name):
    fields = {"do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255}
    fields |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    if name == "vit":
        fields |= {"image_processor_type": "ViTImageProcessor", "resample": 2, "size": {"height": 8, "width": 12}}
    else:
        fields |= {"image_processor_type": "ConvNextImageProcessor", "resample": 3, "size": {"shortest_edge": 14}}
        fields |= {"crop_pct": 0.875}
    (GOLDEN / name / "preprocessor_config.json").write_text(json.dumps(fields, indent=2) + "\n")


def save(target):
    from jkd import models

    for name in MODELS:
        models.save_pretrained(models.from_pretrained(GOLDEN / name), target / name, largest=20_000)
        print("wrote", target / name)


def load(target):
    import transformers

    for name, (kind, _) in MODELS.items():
        cls = getattr(transformers, kind)
        model, told = cls.from_pretrained(target / name, output_loading_info=True, attn_implementation="eager")
        assert not any(told[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
        kept = np.load(GOLDEN / name / "answers.npz")
        for key, value in answers(name, model.eval(), inputs(name), target / name).items():
            np.testing.assert_allclose(value, kept[key], atol=1e-5, rtol=1e-5, err_msg=name)
        print("transformers", transformers.__version__, "loads", name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="DIR", help="jkd writes every model there")
    parser.add_argument("--load", type=Path, metavar="DIR", help="transformers reads them from there and compares")
    given = parser.parse_args()
    if given.save:
        save(given.save)
    elif given.load:
        load(given.load)
    else:
        make()
