"""Plain convolutional networks as people write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cape.config import ModelSpec
from cape.families.lookup import LookupOptions, entry
from cape.families.makes import (
    ACTIVATIONS,
    LABELLED,
    Ordinary,
    OrdinaryOptions,
    TokenOptions,
    check_make,
    draw_make,
    initialized,
)
from cape.families.registry import DatasetInfo, check_options, pick


@dataclass(frozen=True)
class ConvNetOptions(TokenOptions):
    """Options of a plain convolutional network.

    Attributes:
        channels: of the blocks: a convolution, norm, activation, and half the height and width.
        kernel: 3 or 5. pool: what halves them: ``max``, ``avg``, or the ``stride`` of the convolution.
        hidden: units of a dense layer over the flattened maps; 0 for none, where the head sees the maps' means.
        norm: ``none``, ``batch`` or ``group``. activation, init, head: as in ``DenseOptions``. dropout: before
            the head. lookup: the embedding of a model of tokens, whose convolutions are along them.
        widths: of models of tokens: so many tokens do convolutions beside one another see, each with the channels of
            the last block, in the place of blocks (Kim 2014); the layers after them see each channel's largest value.
    """

    LATER: ClassVar[tuple[str, ...]] = (*TokenOptions.LATER, "widths")

    channels: tuple[int, ...]
    kernel: int
    pool: str
    hidden: int
    norm: str
    activation: str
    init: str
    dropout: float = 0.0
    head: str = "init"
    lookup: LookupOptions | None = None
    widths: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_make("a plain convolutional network", self.activation, self.init, self.head, self.dropout)
        check_options(
            "a plain convolutional network",
            channels=(list(self.channels), len(self.channels) >= 1 and min(self.channels) >= 1),
            kernel=(self.kernel, self.kernel in (3, 5)),
            pool=(self.pool, self.pool in ("max", "avg", "stride")),
            hidden=(self.hidden, self.hidden >= 0),
            norm=(self.norm, self.norm in ("none", "batch", "group")),
            lookup=(self.lookup, self.lookup is None or self.lookup.pooled == "none"),
            widths=(
                list(self.widths),
                min(self.widths, default=1) >= 1 and (self.lookup is not None or not self.widths),
            ),
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

    def reading(self, rng: np.random.Generator, dataset: DatasetInfo) -> ConvNetOptions:
        """Draw an embedding, and in half of all draws convolutions beside one another in the place of blocks."""
        made = self.replace(head="init", lookup=LookupOptions.draw(rng, dataset))
        return made.replace(widths=pick(rng, ((), (3, 4, 5))))

    def model(self, spec: ModelSpec) -> nn.Module:
        """Return a plain convolutional network, [B, C, H, W] or of tokens [B, T] -> [B, outputs]."""
        first, channels = entry(self.lookup, spec.layout), spec.input_shape[0]
        layers: list[nn.Module] = []
        if self.lookup is not None and first is not None:
            layers, channels = [first, ChannelsFirst()], self.lookup.dim
        if self.widths:
            branches = [self._block(channels, self.channels[-1], width, 1, 1) for width in self.widths]
            layers, units = [*layers, Beside(branches)], self.channels[-1] * len(self.widths)
        else:
            sizes = spec.input_shape if self.lookup is not None else spec.input_shape[1:]
            for outputs in self.channels:
                strided = self.pool == "stride" and min(sizes) > 1
                layers += self._block(channels, outputs, self.kernel, 2 if strided else 1, len(sizes))
                if strided:
                    sizes = tuple(-(-size // 2) for size in sizes)
                elif min(sizes) > 1:
                    layers, sizes = [*layers, _POOLS[self.pool, len(sizes)](2)], tuple(size // 2 for size in sizes)
                channels = outputs
            units = channels * math.prod(sizes) if self.hidden else channels
            layers += [nn.Flatten()] if self.hidden else [self._mean(len(sizes)), nn.Flatten()]
        if self.hidden:
            layers, units = [*layers, nn.Linear(units, self.hidden), ACTIVATIONS[self.activation]()], self.hidden
        layers += [nn.Dropout(self.dropout)] if self.dropout else []
        return initialized(nn.Sequential(*layers, nn.Linear(units, spec.outputs)), self.init, self.head)

    def _block(self, inputs: int, outputs: int, kernel: int, stride: int, dims: int) -> list[nn.Module]:
        """Return a convolution, norm and activation."""
        convolution, batch_norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
        norms: dict[str, Callable[[int], nn.Module] | None] = {
            "none": None,
            "batch": batch_norm,
            "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
        }
        norm = norms[self.norm]
        layers: list[nn.Module] = [convolution(inputs, outputs, kernel, stride, kernel // 2)]
        return [*layers, *([norm(outputs)] if norm else []), ACTIVATIONS[self.activation]()]

    def _mean(self, dims: int) -> nn.Module:
        """Return what the head sees of maps: their means, along tokens their maxima where these are pooled."""
        if dims == 1:
            return nn.AdaptiveMaxPool1d(1) if self.pool == "max" else nn.AdaptiveAvgPool1d(1)
        return nn.AdaptiveAvgPool2d(1)


_POOLS: dict[tuple[str, int], Callable[[int], nn.Module]] = {
    ("max", 1): nn.MaxPool1d,
    ("avg", 1): nn.AvgPool1d,
    ("max", 2): nn.MaxPool2d,
    ("avg", 2): nn.AvgPool2d,
}


class ChannelsFirst(nn.Module):
    """[B, T, d] -> [B, d, T]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Beside(nn.Module):
    """Blocks beside one another, [B, d, T] -> [B, channels of all]: each channel's largest value."""

    def __init__(self, blocks: Sequence[Sequence[nn.Module]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(*block) for block in blocks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([block(x).amax(2) for block in self.blocks], dim=1)


class ConvNet(Ordinary):
    """Plain convolutional networks of many makes (``ConvNetOptions``)."""

    name: ClassVar[str] = "convnet"
    layouts: ClassVar[tuple[str, ...]] = ("image", "tokens")
    token_tasks: ClassVar[tuple[str, ...]] = LABELLED
    architectures: ClassVar[tuple[str, ...]] = ("convnet",)
    drawn: ClassVar[type[OrdinaryOptions]] = ConvNetOptions
