"""One row for every public recipe: how to make it on small networks. The invariants in `test_invariants` read this table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import small
import tiny

from jkd import recipes
from jkd.config import Ema, StudentEma
from jkd.data import At
from jkd.recipe import Recipe
from jkd.recipes.projectors import Linear, Pointwise, Regressor

PAIRS = dict(student_taps=small.TAPS, teacher_taps=small.TAPS)
PRES = dict(student_taps=small.PRE, teacher_taps=small.PRE)
LEVELS = dict(student_taps=small.LEVELS, teacher_taps=small.LEVELS)
LATE = dict(student_taps=("late",), teacher_taps=("late",))
POOL = dict(student_taps=("pool",), teacher_taps=("pool",))


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe.

    Args:
        make: keyword arguments -> the recipe, small.
        independent: arguments that uncouple the examples (no BatchNorm in a projector), where there are such; else None.
        student, teacher: options of the small networks.
        rate: learning rate at which 50 steps of Adam lower its loss.
        run: further fields of the run (the views that the recipe needs).
    """

    make: Callable[..., Recipe]
    independent: dict[str, Any] | None = None
    student: dict[str, Any] = dataclasses.field(default_factory=dict)
    teacher: dict[str, Any] = dataclasses.field(default_factory=dict)
    rate: float = 3e-3
    run: dict[str, Any] = dataclasses.field(default_factory=dict)


def row(kind: Callable[..., Recipe], independent: dict[str, Any] | None = None, /, *, nets: Any = None, **given: Any) -> Row:
    def make(**changes: Any) -> Recipe:
        return kind(**given | changes)

    return Row(make, independent, **(nets or {}))


def noise(batch, key):
    return {**batch, "image": batch["image"] + 0.1 * jax.random.normal(key, batch["image"].shape)}


def stream(batch, key):
    """Twice as many unlabelled rows as the batch has."""
    twice = {name: jnp.concatenate([batch[name], batch[name][::-1]]) for name in ("image", "weight")}
    twice["image"] = twice["image"] * 0.9
    return {**batch, "unlabelled": {**twice, "index": jnp.arange(2 * len(batch["weight"]))}}


def sides(student: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    return {"student": student, "teacher": teacher}


def by_pixel(batch, key):
    """A label for each pixel, that of the image or its neighbour."""
    rows, height, width, _ = batch["image"].shape
    border = jnp.arange(height * width).reshape(1, height, width) % 3
    return {**batch, "label": (batch["label"].reshape(-1, 1, 1) + border) % tiny.CLASSES}


def as_text(batch, key):
    """Twelve tokens of each image, of which the first three or four are the prompt; the last may be padding."""
    rows = batch["image"].shape[0]
    tokens = (jnp.abs(batch["image"].reshape(rows, -1)[:, :12]) * 5).astype(jnp.int32) % small.VOCAB
    place = jnp.arange(12)[None]
    counted = place >= 3 + (batch["label"] % 2)[:, None]
    real = place < 12 - (batch["label"] % 3)[:, None]
    return {**batch, "tokens": tokens, "mask": real.astype(jnp.uint8), "loss_mask": counted.astype(jnp.uint8)}


def both_views(batch, key):
    """A teacher of as many letters in other numbers, which reads the text from its second token on; who is private, and hidden."""
    batch = as_text(batch, key)
    theirs = {f"teacher_{name}": batch[name][:, 1:] for name in ("mask", "loss_mask")}
    return {**batch, **theirs, "teacher_tokens": (batch["tokens"][:, 1:] + 1) % small.VOCAB}


def private(batch, key):
    """Every third place is half private, or wholly."""
    batch = as_text(batch, key)
    place = jnp.arange(12)[None] % 3
    return {**batch, "privacy": jnp.where(place == 1, 1.0, jnp.where(place == 2, 0.5, 0.0)) * batch["mask"]}


def masked(batch, key):
    """A third of the tokens hidden, in the same places in every step."""
    batch = as_text(batch, key)
    chosen = (jnp.arange(12)[None] % 3 == 1) & (batch["mask"] > 0)
    told = {"label": batch["tokens"], "masked": chosen.astype(jnp.uint8)}
    return {**batch, "tokens": jnp.where(chosen, 0, batch["tokens"]), **told}


TEXT = {
    "student": {"kind": small.chain},
    "teacher": {"kind": small.chain, "width": 6},
    "run": {"augment": (as_text,)},
    "rate": 1e-2,
}
READS = sides({"kind": small.reader, "depth": 1}, {"kind": small.reader}) | {"rate": 1e-2}
LAYERS = dict(
    student_hidden=("embed", "layer@0"),
    teacher_hidden=("embed", "layer@1"),
    student_attention=(("query@0", "key@0"),),
    teacher_attention=(("query@1", "key@1"),),
)
SAYS = recipes.Rollout(prompt=4, length=6, end=0)
PIXELS = {"run": {"augment": (by_pixel,)}}
ATTENTION = dict(student_taps=small.QKV, teacher_taps=small.QKV)
TRANSFORMERS = {"kind": small.transformer, "heads": 2}, {"kind": small.transformer, "width": 12}
STRONG = {"run": {"augment": (recipes.View("strong", noise),)}}
STREAM = {"run": {"augment": (stream, At("unlabelled", recipes.View("strong", noise)))}}
SECOND = {"run": {"augment": (stream, At("unlabelled", recipes.View("second", noise)))}}
AVERAGE = {"teacher": StudentEma(), "ema": Ema(decay=0.9)}
AVERAGED = {"run": STREAM["run"] | AVERAGE}
NEGATIVE = {"run": {"augment": (recipes.View("negative", noise),)}}

ROWS = {
    "Supervised": row(recipes.Supervised),
    "KD": row(recipes.KD),
    "FunMatch": row(recipes.FunMatch),
    "DKD": row(recipes.DKD, warmup_epochs=0.0),
    # the paper's constants for ImageNet: with T = 3 most of the loss is the teacher's entropy, which no training lowers
    "NKD": row(recipes.NKD, gamma=1.5, temperature=1.0, nets={"rate": 1e-2}),
    "WSLD": row(recipes.WSLD),
    "DIST": row(recipes.DIST, {"gamma": 0.0}),
    "StandardizedKD": row(recipes.StandardizedKD),
    "Standardized": row(recipes.Standardized, recipe=recipes.NKD()),
    "Combine": row(recipes.Combine, recipes=(recipes.KD(), recipes.AT(**PAIRS, task_weight=0.0))),
    "Match": row(recipes.Match, **LATE, projector=Linear()),
    "FitNet": row(recipes.FitNet, {"projector": Regressor(batch_norm=False)}, **LATE),
    "VID": row(recipes.VID, **PAIRS),
    "ReviewKD": row(recipes.ReviewKD, {"norm": False}, **LEVELS, warmup_epochs=0.0),
    "AT": row(recipes.AT, **PAIRS),
    "NST": row(recipes.NST, **PAIRS),
    "FSP": row(recipes.FSP, **PAIRS, nets={"teacher": {"width": 6}}),
    "AB": row(recipes.AB, {"projector": Regressor(batch_norm=False, keep_equal=True)}, **PRES),
    "OFD": row(recipes.OFD, {"projector": Pointwise()}, **PRES, teacher_norms=small.TAPS),
    "FT": row(recipes.FT, {"translator_norm": False}, **LATE),
    "SP": row(recipes.SP, **LATE),
    "PKT": row(recipes.PKT, **POOL),
    "RKD": row(recipes.RKD, **POOL),
    "CC": row(recipes.CC, **POOL, dim=16),
    "CRD": row(recipes.CRD, **POOL, dim=16, negatives=24),
    "SimKD": row(recipes.SimKD, {"batch_norm": False}, **LATE),
    "SRRL": row(recipes.SRRL, {"projector": Pointwise(relu=True)}, **LATE),
    "DeiT": row(recipes.DeiT, nets={"student": {"token": True}}),
    "PSKD": row(recipes.PSKD),
    "ELR": row(recipes.ELR),
    "MeanTeacher": row(recipes.MeanTeacher, weight=10.0, nets={"run": SECOND["run"] | AVERAGE}),
    "FixMatch": row(recipes.FixMatch, threshold=0.4, nets=STREAM),
    "FlexMatch": row(recipes.FlexMatch, threshold=0.4, examples=2 * tiny.ROWS, nets=STREAM),
    "DHKD": row(recipes.DHKD, student_taps=("pool",)),
    "DHO": row(recipes.DHO, student_taps=("pool",), nets=SECOND),
    "CTKD": row(recipes.CTKD),
    "InstanceCTKD": row(recipes.InstanceCTKD, hidden=8),
    "HARD": row(recipes.HARD, lower=0.05, upper=0.1, temperature=4.0),
    "LELP": row(recipes.LELP, subclasses=4, nets=sides({"classes": 4 * tiny.CLASSES}, {"kind": small.split})),
    "LADTeacher": row(recipes.LADTeacher, nets=sides({"kind": small.privileged}, {}) | PIXELS),
    "LAD": row(recipes.LAD, nets=sides({"kind": small.dense}, {"kind": small.privileged}) | PIXELS),
    "FST": row(recipes.FST, threshold=0.4, ahead=1, nets=AVERAGED),
    "MPL": row(recipes.MPL, uda_weight=1.0, nets=STREAM),
    "MLLD": row(recipes.MLLD, nets=STRONG),
    "MarginMSE": row(recipes.MarginMSE, nets=NEGATIVE),
    "PLD": row(recipes.PLD),
    "USKD": row(recipes.USKD, student_taps=("early",)),
    "MCMI": row(recipes.MCMI),
    "MiniLM": row(recipes.MiniLM, **ATTENTION, nets=sides(*TRANSFORMERS)),
    "MiniLMv2": row(
        recipes.MiniLMv2, **ATTENTION, relation_heads=4, nets=sides({**TRANSFORMERS[0], "heads": 4}, TRANSFORMERS[1])
    ),
    "TransKD": row(
        recipes.TransKD,
        {"norm": False},
        student_taps=(*small.TAPS, "early:pre"),
        teacher_taps=(*small.TAPS, "early:pre"),
        embedding_weights=(0.5,),
    ),
    "MEALV2": row(recipes.MEALV2, nets={"teacher": {"members": (tiny.CLASSES, tiny.CLASSES)}}),
    "KnowledgeConcentration": row(
        recipes.KnowledgeConcentration,
        classes=((3, 0), (1, 2, 4)),
        pace=1.0,
        nets={"teacher": {"members": (2, 3), "mean": None}},
    ),
    "NextToken": row(recipes.NextToken, nets=TEXT | {"rate": 5e-2}),
    "TokenKD": row(recipes.TokenKD, temperature=2.0, task_weight=0.5, nets=TEXT | {"rate": 5e-2}),
    "TopKKD": row(recipes.TopKKD, k=3, task_weight=0.5, nets=TEXT),
    "RandomSamplingKD": row(recipes.RandomSamplingKD, draws=16, task_weight=0.5, nets=TEXT),
    "AKL": row(recipes.AKL, task_weight=0.5, nets=TEXT),
    "ABKD": row(recipes.ABKD, nets=TEXT),
    "TAID": row(recipes.TAID, start=1.0, nets=TEXT),
    "SeqKD": row(recipes.SeqKD, rollout=SAYS, nets=TEXT | {"rate": 5e-2}),
    "GKD": row(recipes.GKD, rollout=SAYS, share=0.5, nets=TEXT),
    "DistiLLM": row(recipes.DistiLLM, rollout=SAYS, capacity=40, look_every=5, threshold=0.8, nets=TEXT),
    "SALT": row(recipes.SALT, until=0.5, nets=TEXT | {"rate": 5e-2}),
    "SwingKD": row(recipes.SwingKD, noise=0.5, task_weight=0.5, nets=TEXT | {"run": {"augment": (private,)}, "rate": 5e-2}),
    "ULD": row(
        recipes.ULD,
        nets=TEXT | {"teacher": {"kind": small.chain, "width": 6}, "run": {"augment": (both_views,)}, "rate": 5e-2},
    ),
    "TinyBERT": row(recipes.TinyBERT, **LAYERS, soft_weight=1.0, nets=READS | {"run": {"augment": (as_text,)}}),
    "DistilBERT": row(
        recipes.DistilBERT,
        student_taps=("layer@0",),
        teacher_taps=("layer@1",),
        nets=READS | {"run": {"augment": (masked,)}},
    ),
    "MiniLLM": row(recipes.MiniLLM, {"whiten": False}, rollout=SAYS, nets=TEXT),
}
