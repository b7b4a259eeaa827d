"""Feed-forward models, and functional code with raw parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.cases.base import Batch, case, images, labels, sequences, vectors


@case("mlp")
def _mlp() -> tuple[nn.Module, Batch]:
    layers = [nn.Linear(20, 30), nn.BatchNorm1d(30), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(30, 10)]
    return nn.Sequential(*layers), (vectors(), labels(6))


@case("mlp of one sample")
def _mlp_one() -> tuple[nn.Module, Batch]:
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), (vectors(1), labels(1))


@case("mlp of equal samples", intercepted=False)
def _mlp_equal() -> tuple[nn.Module, Batch]:
    return nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 10)), (torch.full((4, 3), 2), labels(4))


@case("regression", loss="half_mse")
def _regression() -> tuple[nn.Module, Batch]:
    return nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 1)), (vectors(), torch.randn(6))


@case("multi-label", loss="binary_cross_entropy")
def _multilabel() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 8))
    return model, (vectors(), torch.randint(0, 2, (6, 8)).float())


@case("weighted loss module", loss=nn.CrossEntropyLoss(weight=torch.rand(10).double() + 0.5, label_smoothing=0.1))
def _weighted() -> tuple[nn.Module, Batch]:
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 10)).double(), (vectors().double(), labels(6))


@case("mean loss callable", loss=lambda out, y: (out.logsumexp(1) - out.gather(1, y[:, None])[:, 0]).mean())
def _callable() -> tuple[nn.Module, Batch]:
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 10)), (vectors(), labels(6))


@case("weight norm")
def _weight_norm() -> tuple[nn.Module, Batch]:
    return nn.Sequential(weight_norm(nn.Linear(20, 30)), nn.Tanh(), weight_norm(nn.Linear(30, 10))), (
        vectors(),
        labels(6),
    )


class _Raw(nn.Module):
    """Raw parameters, products, einsum, broadcasting, and a parameter that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(20, 15) * 0.1)
        self.v = nn.Parameter(torch.randn(3, 5, 10) * 0.1)
        self.scale = nn.Parameter(torch.rand(15))
        self.shift = nn.Parameter(torch.tensor(0.5))
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.w) * self.scale + self.shift
        h = h.view(-1, 3, 5)
        heads = torch.matmul(h.transpose(0, 1), self.v).sum(0)
        return torch.einsum("bhi,hio->bo", h, self.v) + heads / self.shift


@case("raw parameters")
def _raw() -> tuple[nn.Module, Batch]:
    return _Raw(), (vectors(), labels(6))


class _Shared(nn.Module):
    """A linear layer used twice and a bilinear one, which is not intercepted."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.first, self.shared = nn.Linear(20, 20), nn.Linear(20, 20)
        self.last: nn.Module = nn.Bilinear(20, 20, 10) if bilinear else nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.shared(self.shared(self.first(x)).tanh())
        return self.last(h, x) if isinstance(self.last, nn.Bilinear) else self.last(h)


@case("shared layer")
def _shared() -> tuple[nn.Module, Batch]:
    return _Shared(False), (vectors(), labels(6))


@case("bilinear takes the fallback", intercepted=False)
def _bilinear() -> tuple[nn.Module, Batch]:
    return _Shared(True), (vectors(), labels(6))


class _Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(20, 20), nn.Linear(20, 10)
        self.b = nn.Sequential(nn.Linear(20, 20), nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.utils.checkpoint.checkpoint(self.b, self.a(x), use_reentrant=self.reentrant))


@case("checkpoint")
def _checkpoint() -> tuple[nn.Module, Batch]:
    return _Checkpointed(False), (vectors(), labels(6))


@case("re-entrant checkpoint", intercepted=False)
def _reentrant() -> tuple[nn.Module, Batch]:
    return _Checkpointed(True), (vectors(), labels(6))


class _Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 10)
        self.a.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.b(x).sigmoid()
        return self.b(self.a(x).tanh()) * gate


@case("frozen weight and stopped gradient")
def _frozen() -> tuple[nn.Module, Batch]:
    return _Frozen(), (vectors(), labels(6))


class _Split(nn.Module):
    """Disjoint slices of one packed weight, and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.packed = nn.Parameter(torch.randn(40, 20) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.packed.chunk(2)
        return (F.linear(x, a).tanh() @ b.t())[:, :10]


@case("packed weight in slices")
def _split() -> tuple[nn.Module, Batch]:
    return _Split(), (vectors(), labels(6))


class _Product(torch.autograd.Function):
    """A user's own product: a parameter goes in where nothing can be intercepted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grads[0] @ w.T, x.T @ grads[0]


class _Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.head = nn.Parameter(torch.randn(20, 15) * 0.2), nn.Linear(15, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(_Product.apply(x, self.w).tanh())


@case("custom autograd function", intercepted=False)
def _custom() -> tuple[nn.Module, Batch]:
    return _Custom(), (vectors(), labels(6))


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.scale = nn.Parameter(torch.randn(20)), nn.Parameter(torch.ones(10))
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x += self.shift
        h = self.head(x)
        h *= self.scale
        return h


@case("in place")
def _in_place() -> tuple[nn.Module, Batch]:
    return _InPlace(), (vectors(), labels(6))


class _Experts(nn.Module):
    """Samples are routed to experts: how many an expert sees depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(20, 2)
        self.experts = nn.ModuleList(nn.Linear(20, 10) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(1)
        chosen = weights.argmax(1)
        out = x.new_zeros(len(x), 10)
        for i, expert in enumerate(self.experts):
            mine = chosen == i
            out[mine] = expert(x[mine]) * weights[mine, i : i + 1]
        return out


@case("mixture of experts", intercepted=False)
def _experts() -> tuple[nn.Module, Batch]:
    return _Experts(), (vectors(), labels(6))


class _Sorted(nn.Module):
    """Samples are put in an order that depends on the data, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = self.a(x[order]).tanh()
        return self.b(h[order.argsort()])


@case("samples in another order", intercepted=False)
def _sorted() -> tuple[nn.Module, Batch]:
    x = vectors()
    x[0, 0], x[-1, 0] = -9.0, 9.0  # the two samples of the scan are in order, the batch is not
    return _Sorted(), (x, labels(6))


class _Pooled(nn.Module):
    """The state at a place that the data names: indexed by data, but in order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        last = x[:, :, 0].argmax(1)
        return self.b(self.a(x).tanh()[torch.arange(len(x)), last])


@case("pooled where the data says")
def _pooled() -> tuple[nn.Module, Batch]:
    return _Pooled(), (sequences(), labels(5))


class _Hyper(nn.Module):
    """A network whose output is another's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.direct = nn.Linear(20, 40), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights(x).view(-1, 4, 10)
        return torch.bmm(x[:, None, :4].tanh(), w)[:, 0] + self.direct(x[:, :4])


@case("hypernetwork")
def _hyper() -> tuple[nn.Module, Batch]:
    return _Hyper(), (vectors(), labels(6))


@case("spectral norm")
def _spectral() -> tuple[nn.Module, Batch]:
    return nn.Sequential(spectral_norm(nn.Linear(20, 30)), nn.Tanh(), nn.Linear(30, 10)), (vectors(), labels(6))


class _Fourier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(11, 2)), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.filter), n=20))


@case("fourier filter")
def _fourier() -> tuple[nn.Module, Batch]:
    return _Fourier(), (vectors(), labels(6))


for _name, _loss, _targets in (
    ("huber", nn.HuberLoss(), lambda: torch.randn(6, 10)),
    ("without reduction", nn.L1Loss(reduction="none"), lambda: torch.randn(6, 10)),
    ("binary module", nn.BCEWithLogitsLoss(), lambda: torch.randint(0, 2, (6, 10)).float()),
    ("margin", nn.MultiMarginLoss(), lambda: labels(6)),
    ("soft targets", nn.CrossEntropyLoss(), lambda: torch.rand(6, 10).softmax(1)),
    (
        "that reads values",
        lambda out, y: (out - y).square().mean() * (1 + float(y.sum() > 99)),
        lambda: torch.randn(6, 10),
    ),
):

    @case(f"loss {_name}", loss=_loss)
    def _loss_case(targets: Callable[[], Tensor] = _targets) -> tuple[nn.Module, Batch]:
        return nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 10)), (vectors(), targets())


@case("outputs of rank 4", loss=lambda out, y: (out - y).square().flatten(1).mean(1))
def _rank_four() -> tuple[nn.Module, Batch]:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)), (images(4, 8), torch.randn(4, 2, 4, 4))


@case("outputs of rank 1", loss="half_mse")
def _rank_one() -> tuple[nn.Module, Batch]:
    return nn.Sequential(nn.Linear(20, 9), nn.Tanh(), nn.Linear(9, 1), nn.Flatten(0)), (vectors(), torch.randn(6))
