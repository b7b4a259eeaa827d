"""Every way to multiply, add, look up and reshape a raw parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.cases.base import functional, sequences, tokens, vectors, weight


def _head(width: int = 20) -> nn.Linear:
    return nn.Linear(width, 10)


def _grouped(x: Tensor) -> Tensor:
    """[B, 20] -> [4, B, 5]."""
    return x.view(-1, 4, 5).transpose(0, 1)


# ---- views of a weight ---------------------------------------------------------------------------------------------

for _name, _shape, _view in (
    ("t()", (10, 20), lambda w: w.t()),
    (".T", (10, 20), lambda w: w.T),
    (".mT", (10, 20), lambda w: w.mT),
    ("view", (200,), lambda w: w.view(20, 10)),
    ("slice", (20, 15), lambda w: w[:, :10]),
    ("strided slice", (20, 20), lambda w: w[:, 1::2]),
    ("rows by index", (15, 20), lambda w: w[[1, 2, 3, 3, 4, 5, 6, 7, 8, 9]].t()),
    ("rows by mask", (15, 20), lambda w: w[torch.arange(15) < 10].t()),
    ("outer product", (20,), lambda w: torch.outer(w, w[:10])),
    ("Kronecker product", (4, 2), lambda w: torch.kron(w, w.new_ones(5, 5))),
    ("expand", (20, 1), lambda w: w.expand(20, 10) * torch.arange(10).to(w.dtype)),
    ("repeat", (20, 5), lambda w: w.repeat(1, 2)),
):
    functional(
        f"weight as {_name}",
        lambda shape=_shape: {"w": weight(*shape)},
        lambda m, x, view=_view: x @ view(m.w),
        vectors,
    )  # type: ignore[misc]

_NONLINEAR = (torch.sin, torch.tanh, torch.exp)
functional(
    "weight in overlapping slices",
    lambda: {"w": weight(20, 15)},
    lambda m, x: x @ m.w[:, :10] + x.tanh() @ m.w[:, 5:],
    vectors,
)
functional(
    "weight unbound",
    lambda: {"w": weight(3, 20, 10)},
    lambda m, x: sum((f(x) @ w for f, w in zip(_NONLINEAR, m.w, strict=True)), x.new_zeros(())),
    vectors,
)
functional(
    "weights stacked and joined",
    lambda: {"a": weight(20, 4), "b": weight(20), "c": weight(20)},
    lambda m, x: x @ torch.cat([m.a, torch.stack([m.b, m.c] * 3, 1)], 1),
    vectors,
)

# ---- contractions --------------------------------------------------------------------------------------------------

for _name, _shapes, _equation in (
    ("implicit output", [(20, 10)], "bi,io"),
    ("spaces", [(20, 10)], " B I , I O -> B O "),
    ("two weights", [(20, 4), (4, 10)], "bi,ik,ko->bo"),
    ("a letter of the weight alone", [(20, 3, 10)], "bi,iko->bo"),
):
    functional(
        f"einsum: {_name}",
        lambda shapes=_shapes: {f"w{i}": weight(*s) for i, s in enumerate(shapes)},
        lambda m, x, equation=_equation: torch.einsum(equation, x, *m.parameters()),  # type: ignore[misc]
        vectors,
    )
functional(
    "einsum: sublists",
    lambda: {"w": weight(20, 10)},
    lambda m, x: torch.einsum(x, [0, 1], m.w, [1, 2], [0, 2]),
    vectors,
)
functional(
    "einsum: ellipses",
    lambda: {"w": weight(7, 12, 10), "v": weight(10, 10)},
    lambda m, x: torch.einsum("...i,io->...o", torch.einsum("b...i,...io->b...o", x, m.w), m.v).mean(1),
    sequences,
)
functional(
    "einsum: two inputs",
    lambda: {"w": weight(20, 20, 10)},
    lambda m, x: torch.einsum("bi,bj,ijo->bo", x, x.tanh(), m.w),
    vectors,
)
functional(
    "einsum: a diagonal",
    lambda: {"w": weight(20, 20), "head": _head()},
    lambda m, x: m.head(torch.einsum("bi,ii->bi", x, m.w)),
    vectors,
    fallback=["w"],
)
functional(
    "heads that broadcast",
    lambda: {"w": weight(4, 12, 6), "head": _head(24)},
    lambda m, x: m.head((x.unsqueeze(1) @ m.w).transpose(1, 2).flatten(2).tanh().mean(1)),
    sequences,
)
functional(
    "weight on the left",
    lambda: {"w": weight(1, 9, 7), "v": weight(9, 9), "head": _head(108)},
    lambda m, x: m.head((m.v @ (m.w @ x).tanh()).flatten(1)),
    sequences,
)
functional(
    "bmm with an expanded weight",
    lambda: {"w": weight(1, 12, 10)},
    lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)).mean(1),
    sequences,
)
functional(
    "baddbmm over groups",
    lambda: {"w": weight(4, 5, 10), "b": weight(4, 1, 10), "v": weight(4, 10, 10)},
    lambda m, x: torch.bmm(torch.baddbmm(m.b, _grouped(x), m.w, alpha=0.5).tanh(), m.v).sum(0),
    vectors,
)
functional(
    "addmm, scaled",
    lambda: {"w": weight(20, 10), "b": weight(10)},
    lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0),
    vectors,
)
functional(
    "matrix times vector",
    lambda: {"w": weight(20), "v": weight(20), "head": _head(2)},
    lambda m, x: m.head(torch.stack([torch.mv(x, m.w), x @ m.v], 1)),
    vectors,
)
functional(
    "tensordot and inner",
    lambda: {"w": weight(7, 12, 10), "v": weight(10, 12)},
    lambda m, x: torch.tensordot(x, m.w, dims=2) + torch.inner(x, m.v).mean(1),
    sequences,
)
functional(
    "multi_dot", lambda: {"w": weight(20, 8), "v": weight(8, 10)},
    lambda m, x: torch.linalg.multi_dot([x, m.w, m.v]), vectors,
)  # fmt: skip

# ---- complex parameters --------------------------------------------------------------------------------------------


def _complex(*shape: int) -> nn.Parameter:
    return weight(*shape, dtype=torch.complex64)


functional(
    "complex scale",
    lambda: {"w": _complex(11), "head": _head()},
    lambda m, x: m.head(torch.fft.irfft(torch.fft.rfft(x) * m.w, n=20)),
    vectors,
)
functional(
    "Fourier neural operator",
    lambda: {"w": _complex(12, 12, 4), "head": _head(12)},
    lambda m, x: m.head(
        torch.fft.irfft(torch.einsum("bix,iox->box", torch.fft.rfft(x.mT), m.w), n=7).mT.tanh().mean(1)
    ),
    sequences,
)
functional(
    "complex linear map",
    lambda: {"w": _complex(12, 11), "b": _complex(12), "v": _complex(12, 10)},
    lambda m, x: (F.linear(torch.fft.rfft(x), m.w, m.b) @ m.v).abs(),
    vectors,
)

# ---- broadcasting --------------------------------------------------------------------------------------------------

functional(
    "temperature",
    lambda: {"t": nn.Parameter(torch.tensor(0.8)), "s": nn.Parameter(torch.tensor(0.3)), "head": _head()},
    lambda m, x: m.head(x) / m.t * m.s.clamp(max=4).exp(),
    vectors,
)
functional(
    "keywords",
    lambda: {"t": weight(10), "lo": nn.Parameter(-torch.rand(20)), "hi": nn.Parameter(torch.rand(20)), "head": _head()},
    lambda m, x: torch.add(m.head(torch.clamp(x, min=m.lo, max=m.hi)), other=m.t, alpha=0.3),
    vectors,
)
functional(
    "filled where masked",
    lambda: {"t": nn.Parameter(torch.tensor(0.5)), "token": weight(12), "head": _head(12)},
    lambda m, x: m.head(torch.where(x[..., :1] > 0, m.token, x).masked_fill(x > 1, m.t).tanh()).mean(1),
    sequences,
)
functional(
    "shape and type of the input",
    lambda: {"a": weight(12), "b": weight(12), "c": weight(12), "buffer": torch.randn(7, 12), "head": _head(12)},
    lambda m, x: m.head(x * m.a.expand_as(x) + m.b.type_as(x) + m.buffer.to(x) * m.c.to(x)).mean(1),
    sequences,
)

# ---- copies of one parameter for each sample -----------------------------------------------------------------------

for _name, _copies in (
    ("expanded and contiguous", lambda t, n: t.expand(n, -1, -1).contiguous()),
    ("expanded and cloned", lambda t, n: t.expand(n, -1, -1).clone()),
    ("repeated", lambda t, n: t.repeat(n, 1, 1)),
    ("tiled", lambda t, n: t.tile(n, 1, 1)),
    ("repeated, then a view", lambda t, n: t.unsqueeze(1).repeat(1, n, 1, 1)[0]),
):
    functional(
        f"token {_name}",
        lambda: {"t": weight(1, 1, 12), "head": _head(12)},
        lambda m, x, copies=_copies: m.head(torch.cat([copies(m.t, len(x)), x], 1).tanh()).mean(1),
        sequences,
    )  # type: ignore[misc]
functional(
    "positions and types looked up for each sample",
    lambda: {"p": nn.Embedding(9, 12), "t": nn.Embedding(2, 12), "head": _head(12)},
    lambda m, x: m.head(
        x.add(m.p(torch.arange(x.shape[1]).expand(len(x), -1))).add(m.t(torch.zeros(x.shape[:2]).long())).tanh()
    ).mean(1),
    sequences,
)


def _canvas(m: nn.Module, x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], x.shape[1] + 1, 12)
    out[:, 0] = m.t
    out[:, 1:] = x
    return m.head(m.body(out).tanh().mean(1))


functional(
    "token written into a canvas",
    lambda: {"t": weight(12), "body": nn.Linear(12, 12), "head": _head(12)},
    _canvas,
    sequences,
    fallback=["t"],
)


def _padded(m: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], x.shape[1] + 2, 12, dtype=x.dtype, device=x.device)
    out[:, 1:-1] = x
    return m.head(m.body(out).tanh().mean(1))


functional("data written into a canvas", lambda: {"body": nn.Linear(12, 12), "head": _head(12)}, _padded, sequences)

# ---- picked by data ------------------------------------------------------------------------------------------------

functional(
    "one-hot product",
    lambda: {"w": weight(30, 12), "head": _head(12)},
    lambda m, i: m.head((F.one_hot(i, 30).to(m.w.dtype) @ m.w).tanh().mean(1)),
    tokens,
)
functional(
    "mixture of experts, all of them",
    lambda: {"gate": nn.Linear(12, 3), "up": weight(3, 12, 8), "down": weight(3, 8, 12), "head": _head(12)},
    lambda m, x: m.head(
        (
            torch.einsum("btef,efd->bted", torch.einsum("btd,edf->btef", x, m.up).relu(), m.down)
            * m.gate(x).softmax(-1)[..., None]
        ).sum(2).mean(1)
    ),
    sequences,
)  # fmt: skip

# ---- copies of a weight, rows that happen to be the same -------------------------------------------------------------


def _copied(name: str, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A product whose outputs are seven times the same, in a model that looks at each of them."""
    functional(
        f"copies of a weight in {name}",
        lambda: {"v": weight(20), "seven": nn.Parameter(torch.randn(7)), "head": _head(7)},
        lambda m, x: m.head((product(x, m.v) * m.seven).tanh()),
        vectors,
    )


_copied("einsum", lambda x, v: torch.einsum("bi,oi->bo", x, v.repeat(7, 1)))
_copied("einsum, summed", lambda x, v: torch.einsum("bi,oi->b", x, v.repeat(7, 1))[:, None].expand(-1, 7))
_copied("inner", lambda x, v: torch.inner(x, v.expand(7, 20)))
_copied("bmm", lambda x, v: torch.bmm(x[:, None], v[None, :, None].expand(len(x), 20, 7))[:, 0])
_copied("tensordot", lambda x, v: torch.tensordot(x, v.repeat(7, 1), ([1], [1])))

for _name, _rows in (
    ("zeros", lambda m: m.rows),
    ("an embedding of zeros", lambda m: m.table(torch.arange(5))),
):
    functional(
        f"as many equal rows as samples: {_name}",
        lambda: {
            "rows": nn.Parameter(torch.zeros(5, 12)),
            "table": nn.Embedding.from_pretrained(torch.zeros(5, 12), freeze=False),
            "body": nn.Linear(12, 12),
            "head": _head(60),
        },
        lambda m, x, rows=_rows: m.head((x[:, :5] + m.body(rows(m))).tanh().flatten(1)),
        sequences,
    )
functional(
    "as many equal rows as samples: ones",
    lambda: {"w": weight(3, 12), "head": _head(60)},
    lambda m, x: m.head((x[:, :5] + x.new_ones(5, 3) @ m.w).tanh().flatten(1)),
    sequences,
)
for _name, _expanded in (
    ("product", lambda m: m.v[:, None].expand(10, 20) @ m.w),
    ("linear layer", lambda m: F.linear(m.v[:, None].expand(10, 20), m.w)),
    ("vector", lambda m: m.v[:, None] * (m.v[0].expand(20) @ m.w)),
):
    functional(
        f"a weight expanded along the sum of a {_name}",
        lambda: {"v": weight(10), "w": weight(20, 20)},
        lambda m, x, expanded=_expanded: F.linear(x, expanded(m)),
        vectors,
    )
