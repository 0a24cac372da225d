"""Methods that compare where feature maps are active, how their channels lie to each other, and on which side of zero they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from jkd import losses, schedules
from jkd.errors import InputError
from jkd.recipe import Vars
from jkd.recipes.features import Match, tap_shapes
from jkd.recipes.logits import with_task
from jkd.recipes.projectors import Pointwise, Projector, Regressor, add_bias, batch_norm, conv, norm_init
from jkd.schedules import Schedule
from jkd.types import Array, Term, Tree, subtree


@dataclasses.dataclass(frozen=True, kw_only=True)
class AT(Match):
    """Attention transfer: ``CE + weight * sum over pairs of mean (a_s - a_t)²``.

    a is the map's mean square over channels, of length 1 over the positions. Weight 1000, the mean of squares and p = 2 are the
    benchmark's and the authors' code's; taps are all stages (stem and pooled features apart).
    """

    loss: Callable[..., Any] = losses.attention_transfer
    weight: float | Schedule = 1000.0

    citation: ClassVar[str] = "Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR 2017, arXiv:1612.03928"
    family: ClassVar[str] = "maps"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"


@dataclasses.dataclass(frozen=True, kw_only=True)
class NST(Match):
    """Neuron selectivity transfer: ``CE + weight * sum over pairs of MMD²`` between the two sets of channel maps.

    With the polynomial kernel ``<a, b>²`` and the benchmark's weight 50. Taps are all stages; channels may differ.
    """

    loss: Callable[..., Any] = losses.neuron_selectivity
    weight: float | Schedule = 50.0

    citation: ClassVar[str] = "Huang & Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017"
    family: ClassVar[str] = "maps"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FSP(Match):
    """Flow of the solution procedure: ``weight * sum over neighbouring taps of mean (G_s - G_t)²``.

    G holds the products of one tap's channels with the next tap's, averaged over positions; so each tap has as many channels in
    the student as in the teacher. In paper and benchmark this loss alone initialises the student, which then learns from labels:
    ``task_weight`` is 0, and `jkd.recipes.two_stages` makes the two runs. With a ``task_weight`` both are learned together.

    Args:
        student_taps, teacher_taps: at least two on each side, in order (all stages).
    """

    weight: float | Schedule = 50.0
    task_weight: float = 0.0

    citation: ClassVar[str] = "Yim et al., A Gift from Knowledge Distillation, CVPR 2017"
    family: ClassVar[str] = "maps"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def __post_init__(self):
        super().__post_init__()
        if len(self.student_taps) < 2:
            raise InputError(f"FSP: student_taps = {self.student_taps}: give at least two, in order")

    def terms(self, vars, student, teacher, batch, *, clock, key):
        terms = with_task(self.task_weight, student, batch)
        weight = schedules.at(self.weight, clock)
        pairs = self.pairs(vars, student, teacher, batch)
        for i, ((mine, theirs), (mine_next, theirs_next)) in enumerate(zip(pairs[:-1], pairs[1:], strict=True)):
            terms[f"flow{i}"] = Term(losses.fsp(mine, mine_next, theirs, theirs_next), batch["weight"], weight)
        return terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class AB(Match):
    """Activation boundaries: ``weight * sum over pairs i of n of 2^(i-n+1) * sum (s ± m)² where the sides differ``.

    Taps are features *before* their activation. Students of another shape are mapped by a convolution with BatchNorm. In paper
    and benchmark (30 epochs) this loss alone initialises the student, which then learns from labels: ``task_weight`` is 0, and
    `jkd.recipes.two_stages` makes the two runs. The loss is a sum over the map; 0.003 is the benchmark's ``3 / 1000``.

    Args:
        margin: m; how far from zero a neuron should be.
    """

    projector: Projector | None = Regressor(relu=False, keep_equal=True)
    weight: float | Schedule = 0.003
    task_weight: float = 0.0
    margin: float = 1.0

    citation: ClassVar[str] = "Heo et al., Knowledge Transfer via Distillation of Activation Boundaries, AAAI 2019"
    family: ClassVar[str] = "maps"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "golden"

    def compare(self, vars, place, mine, theirs, batch):
        return losses.activation_boundary(mine, theirs, margin=self.margin)

    def share(self, place):
        return 2.0 ** (place - len(self.student_taps) + 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFD(Match):
    """Overhaul of feature distillation: ``CE + weight * sum over pairs i of n of 2^(i-n+1) * partial L2``.

    Taps are features *before* their activation; the student's pass a 1x1 convolution with BatchNorm. The teacher's are cut off at
    a margin for each channel, the mean of its negative values, which follows from the BatchNorm that made them. The loss is a sum
    over the map, with the authors' weight 0.001 (CIFAR-100).

    Args:
        teacher_norms: for each tap, the path of the BatchNorm in the teacher's parameters (``stages/0/blocks/4/norm2``).
    """

    projector: Projector | None = Pointwise(batch_norm=True)
    weight: float | Schedule = 1e-3
    teacher_norms: tuple[str, ...] = ()

    citation: ClassVar[str] = "Heo et al., A Comprehensive Overhaul of Feature Distillation, ICCV 2019, arXiv:1904.01866"
    family: ClassVar[str] = "maps"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def __post_init__(self):
        super().__post_init__()
        if len(self.teacher_norms) != len(self.teacher_taps):
            raise InputError(f"OFD: {len(self.teacher_norms)} teacher_norms for {len(self.teacher_taps)} teacher_taps")

    def compare(self, vars, place, mine, theirs, batch):
        path = self.teacher_norms[place]
        found = subtree(vars.params.get("teacher", {}), path)
        if not {"scale", "bias"} <= found.keys():
            raise InputError(f"OFD.teacher_norms: the teacher has no BatchNorm with scale and bias at {path!r}")
        return losses.overhaul(mine, theirs, jax.lax.stop_gradient(margin(found["scale"], found["bias"])))

    def share(self, place):
        return 2.0 ** (place - len(self.student_taps) + 1)


def margin(scale: Array, bias: Array) -> Array:
    """``E[x | x < 0]`` of each channel behind a BatchNorm: x normal with mean ``bias`` and deviation ``|scale|`` (OFD).

    Where it is hardly ever negative (probability up to 0.001): ``-3 |scale|``, as the code has it.
    """
    scale, bias = jnp.abs(scale.astype(jnp.float32)), bias.astype(jnp.float32)
    ratio = bias / jnp.where(scale > 0, scale, 1)
    below = norm.cdf(-ratio)
    some = (below > 1e-3) & (scale > 0)
    return jnp.where(some, bias - scale * norm.pdf(ratio) / jnp.where(some, below, 1), -3 * scale)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FT(Match):
    """Factor transfer: ``CE + weight * mean |a_s - a_t|`` between factors, and ``reconstruct``, the paraphraser's own loss.

    A paraphraser (three convolutions with LeakyReLU, ``rate`` times the teacher's channels, and three back) makes the teacher's
    factors, a translator of the same shape with BatchNorm the student's. The authors train the paraphraser for 30 epochs before
    the student; here it learns along with it, from its own term whose gradient reaches nothing else. Weight and the mean of
    squares over channels are the CIFAR benchmark's (Tian et al., ICLR 2020).

    Args:
        student_taps, teacher_taps: one on each side, the last feature map.
        rate: the factors' channels over the teacher's.
        translator_norm: BatchNorm in the translator; without it examples stay independent.
    """

    weight: float | Schedule = 200.0
    rate: float = 0.5
    translator_norm: bool = True

    citation: ClassVar[str] = (
        "Kim, Park & Kwak, Paraphrasing Complex Network: Network Compression via Factor Transfer, NeurIPS 2018"
    )
    family: ClassVar[str] = "maps"
    evidence: ClassVar[Literal["golden", "formula", "mechanism"]] = "formula"

    def __post_init__(self):
        super().__post_init__()
        if len(self.student_taps) != 1:
            raise InputError(f"FT: student_taps = {self.student_taps}: give one, the last feature map")

    @property
    def couples_batch(self):
        return self.translator_norm

    def init(self, key, ctx):
        ((mine, theirs),) = tap_shapes(self, ctx)
        if len(mine) != 4 or len(theirs) != 4:
            raise InputError(f"FT: needs feature maps, got {mine} and {theirs}")
        factors = int(theirs[-1] * self.rate)
        encoder, decoder, translator = jax.random.split(key, 3)
        return Vars(
            params={
                "paraphraser": {
                    "encoder": _stack_init(encoder, (theirs[-1], theirs[-1], factors, factors), norm=False),
                    "decoder": _stack_init(decoder, (factors, factors, theirs[-1], theirs[-1]), norm=False),
                },
                "projector": _stack_init(translator, (mine[-1], mine[-1], factors, factors), norm=self.translator_norm),
            }
        )

    def terms(self, vars, student, teacher, batch, *, clock, key):
        mine, theirs = student.taps[self.student_taps[0]], teacher.taps[self.teacher_taps[0]]
        factors = _stack(vars.params["paraphraser"]["encoder"], theirs)
        rebuilt = _stack(vars.params["paraphraser"]["decoder"], factors)
        translated = _stack(vars.params["projector"], mine, batch["weight"] > 0)
        transfer = losses.factor_transfer(translated, jax.lax.stop_gradient(factors))
        return with_task(self.task_weight, student, batch) | {
            "transfer": Term(transfer, batch["weight"], schedules.at(self.weight, clock)),
            "reconstruct": Term(losses.mse(rebuilt, theirs), batch["weight"]),
        }


def _stack_init(key: Array, widths: tuple[int, ...], *, norm: bool) -> Tree:
    """3x3 convolutions, each with a bias, or with BatchNorm, which makes the bias idle."""
    layers = {}
    for i, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        kernel = jax.nn.initializers.he_normal()(jax.random.fold_in(key, i), (3, 3, inputs, outputs))
        layers[str(i)] = {"kernel": kernel} | (norm_init(outputs) if norm else {"bias": jnp.zeros(outputs)})
    return layers


def _stack(layers: Tree, features: Array, kept: Array | None = None) -> Array:
    for i in range(len(layers)):
        layer = layers[str(i)]
        features = conv(features, layer["kernel"])
        features = add_bias(features, layer["bias"]) if "bias" in layer else batch_norm(layer, features, kept)
        features = jax.nn.leaky_relu(features, 0.1)
    return features
