"""Convolutional networks for 3x32x32 images: VGG-like stacks, small ResNets, small MobileNetV2s."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cape.config import ModelSpec
from cape.errors import SpecError
from cape.families.registry import DatasetInfo, Family, check_options, pick
from cape.jsonconfig import JsonConfig

MAX_PARAMETERS = 2_000_000
WEIGHTS = {"vgg": 0.50, "resnet": 0.35, "mobilenetv2": 0.15}


def _check_stages(what: str, repeats: tuple[int, ...], dropout: float) -> None:
    check_options(
        what,
        repeats=(list(repeats), len(repeats) == 3 and min(repeats) >= 1),
        dropout=(dropout, 0.0 <= dropout < 1.0),
    )


@dataclass(frozen=True)
class VGGOptions(JsonConfig):
    """Options of a VGG: channels and 3x3 convolutions of each of the three stages.

    The second and third stage open with a stride of 2; with ``pool`` a 2x2 max-pool also follows the first two.
    """

    channels: tuple[int, ...]
    repeats: tuple[int, ...]
    pool: bool
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_stages("a vgg", self.repeats, self.dropout)
        check_options("a vgg", channels=(list(self.channels), len(self.channels) == 3 and min(self.channels) >= 1))


@dataclass(frozen=True)
class ResNetOptions(JsonConfig):
    """Options of a ResNet: channels of the first stage (doubled by each next), basic blocks of each stage."""

    base: int
    repeats: tuple[int, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_stages("a resnet", self.repeats, self.dropout)
        check_options("a resnet", base=(self.base, self.base >= 1))


@dataclass(frozen=True)
class MobileNetV2Options(JsonConfig):
    """Options of a MobileNetV2.

    Attributes:
        width: multiplier of all channels (at least 8 remain).
        stem: channels of the first convolution before the multiplier.
        repeats: inverted residuals in the three stages that follow the first one.
        dropout: before the head.
    """

    width: float
    stem: int
    repeats: tuple[int, ...]
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_stages("a mobilenetv2", self.repeats, self.dropout)
        check_options("a mobilenetv2", width=(self.width, self.width > 0), stem=(self.stem, self.stem >= 1))


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (projected where the shape changes), ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_conv_bn(inputs, outputs, 3, stride), nn.ReLU(), *_conv_bn(outputs, outputs, 3))
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_bn(inputs, outputs, 1, stride))
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.body(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand (1x1), filter each channel (3x3), project (1x1); a residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers: list[nn.Module] = []
        if expansion != 1:
            layers += [*_conv_bn(inputs, hidden, 1), nn.ReLU6()]
        layers += [*_conv_bn(hidden, hidden, 3, stride, groups=hidden), nn.ReLU6(), *_conv_bn(hidden, outputs, 1)]
        self.body = nn.Sequential(*layers)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


def _head(channels: int, outputs: int, dropout: float) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(channels, outputs)]


def _vgg(channels: int, outputs: int, options: VGGOptions) -> nn.Module:
    layers: list[nn.Module] = []
    for stage, (width, repeats) in enumerate(zip(options.channels, options.repeats, strict=True)):
        for i in range(repeats):
            layers += [*_conv_bn(channels, width, 3, 2 if stage > 0 and i == 0 else 1), nn.ReLU()]
            channels = width
        if options.pool and stage < 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, *_head(channels, outputs, options.dropout))


def _resnet(channels: int, outputs: int, options: ResNetOptions) -> nn.Module:
    layers: list[nn.Module] = [*_conv_bn(channels, options.base, 3), nn.ReLU()]
    channels = options.base
    for stage, repeats in enumerate(options.repeats):
        width = options.base * 2**stage
        for i in range(repeats):
            layers.append(BasicBlock(channels, width, 2 if stage > 0 and i == 0 else 1))
            channels = width
    return nn.Sequential(*layers, *_head(channels, outputs, options.dropout))


def _mobilenetv2(channels: int, outputs: int, options: MobileNetV2Options) -> nn.Module:
    def scaled(width: int) -> int:
        return max(8, int(width * options.width))

    layers: list[nn.Module] = [*_conv_bn(channels, scaled(options.stem), 3), nn.ReLU6()]
    channels = scaled(options.stem)
    stages = zip((1, 6, 6, 6), (16, 24, 32, 64), (1, *options.repeats), (1, 2, 2, 2), strict=True)
    for expansion, width, repeats, stride in stages:
        for i in range(repeats):
            layers.append(InvertedResidual(channels, scaled(width), stride if i == 0 else 1, expansion))
            channels = scaled(width)
    return nn.Sequential(*layers, *_head(channels, outputs, options.dropout))


class CNN(Family):
    """VGG, ResNet or MobileNetV2, drawn .50/.35/.15; drawn again while it has more than 2 million parameters.

    Gray images get narrower stages. The drawn presets are those of the authors' generator, which strides *and*
    max-pools in the VGG for gray images.
    """

    name: ClassVar[str] = "cnn"
    layouts: ClassVar[tuple[str, ...]] = ("image",)
    architectures: ClassVar[tuple[str, ...]] = tuple(WEIGHTS)

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        for _ in range(200):
            spec = self._draw(rng, dataset)
            if _parameters(spec.to_json()) <= MAX_PARAMETERS:
                return spec
        raise SpecError(
            f"No CNN with {dataset.outputs} outputs stays within {MAX_PARAMETERS:,} parameters; use another family."
        )

    def _draw(self, rng: np.random.Generator, dataset: DatasetInfo) -> ModelSpec:
        architecture = str(rng.choice(self.architectures, p=list(WEIGHTS.values())))
        gray = dataset.gray
        dropout = pick(rng, (0.0, 0.1))
        options: JsonConfig
        if architecture == "vgg":
            channels = (32, 64, 128) if gray else (64, 128, 256)
            options = VGGOptions(channels, pick(rng, ((1, 1, 1), (2, 1, 1), (2, 2, 1))), gray, dropout)
        elif architecture == "resnet":
            options = ResNetOptions(32 if gray else 64, pick(rng, ((1, 1, 1), (2, 2, 2))), dropout)
        else:
            stem, repeats = (16, (2, 2, 2)) if gray else (32, (2, 3, 3))
            options = MobileNetV2Options(pick(rng, (0.5, 0.75)), stem, repeats, dropout)
        return self.spec(architecture, dataset, options)

    def build(self, spec: ModelSpec) -> nn.Module:
        options = self.options(spec, _OPTIONS)
        channels = spec.input_shape[0]
        if isinstance(options, VGGOptions):
            return _vgg(channels, spec.outputs, options)
        if isinstance(options, ResNetOptions):
            return _resnet(channels, spec.outputs, options)
        assert isinstance(options, MobileNetV2Options)
        return _mobilenetv2(channels, spec.outputs, options)


_OPTIONS: dict[str, type[JsonConfig]] = {"vgg": VGGOptions, "resnet": ResNetOptions, "mobilenetv2": MobileNetV2Options}


@lru_cache(maxsize=1024)
def _parameters(spec_json: str) -> int:
    """Return the number of parameters of a CNN; on the meta device no memory and no random numbers are used."""
    with torch.device("meta"):
        model = CNN().build(ModelSpec.from_json(spec_json))
    return sum(p.numel() for p in model.parameters())
