"""BERT and RoBERTa, as encoders, with classes, or with masked tokens: config.json and tensor names."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from jkd.models.encoder import Config
from jkd.models.pretrained.family import Family, Json, both, label_names, labels, normed, require


def _trunk(prefix: str) -> dict[str, tuple[str, str]]:
    layer, table = f"{prefix}encoder.layer.{{}}.", dict[str, tuple[str, str]]()
    for ours, theirs in (("token", "word"), ("position", "position"), ("kind", "token_type")):
        table[f"embed/{ours}/embedding"] = (f"{prefix}embeddings.{theirs}_embeddings.weight", "row dim -> row dim")
    table |= normed("embed/norm", prefix + "embeddings.LayerNorm")
    for name in ("query", "key", "value"):
        table[f"layers/attention/{name}/kernel"] = (f"{layer}attention.self.{name}.weight", "(head k) dim -> dim head k")
        table[f"layers/attention/{name}/bias"] = (f"{layer}attention.self.{name}.bias", "(head k) -> head k")
    table |= both("layers/attention/out", layer + "attention.output.dense", ("kernel", "dim (head k) -> head k dim"))
    table |= normed("layers/norm1", layer + "attention.output.LayerNorm")
    table |= both("layers/mlp/up", layer + "intermediate.dense") | both("layers/mlp/down", layer + "output.dense")
    return table | normed("layers/norm2", layer + "output.LayerNorm")


def _shape(json: Json) -> dict[str, Any]:
    require(json, hidden_act="gelu", is_decoder=False, add_cross_attention=False)
    require(json, position_embedding_type="absolute", tie_word_embeddings=True)
    return {
        "vocab": json["vocab_size"],
        "dim": json["hidden_size"],
        "depth": json["num_hidden_layers"],
        "heads": json["num_attention_heads"],
        "hidden": json["intermediate_size"],
        "length": json["max_position_embeddings"],
        "types": json["type_vocab_size"],
        "dropout": float(json.get("hidden_dropout_prob", 0.1)),
        "epsilon": json.get("layer_norm_eps", 1e-12),
    }


def _write(config: Config) -> dict[str, Any]:
    return {
        "hidden_act": "gelu",
        "vocab_size": config.vocab,
        "hidden_size": config.dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.length + config.offset,
        "type_vocab_size": config.types,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "layer_norm_eps": config.epsilon,
        **({} if config.classes is None else label_names(config.classes)),
    }


def _plain(json: Json, **head: Any) -> Config:
    return Config(**_shape(json), **head)


def _shifted(json: Json, **head: Any) -> Config:
    # RoBERTa counts positions from the one after its padding token's number.
    shape, offset = _shape(json), json.get("pad_token_id", 1) + 1
    return Config(**shape | {"length": shape["length"] - offset, "offset": offset}, **head)


_canonical = functools.partial(dataclasses.replace, tokens=None, remat=None)
_BERT: Any = functools.partial(
    Family,
    prefix="bert.",
    write=lambda config: {"model_type": "bert", "pad_token_id": 0, **_write(config)},
    canonical=_canonical,
)
_ROBERTA: Any = functools.partial(
    Family,
    prefix="roberta.",
    write=lambda config: {"model_type": "roberta", "pad_token_id": config.offset - 1, **_write(config)},
    canonical=_canonical,
)
# Numbers of positions, which old versions of transformers wrote down.
_IDS = r"(.*\.)?embeddings\.position_ids"
_POOL = functools.partial(both, "pool/linear")
_CLASSES = functools.partial(both, "classifier")

FAMILIES = (
    _BERT(
        architecture="BertForSequenceClassification",
        read=lambda json: _plain(json, classes=labels(json)),
        table=_trunk("bert.") | _POOL("bert.pooler.dense") | _CLASSES("classifier"),
        ignored=(_IDS,),
    ),
    _BERT(
        architecture="BertForMaskedLM",
        read=lambda json: _plain(json, pool=False, masked=True),
        table=_trunk("bert.")
        | both("predict/linear", "cls.predictions.transform.dense")
        | normed("predict/norm", "cls.predictions.transform.LayerNorm")
        | {"predict/bias": ("cls.predictions.bias", "vocab -> vocab")},
        # The head is the embedding; pretraining leaves the pooled token's map and next sentences besides.
        ignored=(_IDS, r"cls\.predictions\.decoder\..*", r"cls\.seq_relationship\..*", r"bert\.pooler\..*"),
    ),
    _BERT(
        architecture="BertModel",
        read=_plain,
        table=_trunk("bert.") | _POOL("bert.pooler.dense"),
        ignored=(_IDS,),
        bare=True,
    ),
    _ROBERTA(
        architecture="RobertaForSequenceClassification",
        read=lambda json: _shifted(json, classes=labels(json)),
        table=_trunk("roberta.") | _POOL("classifier.dense") | _CLASSES("classifier.out_proj"),
        ignored=(_IDS,),
    ),
    _ROBERTA(
        architecture="RobertaForMaskedLM",
        read=lambda json: _shifted(json, pool=False, masked=True),
        table=_trunk("roberta.")
        | both("predict/linear", "lm_head.dense")
        | normed("predict/norm", "lm_head.layer_norm")
        | {"predict/bias": ("lm_head.bias", "vocab -> vocab")},
        ignored=(_IDS, r"lm_head\.decoder\..*", r"roberta\.pooler\..*"),
    ),
    _ROBERTA(
        architecture="RobertaModel",
        read=_shifted,
        table=_trunk("roberta.") | _POOL("roberta.pooler.dense"),
        ignored=(_IDS,),
        bare=True,
    ),
)
