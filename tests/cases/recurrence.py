"""Recurrent networks, cells and language models."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from tests.cases.base import CASES, Batch, Case, case, labels, sequences


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.body = kind(12, 8, **options)
        self.head = nn.Linear(16 if options.get("bidirectional") else 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x if self.body.batch_first else x.transpose(0, 1))[0]
        return self.head(out[:, -1] if self.body.batch_first else out[-1])


for _kind in (nn.LSTM, nn.GRU, nn.RNN):
    for _options in (
        {"batch_first": True},
        {"num_layers": 2, "bidirectional": True},
        {"num_layers": 3, "batch_first": True, "bias": False},
    ):
        CASES.append(
            Case(
                f"{_kind.__name__} {' '.join(_options)}",
                lambda kind=_kind, options=_options: (Recurrent(kind, **options), (sequences(), labels(5))),  # type: ignore[misc]
            )
        )


class _Cell(nn.Module):
    def __init__(self, kind: type[nn.RNNCellBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(12, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


for _cell in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
    CASES.append(Case(_cell.__name__, lambda kind=_cell: (_Cell(kind), (sequences(), labels(5)))))  # type: ignore[misc]


class _FromZeros(nn.Module):
    """A recurrence written by hand: every sample's first state is the same, and no data."""

    def __init__(self, learned: bool, by_product: bool) -> None:
        super().__init__()
        self.inputs, self.state, self.head = nn.Linear(12, 8), nn.Linear(8, 8, bias=not by_product), nn.Linear(8, 10)
        self.first = nn.Parameter(torch.randn(8)) if learned else None
        self.by_product = by_product

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 8) if self.first is None else self.first.expand(len(x), -1)
        for t in range(x.shape[1]):
            h = (self.inputs(x[:, t]) + (h @ self.state.weight.T if self.by_product else self.state(h))).tanh()
        return self.head(h)


for _learned in (False, True):
    for _by_product in (False, True):
        _name = f"a cell from {'a learned state' if _learned else 'zeros'}{', by a product' if _by_product else ''}"
        case(_name)(lambda a=_learned, b=_by_product: (_FromZeros(a, b), (sequences(), labels(5))))


class _FirstState(nn.Module):
    """A learned initial state, and hidden states projected to a smaller size."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.h0 = nn.GRU(12, 8, batch_first=True), nn.Parameter(torch.randn(1, 1, 8))
        self.lstm, self.head = nn.LSTM(8, 8, proj_size=5, batch_first=True), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        states = self.gru(x, self.h0.expand(-1, len(x), -1).contiguous())[0]
        return self.head(self.lstm(states)[0][:, -1])


@case("learned first state", intercepted=False)
def _first_state() -> tuple[nn.Module, Batch]:
    return _FirstState(), (sequences(), labels(5))


class _Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(12, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.body(packed)[1][-1])


@case("packed sequence takes the fallback", intercepted=False)
def _packed() -> tuple[nn.Module, Batch]:
    return _Packed(), ((sequences(), torch.tensor([7, 3, 5, 2, 6])), labels(5))


class _Language(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12, padding_idx=3)
        self.body, self.head = nn.GRU(12, 12, batch_first=True), nn.Linear(12, 30)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.table(x))[0])


@case("language model", loss="sequence_cross_entropy")
def _language() -> tuple[nn.Module, Batch]:
    tokens = torch.randint(0, 30, (5, 9))
    return _Language(False), (tokens, tokens.roll(1, 1))


@case("language model with tied table", loss="sequence_cross_entropy")
def _tied() -> tuple[nn.Module, Batch]:
    tokens = torch.randint(0, 30, (5, 9))
    return _Language(True), (tokens, tokens.roll(1, 1))


@case("embedding bag")
def _bag() -> tuple[nn.Module, Batch]:
    return nn.Sequential(nn.EmbeddingBag(30, 12), nn.Linear(12, 10)), (torch.randint(0, 30, (5, 9)), labels(5))


class _State(nn.Module):
    """A learned first state, in the ways that people write it."""

    def __init__(self, how: str, layers: int) -> None:
        super().__init__()
        self.how = how
        self.body, self.head = nn.LSTM(12, 8, layers, batch_first=True), nn.Linear(8, 10)
        self.h, self.c = (nn.Parameter(torch.randn(layers, 1, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        states = (p.expand(-1, len(x), -1) for p in (self.h, self.c))
        if self.how == "contiguous":
            states = (p.contiguous() for p in states)
        elif self.how == "repeated":
            states = (p.repeat(1, len(x), 1) for p in (self.h, self.c))
        return self.head(self.body(x, tuple(states))[0].mean(1))


for _how in ("expanded", "contiguous", "repeated"):

    @case(f"first state {_how}")
    def _state(how: str = _how) -> tuple[nn.Module, Batch]:
        return _State(how, 2 if how == "repeated" else 1), (sequences(), labels(5))


class _CellState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.first, self.head = nn.LSTMCell(12, 8), nn.Parameter(torch.randn(2, 1, 8)), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.first.expand(-1, len(x), -1)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        return self.head(h)


@case("first state of a cell")
def _cell_state() -> tuple[nn.Module, Batch]:
    return _CellState(), (sequences(), labels(5))


@case("sequence of one step")
def _one_step() -> tuple[nn.Module, Batch]:
    return Recurrent(nn.GRU), (sequences(5, 1), labels(5))


@case(
    "projected LSTM", fallback=[f"body.{n}_l0" for n in ("bias_hh", "bias_ih", "weight_hh", "weight_hr", "weight_ih")]
)
def _projected() -> tuple[nn.Module, Batch]:
    model = Recurrent(nn.LSTM, proj_size=5)
    model.head = nn.Linear(5, 10)
    return model, (sequences(), labels(5))


@case("bags", fallback=["1.weight", "2.weight"])
def _bags() -> tuple[nn.Module, Batch]:
    class Bags(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            plain, largest, padded, summed, head = self
            return head(plain(x) * 0.5 + largest(x) + padded(x) + summed(x))

    bags = [nn.EmbeddingBag(30, 12), nn.EmbeddingBag(30, 12, mode="max"), nn.EmbeddingBag(30, 12, padding_idx=0)]
    last = nn.EmbeddingBag(30, 12, mode="sum", padding_idx=3)
    return Bags([*bags, last, nn.Linear(12, 10)]), (torch.randint(0, 30, (5, 9)), labels(5))
