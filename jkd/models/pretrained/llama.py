"""Llama, Qwen2 and Qwen3: config.json and tensor names."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jkd.errors import InputError
from jkd.models.decoder import Config
from jkd.models.pretrained.family import Family, Json, require
from jkd.models.rope import Linear, Llama3, Rope

_LAYER = "model.layers.{}."
TABLE = {
    "embed/embedding": ("model.embed_tokens.weight", "vocab dim -> vocab dim"),
    "layers/norm1/scale": (_LAYER + "input_layernorm.weight", "dim -> dim"),
    **{
        f"layers/attention/{ours}/{kind}": (f"{_LAYER}self_attn.{theirs}_proj.{name}", layout)
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"))
        for kind, name, layout in (("kernel", "weight", "(head k) dim -> dim head k"), ("bias", "bias", "(head k) -> head k"))
    },
    "layers/attention/query_norm/scale": (_LAYER + "self_attn.q_norm.weight", "k -> k"),
    "layers/attention/key_norm/scale": (_LAYER + "self_attn.k_norm.weight", "k -> k"),
    "layers/attention/out/kernel": (_LAYER + "self_attn.o_proj.weight", "dim (head k) -> head k dim"),
    "layers/attention/out/bias": (_LAYER + "self_attn.o_proj.bias", "dim -> dim"),
    "layers/norm2/scale": (_LAYER + "post_attention_layernorm.weight", "dim -> dim"),
    **{
        f"layers/mlp/{name}/{kind}": (f"{_LAYER}mlp.{name}_proj.{theirs}", layout)
        for name in ("gate", "up", "down")
        for kind, theirs, layout in (("kernel", "weight", "out in -> in out"), ("bias", "bias", "out -> out"))
    },
    "norm/scale": ("model.norm.weight", "dim -> dim"),
    "head/kernel": ("lm_head.weight", "vocab dim -> dim vocab"),
}
# The first is written beside a tied embedding by some, the second by old versions of transformers.
IGNORED = (r"lm_head\.weight", r".*\.rotary_emb\.inv_freq")


def read_shape(json: Json) -> dict[str, Any]:
    """The fields of `Config` that all decoders have in common."""
    require(json, partial_rotary_factor=(1.0, None), is_decoder=(True, False), add_cross_attention=False)
    heads, dim = json["num_attention_heads"], json["hidden_size"]
    return {
        "vocab": json["vocab_size"],
        "dim": dim,
        "depth": json["num_hidden_layers"],
        "heads": heads,
        "kv_heads": json.get("num_key_value_heads") or heads,
        "head_dim": json.get("head_dim") or dim // heads,
        "hidden": json["intermediate_size"],
        "epsilon": json["rms_norm_eps"],
        "length": json["max_position_embeddings"],
    }


def write_shape(config: Config) -> dict[str, Any]:
    """The inverse of `read_shape`."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.width,
        "intermediate_size": config.hidden,
        "rms_norm_eps": config.epsilon,
        "max_position_embeddings": config.length,
        "tie_word_embeddings": config.tied,
    }


def read_rope(parameters: Json, length: int) -> Rope:
    """``rope_parameters`` of transformers 5, or ``rope_theta`` and ``rope_scaling`` joined.

    Raises:
        InputError: a kind of scaling that is not known here.
    """
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    theta = float(parameters["rope_theta"])
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling=Linear(factor=float(parameters["factor"])))
    if kind == "llama3":
        return Rope(
            theta=theta,
            scaling=Llama3(
                factor=float(parameters["factor"]),
                low=float(parameters["low_freq_factor"]),
                high=float(parameters["high_freq_factor"]),
                length=parameters.get("original_max_position_embeddings", length),
            ),
        )
    raise InputError(f"config.json: rope_type = {kind!r} is not supported, only 'default', 'linear' or 'llama3'")


def rope_parameters(json: Json) -> Json:
    """The one set of rotary parameters of a config.json, of transformers 4 or 5."""
    return {
        "rope_theta": json.get("rope_theta", 10_000.0),
        **(json.get("rope_scaling") or {}),
        **(json.get("rope_parameters") or {}),
    }


def write_rope(rope: Rope) -> dict[str, Any]:
    """As transformers 4 has it, which 5 reads too."""
    scaling: dict[str, Any] | None = None
    if isinstance(rope.scaling, Linear):
        scaling = {"rope_type": "linear", "factor": rope.scaling.factor}
    elif isinstance(rope.scaling, Llama3):
        scaling = {
            "rope_type": "llama3",
            "factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low,
            "high_freq_factor": rope.scaling.high,
            "original_max_position_embeddings": rope.scaling.length,
        }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def read_windows(json: Json, default: list[bool]) -> dict[str, Any]:
    """Which layers are windowed: ``layer_types``, or where that is not there the family's own rule."""
    types = json.get("layer_types")
    if types is not None:
        if unknown := set(types) - {"full_attention", "sliding_attention"}:
            raise InputError(f"config.json: layer_types holds {min(unknown)!r}, which is not supported")
        default = [kind == "sliding_attention" for kind in types]
    return {"window": json["sliding_window"], "windowed": tuple(default)} if any(default) else {}


def write_windows(config: Config) -> dict[str, Any]:
    """The inverse of `read_windows`."""
    return {
        "sliding_window": config.window,
        "layer_types": ["sliding_attention" if local else "full_attention" for local in config.local],
    }


def canonical(config: Config) -> Config:
    """The config with nothing left to its defaults, as every layer works it out."""
    return dataclasses.replace(
        config,
        tokens=None,
        kv_heads=config.groups,
        head_dim=config.width,
        windowed=config.local,
        window=config.window or 1,
        local_rope=(config.local_rope or config.rope) if config.window else None,
        query_scale=config.width**-0.5 if config.query_scale is None else config.query_scale,
        remat=None,
    )


def _read_llama(json: Json) -> Config:
    require(json, hidden_act="silu", pretraining_tp=1)
    biased = bool(json.get("attention_bias", False))
    shape = read_shape(json)
    return Config(
        **shape,
        tied=json.get("tie_word_embeddings", False),
        rope=read_rope(rope_parameters(json), shape["length"]),
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=bool(json.get("mlp_bias", False)),
    )


def _write_llama(config: Config) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        **write_shape(config),
        **write_rope(config.rope),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }


def _read_qwen(json: Json) -> Config:
    require(json, hidden_act="silu")
    shape, windowed = read_shape(json), [False] * json["num_hidden_layers"]
    if json.get("use_sliding_window", False):
        windowed = [number >= json["max_window_layers"] for number in range(shape["depth"])]
    return Config(
        **shape,
        tied=json.get("tie_word_embeddings", False),
        rope=read_rope(rope_parameters(json), shape["length"]),
        **read_windows(json, windowed),
    )


def _write_qwen(config: Config) -> dict[str, Any]:
    # Old readers know no layer_types, only a first windowed layer.
    full = config.local.index(True) if any(config.local) else config.depth
    return {
        "hidden_act": "silu",
        **write_shape(config),
        **write_rope(config.rope),
        **write_windows(config),
        "use_sliding_window": config.window is not None,
        "max_window_layers": full,
    }


def _read_qwen2(json: Json) -> Config:
    return dataclasses.replace(_read_qwen(json), qkv_bias=True)


def _read_qwen3(json: Json) -> Config:
    biased = bool(json.get("attention_bias", False))
    return dataclasses.replace(_read_qwen(json), query_norm=True, qkv_bias=biased, out_bias=biased)


_Decoder = functools.partial(Family, prefix="model.", table=TABLE, ignored=IGNORED, canonical=canonical)
LLAMA = _Decoder(architecture="LlamaForCausalLM", read=_read_llama, write=_write_llama)
QWEN2 = _Decoder(
    architecture="Qwen2ForCausalLM",
    read=_read_qwen2,
    write=lambda config: {"model_type": "qwen2", **_write_qwen(config)},
)
QWEN3 = _Decoder(
    architecture="Qwen3ForCausalLM",
    read=_read_qwen3,
    write=lambda config: {"model_type": "qwen3", **_write_qwen(config), "attention_bias": config.qkv_bias},
)
