"""Recurrent networks as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from cape.config import ModelSpec
from cape.families.lookup import LookupOptions, entry
from cape.families.makes import DROPOUTS, Ordinary, OrdinaryOptions, TokenOptions, check_make, initialized
from cape.families.registry import DatasetInfo, check_options, pick

CELLS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@dataclass(frozen=True)
class RecurrentOptions(TokenOptions):
    """Options of a recurrent network over rows or tokens.

    Attributes:
        cell: ``lstm``, ``gru`` or ``rnn`` (tanh). layers, hidden, bidirectional: torch's.
        readout: what the head sees: the ``last`` row's output, the ``mean`` or ``max`` over all rows, the final
            ``state`` of each direction, or ``each`` row's output (sequences, which one direction alone may read).
        init, head: as in ``DenseOptions``. dropout: between layers and before the head. lookup: the embedding of a
            model of tokens.
    """

    cell: str
    layers: int
    hidden: int
    bidirectional: bool
    readout: str
    init: str
    dropout: float = 0.0
    head: str = "init"
    lookup: LookupOptions | None = None

    def __post_init__(self) -> None:
        check_make("a recurrent network", "tanh", self.init, self.head, self.dropout)
        check_options(
            "a recurrent network",
            cell=(self.cell, self.cell in CELLS),
            layers=(self.layers, self.layers >= 1),
            hidden=(self.hidden, self.hidden >= 1),
            readout=(self.readout, self.readout in ("last", "mean", "max", "state", "each")),
            bidirectional=(self.bidirectional, not (self.bidirectional and self.readout == "each")),
            lookup=(self.lookup, self.lookup is None or self.lookup.pooled == "none"),
        )

    @classmethod
    def draw(cls, rng: np.random.Generator) -> RecurrentOptions:
        """Return one to three layers of 32 to 256 units."""
        return cls(
            pick(rng, ("lstm", "lstm", "gru", "gru", "rnn")),
            pick(rng, (1, 1, 1, 2, 2, 3)),
            pick(rng, (32, 64, 128, 256)),
            pick(rng, (False, True)),
            pick(rng, ("last", "mean", "max", "state")),
            pick(rng, ("torch", "torch", "torch", "xavier_uniform", "orthogonal")),
            pick(rng, DROPOUTS),
        )

    def reading(self, rng: np.random.Generator, dataset: DatasetInfo) -> RecurrentOptions:
        """Draw an embedding; of sequences the head reads each output, and nothing looks back."""
        made = self.replace(head="init", lookup=LookupOptions.draw(rng, dataset))
        return made.replace(bidirectional=False, readout="each") if dataset.task == "sequence" else made

    def model(self, spec: ModelSpec) -> nn.Module:
        """Return a ``RecurrentReader``."""
        check_options(
            "a recurrent network", readout=(self.readout, (self.readout == "each") == (spec.task == "sequence"))
        )
        return initialized(RecurrentReader(spec, self), self.init, self.head)


class RecurrentReader(nn.Module):
    """Rows [B, T, d] or tokens [B, T] -> [B, outputs], or [B, T, outputs] of sequences, through a recurrent network."""

    def __init__(self, spec: ModelSpec, options: RecurrentOptions) -> None:
        super().__init__()
        self.lookup = entry(options.lookup, spec.layout)
        self.rnn = CELLS[options.cell](
            options.lookup.dim if options.lookup else spec.input_shape[1],  # type: ignore[arg-type]  # torch's base class names its mode first
            options.hidden,
            options.layers,
            batch_first=True,
            bidirectional=options.bidirectional,
            dropout=options.dropout if options.layers > 1 else 0.0,
        )
        self.directions, self.readout = 1 + options.bidirectional, options.readout
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(self.directions * options.hidden, spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.rnn(x if self.lookup is None else self.lookup(x))
        if self.readout == "state":
            final = state[0] if isinstance(state, tuple) else state
            seen = final[-self.directions :].transpose(0, 1).flatten(1)
        elif self.readout == "last":
            seen = outputs[:, -1]
        elif self.readout == "each":
            seen = outputs
        else:
            seen = outputs.mean(1) if self.readout == "mean" else outputs.amax(1)
        return self.head(self.dropout(seen))


class Recurrent(Ordinary):
    """Recurrent networks over rows or tokens, of many makes (``RecurrentOptions``)."""

    name: ClassVar[str] = "recurrent"
    layouts: ClassVar[tuple[str, ...]] = ("rows", "tokens")
    architectures: ClassVar[tuple[str, ...]] = ("recurrent",)
    drawn: ClassVar[type[OrdinaryOptions]] = RecurrentOptions
