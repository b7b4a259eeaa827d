"""Dense networks as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

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
class DenseOptions(TokenOptions):
    """Options of a dense network.

    Attributes:
        widths: units of the hidden layers. norm: ``none``, ``batch`` or ``layer``, before the activation.
        activation, init: names of ``ACTIVATIONS`` and ``INITS``. dropout: after each activation.
        head: starts like the other layers (``init``) or at ``zero``. lookup: the embedding of a model of tokens.
    """

    widths: tuple[int, ...]
    norm: str
    activation: str
    init: str
    dropout: float = 0.0
    head: str = "init"
    lookup: LookupOptions | None = None

    def __post_init__(self) -> None:
        check_make("a dense network", self.activation, self.init, self.head, self.dropout)
        check_options(
            "a dense network",
            widths=(list(self.widths), len(self.widths) >= 1 and min(self.widths) >= 1),
            norm=(self.norm, self.norm in ("none", "batch", "layer")),
            lookup=(self.lookup, self.lookup is None or self.lookup.pooled != "none"),
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

    def reading(self, rng: np.random.Generator, dataset: DatasetInfo) -> DenseOptions:
        """Draw an embedding, and whether the layers see the mean of a text's words, their largest, or all.

        All words are of 32 numbers at most: of more, the first layer would be most of what there is to train.
        """
        lookup, pooled = LookupOptions.draw(rng, dataset), pick(rng, ("mean", "mean", "max", "flat"))
        dim = min(lookup.dim, 32) if pooled == "flat" else lookup.dim
        return self.replace(head="init", lookup=lookup.replace(pooled=pooled, dim=dim))

    def model(self, spec: ModelSpec) -> nn.Module:
        """Return a dense network, [B, d] -> [B, outputs], or of tokens, [B, T] -> [B, outputs]."""
        norms = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
        first, units = entry(self.lookup, spec.layout), spec.input_shape[0]
        layers: list[nn.Module] = [] if first is None else [first]
        if self.lookup is not None:
            units = self.lookup.dim * (units if self.lookup.pooled == "flat" else 1)
        for width in self.widths:
            norm = norms[self.norm]
            layers += [nn.Linear(units, width), *([norm(width)] if norm else []), ACTIVATIONS[self.activation]()]
            layers += [nn.Dropout(self.dropout)] if self.dropout else []
            units = width
        return initialized(nn.Sequential(*layers, nn.Linear(units, spec.outputs)), self.init, self.head)


class Dense(Ordinary):
    """Dense networks of many makes (``DenseOptions``)."""

    name: ClassVar[str] = "dense"
    layouts: ClassVar[tuple[str, ...]] = ("vector", "tokens")
    token_tasks: ClassVar[tuple[str, ...]] = LABELLED
    architectures: ClassVar[tuple[str, ...]] = ("dense",)
    drawn: ClassVar[type[OrdinaryOptions]] = DenseOptions
