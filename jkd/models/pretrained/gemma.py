"""Gemma 2 and the text models of Gemma 3: config.json and tensor names."""

from __future__ import annotations

import functools
from typing import Any

from jkd.models.decoder import Config
from jkd.models.pretrained.family import Family, Json, require
from jkd.models.pretrained.llama import (
    IGNORED,
    TABLE,
    canonical,
    read_rope,
    read_shape,
    read_windows,
    rope_parameters,
    write_rope,
    write_shape,
    write_windows,
)

_LAYER = "model.layers.{}."
_TABLE = TABLE | {
    "layers/post_norm1/scale": (_LAYER + "post_attention_layernorm.weight", "dim -> dim"),
    "layers/norm2/scale": (_LAYER + "pre_feedforward_layernorm.weight", "dim -> dim"),
    "layers/post_norm2/scale": (_LAYER + "post_feedforward_layernorm.weight", "dim -> dim"),
}


def _read(json: Json, windowed: list[bool]) -> dict[str, Any]:
    require(json, hidden_activation=("gelu_pytorch_tanh", None), use_bidirectional_attention=(False, None))
    shape, biased = read_shape(json), bool(json.get("attention_bias", False))
    return {
        **shape,
        **read_windows(json, windowed),
        "activation": "gelu",
        "tied": json.get("tie_word_embeddings", True),
        "sandwich_norm": True,
        "centered_norm": True,
        "qkv_bias": biased,
        "out_bias": biased,
        "embedding_scale": shape["dim"] ** 0.5,
        "query_scale": json["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": json.get("attn_logit_softcapping"),
        "logit_softcap": json.get("final_logit_softcapping"),
    }


def _write(config: Config) -> dict[str, Any]:
    scale = config.width**-0.5 if config.query_scale is None else config.query_scale
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        **write_shape(config),
        **write_windows(config),
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _read_gemma2(json: Json) -> Config:
    fields = _read(json, [number % 2 == 0 for number in range(json["num_hidden_layers"])])
    return Config(**fields, rope=read_rope(rope_parameters(json), fields["length"]))


def _read_gemma3(json: Json) -> Config:
    pattern = json.get("sliding_window_pattern", json.get("_sliding_window_pattern", 6))
    fields = _read(json, [(number + 1) % pattern != 0 for number in range(json["num_hidden_layers"])])
    both = json.get("rope_parameters") or {}
    full = {
        "rope_theta": json.get("rope_theta", 1_000_000.0),
        **(json.get("rope_scaling") or {}),
        **both.get("full_attention", {}),
    }
    local = {"rope_theta": json.get("rope_local_base_freq", 10_000.0), **both.get("sliding_attention", {})}
    length = fields["length"]
    return Config(**fields, query_norm=True, rope=read_rope(full, length), local_rope=read_rope(local, length))


def _write_gemma3(config: Config) -> dict[str, Any]:
    local = (config.local_rope or config.rope).theta
    return {"model_type": "gemma3_text", **_write(config), **write_rope(config.rope), "rope_local_base_freq": local}


_Decoder = functools.partial(Family, prefix="model.", table=_TABLE, ignored=IGNORED, canonical=canonical)
GEMMA2 = _Decoder(
    architecture="Gemma2ForCausalLM",
    read=_read_gemma2,
    write=lambda config: {"model_type": "gemma2", **_write(config), **write_rope(config.rope)},
)
GEMMA3 = _Decoder(architecture="Gemma3ForCausalLM", read=_read_gemma3, write=_write_gemma3)
