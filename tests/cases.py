"""The one list of models that every implementation of the probe must pass.

A case builds a small model and a batch from a seed. ``CASES`` are quick; ``ARCHITECTURES`` are torchvision's.
``intercepted`` says that no parameter may need the fallback: the price, not only the number, is part of the promise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], tuple[nn.Module, Batch]]
    loss: Any = "cross_entropy"
    intercepted: bool = True
    randomized: bool = True

    def make(self, seed: int = 0) -> tuple[nn.Module, Batch]:
        torch.manual_seed(seed)
        model, batch = self.build()
        if self.randomized:
            randomize_statistics(model)
        return model, batch


def randomize_statistics(model: nn.Module) -> None:
    """Give batch norms statistics and affine parameters that are not 0 and 1, so that mistakes show."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        normalizes = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm))
        if normalizes and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)


CASES: list[Case] = []


def case(name: str, loss: Any = "cross_entropy", intercepted: bool = True) -> Callable[..., Any]:
    def add(build: Callable[[], tuple[nn.Module, Batch]]) -> Callable[[], tuple[nn.Module, Batch]]:
        CASES.append(Case(name, build, loss, intercepted))
        return build

    return add


def labels(batch: int, classes: int = 10) -> Tensor:
    return (torch.arange(batch) * 7) % classes


def vectors(batch: int = 6, width: int = 20) -> Tensor:
    return torch.randn(batch, width)


def sequences(batch: int = 5, length: int = 7, width: int = 12) -> Tensor:
    return torch.randn(batch, length, width)


def images(batch: int = 5, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size)


# ---- feed-forward --------------------------------------------------------------------------------------------------


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


# ---- convolution ---------------------------------------------------------------------------------------------------


@case("convolutions")
def _conv() -> tuple[nn.Module, Batch]:
    layers = [
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, dilation=2), nn.GroupNorm(4, 16), nn.SiLU(),
        nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16), nn.PReLU(16),
        nn.ConvTranspose2d(16, 8, 3, stride=2, output_padding=1, groups=2), nn.InstanceNorm2d(8, affine=True),
        nn.Conv2d(8, 8, 1, bias=False), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    ]  # fmt: skip
    return nn.Sequential(*layers), (images(), labels(5))


@case("1-D and even kernel")
def _conv1d() -> tuple[nn.Module, Batch]:
    layers = [
        nn.Conv1d(12, 8, 4, padding="same"),
        nn.Tanh(),
        nn.ConvTranspose1d(8, 6, 2),
        nn.Flatten(),
        nn.Linear(48, 10),
    ]
    return nn.Sequential(*layers), (sequences(5, 7, 12).transpose(1, 2), labels(5))


@case("3-D")
def _conv3d() -> tuple[nn.Module, Batch]:
    layers = [nn.Conv3d(2, 4, 3, padding=1), nn.Tanh(), nn.ConvTranspose3d(4, 3, 2), nn.Flatten(), nn.Linear(375, 10)]
    return nn.Sequential(*layers), (torch.randn(4, 2, 4, 4, 4), labels(4))


class _Frames(nn.Module):
    """A convolution over frames flattened into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.norm(self.conv(x.flatten(0, 1))).relu().mean((2, 3))
        return self.head(frames.view(*x.shape[:2], 4)).mean(1)


@case("frames in the batch")
def _frames() -> tuple[nn.Module, Batch]:
    return _Frames(), (torch.randn(4, 3, 3, 8, 8), labels(4))


class _Tokens(nn.Module):
    """Batch norm, then tokens: its gradients arrive transposed."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.mix = nn.Bilinear(6, 6, 8) if bilinear else nn.Linear(6, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.last(self.mix(x, x) if isinstance(self.mix, nn.Bilinear) else self.mix(x)).mean(1))


@case("tokens after batch norm")
def _tokens() -> tuple[nn.Module, Batch]:
    return _Tokens(False), (images(3, 8), labels(3))


@case("one sample, tokens after batch norm")
def _tokens_one() -> tuple[nn.Module, Batch]:
    return _Tokens(False), (images(1, 8), labels(1))


@case("tokens after batch norm, fallback", intercepted=False)
def _tokens_fallback() -> tuple[nn.Module, Batch]:
    return _Tokens(True), (images(3, 8), labels(3))


class _SharedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.stem(x)).relu()).mean((2, 3)))


@case("shared convolution")
def _shared_convolution() -> tuple[nn.Module, Batch]:
    return _SharedConvolution(), (images(4, 8), labels(4))


@case("convolution with weight norm")
def _conv_weight_norm() -> tuple[nn.Module, Batch]:
    layers = [weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)]
    return nn.Sequential(*layers), (images(4, 8), labels(4))


@case("dense targets")
def _dense() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 10, 1))
    return model, (images(4, 8), torch.randint(0, 10, (4, 8, 8)))


# ---- recurrence ----------------------------------------------------------------------------------------------------


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


# ---- attention -----------------------------------------------------------------------------------------------------


class _Attention(nn.Module):
    """Class token, positions, packed projection; batch first or not."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=batch_first, add_bias_kv=not batch_first)
        self.head = nn.Linear(12, 10)
        self.token = nn.Parameter(torch.randn(1, 1, 12))
        self.positions = nn.Parameter(torch.randn(1, 8, 12))
        self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        if not self.batch_first:
            x = x.transpose(0, 1)
        out = self.attention(x, x, x)[0]
        return self.head(out[:, 0] if self.batch_first else out[0])


for _first in (True, False):
    CASES.append(
        Case(f"attention batch_first={_first}", lambda first=_first: (_Attention(first), (sequences(), labels(5))))  # type: ignore[misc]
    )
# Equal batch size and length: the layouts that shapes cannot tell apart.
CASES.append(Case("attention, T equals B", lambda: (_Attention(False), (sequences(7), labels(7)))))


@case("encoder")
def _encoder() -> tuple[nn.Module, Batch]:
    layer = nn.TransformerEncoderLayer(12, 2, 24, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(84, 10)), (sequences(), labels(5))


class _Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(12, 2, 1, 1, 24, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(source, target).mean(1))


@case("encoder and decoder")
def _translator() -> tuple[nn.Module, Batch]:
    return _Translator(), ({"source": sequences(), "target": sequences(5, 4)}, labels(5))


class _RelativeBias(nn.Module):
    """A learned bias per relative position, looked up and added to the attention scores."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(12, 36), nn.Linear(12, 10)
        self.bias = nn.Parameter(torch.randn(13, 3) * 0.5)
        steps = torch.arange(7)
        self.register_buffer("index", steps[:, None] - steps[None, :] + 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
        bias = self.bias[self.index].permute(2, 0, 1)
        return self.head(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2).mean(1))


@case("relative position bias")
def _relative() -> tuple[nn.Module, Batch]:
    return _RelativeBias(), (sequences(), labels(5))


# ---- torchvision ---------------------------------------------------------------------------------------------------


def _vision(name: str, size: int, **options: Any) -> tuple[nn.Module, Batch]:
    models = __import__("torchvision.models").models
    return getattr(models, name)(num_classes=10, **options), (torch.randn(2, 3, size, size), labels(2))


ARCHITECTURES = [
    Case(name, functools.partial(_vision, name, size, **options), intercepted=name != "swin_v2_t", randomized=False)
    for name, size, options in (
        ("resnet18", 32, {}), ("densenet121", 32, {}), ("mobilenet_v3_small", 32, {}), ("efficientnet_b0", 32, {}),
        ("convnext_tiny", 32, {}), ("swin_t", 32, {}), ("swin_v2_t", 32, {}), ("regnet_y_400mf", 32, {}),
        ("shufflenet_v2_x0_5", 32, {}), ("squeezenet1_1", 32, {}), ("mnasnet0_5", 32, {}),
        ("vit_b_16", 32, {"image_size": 32}),
        ("googlenet", 32, {"aux_logits": False, "init_weights": False}),
    )
]  # fmt: skip
