"""Residual networks, one module for three families: CIFAR ResNets, wide ResNets and ImageNet ResNets.

Layers, widths and initialisation follow the PyTorch originals that distillation papers compare on: the CIFAR family and WRN
those of RepDistiller (https://github.com/HobbitLong/RepDistiller) and mdistiller (https://github.com/megvii-research/mdistiller),
ImageNet those of torchvision (stride in the 3x3 convolution). The networks compute in the dtype of their inputs and parameters;
normalisation statistics are float32.

Taps: ``stem``, ``stages/i``, ``stages/i/blocks/j``, ``pool`` and ``head``; `Config.features` and `Config.preactivations` name the ones
that feature distillation usually reads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jkd.errors import InputError, nearest
from jkd.models.adapt_nnx import from_nnx
from jkd.models.norms import BatchNorm, GroupNorm, LayerNorm, Norm
from jkd.types import Model, Preprocess

__all__ = [
    "Basic",
    "BatchNorm",
    "Bottleneck",
    "Config",
    "GroupNorm",
    "LayerNorm",
    "Norm",
    "ResNet",
    "Wide",
    "cifar",
    "imagenet",
    "wrn",
]

Array = jax.Array

# kaiming_normal_(mode="fan_out", nonlinearity="relu"), and the default of torch.nn.Linear: uniform within ±1/sqrt(fan_in).
_conv_init = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")
_linear_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class _Layers:
    """Makes a network's convolutions and norms; holds what they share."""

    def __init__(self, norm: Norm, rngs: nnx.Rngs):
        self.of, self.rngs = norm, rngs

    def conv(self, inputs: int, outputs: int, size: int = 3, stride: int = 1) -> nnx.Conv:
        # Explicit padding: "SAME" would pad the other side than PyTorch does where the stride is 2.
        return nnx.Conv(
            inputs,
            outputs,
            (size, size),
            strides=stride,
            padding=(size - 1) // 2,
            use_bias=False,
            kernel_init=_conv_init,
            rngs=self.rngs,
        )

    def norm(self, features: int, *, zero: bool = False) -> nnx.Module:
        norm: Any = self.of.build(features, self.rngs)
        if zero:
            norm.scale.set_value(jnp.zeros_like(norm.scale.get_value()))
        return norm


def _same(norm: Any, x: Array) -> Array:
    # float32 statistics make the norm's answer float32; the network goes on in the dtype it was given.
    return norm(x).astype(x.dtype)


class Basic(nnx.Module):
    """conv-norm-relu-conv-norm + shortcut, relu. The method ``preactivation`` is the same without the last relu."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, layers: _Layers, zero_init: bool, dropout: float):
        self.conv1, self.norm1 = layers.conv(inputs, width, stride=stride), layers.norm(width)
        self.dropout = nnx.Dropout(dropout, rngs=layers.rngs) if dropout else None
        self.conv2, self.norm2 = layers.conv(width, width), layers.norm(width, zero=zero_init)
        self.shortcut = Shortcut(inputs, width, stride, layers) if stride != 1 or inputs != width else None

    def preactivation(self, x: Array) -> Array:
        y = nnx.relu(_same(self.norm1, self.conv1(x)))
        y = self.dropout(y) if self.dropout is not None else y
        y = _same(self.norm2, self.conv2(y))
        return y + (x if self.shortcut is None else self.shortcut(x))

    def __call__(self, x: Array) -> Array:
        return nnx.relu(self.preactivation(x))


class Bottleneck(nnx.Module):
    """1x1, 3x3 (with the stride), 1x1 to four times the width, + shortcut, relu; ``preactivation`` as in `Basic`."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, *, layers: _Layers, zero_init: bool, dropout: float):
        outputs = width * self.expansion
        self.conv1, self.norm1 = layers.conv(inputs, width, 1), layers.norm(width)
        self.conv2, self.norm2 = layers.conv(width, width, 3, stride), layers.norm(width)
        self.dropout = nnx.Dropout(dropout, rngs=layers.rngs) if dropout else None
        self.conv3, self.norm3 = layers.conv(width, outputs, 1), layers.norm(outputs, zero=zero_init)
        self.shortcut = Shortcut(inputs, outputs, stride, layers) if stride != 1 or inputs != outputs else None

    def preactivation(self, x: Array) -> Array:
        y = nnx.relu(_same(self.norm1, self.conv1(x)))
        y = nnx.relu(_same(self.norm2, self.conv2(y)))
        y = self.dropout(y) if self.dropout is not None else y
        y = _same(self.norm3, self.conv3(y))
        return y + (x if self.shortcut is None else self.shortcut(x))

    def __call__(self, x: Array) -> Array:
        return nnx.relu(self.preactivation(x))


class Wide(nnx.Module):
    """norm-relu-conv, twice, + shortcut: the pre-activation block of wide ResNets (https://arxiv.org/abs/1605.07146)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, *, layers: _Layers, zero_init: bool, dropout: float):
        self.norm1, self.conv1 = layers.norm(inputs), layers.conv(inputs, width, stride=stride)
        self.norm2, self.conv2 = layers.norm(width, zero=zero_init), layers.conv(width, width)
        self.dropout = nnx.Dropout(dropout, rngs=layers.rngs) if dropout else None
        self.shortcut = layers.conv(inputs, width, 1, stride) if stride != 1 or inputs != width else None

    def __call__(self, x: Array) -> Array:
        y = nnx.relu(_same(self.norm1, x))
        # Where the shape changes, the shortcut starts after the activation too.
        x = x if self.shortcut is None else self.shortcut(y)
        y = nnx.relu(_same(self.norm2, self.conv1(y)))
        y = self.dropout(y) if self.dropout is not None else y
        return x + self.conv2(y)


class Shortcut(nnx.Module):
    """1x1 convolution and norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, layers: _Layers):
        self.conv, self.norm = layers.conv(inputs, outputs, 1, stride), layers.norm(outputs)

    def __call__(self, x: Array) -> Array:
        return _same(self.norm, self.conv(x))


class Stem(nnx.Module):
    """From the image to the first feature map; its own norm and relu only where blocks do not begin with theirs."""

    def __init__(self, config: Config, layers: _Layers):
        size, stride = (7, 2) if config.imagenet_stem else (3, 1)
        self.conv = layers.conv(config.channels, config.widths[0], size, stride)
        self.norm = None if config.block is Wide else layers.norm(config.widths[0])
        self.shrink = config.imagenet_stem

    def __call__(self, x: Array) -> Array:
        x = self.conv(x)
        if self.norm is not None:
            x = nnx.relu(_same(self.norm, x))
        return nnx.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.shrink else x


class Stage(nnx.Module):
    """Blocks of one width, one after the other."""

    def __init__(self, blocks: list[Any]):
        self.blocks = nnx.List(blocks)

    def __call__(self, x: Array) -> Array:
        for block in self.blocks:
            x = block(x)
        return x


class Pool(nnx.Module):
    """Mean over height and width; a module so that it can be tapped (the input of the head)."""

    def __call__(self, x: Array) -> Array:
        return x.mean((-3, -2))


class ResNet(nnx.Module):
    """Stem, stages, (final norm of pre-activation blocks), pool, head: ``[batch, height, width, channels]`` to logits."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        layers = _Layers(config.norm, rngs)
        self.stem = Stem(config, layers)
        inputs, stages = config.widths[0], []
        for number, (depth, width) in enumerate(zip(config.depths, config.widths[1:], strict=True)):
            blocks = []
            for position in range(depth):
                stride = 2 if number and not position else 1
                block = config.block(inputs, width, stride, layers=layers, zero_init=config.zero_init, dropout=config.dropout)
                blocks.append(block)
                inputs = width * config.block.expansion
            stages.append(Stage(blocks))
        self.stages = nnx.List(stages)
        self.norm = layers.norm(inputs) if config.block is Wide else None
        self.pool = Pool()
        self.head = nnx.Linear(
            inputs, config.classes, kernel_init=_linear_init, bias_init=_head_bias(config, inputs), rngs=rngs
        )

    def __call__(self, x: Array) -> Array:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        if self.norm is not None:
            x = nnx.relu(_same(self.norm, x))
        return self.head(self.pool(x))


def _head_bias(config: Config, features: int):
    if config.block is Wide:
        return nnx.initializers.zeros_init()
    bound = features**-0.5
    return lambda key, shape, dtype=jnp.float32, **_: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A residual network; see `cifar`, `wrn` and `imagenet` for the published ones.

    Args:
        depths: blocks in each stage; every stage but the first halves height and width.
        widths: channels of the stem, then of each stage (before a block's ``expansion``).
        classes: logits.
        block: `Basic`, `Bottleneck`, `Wide`, or a module class with their constructor.
        norm: `BatchNorm`, `GroupNorm`, `LayerNorm`, or anything with ``build(features, rngs)``.
        imagenet_stem: 7x7 with stride 2 and a max-pool, in place of one 3x3 convolution.
        zero_init: start each residual branch at zero (the scale of its last norm); off in mdistiller and torchvision.
        dropout: within the residual branch (WRN), 0 in distillation papers.
        channels: of the image.
        preprocess: how it wants its images; None: as float 0..1.

    Raises:
        InputError: ``widths`` is not one longer than ``depths``.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int
    block: Any = Basic
    norm: Norm = BatchNorm()
    imagenet_stem: bool = False
    zero_init: bool = False
    dropout: float = 0.0
    channels: int = 3
    preprocess: Preprocess | None = None

    def __post_init__(self):
        if len(self.widths) != len(self.depths) + 1:
            raise InputError(f"resnet widths={self.widths}: give the stem's and one for each of the {len(self.depths)} stages")

    def build(self) -> Model:
        """The Model, holding shapes; ``init(key)`` makes weights."""
        name = f"{'wrn' if self.block is Wide else 'resnet'}{self.layers}"
        model = from_nnx(lambda rngs: ResNet(self, rngs), preprocess=self.preprocess, name=name)
        return dataclasses.replace(model, config=self)

    @property
    def layers(self) -> int:
        """Convolutions and linear maps on the longest path: the number in the name."""
        return sum(self.depths) * (3 if self.block is Bottleneck else 2) + (4 if self.block is Wide else 2)

    @property
    def features(self) -> tuple[str, ...]:
        """Taps of the stem's and every stage's output, after the activation where the block ends with one."""
        return ("stem", *(f"stages/{number}" for number in range(len(self.depths))))

    @property
    def preactivations(self) -> tuple[str, ...]:
        """Taps of the same maps before their activation, as mdistiller's ``preact_feats``."""
        stages = range(len(self.depths))
        if self.block is Wide:
            return ("stem", *(f"stages/{number}/blocks/0/norm1" for number in stages[1:]), "norm")
        return ("stem", *(f"stages/{number}/blocks/{self.depths[number] - 1}:preactivation" for number in stages))


_CIFAR = {f"resnet{depth}": (depth, (16, 16, 32, 64)) for depth in (8, 14, 20, 32, 44, 56, 110)}
_CIFAR |= {f"resnet{depth}x4": (depth, (32, 64, 128, 256)) for depth in (8, 32)}
_IMAGENET = {18: (Basic, (2, 2, 2, 2)), 34: (Basic, (3, 4, 6, 3)), 50: (Bottleneck, (3, 4, 6, 3))}


def cifar(name: str, *, classes: int, **changes: Any) -> Config:
    """``resnet8`` to ``resnet110``, ``resnet8x4``, ``resnet32x4``: the networks of CIFAR distillation tables.

    Raises:
        InputError: no such network.
    """
    if name not in _CIFAR:
        raise InputError(f"resnet.cifar({name!r}): no such network{nearest(name, _CIFAR)}")
    depth, widths = _CIFAR[name]
    given: dict[str, Any] = {"depths": ((depth - 2) // 6,) * 3, "widths": widths, "classes": classes}
    return Config(**given | changes)


def wrn(depth: int, width: int, *, classes: int, **changes: Any) -> Config:
    """Wide ResNet ``WRN-depth-width`` (https://arxiv.org/abs/1605.07146), for example ``wrn(40, 2, classes=100)``.

    Raises:
        InputError: ``depth`` is not ``6 n + 4``.
    """
    if depth < 10 or (depth - 4) % 6:
        raise InputError(f"resnet.wrn(depth={depth}): the depth must be 6n + 4 (10, 16, 22, 28, 34, 40, …)")
    widths = (16, 16 * width, 32 * width, 64 * width)
    given: dict[str, Any] = {"depths": ((depth - 4) // 6,) * 3, "widths": widths, "classes": classes, "block": Wide}
    return Config(**given | changes)


def imagenet(depth: int, *, classes: int = 1000, **changes: Any) -> Config:
    """ResNet-18, 34 or 50 (https://arxiv.org/abs/1512.03385) as in torchvision.

    Raises:
        InputError: another depth.
    """
    if depth not in _IMAGENET:
        raise InputError(f"resnet.imagenet({depth}): there are {', '.join(map(str, _IMAGENET))}")
    block, depths = _IMAGENET[depth]
    given: dict[str, Any] = {"depths": depths, "widths": (64, 64, 128, 256, 512), "classes": classes, "block": block}
    return Config(**given | {"imagenet_stem": True} | changes)
