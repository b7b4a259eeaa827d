"""Recurrent networks as people write them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from cape.config import ModelSpec
from cape.families.makes import DROPOUTS, Ordinary, OrdinaryOptions, check_make, initialized
from cape.families.registry import check_options, pick

CELLS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


@dataclass(frozen=True)
class RecurrentOptions(OrdinaryOptions):
    """Options of a recurrent network over rows.

    Attributes:
        cell: ``lstm``, ``gru`` or ``rnn`` (tanh). layers, hidden, bidirectional: torch's.
        readout: what the head sees: the ``last`` row's output, the ``mean`` or ``max`` over all rows, or the final
            ``state`` of each direction.
        init, head: as in ``DenseOptions``. dropout: between layers and before the head.
    """

    cell: str
    layers: int
    hidden: int
    bidirectional: bool
    readout: str
    init: str
    dropout: float = 0.0
    head: str = "init"

    def __post_init__(self) -> None:
        check_make("a recurrent network", "tanh", self.init, self.head, self.dropout)
        check_options(
            "a recurrent network",
            cell=(self.cell, self.cell in CELLS),
            layers=(self.layers, self.layers >= 1),
            hidden=(self.hidden, self.hidden >= 1),
            readout=(self.readout, self.readout in ("last", "mean", "max", "state")),
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

    def model(self, spec: ModelSpec) -> nn.Module:
        """Return a ``RecurrentReader``."""
        return initialized(RecurrentReader(spec, self), self.init, self.head)


class RecurrentReader(nn.Module):
    """A recurrent network over rows, [B, T, d] -> [B, outputs]."""

    def __init__(self, spec: ModelSpec, options: RecurrentOptions) -> None:
        super().__init__()
        self.rnn = CELLS[options.cell](
            spec.input_shape[1],  # type: ignore[arg-type]  # torch's base class names its mode first
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
        outputs, state = self.rnn(x)
        if self.readout == "state":
            final = state[0] if isinstance(state, tuple) else state
            seen = final[-self.directions :].transpose(0, 1).flatten(1)
        elif self.readout == "last":
            seen = outputs[:, -1]
        else:
            seen = outputs.mean(1) if self.readout == "mean" else outputs.amax(1)
        return self.head(self.dropout(seen))


class Recurrent(Ordinary):
    """Recurrent networks over rows, of many makes (``RecurrentOptions``)."""

    name: ClassVar[str] = "recurrent"
    layouts: ClassVar[tuple[str, ...]] = ("rows",)
    architectures: ClassVar[tuple[str, ...]] = ("recurrent",)
    drawn: ClassVar[type[OrdinaryOptions]] = RecurrentOptions
