"""Multi-layer perceptrons: blocks of Linear, BatchNorm, activation and dropout, and a linear head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from cape.config import ModelSpec
from cape.families.registry import DatasetInfo, Family, check_options, pick
from cape.jsonconfig import JsonConfig
from cape.randoms import normal_


@dataclass(frozen=True)
class MLPOptions(JsonConfig):
    """Options of an MLP.

    Attributes:
        depth: number of hidden layers.
        width: units of each.
        activation: ``gelu`` (Xavier normal weights) or ``relu`` (Kaiming normal weights).
        dropout: probability after each activation.
    """

    depth: int
    width: int
    activation: str
    dropout: float = 0.2

    def __post_init__(self) -> None:
        check_options(
            "an MLP",
            depth=(self.depth, self.depth >= 1),
            width=(self.width, self.width >= 1),
            activation=(self.activation, self.activation in ("gelu", "relu")),
            dropout=(self.dropout, 0.0 <= self.dropout < 1.0),
        )


class MLP(Family):
    """Depth 2-4, width {128, 256, 512, 1024}; gray images: depth {2, 3}, width up to 512.

    The authors' generators use GELU only, and no width of 128 for colour images (``reference=True``).
    """

    name: ClassVar[str] = "mlp"
    layouts: ClassVar[tuple[str, ...]] = ("vector",)
    architectures: ClassVar[tuple[str, ...]] = ("mlp",)

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        depths: tuple[int, ...] = (2, 3) if dataset.gray else (2, 3, 4)
        widths: tuple[int, ...] = (128, 256, 512) if dataset.gray else (128, 256, 512, 1024)
        if reference and not dataset.gray:
            widths = (256, 512, 1024)
        activations = ("gelu",) if reference else ("gelu", "relu")
        options = MLPOptions(pick(rng, depths), pick(rng, widths), pick(rng, activations))
        return self.spec("mlp", dataset, options)

    def build(self, spec: ModelSpec) -> nn.Module:
        options = self.options(spec, {"mlp": MLPOptions})
        layers: list[nn.Module] = []
        units = spec.input_shape[0]
        for _ in range(options.depth):
            activation = nn.GELU() if options.activation == "gelu" else nn.ReLU()
            layers += [_linear(units, options.width), nn.BatchNorm1d(options.width), activation]
            layers.append(nn.Dropout(options.dropout))
            units = options.width
        layers.append(_linear(units, spec.outputs))
        for layer in layers:
            if isinstance(layer, nn.Linear):
                normal_(layer.weight, _deviation(layer, options.activation))
                nn.init.zeros_(layer.bias)
        return nn.Sequential(*layers)


def _deviation(layer: nn.Linear, activation: str) -> float:
    """Return the deviation of ``nn.init.xavier_normal_`` (GELU) or ``kaiming_normal_`` (ReLU)."""
    if activation == "gelu":
        return math.sqrt(2.0 / float(layer.in_features + layer.out_features))
    return math.sqrt(2.0) / math.sqrt(layer.in_features)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a layer without values: torch's own initialization would cost as much as ours, which replaces it."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    return layer
