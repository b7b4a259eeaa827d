"""Dense networks as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from cape.config import ModelSpec
from cape.families.makes import ACTIVATIONS, check_make, draw_make, initialized
from cape.families.registry import DatasetInfo, Family, check_options, pick
from cape.jsonconfig import JsonConfig


@dataclass(frozen=True)
class DenseOptions(JsonConfig):
    """Options of a dense network.

    Attributes:
        widths: units of the hidden layers. norm: ``none``, ``batch`` or ``layer``, before the activation.
        activation, init: names of ``ACTIVATIONS`` and ``INITS``. dropout: after each activation.
    """

    widths: tuple[int, ...]
    norm: str
    activation: str
    init: str
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_make("a dense network", self.activation, self.init, self.dropout)
        check_options(
            "a dense network",
            widths=(list(self.widths), len(self.widths) >= 1 and min(self.widths) >= 1),
            norm=(self.norm, self.norm in ("none", "batch", "layer")),
        )

    @classmethod
    def draw(cls, rng: np.random.Generator) -> DenseOptions:
        """Return one to four layers of 32 to 512 units, half as many from layer to layer in one of three."""
        depth, width, tapered = pick(rng, (1, 2, 2, 3, 3, 4)), pick(rng, (32, 64, 128, 256, 512)), rng.random() < 1 / 3
        return cls(
            tuple(max(16, width >> i) if tapered else width for i in range(depth)),
            pick(rng, ("none", "none", "none", "batch", "layer")),
            *draw_make(rng),
        )


def dense(spec: ModelSpec, options: DenseOptions) -> nn.Module:
    """Return a dense network, [B, d] -> [B, outputs]."""
    norms = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    layers, units = [], spec.input_shape[0]
    for width in options.widths:
        norm = norms[options.norm]
        layers += [nn.Linear(units, width), *([norm(width)] if norm else []), ACTIVATIONS[options.activation]()]
        layers += [nn.Dropout(options.dropout)] if options.dropout else []
        units = width
    return initialized(nn.Sequential(*layers, nn.Linear(units, spec.outputs)), options.init)


class Dense(Family):
    """Dense networks of many makes (``DenseOptions``)."""

    name: ClassVar[str] = "dense"
    layouts: ClassVar[tuple[str, ...]] = ("vector",)
    architectures: ClassVar[tuple[str, ...]] = ("dense",)

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        return self.spec("dense", dataset, DenseOptions.draw(rng))

    def build(self, spec: ModelSpec) -> nn.Module:
        return dense(spec, self.options(spec, {"dense": DenseOptions}))
