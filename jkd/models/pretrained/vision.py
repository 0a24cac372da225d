"""ViT and ResNet for image classification: config.json and tensor names."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from jkd.errors import InputError
from jkd.models import resnet, vit
from jkd.models.pretrained.family import Family, Json, both, label_names, labels, normed, require


def _read_vit(json: Json) -> vit.Config:
    require(json, hidden_act="gelu", qkv_bias=True)
    size = json["image_size"]
    return vit.Config(
        size=(size, size) if isinstance(size, int) else tuple(size),
        patch=json["patch_size"],
        dim=json["hidden_size"],
        depth=json["num_hidden_layers"],
        heads=json["num_attention_heads"],
        mlp_ratio=json["intermediate_size"] / json["hidden_size"],
        classes=labels(json),
        dropout=float(json.get("hidden_dropout_prob", 0.0)),
        epsilon=json.get("layer_norm_eps", 1e-12),
        channels=json.get("num_channels", 3),
    )


def _write_vit(config: vit.Config) -> dict[str, Any]:
    return {
        "model_type": "vit",
        "hidden_act": "gelu",
        "qkv_bias": True,
        "image_size": config.size[0] if config.size[0] == config.size[1] else list(config.size),
        "patch_size": config.patch,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": round(config.dim * config.mlp_ratio),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": config.epsilon,
        "num_channels": config.channels,
        **label_names(config.classes),
    }


_BLOCK = "vit.encoder.layer.{}."
_IMAGE = ("kernel", "out in h w -> h w in out")
VIT = Family(
    architecture="ViTForImageClassification",
    read=_read_vit,
    write=_write_vit,
    table={
        **both("patches/conv", "vit.embeddings.patch_embeddings.projection", _IMAGE),
        "tokens": ("vit.embeddings.cls_token", "one token dim -> one token dim"),
        "position": ("vit.embeddings.position_embeddings", "one token dim -> one token dim"),
        **normed("blocks/{}/norm1", _BLOCK + "layernorm_before"),
        **{
            f"blocks/{{}}/attention/{name}/{kind}": (f"{_BLOCK}attention.attention.{name}.{theirs}", layout)
            for name in ("query", "key", "value")
            for kind, theirs, layout in (
                ("kernel", "weight", "(head k) dim -> dim head k"),
                ("bias", "bias", "(head k) -> head k"),
            )
        },
        **both("blocks/{}/attention/out", _BLOCK + "attention.output.dense", ("kernel", "dim (head k) -> head k dim")),
        **normed("blocks/{}/norm2", _BLOCK + "layernorm_after"),
        **both("blocks/{}/mlp/up", _BLOCK + "intermediate.dense"),
        **both("blocks/{}/mlp/down", _BLOCK + "output.dense"),
        **normed("norm", "vit.layernorm"),
        **both("head", "classifier"),
    },
    prefix="vit.",
    ignored=(r"vit\.pooler\..*",),
    canonical=functools.partial(dataclasses.replace, stochastic_depth=0.0, preprocess=None),
)


_BLOCKS: dict[str, Any] = {"basic": resnet.Basic, "bottleneck": resnet.Bottleneck}


def _read_resnet(json: Json) -> resnet.Config:
    require(json, hidden_act="relu", downsample_in_first_stage=False, downsample_in_bottleneck=False)
    require(json, layer_type=tuple(_BLOCKS))
    block = _BLOCKS[json.get("layer_type", "bottleneck")]
    return resnet.Config(
        depths=tuple(json["depths"]),
        widths=(json["embedding_size"], *(width // block.expansion for width in json["hidden_sizes"])),
        classes=labels(json),
        block=block,
        imagenet_stem=True,
        channels=json.get("num_channels", 3),
    )


def _write_resnet(config: resnet.Config) -> dict[str, Any]:
    kinds = {block: name for name, block in _BLOCKS.items()}
    if config.block not in kinds:
        raise InputError(f"{config.block.__name__} is no block of ResNetForImageClassification")
    return {
        "model_type": "resnet",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "layer_type": kinds[config.block],
        "depths": list(config.depths),
        "embedding_size": config.widths[0],
        "hidden_sizes": [width * config.block.expansion for width in config.widths[1:]],
        "num_channels": config.channels,
        **label_names(config.classes),
    }


def _convolved(conv: str, norm: str, theirs: str) -> dict[str, tuple[str, str]]:
    """A convolution and its batch norm."""
    table = {f"{conv}/kernel": (f"{theirs}.convolution.weight", _IMAGE[1]), **normed(norm, f"{theirs}.normalization")}
    for ours, name in (("mean", "running_mean"), ("var", "running_var")):
        table[f"{norm}/{ours}"] = (f"{theirs}.normalization.{name}", "dim -> dim")
    return table


def _counters(names: Iterable[str]) -> dict[str, np.ndarray]:
    """What PyTorch's batch norms hold besides: how often they were trained, which nothing here depends on."""
    norms = (name.removesuffix("running_mean") for name in names if name.endswith("running_mean"))
    return {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}


_CELL = "resnet.encoder.stages.{}.layers.{}."
RESNET = Family(
    architecture="ResNetForImageClassification",
    read=_read_resnet,
    write=_write_resnet,
    table={
        **_convolved("stem/conv", "stem/norm", "resnet.embedder.embedder"),
        **{
            path: place
            for number in (1, 2, 3)
            for path, place in _convolved(
                f"stages/{{}}/blocks/{{}}/conv{number}", f"stages/{{}}/blocks/{{}}/norm{number}", f"{_CELL}layer.{number - 1}"
            ).items()
        },
        **_convolved("stages/{}/blocks/{}/shortcut/conv", "stages/{}/blocks/{}/shortcut/norm", _CELL + "shortcut"),
        **both("head", "classifier.1"),
    },
    prefix="resnet.",
    ignored=(r".*\.num_batches_tracked",),
    also=_counters,
    canonical=functools.partial(dataclasses.replace, zero_init=False, dropout=0.0, preprocess=None),
)
