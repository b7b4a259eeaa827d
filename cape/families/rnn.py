"""Recurrent networks: LSTM or GRU over the rows of an image (or vector), or over embedded tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from cape.config import ModelSpec
from cape.errors import SpecError
from cape.families.registry import DatasetInfo, Family, check_options, pick
from cape.jsonconfig import JsonConfig


@dataclass(frozen=True)
class RNNOptions(JsonConfig):
    """Options of a recurrent network.

    Attributes:
        layers: number of stacked recurrent layers.
        hidden: units of each direction of a layer.
        bidirectional: read the rows in both directions (never for sequences, which it would let cheat).
        embedding: size of a token's embedding; ``None`` for rows.
    """

    layers: int
    hidden: int
    bidirectional: bool = False
    embedding: int | None = None

    def __post_init__(self) -> None:
        check_options(
            "a recurrent network",
            layers=(self.layers, self.layers >= 1),
            hidden=(self.hidden, self.hidden >= 1),
            embedding=(self.embedding, self.embedding is None or self.embedding >= 1),
        )


class RecurrentNet(nn.Module):
    """``rows`` [B, T, d] -> [B, outputs] from the last position, or ``tokens`` [B, T] -> [B, T, outputs]."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU], spec: ModelSpec, options: RNNOptions) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.outputs, options.embedding) if options.embedding else None
        self.rnn = cell(
            input_size=options.embedding or spec.input_shape[1],
            hidden_size=options.hidden,
            num_layers=options.layers,
            batch_first=True,
            bidirectional=options.bidirectional,
        )
        self.head = nn.Linear(options.hidden * (2 if options.bidirectional else 1), spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            return self.head(self.rnn(self.embedding(x))[0])
        return self.head(self.rnn(x)[0][:, -1])


class RNN(Family):
    """LSTM or GRU, layers 1-3, hidden {128, 256, 512}, bidirectional or not.

    As in the authors' generator, the head sees the outputs at the last row: of the backward direction that is its
    first step. For sequences the cell is never bidirectional, and an embedding of 64 or 128 comes first.
    """

    name: ClassVar[str] = "rnn"
    layouts: ClassVar[tuple[str, ...]] = ("rows", "tokens")
    architectures: ClassVar[tuple[str, ...]] = ("lstm", "gru")
    token_tasks: ClassVar[tuple[str, ...]] = ("sequence",)

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        architecture = pick(rng, self.architectures)
        hidden, layers = pick(rng, (128, 256, 512)), pick(rng, (1, 2, 3))
        if self.layout_for(dataset) == "tokens":
            options = RNNOptions(layers, hidden, embedding=pick(rng, (64, 128)))
        else:
            options = RNNOptions(layers, hidden, bidirectional=pick(rng, (False, True)))
        return self.spec(architecture, dataset, options)

    def build(self, spec: ModelSpec) -> nn.Module:
        options = self.options(spec, {"lstm": RNNOptions, "gru": RNNOptions})
        if (options.embedding is not None) != (spec.layout == "tokens"):
            raise SpecError("A recurrent network has an embedding if and only if it takes tokens.")
        if options.bidirectional and spec.task == "sequence":
            raise SpecError("A bidirectional network sees the next token; a sequence model cannot be bidirectional.")
        return RecurrentNet(nn.LSTM if spec.architecture == "lstm" else nn.GRU, spec, options)
