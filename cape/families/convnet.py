"""Plain convolutional networks as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from cape.config import ModelSpec
from cape.families.makes import ACTIVATIONS, Ordinary, OrdinaryOptions, check_make, draw_make, initialized
from cape.families.registry import check_options, pick


@dataclass(frozen=True)
class ConvNetOptions(OrdinaryOptions):
    """Options of a plain convolutional network.

    Attributes:
        channels: of the blocks: a convolution, norm, activation, and half the height and width.
        kernel: 3 or 5. pool: what halves them: ``max``, ``avg``, or the ``stride`` of the convolution.
        hidden: units of a dense layer over the flattened maps; 0 for none, where the head sees the maps' means.
        norm: ``none``, ``batch`` or ``group``. activation, init, head: as in ``DenseOptions``. dropout: before
            the head.
    """

    channels: tuple[int, ...]
    kernel: int
    pool: str
    hidden: int
    norm: str
    activation: str
    init: str
    dropout: float = 0.0
    head: str = "init"

    def __post_init__(self) -> None:
        check_make("a plain convolutional network", self.activation, self.init, self.head, self.dropout)
        check_options(
            "a plain convolutional network",
            channels=(list(self.channels), len(self.channels) >= 1 and min(self.channels) >= 1),
            kernel=(self.kernel, self.kernel in (3, 5)),
            pool=(self.pool, self.pool in ("max", "avg", "stride")),
            hidden=(self.hidden, self.hidden >= 0),
            norm=(self.norm, self.norm in ("none", "batch", "group")),
        )

    @classmethod
    def draw(cls, rng: np.random.Generator) -> ConvNetOptions:
        """Return two to four blocks, of 8, 16 or 32 channels and twice as many from block to block (128 at most)."""
        first, blocks = pick(rng, (8, 16, 32)), pick(rng, (2, 2, 3, 3, 4))
        return cls(
            tuple(min(128, first << i) for i in range(blocks)),
            pick(rng, (3, 3, 5)),
            pick(rng, ("max", "max", "avg", "stride")),
            pick(rng, (0, 64, 128, 256)),
            pick(rng, ("none", "none", "batch", "batch", "group")),
            *draw_make(rng),
        )

    def model(self, spec: ModelSpec) -> nn.Module:
        """Return a plain convolutional network, [B, C, H, W] -> [B, outputs]."""
        norms: dict[str, Callable[[int], nn.Module] | None] = {
            "none": None,
            "batch": nn.BatchNorm2d,
            "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
        }
        pools = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
        channels, height, width = spec.input_shape
        layers: list[nn.Module] = []
        for outputs in self.channels:
            strided, norm = self.pool == "stride" and min(height, width) > 1, norms[self.norm]
            padding = self.kernel // 2
            layers += [nn.Conv2d(channels, outputs, self.kernel, 2 if strided else 1, padding)]
            layers += [*([norm(outputs)] if norm else []), ACTIVATIONS[self.activation]()]
            if strided:
                height, width = -(-height // 2), -(-width // 2)
            elif min(height, width) > 1:
                layers, height, width = [*layers, pools[self.pool](2)], height // 2, width // 2
            channels = outputs
        if self.hidden:
            layers += [nn.Flatten(), nn.Linear(channels * height * width, self.hidden)]
            layers += [ACTIVATIONS[self.activation]()]
            channels = self.hidden
        else:
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        layers += [nn.Dropout(self.dropout)] if self.dropout else []
        return initialized(nn.Sequential(*layers, nn.Linear(channels, spec.outputs)), self.init, self.head)


class ConvNet(Ordinary):
    """Plain convolutional networks of many makes (``ConvNetOptions``)."""

    name: ClassVar[str] = "convnet"
    layouts: ClassVar[tuple[str, ...]] = ("image",)
    architectures: ClassVar[tuple[str, ...]] = ("convnet",)
    drawn: ClassVar[type[OrdinaryOptions]] = ConvNetOptions
