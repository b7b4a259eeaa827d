"""What of a batch's inputs is a sample's and what is shared by all: told once, by the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cape
from cape.errors import ModelError
from cape.probing.reference import per_sample_norms_reference
from cape.samples import Samples
from tests.cases.base import Functional, weight


def test_a_piece_keeps_what_is_shared() -> None:
    batch = {"x": torch.arange(12.0).view(4, 3), "pair": (torch.arange(4), torch.ones(2, 3)), "scalar": torch.tensor(4)}
    samples = Samples.of(batch, 4)
    assert len(samples) == 4 and [len(t) for t in samples.tensors()] == [4, 4]
    for index in (slice(1, 3), torch.tensor([1, 2])):
        piece = samples.take(index)  # as long as what is shared
        assert len(piece) == 2 and [len(t) for t in piece.tensors()] == [2, 2]
        twice = piece.take(torch.tensor([1, 1, 0]))
        assert twice.inputs["x"].tolist() == [[6, 7, 8], [6, 7, 8], [3, 4, 5]]
        assert twice.inputs["pair"][0].tolist() == [2, 2, 1]
        assert twice.inputs["pair"][1] is batch["pair"][1] and twice.inputs["scalar"] is batch["scalar"]


def _close(model: nn.Module, batch: Any, loss: Any = "cross_entropy", **settings: Any) -> None:
    ours = cape.per_sample_norms(model, batch, loss=loss, **settings)
    for a, r in zip(ours, per_sample_norms_reference(model, batch, loss=loss), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-10, atol=0.0)


def _graph(m: nn.Module, x: Tensor, adjacency: Tensor) -> Tensor:
    return m.head((adjacency @ m.body(x)).relu().mean(1))


def _edges(m: nn.Module, x: Tensor, ends: Tensor) -> Tensor:
    values = m.body(x)
    return m.head(torch.zeros_like(values).index_add(1, ends[1], values[:, ends[0]]).relu().mean(1))


def _diagonal(m: nn.Module, x: Tensor, table: Tensor) -> Tensor:
    """A model of which one weight takes the slow way."""
    z = m.body(x).mean(1)
    return m.head((z + table.sum(0)) * torch.einsum("bi,ii->bi", z, m.w))


@pytest.mark.parametrize(
    ("forward", "batch", "shared", "pieces"),
    [
        (_graph, 128, torch.rand(64, 64, dtype=torch.float64), None),
        (_graph, 12, torch.rand(4, 4, dtype=torch.float64), 4),
        (_diagonal, 12, torch.rand(4, 6, dtype=torch.float64), 4),
        (_edges, 4, torch.tensor([[0, 1, 2], [1, 2, 3]]), 2),
        (_edges, 1, torch.tensor([[0, 1, 2], [1, 2, 3]]), None),
        (_diagonal, 1, torch.rand(2, 6, dtype=torch.float64), None),
    ],
)
def test_a_table_as_long_as_a_piece_is_none_of_samples(
    forward: Any, batch: int, shared: Tensor, pieces: int | None
) -> None:
    torch.manual_seed(0)
    model = Functional(forward, body=nn.Linear(5, 6), w=weight(6, 6), head=nn.Linear(6, 4)).double()
    x = torch.randn(batch, len(shared) if forward is _graph else 4, 5, dtype=torch.float64)
    _close(model, ((x, shared), torch.arange(batch) % 4), micro_batch=pieces)


class _State(nn.Module):
    """A recurrent network whose first state is of a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 4)
        self.register_buffer("start", torch.zeros(1, 1, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, self.start)[0][:, -1])


@pytest.mark.parametrize("tau", ["true_logit", "full"])
@pytest.mark.parametrize(
    "model",
    [_State(), Functional(lambda m, x: m.head(x.reshape(1, -1)), head=nn.Linear(35, 4))],
    ids=["first state", "flattened"],
)
def test_models_of_one_sample_are_taken(model: nn.Module, tau: str) -> None:
    model = model.double()
    x, y = torch.randn(1, 7, 5, dtype=torch.float64), torch.tensor([1])
    g2, trace = cape.per_sample_norms(model, (x, y), tau=tau)
    out, parameters = model(x), list(model.parameters())

    def norm(value: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.autograd.grad(value, parameters, retain_graph=True))

    torch.testing.assert_close(g2, norm(F.cross_entropy(out, y))[None])
    wanted = sum(norm(o) for o in out[0]) if tau == "full" else norm(out[0, 1])
    torch.testing.assert_close(trace, wanted[None])
    assert all(p.grad is None for p in parameters)


def test_what_a_model_of_one_sample_raises_is_said() -> None:
    model = Functional(lambda m, x: m.head(x.reshape(1, -1)), head=nn.Linear(36, 4))
    with pytest.raises(ModelError, match="1x35 and 36x4"):
        cape.per_sample_norms(model, (torch.randn(1, 7, 5), torch.tensor([1])))


def _dice(outputs: Tensor, targets: Tensor) -> Tensor:
    """A ratio of sums: of two samples no mean of theirs."""
    p = outputs.sigmoid()
    return 1 - (2 * (p * targets).sum() + 1) / ((p + targets).sum() + 1)


def test_any_loss_of_one_sample_is_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 1, 1)).double()
    x, y = torch.randn(1, 3, 6, 6, dtype=torch.float64), torch.randint(0, 2, (1, 1, 6, 6)).double()
    _close(model, (x, y), loss=_dice)
    estimate = cape.per_sample_norms(model, (x, y), loss=_dice, tau="hutchinson", probes=400)[1]
    full = cape.per_sample_norms(model, (x, y), loss=_dice, tau="full")[1]
    torch.testing.assert_close(estimate, full, rtol=0.3, atol=0.0)


def _packed(m: nn.Module, x: Tensor, mask: Tensor, ordered: bool) -> Tensor:
    packed = pack_padded_sequence(x, mask.sum(1).cpu(), batch_first=True, enforce_sorted=ordered)
    rows = packed._replace(data=m.body(packed.data).tanh())
    return m.head(pad_packed_sequence(rows, batch_first=True)[0].sum(1))


def _unpadded(m: nn.Module, x: Tensor, mask: Tensor, ordered: bool) -> Tensor:
    out = x.new_zeros(*mask.shape, 6)
    out[mask] = m.body(x[mask]).tanh()
    return m.head(out.sum(1) / mask.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("forward", "lengths"),
    [
        (_packed, (6, 5, 4, 4, 4, 1)),
        (_packed, (5, 4, 4, 4, 4, 3)),
        (_unpadded, (47, 49, 48, 48, 48, 48)),
        (_unpadded, (3, 5, 4, 4, 4, 4)),
    ],
)
@pytest.mark.parametrize("ordered", [True, False])
def test_ragged_rows_that_are_as_many_as_rectangular_ones(
    forward: Any, lengths: tuple[int, ...], ordered: bool
) -> None:
    """The two samples that are scanned have equal lengths, and the mean length of the batch."""
    torch.manual_seed(0)
    model = Functional(lambda m, x, mask: forward(m, x, mask, ordered), body=nn.Linear(5, 6), head=nn.Linear(6, 4))
    ends = torch.tensor(lengths)
    x, mask = torch.randn(len(ends), max(lengths), 5, dtype=torch.float64), torch.arange(max(lengths)) < ends[:, None]
    _close(model.double(), ((x, mask), torch.arange(len(ends)) % 4))


@pytest.mark.parametrize(("batch", "pieces"), [(1, None), (2, None), (8, 2), (8, None)])
@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize(
    "cut", [lambda z, n: (z[:n], z[n:]), lambda z, n: torch.vsplit(z, [n]), lambda z, n: z.split([n, len(z) - n])]
)
def test_rows_of_the_model_in_front_of_the_batch(cut: Any, rows: int, batch: int, pieces: int | None) -> None:
    """A prototype network: in a batch of two, one of these rows and a sample look like two samples' rows."""

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        known, asked = cut(m.body(torch.cat([m.rows, x])).tanh(), rows)
        return -(asked[:, None] - known[None]).square().sum(-1)

    torch.manual_seed(0)
    model = Functional(forward, body=nn.Linear(6, 5), rows=weight(rows, 6)).double()
    x = torch.randn(batch, 6, dtype=torch.float64)
    _close(model, (x, torch.arange(batch) % rows), micro_batch=pieces)


@pytest.mark.parametrize("pieces", [None, 1, 2, 3])
def test_two_positions_are_not_the_two_samples_of_a_piece(pieces: int | None) -> None:
    def windows(m: nn.Module, x: Tensor) -> Tensor:
        h = m.body(x.transpose(0, 1)).tanh()
        return m.head(h[0] - 0.3 * h[1])

    def places(m: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        return m.head((m.body(x) + m.table((mask.cumsum(1) - 1).t()).transpose(0, 1)).tanh().sum(1))

    torch.manual_seed(0)
    parts = {"body": nn.Linear(3, 6), "table": nn.Embedding(2, 6), "head": nn.Linear(6, 4)}
    steps = torch.randn(9, 3, dtype=torch.float64)
    x = torch.stack([steps[i : i + 2] for i in range(8)])  # one sample's first row is the last one of another
    y = torch.arange(8) % 4
    _close(Functional(windows, **parts).double(), (x, y), micro_batch=pieces)
    _close(Functional(places, **parts).double(), ((x, torch.ones(8, 2, dtype=torch.long)), y), micro_batch=pieces)


@pytest.mark.parametrize("lengths", [(4,), (3, 6), (3, 6, 2, 1)])
def test_nested_tensors_inside_a_model(lengths: tuple[int, ...]) -> None:
    def forward(m: nn.Module, x: Tensor, ends: Tensor) -> Tensor:
        rows = [one[:end] for one, end in zip(x, ends.tolist(), strict=True)]
        nested = m.body(torch.nested.as_nested_tensor(rows, layout=torch.jagged)).relu()
        return m.head(torch.nested.to_padded_tensor(nested, 0.0).sum(1))

    torch.manual_seed(0)
    model = Functional(forward, body=nn.Linear(5, 6), head=nn.Linear(6, 4)).double()
    x = torch.randn(len(lengths), 6, 5, dtype=torch.float64)
    _close(model, ((x, torch.tensor(lengths)), torch.arange(len(lengths))))
