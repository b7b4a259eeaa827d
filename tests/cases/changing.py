"""Models whose tensors, orders and labels are not what they were a moment ago."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.base import Batch, Functional, case, functional, images, labels, sequences, tokens, vectors, weight

# ---- tensors computed from parameters, and written into after a parameter's use ------------------------------------


def _growing(m: nn.Module, x: Tensor) -> Tensor:
    bias = m.b * 0.5
    for _ in range(3):
        x = m.body(x).tanh() + bias
        bias *= 2.0
    return m.head(x)


def _scaled(m: nn.Module, x: Tensor) -> Tensor:
    w = m.w * 1.0
    first = F.linear(x, w)
    w.mul_(2)
    return m.head((0.3 * first + F.linear(x.flip(1), w)).tanh())


def _overwritten(m: nn.Module, x: Tensor) -> Tensor:
    w = m.w + 0.0
    first = F.linear(x, w)
    w[0] = m.b[:20]
    return m.head((first + F.linear(x.flip(1), w)).tanh())


def _emptied(m: nn.Module, x: Tensor) -> Tensor:
    bias = m.b * 2.0
    x = m.body(x) + bias
    bias.zero_()
    return m.head(x.tanh())


for _name, _forward, _parts, _fallback in (
    ("bias that grows", _growing, lambda: {"b": weight(20), "body": nn.Linear(20, 20)}, ["b"]),
    ("weight that is scaled between two uses", _scaled, lambda: {"w": weight(20, 20)}, ["w"]),
    ("weight whose row is replaced", _overwritten, lambda: {"w": weight(20, 20), "b": weight(20)}, ["w", "b"]),
    ("bias that is emptied after its use", _emptied, lambda: {"b": weight(20), "body": nn.Linear(20, 20)}, ["b"]),
):
    functional(
        _name,
        lambda parts=_parts: {**parts(), "head": nn.Linear(20, 10)},  # type: ignore[misc]
        _forward,
        vectors,
        fallback=_fallback,
    )

functional(
    "weight from a sparse product",
    lambda: {"w": weight(10, 20)},
    lambda m, x: F.linear(x, torch.sparse.mm(torch.eye(20, dtype=x.dtype).to_sparse(), m.w.t()).t()),
    vectors,
    intercepted=False,
)
functional(
    "weight from a nested tensor",
    lambda: {"w": weight(10, 20)},
    lambda m, x: F.linear(x, torch.nested.to_padded_tensor(torch.nested.as_nested_tensor(list(m.w)), 0.0)),
    vectors,
    intercepted=False,
)


# ---- orders ----------------------------------------------------------------------------------------------------------


def _interleaved(m: nn.Module, x: Tensor) -> Tensor:
    """Samples in another order, which two samples do not show, nor the black rows that every image begins with."""
    size = len(x)
    if size % 2:
        return m.head(m.conv(x).relu().mean((2, 3)))
    h = x.view(2, size // 2, *x.shape[1:]).transpose(0, 1).reshape(x.shape)
    h = m.conv(h).relu()
    return m.head(h.view(size // 2, 2, *h.shape[1:]).transpose(0, 1).reshape(h.shape).mean((2, 3)))


@case("samples reordered behind black rows", intercepted=False)
def _reordered() -> tuple[nn.Module, Batch]:
    x = images(8, 32)
    x[:, :, :9] = 0.0
    return Functional(_interleaved, conv=nn.Conv2d(3, 4, 3), head=nn.Linear(4, 10)), (x, labels(8))


class _Sorted(nn.Module):
    """Sequences that must come sorted by length."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.head(self.body(packed)[1][0][-1])


@case("sequences sorted by length", intercepted=False)
def _sorted() -> tuple[nn.Module, Batch]:
    return _Sorted(), ((sequences(6), torch.tensor([7, 6, 6, 4, 3, 1])), labels(6))


class _Padded(nn.Module):
    """A frozen encoder with padding: torch's fast path would give zeros there."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2).requires_grad_(False)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        return self.head(self.body(x, src_key_padding_mask=padded).mean(1))


@case("frozen encoder with padding")
def _padded() -> tuple[nn.Module, Batch]:
    padded = torch.arange(7)[None] >= torch.tensor([7, 3, 5, 1, 6])[:, None]
    return _Padded(), ((sequences(), padded), labels(5))


# ---- inputs and labels -----------------------------------------------------------------------------------------------


@case("bytes from 0 to 255")
def _bytes() -> tuple[nn.Module, Batch]:
    x = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    x[0, 0, 0, :2] = torch.tensor([0, 255])
    forward = lambda m, x: m.head(m.conv((x / 255.0).to(m.conv.weight)).relu().mean((2, 3)))  # noqa: E731
    return Functional(forward, conv=nn.Conv2d(3, 6, 3), head=nn.Linear(6, 10)), (x, labels(5))


def _segments(ignored: int) -> tuple[nn.Module, Batch]:
    y = torch.randint(0, 4, (5, 16, 16))
    y[:, :2] = ignored
    return nn.Conv2d(3, 4, 1), (images(), y)


case("segments, 255 ignored", loss=nn.CrossEntropyLoss(ignore_index=255))(lambda: _segments(255))
case("segments, -1 ignored", loss=lambda o, t: F.cross_entropy(o, t, ignore_index=-1))(lambda: _segments(-1))


def _ctc(outputs: Tensor, targets: Tensor) -> Tensor:
    size = len(outputs)
    lengths = [torch.full((size,), n) for n in (outputs.shape[1], targets.shape[1])]
    return F.ctc_loss(outputs.log_softmax(-1).transpose(0, 1), targets, *lengths, reduction="none")


@case("connectionist temporal classification", loss=_ctc)
def _speech() -> tuple[nn.Module, Batch]:
    return nn.Linear(12, 6), (sequences(6, 12), torch.randint(1, 6, (6, 3)))


def _distance(outputs: Tensor, targets: Any) -> Tensor:
    return (outputs - targets).abs().square().sum(1)


@case("products by the names of their arguments")
def _named() -> tuple[nn.Module, Batch]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        h = m.body(x)
        alike = torch.matmul(input=h, other=h.mT).softmax(-1) + torch.cdist(x1=h, x2=h)
        mixed = torch.baddbmm(h, batch1=alike, batch2=h) + torch.bmm(input=alike, mat2=h)
        return m.head(mixed.mean(1))

    return Functional(forward, body=nn.Linear(12, 8), head=nn.Linear(8, 10)), (sequences(), labels(5))


@case("a sparse matrix of data, transposed")
def _adjacency() -> tuple[nn.Module, Batch]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        kept = (x * (x > 0)).to_sparse()
        return m.head(kept.t().t().to_dense())

    return Functional(forward, head=nn.Linear(20, 10)), (vectors(), labels(6))


class _Workspace(nn.Module):
    """Frozen features in a buffer that every pass writes into, and a number of the whole batch."""

    def __init__(self, reading: bool) -> None:
        super().__init__()
        self.stem, self.head, self.reading = nn.Linear(20, 8).requires_grad_(False), nn.Linear(8, 10), reading
        self.register_buffer("features", torch.zeros(32, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        held = self.features[: len(x)]
        held.copy_(self.stem(x).relu())
        if self.reading:
            self.largest = float(held.max())
        return self.head(held)


for _size, _reading in ((6, True), (6, False), (2, False)):
    case(f"a workspace, batch of {_size}{', read' if _reading else ''}")(
        lambda n=_size, r=_reading: (_Workspace(r), (vectors(n), labels(n)))
    )


@case("outputs that are masked")
def _actions() -> tuple[nn.Module, Batch]:
    forward = lambda m, x, allowed: m.head(x).masked_fill(~allowed, -torch.inf)  # noqa: E731
    allowed = torch.rand(6, 10) > 0.3
    allowed[torch.arange(6), labels(6)] = True
    return Functional(forward, head=nn.Linear(20, 10)), ((vectors(), allowed), labels(6))


for _kind in (torch.uint16, torch.uint32, torch.uint64):

    @case(f"tokens of {_kind}")
    def _unsigned(kind: torch.dtype = _kind) -> tuple[nn.Module, Batch]:
        forward = lambda m, x: m.head(m.table(x.long()).mean(1))  # noqa: E731
        return Functional(forward, table=nn.Embedding(30, 8), head=nn.Linear(8, 10)), (tokens().to(kind), labels(5))


@case("complex outputs", loss=_distance)
def _complex() -> tuple[nn.Module, Batch]:
    forward = lambda m, x: torch.complex(m.real(x), m.imaginary(x))  # noqa: E731
    targets = torch.randn(6, 3, dtype=torch.complex64)
    return Functional(forward, real=nn.Linear(20, 3), imaginary=nn.Linear(20, 3)), (vectors(), targets)


@case("sparse gradients of an embedding")
def _sparse() -> tuple[nn.Module, Batch]:
    forward = lambda m, x: m.head(m.table(x).mean(1))  # noqa: E731
    return Functional(forward, table=nn.Embedding(30, 8, sparse=True), head=nn.Linear(8, 10)), (tokens(), labels(5))
