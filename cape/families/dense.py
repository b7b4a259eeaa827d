"""Dense networks as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from cape.config import ModelSpec
from cape.families.makes import ACTIVATIONS, Ordinary, OrdinaryOptions, check_make, draw_make, initialized
from cape.families.registry import check_options, pick


@dataclass(frozen=True)
class DenseOptions(OrdinaryOptions):
    """Options of a dense network.

    Attributes:
        widths: units of the hidden layers. norm: ``none``, ``batch`` or ``layer``, before the activation.
        activation, init: names of ``ACTIVATIONS`` and ``INITS``. dropout: after each activation.
        head: starts like the other layers (``init``) or at ``zero``.
    """

    widths: tuple[int, ...]
    norm: str
    activation: str
    init: str
    dropout: float = 0.0
    head: str = "init"

    def __post_init__(self) -> None:
        check_make("a dense network", self.activation, self.init, self.head, self.dropout)
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

    def model(self, spec: ModelSpec) -> nn.Module:
        """Return a dense network, [B, d] -> [B, outputs]."""
        norms = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        layers, units = [], spec.input_shape[0]
        for width in self.widths:
            norm = norms[self.norm]
            layers += [nn.Linear(units, width), *([norm(width)] if norm else []), ACTIVATIONS[self.activation]()]
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            units = width
        return initialized(nn.Sequential(*layers, nn.Linear(units, spec.outputs)), self.init, self.head)


class Dense(Ordinary):
    """Dense networks of many makes (``DenseOptions``)."""

    name: ClassVar[str] = "dense"
    layouts: ClassVar[tuple[str, ...]] = ("vector",)
    architectures: ClassVar[tuple[str, ...]] = ("dense",)
    drawn: ClassVar[type[OrdinaryOptions]] = DenseOptions
