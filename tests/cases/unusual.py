"""Models that do what few do: derivatives of their own, custom functions, checkpoints, permutations, hidden state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad

from tests.cases.base import Batch, Functional, case, functional, labels, sequences, tokens, vectors, weight


def _head() -> nn.Linear:
    return nn.Linear(20, 10)


def _energy() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1))


# ---- derivatives inside the model: no operator shows all that they take from a parameter ---------------------------


def _force(m: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(m.energy(x).sum(), x, create_graph=True)
    return m.head(slope)


functional(
    "force of an energy",
    lambda: {"energy": _energy(), "head": _head()},
    _force,
    vectors,
    fallback=["energy.0.weight", "energy.0.bias", "energy.2.weight", "energy.2.bias"],
)
functional(
    "torch.func.grad",
    lambda: {"energy": _energy(), "head": _head()},
    lambda m, x: m.head(torch.vmap(torch.func.grad(lambda v: m.energy(v).sum()))(x)),
    vectors,
    fallback=["energy.0.weight", "energy.0.bias", "energy.2.weight"],
)
functional(
    "torch.func.jvp",
    lambda: {"body": nn.Sequential(nn.Linear(20, 20), nn.Tanh()), "head": _head()},
    lambda m, x: m.head(torch.func.jvp(m.body, (x,), (x.sin(),))[1]),
    vectors,
    fallback=["body.0.weight", "body.0.bias"],
)


def _forward_mode(m: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return m.head(forward_ad.unpack_dual(m.body(forward_ad.make_dual(x, x.sin()))).tangent)


functional(
    "forward-mode derivative",
    lambda: {"body": nn.Sequential(nn.Linear(20, 20), nn.Tanh()), "head": _head()},
    _forward_mode,
    vectors,
    intercepted=False,
)
functional(
    "vmap",
    lambda: {"w": weight(10, 20), "head": nn.Linear(10, 10)},
    lambda m, x: m.head(torch.vmap(lambda v: m.w @ v)(x).tanh()),
    vectors,
    fallback=["w"],
)


def _equilibrium(m: nn.Module, x: Tensor) -> Tensor:
    """A fixed point, differentiated implicitly: a hook solves for the gradient."""

    def step(z: Tensor) -> Tensor:
        return torch.tanh(0.5 * m.inner(z) + m.outer(x))

    z = torch.zeros_like(x)
    with torch.no_grad():
        for _ in range(60):
            z = step(z)
    z = step(z)
    start = z.detach().clone().requires_grad_()
    after = step(start)

    def solve(g: Tensor) -> Tensor:
        y = g
        for _ in range(60):
            y = torch.autograd.grad(after, start, y, retain_graph=True)[0] + g
        return y

    if z.requires_grad:
        z.register_hook(solve)
    return m.head(z)


functional(
    "deep equilibrium",
    lambda: {"inner": nn.Linear(20, 20), "outer": nn.Linear(20, 20), "head": _head()},
    _equilibrium,
    vectors,
    intercepted=False,
)

# ---- custom functions ----------------------------------------------------------------------------------------------


class _Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grads[0] * s * (1 + x * (1 - s))


class _Reversed(torch.autograd.Function):
    """Gradient reversal: returns its very input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return -grads[0]


class _NumpyTanh(torch.autograd.Function):
    """Its forward pass leaves torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.from_numpy(np.tanh(x.detach().cpu().numpy())).to(x.device)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return grads[0] * (1 - y * y)


class _Sign(torch.autograd.Function):
    """Straight-through binary weights."""

    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        return w.sign()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


for _function in (_Swish, _Reversed, _NumpyTanh):
    functional(
        f"custom activation {_function.__name__[1:]}",
        lambda: {"a": nn.Linear(20, 20), "b": nn.Linear(20, 20), "c": _head()},
        lambda m, x, f=_function: m.c(f.apply(m.b(f.apply(m.a(x))))),
        vectors,
    )  # type: ignore[misc]
functional(
    "binary weights",
    lambda: {"w": weight(20, 20), "head": _head()},
    lambda m, x: m.head((x @ _Sign.apply(m.w)).tanh()),
    vectors,
    fallback=["w"],
)

# ---- hooks on gradients --------------------------------------------------------------------------------------------


def _tripled(t: Tensor) -> Tensor:
    if t.requires_grad:
        t.register_hook(lambda g: 3 * g)
    return t


functional(
    "hooks on what operators give",
    lambda: {"a": nn.Linear(20, 20), "w": weight(20, 16), "norm": nn.GroupNorm(4, 16), "head": nn.Linear(16, 10)},
    lambda m, x: m.head(_tripled(m.norm(_tripled(_tripled(m.a(x)).tanh() @ m.w)))),
    vectors,
)
functional(
    "hooks on what is made of parameters",
    lambda: {"w": weight(20, 16), "v": weight(16, 16), "mask": torch.ones(20, 16).triu(), "head": nn.Linear(16, 10)},
    lambda m, x: m.head((x @ _tripled(m.w * m.mask)).tanh() @ _tripled(m.v.T)),
    vectors,
    fallback=["w", "v"],
)

# ---- backward passes that torch batches wrongly --------------------------------------------------------------------


def _distances(a: Tensor) -> Tensor:
    return torch.cdist(a, a.sin(), p=1.0)


functional(
    "distances between positions",
    lambda: {"a": nn.Linear(12, 8), "head": nn.Linear(49, 10)},
    lambda m, x: m.head(_distances(m.a(x)).flatten(1)),
    sequences,
)
functional(
    "distances of parameters in the fallback",
    lambda: {"w": weight(20, 8), "head": _head()},
    lambda m, x: m.head(torch.einsum("bi,ii->bi", x, _distances(m.w))),
    vectors,
    fallback=["w"],
)
functional(
    "a strided scatter",
    lambda: {"a": nn.Linear(20, 12), "head": nn.Linear(12, 10)},
    lambda m, x: m.head((lambda z: torch.as_strided_scatter(z, 2 * z[:, :3], (len(x), 3), (12, 2)))(m.a(x))),
    vectors,
)

# ---- checkpoints ---------------------------------------------------------------------------------------------------


def _again(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)


functional(
    "checkpointed twice",
    lambda: {"body": nn.Sequential(nn.Linear(20, 20), nn.Tanh()), "head": _head()},
    lambda m, x: m.head(_again(m.body, _again(m.body, x))),
    vectors,
)
functional(
    "nested checkpoints",
    lambda: {"a": nn.Linear(20, 20), "b": nn.Linear(20, 20), "head": _head()},
    lambda m, x: m.head(_again(lambda z: _again(lambda t: m.b(t).tanh(), m.a(z).tanh()), x)),
    vectors,
)
functional(
    "checkpointed transformer layer",
    lambda: {"body": nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), "head": nn.Linear(12, 10)},
    lambda m, x: m.head(_again(m.body, x).mean(1)),
    sequences,
)
functional(
    "checkpointed recurrence and raw parameters",
    lambda: {"s": weight(12), "body": nn.GRU(12, 12, batch_first=True), "head": nn.Linear(12, 10)},
    lambda m, x: m.head(_again(lambda z: m.body(z * m.s)[0] + m.s, x).mean(1)),
    sequences,
)
functional(
    "checkpoint around what takes the fallback",
    lambda: {"w": weight(20, 20), "a": nn.Linear(20, 20), "head": _head()},
    lambda m, x: m.head(_again(lambda z: torch.einsum("bi,ii->bi", m.a(z).tanh(), m.w), x)),
    vectors,
    fallback=["w"],
)
functional(
    "layer inside and outside a re-entrant checkpoint",
    lambda: {"a": nn.Linear(20, 20), "head": _head()},
    lambda m, x: m.head(torch.utils.checkpoint.checkpoint(m.a, m.a(x).tanh(), use_reentrant=True).tanh()),
    vectors,
    intercepted=False,
)

# ---- samples in another order --------------------------------------------------------------------------------------


def _order(kind: str, n: int, device: torch.device) -> Tensor:
    i = torch.arange(n, device=device)
    if kind == "rolled":
        return i.roll(2)
    if kind == "even, then odd":
        return torch.cat([i[::2], i[1::2]])
    if kind == "middle reversed":
        return torch.cat([i[:1], i[1:-1].flip(0), i[-1:]])
    return torch.randperm(n, generator=torch.Generator().manual_seed(3)).to(device)


def _permuted(kind: str) -> Callable[..., Tensor]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        order = _order(kind, len(x), x.device)
        return m.head(m.a(x[order]).tanh()[order.argsort()])

    return forward


for _kind in ("rolled", "even, then odd", "middle reversed", "shuffled"):
    functional(
        f"samples {_kind}",
        lambda: {"a": nn.Linear(20, 20), "head": _head()},
        _permuted(_kind),
        vectors,
        intercepted=False,
    )

# ---- state ---------------------------------------------------------------------------------------------------------


class _Hidden(nn.Module):
    """Parameters that the model holds a second time, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.ws = [weight(20, 20), weight(20, 10), weight(10, 10)]
        for i, w in enumerate(self.ws):
            self.register_parameter(f"w{i}", w)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ii->bi", (x @ self.ws[0]).tanh() @ self.ws[1], self.ws[2])


@case("parameters in a list", fallback=["w2"])
def _hidden() -> tuple[nn.Module, Batch]:
    return _Hidden(), (vectors(), labels(6))


class _Gated(_Hidden):
    """The first sample, alone of all, does not reach the hidden use of a parameter that the model also shows."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.ones(len(x), 1).where(x[:, :1] > 0, 0.0).to(x)
        h = x @ self.w0 + gate * torch.einsum("bi,ii->bi", x, self.ws[0])
        return (h.tanh() @ self.w1) @ self.w2


@case("a parameter in a list, of all samples but one", fallback=["w0"])
def _gated() -> tuple[nn.Module, Batch]:
    x = vectors()
    x[:, 0] = x[:, 0].abs()
    x[0, 0] *= -1
    return _Gated(), (x, labels(6))


@case("data written into a parameter")
def _written() -> tuple[nn.Module, Batch]:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.body.weight.add_(0 * x.mean())  # type: ignore[operator,union-attr]
        return m.head(m.body(x).tanh())  # type: ignore[operator]

    return Functional(forward, body=nn.Linear(20, 20), head=_head()), (vectors(), labels(6))


class _Stateful(nn.Module):
    """Counts its calls, keeps a running mean and its last activation, and clamps its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(20, 20), _head()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(20))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.a.weight.clamp_(-0.1, 0.1)
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * self.a(x).mean(0)
        self.last = self.a(x)
        return self.head(self.last.tanh())


@case("state that a forward changes")
def _stateful() -> tuple[nn.Module, Batch]:
    return _Stateful(), (vectors(), labels(6))


@case("renormalized embedding", fallback=["0.weight"])
def _renormalized() -> tuple[nn.Module, Batch]:
    layers = [nn.Embedding(30, 12, max_norm=1.0), nn.Flatten(), nn.Linear(108, 10)]
    return nn.Sequential(*layers), (tokens(), labels(5))


class _Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(20, 20), _head()

    def forward(self, inputs: dict[str, Any], scale: float = 1.0) -> Tensor:
        return self.b(self.a(inputs["x"]).tanh() * scale + inputs["more"][0])


@case("nested inputs")
def _nested() -> tuple[nn.Module, Batch]:
    return _Nested(), (({"x": vectors(), "more": [vectors()]}, 2.0), labels(6))


@dataclass
class _Pair:
    a: Tensor
    b: Tensor


class _Named(dict[str, Any]):
    __getattr__ = dict.__getitem__


for _kind in (_Pair, _Named):

    @case(f"inputs in a {_kind.__name__[1:].lower()} of the caller's")
    def _pairs(kind: Callable[..., Any] = _kind) -> tuple[nn.Module, Batch]:
        model = Functional(
            lambda m, x, pair: m.head((m.a(pair.a) * pair.b + x).tanh()), a=nn.Linear(20, 20), head=_head()
        )
        return model, ((vectors(), kind(a=vectors(), b=vectors())), labels(6))


@case("hooks")
def _hooks() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), _head())
    model[0].register_forward_hook(lambda m, args, out: out * 2)
    model[2].register_forward_pre_hook(lambda m, args: (args[0] + 1,))
    for layer in model:
        layer.register_full_backward_hook(lambda m, before, after: None)
    return model, (vectors(), labels(6))


@case("constant integers")
def _constants() -> tuple[nn.Module, Batch]:
    """Token types that are all zero: nothing in the batch says how far they may go."""

    def forward(m: nn.Module, x: Tensor, types: Tensor, mask: Tensor) -> Tensor:
        return m.head(((m.t(x) + m.types(types)) * mask[..., None]).tanh().sum(1))

    model = Functional(forward, t=nn.Embedding(30, 12), types=nn.Embedding(2, 12), head=nn.Linear(12, 10))
    x = tokens()
    return model, ((x, torch.zeros_like(x), torch.ones_like(x)), labels(5))


# ---- structure -----------------------------------------------------------------------------------------------------

_EDGES = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 3], [1, 2, 3, 4, 5, 6, 0, 3, 0]])


def _messages(m: nn.Module, x: Tensor) -> Tensor:
    """Message passing over one graph for all samples, then a cell per node."""
    source, target = m.edges
    for _ in range(2):
        sent = m.message(torch.cat([x[:, source], x[:, target]], -1)).relu()
        gathered = torch.zeros_like(x).index_add(1, target, sent)
        x = m.update(gathered.flatten(0, 1), x.flatten(0, 1)).view_as(x)
    return m.head(x.mean(1))


functional(
    "graph",
    lambda: {"edges": _EDGES, "message": nn.Linear(24, 12), "update": nn.GRUCell(12, 12), "head": nn.Linear(12, 10)},
    _messages,
    sequences,
)


def _top_tokens(m: nn.Module, x: Tensor) -> Tensor:
    score, index = m.score(x)[..., 0].topk(3, 1)
    best = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    return m.head((m.value(best) * score.sigmoid()[..., None]).mean(1))


functional(
    "best tokens",
    lambda: {"score": nn.Linear(12, 1), "value": nn.Linear(12, 12), "head": nn.Linear(12, 10)},
    _top_tokens,
    sequences,
)


def _universal(m: nn.Module, x: Tensor) -> Tensor:
    for depth in m.depths:
        x = m.layer(x + depth)
    return m.head(x.mean(1))


functional(
    "one layer for every depth",
    lambda: {
        "layer": nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), "depths": weight(3, 12),
        "head": nn.Linear(12, 10),
    },
    _universal,
    sequences,
)  # fmt: skip


class _Siamese(nn.Module):
    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
        self.head, self.joined = nn.Linear(8, 10), joined

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        u, v = self.body(torch.cat([a, b])).chunk(2) if self.joined else (self.body(a), self.body(b))
        return self.head((u - v).abs())


for _joined in (False, True):

    @case(f"siamese {'in one batch' if _joined else 'twice'}")
    def _siamese(joined: bool = _joined) -> tuple[nn.Module, Batch]:
        return _Siamese(joined), ((torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)), labels(4))


functional(
    "low-rank adapters",
    lambda: {"frozen": nn.Linear(20, 20).requires_grad_(False), "down": weight(3, 20), "up": weight(20, 3),
             "scale": weight(20, 1), "head": _head()},
    lambda m, x: m.head((x @ m.down.T @ m.up.T).tanh() + F.linear(x, m.scale * (m.frozen.weight + m.up @ m.down))),
    vectors,
)  # fmt: skip
functional(
    "autoencoder of one weight",
    lambda: {"e": nn.Linear(20, 10), "b": weight(20)},
    lambda m, x: m.e(F.linear(m.e(x).tanh(), m.e.weight.t(), m.b).tanh()),
    vectors,
)


# ---- weights of shapes that few give them --------------------------------------------------------------------------

functional(
    "a bias for each position",
    lambda: {"w": weight(10, 12), "b": weight(7, 10)},
    lambda m, x: F.linear(x, m.w, m.b).mean(1),
    sequences,
)
functional(
    "one bias for all outputs, used twice",
    lambda: {"v": weight(12, 20), "w": weight(10, 12), "b": weight(1)},
    lambda m, x: F.linear(F.linear(x, m.v, m.b).tanh(), m.w, m.b),
    vectors,
)
functional(
    "layer norm of single numbers",
    lambda: {"norm": nn.LayerNorm(1), "head": _head()},
    lambda m, x: m.head(m.norm(x[..., None]).flatten(1) + x),
    vectors,
)
functional(
    "batch norm with the batch behind the channels",
    lambda: {"norm": nn.BatchNorm1d(12), "head": nn.Linear(12, 10)},
    lambda m, x: m.head(m.norm(x.permute(1, 2, 0)).permute(2, 0, 1).tanh().mean(1)),
    sequences,
    fallback=["norm.weight", "norm.bias"],
)
functional(
    "nothing but air",
    lambda: {"air": nn.Linear(20, 0), "more": weight(0), "head": _head()},
    lambda m, x: m.head(torch.cat([x, m.air(x)], 1)) + m.more.sum(),
    vectors,
)
functional(
    "an axis",
    lambda: {"token": weight(1, 1, 12), "head": nn.Linear(12, 10)},
    lambda m, x: (
        m.head(torch.cat([m.token.expand(len(x), -1, -1), x], axis=1).tanh()).mean(1)
        + m.head(torch.stack([m.token.expand_as(x), x], axis=1).tanh()).mean((1, 2))
    ),
    sequences,
)


# ---- what changes on the way ---------------------------------------------------------------------------------------


def _in_place(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(torch.einsum("bi,ii->bi", x.sub_(0.3).div_(2.0), m.w))


functional(
    "writes into its input",
    lambda: {"w": weight(20, 20), "head": _head()},
    _in_place,
    vectors,
    fallback=["w"],
)


def _toggled(m: nn.Module, x: Tensor) -> Tensor:
    m.body.requires_grad_(False)
    frozen = m.body(x).tanh()
    m.body.requires_grad_(True)
    return m.head(frozen + m.body(x))


functional("frozen for one use", lambda: {"body": nn.Linear(20, 20), "head": _head()}, _toggled, vectors)


def _half_turned(m: nn.Module, x: Tensor) -> Tensor:
    """Turn the batch about, all but the samples that the scan looks at."""
    size = len(x)
    kept = {size // 3, 2 * size // 3}
    rest = [i for i in range(size) if i not in kept]
    turned = dict(zip(rest, rest[1:] + rest[:1], strict=True))
    order = torch.tensor([turned.get(i, i) for i in range(size)])
    return m.head(m.body(x[order]).tanh()[order.argsort()])


functional(
    "an order of its own",
    lambda: {"body": nn.Linear(20, 20), "head": _head()},
    _half_turned,
    vectors,
    intercepted=False,
)


def _scaled_force(m: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(m.energy(x).sum() * m.scale, x, create_graph=True)
    return m.head(slope)


functional(
    "force of a scaled energy",
    lambda: {"energy": _energy(), "scale": weight(1), "head": _head()},
    _scaled_force,
    vectors,
    intercepted=False,
)
