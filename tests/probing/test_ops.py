"""The native operators and their twins, against a float64 loop over awkward shapes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cape
from cape.errors import SpecError
from cape.probing import ops
from cape.probing.ops import ConvGeometry
from cape.probing.recurrent_ops import TWINS

BACKENDS = ["native", "torch"]
DTYPES = [torch.float32, torch.float64]

# [B, T, d, p]: one, odd, large, empty, and both sides of the direct/Gram choice.
LINEAR = [
    (1, 1, 1, 1), (3, 1, 7, 5), (2, 5, 3, 1), (4, 7, 13, 11), (2, 129, 17, 33), (3, 64, 31, 3), (2, 3, 151, 257),
    (5, 33, 64, 48), (1, 300, 12, 32), (0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 17, 96, 1134),
]  # fmt: skip

# frames, channels, outputs, size, geometry
CONV = [
    (1, 3, 4, (8,), ConvGeometry((3,), (1,), (1,), (1,), 1)),
    (1, 4, 6, (9,), ConvGeometry((4,), (2,), (3,), (2,), 2)),
    (1, 3, 8, (16, 16), ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    (1, 13, 33, (9, 7), ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    (1, 12, 32, (32, 32), ConvGeometry((3, 3), (2, 2), (0, 0), (1, 1), 1)),
    (2, 8, 16, (7, 9), ConvGeometry((3, 5), (2, 1), (2, 0), (2, 1), 4)),
    (1, 64, 70, (4, 4), ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    (3, 16, 16, (5, 11), ConvGeometry((3, 3), (1, 2), (1, 1), (1, 1), 16)),
    (1, 5, 7, (6, 6), ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    (1, 2, 3, (4, 5, 3), ConvGeometry((2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1), 1)),
    (1, 3, 4, (1, 1), ConvGeometry((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    (1, 3, 2, (5, 5), ConvGeometry((5, 5), (3, 3), (4, 4), (1, 1), 1)),
]


def out_size(size: tuple[int, ...], c: ConvGeometry) -> tuple[int, ...]:
    return tuple(
        (n + 2 * p - (k - 1) * d - 1) // s + 1
        for n, k, s, p, d in zip(size, c.kernel, c.stride, c.padding, c.dilation, strict=True)
    )


def linear_reference(a: Tensor, g: Tensor) -> Tensor:
    """By a loop: a [B, T, d], g [K, B, T, p] to [K, B]."""
    a, g = a.double(), g.double()
    norms = [(a[b].T @ one[b]).square().sum() for one in g for b in range(len(a))]
    return torch.stack(norms).view(len(g), -1) if norms else a.new_zeros(len(g), 0)


def conv_reference(x: Tensor, g: Tensor, c: ConvGeometry) -> Tensor:
    """By autograd, one sample at a time."""
    if g.dim() > x.dim():
        return torch.stack([conv_reference(x, one, c) for one in g])
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(c.kernel) - 1]
    norms = []
    for xb, gb in zip(x.double(), g.double(), strict=True):
        w = torch.zeros(g.shape[2], x.shape[2] // c.groups, *c.kernel, dtype=torch.float64, requires_grad=True)
        y = conv(xb, w, None, c.stride, c.padding, c.dilation, c.groups)
        (grad,) = torch.autograd.grad(y, w, gb)
        norms.append(grad.square().sum())
    return torch.stack(norms)


def assert_close(ours: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, reference, rtol=1e-5 if dtype == torch.float32 else 1e-11, atol=1e-30)


@pytest.mark.parametrize("form", ["native direct", "native gram", "native auto", "torch auto"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    b, t, d, p = shape
    a, g = torch.randn(b, t, d, dtype=dtype), torch.randn(3, b, t, p, dtype=dtype)
    biases = g.double().sum(2).square().sum(2)
    with ops.use_backend(form.split()[0]):
        for count in (0, 2):
            ours = ops.linear_sq_norms(a, g, biases=count, form=form.split()[1])
            assert_close(ours, linear_reference(a, g) + count * biases, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "t", "d", "p"), [(1, 2, 64, 48), (5, 7, 96, 33), (3, 6, 40, 300), (0, 4, 64, 64)])
def test_linear_whose_terms_cancel(b: int, t: int, d: int, p: int, dtype: torch.dtype, backend: str) -> None:
    """Positions that are nearly the same, with gradients that are nearly opposite: a Gram form keeps few digits."""
    near = 1e-3 if dtype == torch.float32 else 1e-6
    a = torch.randn(b, 1, d, dtype=dtype) + near * torch.randn(b, t, d, dtype=dtype)
    g = torch.randn(2, b, 1, p, dtype=dtype) * torch.ones(t, 1, dtype=dtype).cumsum(0).sub((t + 1) / 2)
    g[1] = torch.randn(b, t, p, dtype=dtype)  # the other cotangent's terms do not cancel
    with ops.use_backend(backend):
        for strided in (g, g.transpose(2, 3).contiguous().transpose(2, 3)):
            assert_close(ops.linear_sq_norms(a, strided), linear_reference(a, g), dtype)
    if b and backend == "native":
        gram = ops.linear_sq_norms(a, g, form="gram")[0]
        assert float((gram / linear_reference(a, g)[0] - 1).abs().max()) > (1e-5 if dtype == torch.float32 else 1e-11)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "geometry"),
    [
        ((4, 4), ConvGeometry((3, 3), (1, 1), (0, 0), (1, 1), 1)),  # Gram
        ((8, 8), ConvGeometry((5, 5), (1, 1), (0, 0), (1, 1), 1)),  # shifted Gram
        ((8, 8), ConvGeometry((5, 5), (1, 1), (2, 2), (1, 1), 1)),
        ((9, 7), ConvGeometry((3, 2), (2, 3), (2, 1), (2, 1), 2)),
        ((11,), ConvGeometry((3,), (2,), (1,), (1,), 1)),
        ((3, 4, 5), ConvGeometry((2, 2, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 4)),
    ],
)
def test_a_convolution_whose_terms_cancel(size: tuple[int, ...], geometry: ConvGeometry, dtype: torch.dtype) -> None:
    """Pixels that are nearly the same, with gradients whose sum is nearly nothing, in every form that is chosen."""
    far = 100.0 if dtype == torch.float32 else 1e6
    x = torch.randn(2, 2, 64, *size, dtype=dtype) + far
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            size, geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True
        )
    ]
    g = torch.randn(2, 2, 2, 64, *out, dtype=dtype)
    flat = g.flatten(4)  # a view
    flat[0] -= flat[0].mean((1, 3), keepdim=True)
    with ops.use_backend("native"):
        ours = ops.conv_sq_norms(x, g, geometry)
        direct = ops.conv_sq_norms(x, g, geometry, form="direct")
    exact = conv_reference(x.double(), g.double(), geometry)
    # A CUDA kernel's norms are looked at by torch: here those of a CPU's Gram form are, by the same functions.
    gram, terms = ops.conv_sq_norms(x, g, geometry, form="gram"), ops._conv_terms(x, g, geometry)
    kept = ops._direct_where_cancelled(gram.clone(), terms, dtype, lambda some: direct[:, some])
    lost = not any(geometry.padding)  # else windows at the border are unlike the others
    assert torch.equal(kept[0], (direct if lost else gram)[0]) and not torch.equal(gram[0], direct[0])
    # The norms of one position after the other, which has only positive terms: those of a group are a product.
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
    window = torch.ones(geometry.groups, 64 // geometry.groups, *geometry.kernel, dtype=torch.float64)
    how = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    seen = conv(x.double().square().flatten(0, 1), window, None, *how).unflatten(0, (2, 2))
    total = (g.double().square().unflatten(3, (geometry.groups, -1)).sum(4) * seen).flatten(2).sum(2)
    torch.testing.assert_close(terms, total, rtol=1e-4, atol=0.0)
    # What rounding the inputs costs any form, the direct one also has.
    bound = 3 * (direct / exact - 1).abs().amax() + (1e-5 if dtype == torch.float32 else 1e-10)
    assert float((ours / exact - 1).abs().amax()) <= float(bound)


def test_linear_without_inputs_or_cotangents() -> None:
    for backend in BACKENDS:
        with ops.use_backend(backend):
            assert ops.linear_sq_norms(torch.randn(4, 1, 0), torch.randn(0, 4, 1, 5), biases=1).shape == (0, 4)


@pytest.mark.parametrize("size", [1e-24, 1e19])
def test_squares_beyond_float32(size: float) -> None:
    """Numbers that float32 has, but not their squares: Winograd's form and one row with a number per channel."""
    x, y = torch.randn(3, 1, 4, 6, 6), size * torch.randn(2, 3, 1, 5, 6, 6)
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    g, row, one = size * torch.randn(2, 3, 1, 40, 1), torch.randn(3, 1, 40, 1), torch.ones(1, 1, 1)
    with ops.use_backend("torch"):
        conv = ops.conv_sq_norms(x.double(), y.double(), geometry)
        affine = ops.affine_sq_norms(g.double(), row.double(), one, one)
    with ops.use_backend("native"):
        ours = ops.conv_sq_norms(x, y, geometry, form="winograd"), ops.affine_sq_norms(g, row, one, one)
    torch.testing.assert_close(ours, (conv, affine), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("form", ["native direct", "native gram", "torch auto"])
@pytest.mark.parametrize(("t", "d", "p"), [(40, 15, 37), (5, 48, 64), (1, 9, 4)])
def test_linear_takes_any_strides(t: int, d: int, p: int, form: str) -> None:
    time_major = torch.randn(t, 3, d).transpose(0, 1)
    feature_major = torch.randn(2, 3, p, t).transpose(2, 3)
    sparse = torch.randn(3, t, 2 * d)[..., ::2]
    expanded = torch.randn(3, 1, p).expand(2, 3, t, p)
    inner = torch.randn(3, t, 2, p).movedim(2, 0)  # cotangents inside
    with ops.use_backend(form.split()[0]):
        for a, g in itertools.product((time_major, sparse), (feature_major, expanded, inner)):
            ours = ops.linear_sq_norms(a, g, form=form.split()[1])
            assert_close(ours, linear_reference(a, g), torch.float32)


def forms_of(channels: int, outputs: int, c: ConvGeometry) -> list[str]:
    """Every form that a convolution has."""
    forms = ["auto", "direct", "gram", "narrow"]
    dense = all(s == 1 for s in c.stride)
    forms += ["shifted"] if dense else []
    forms += ["winograd"] if dense and c.kernel == (3, 3) and c.dilation == (1, 1) else []
    return forms + (["channelwise"] if c.groups == channels == outputs else [])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", CONV, ids=lambda s: f"{s[0]}x{s[1]}to{s[2]}-{s[3]}-g{s[4].groups}")
def test_conv(setting: tuple, dtype: torch.dtype) -> None:
    frames, channels, outputs, size, geometry = setting
    x = torch.randn(3, frames, channels, *size, dtype=dtype)
    g = torch.randn(2, 3, frames, outputs, *out_size(size, geometry), dtype=dtype)
    reference = conv_reference(x, g, geometry)
    with ops.use_backend("torch"):
        assert_close(ops.conv_sq_norms(x, g, geometry), reference, dtype)
    strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    with ops.use_backend("native"):
        for form in forms_of(channels, outputs, geometry):
            if form == "shifted" and frames > 1:
                continue  # one image per sample only
            assert_close(ops.conv_sq_norms(x, g, geometry, form=form), reference, dtype)
        assert_close(ops.conv_sq_norms(strided, g, geometry), reference, dtype)
        assert ops.conv_sq_norms(x[:0], g[:, :0], geometry).shape == (2, 0)


@pytest.mark.parametrize("channels", [3, 64])
@pytest.mark.parametrize("positions", [(16, 16), (33, 16), (16, 64), (32, 63), (1, 1)], ids=str)
def test_conv_whose_gradient_ends_before_the_image(positions: tuple[int, int], channels: int) -> None:
    geometry = ConvGeometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    x, g = torch.randn(2, 1, channels, 33, 64), torch.randn(2, 2, 1, channels, *positions)
    with ops.use_backend("torch"):
        expected = ops.conv_sq_norms(x.double(), g.double(), geometry)
        assert_close(ops.conv_sq_norms(x, g, geometry), expected, torch.float32)
    with ops.use_backend("native"):
        for form in ("auto", "direct", "gram", "shifted", "narrow"):
            if form != "shifted" or channels == 3:  # a Gram matrix of all 2310 padded pixels
                assert_close(ops.conv_sq_norms(x, g, geometry, form=form), expected, torch.float32)
        with pytest.raises(RuntimeError, match="no form 'winograd'"):
            ops.conv_sq_norms(x, g, geometry, form="winograd")


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_gradients_have_these_norms(backend: str) -> None:
    for frames, channels, outputs, size, geometry in CONV:
        x, g = torch.randn(2, frames, channels, *size), torch.randn(2, frames, outputs, *out_size(size, geometry))
        norms = ops.conv_grads(x, g, geometry).flatten(1).double().square().sum(1)
        with ops.use_backend(backend):
            ours = ops.conv_sq_norms(x, g.unsqueeze(0), geometry)[0]
            torch.testing.assert_close(ours, norms, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 4), (2, 0), (5, 1134), (4, 3, 5), (6,)])
def test_sq_norms(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(*shape)
    with ops.use_backend(backend):
        expected = x.double().reshape(shape[0], x.shape[1:].numel()).square().sum(1)
        torch.testing.assert_close(ops.sq_norms(x), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_size_sums(dtype: torch.dtype, backend: str) -> None:
    shapes = [(), (1,), (0, 3), (7, 9), (31,), (2, 3, 5, 7), (33, 1000), (3, 32768)]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    tensors += [tensors[3].t(), tensors[6][::2, ::3], tensors[5].to(memory_format=torch.channels_last)]
    wide = [t.double().flatten() for t in tensors]
    expected = torch.stack([torch.stack([t.abs().sum(), t.square().sum()]) for t in wide])
    with ops.use_backend(backend):
        torch.testing.assert_close(ops.size_sums(tensors), expected, rtol=1e-13, atol=0.0)
        assert torch.equal(ops.size_sums(tensors[6:7]), ops.size_sums(tensors)[6:7])  # whatever lies beside it
        mixed = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)]
        torch.testing.assert_close(ops.size_sums(mixed), torch.tensor([[3.0, 3.0], [2.0, 2.0]]).double())
        assert ops.size_sums([]).shape == (0, 2)
        odd = torch.tensor([1.0, math.nan]), torch.tensor([math.inf, 2.0]), torch.tensor([-0.0])
        assert str(ops.size_sums(odd).tolist()) == "[[nan, nan], [inf, inf], [0.0, 0.0]]"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1), (3, 2, 5, 7), (2, 65, 33, 1), (2, 1, 3, 1134), (2, 1, 37, 1), (0, 2, 3, 4), (2, 0, 3, 4)],
    ids=str,
)
def test_affine(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    b, r, c, _ = shape
    g, x = torch.randn(2, *shape, dtype=dtype), torch.randn(*shape, dtype=dtype) + 1
    strided = g.transpose(3, 4).contiguous().transpose(3, 4)
    for vary in ((1, 1, c), (b, r, 1), (b, 1, c), (b, r, c)):  # batch, layer, group and any other norm
        mean, inverse = torch.randn(vary, dtype=dtype), torch.rand(vary, dtype=dtype) + 0.5
        for m, scale, shift in ((mean, True, True), (None, True, False), (mean, False, True)):
            hat = (x.double() - (0 if m is None else m.double().unsqueeze(-1))) * inverse.double().unsqueeze(-1)
            expected = torch.zeros(2, b, dtype=torch.float64)
            expected += (g.double() * hat).sum((2, 4)).square().sum(2) if scale else 0
            expected += g.double().sum((2, 4)).square().sum(2) if shift else 0
            with ops.use_backend(backend):
                for first in (g, strided):
                    ours = ops.affine_sq_norms(first, x, m, inverse, scale=scale, shift=shift)
                    tolerance = 1e-4 if dtype == torch.float32 else 1e-11  # sums of signed terms
                    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=1e-5 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("s", [1, 6])
@pytest.mark.parametrize("rows", [1, 2])
def test_affine_takes_statistics_of_any_strides(rows: int, s: int, backend: str) -> None:
    g, x = torch.randn(2, 3, rows, 20, s), torch.randn(3, rows, 20, s)
    weight, inverse = torch.randn(20), torch.rand(1, 1, 20) + 0.5
    means = [torch.zeros(1).expand(20), torch.randn(20, 2)[:, 0], torch.randn(20), torch.randn(())]
    means += [torch.randn(3, rows, 1), torch.randn(3, 20, rows).transpose(1, 2), torch.randn(1, 1, 20, 2)[..., 0]]
    for m, i in itertools.product(means, (inverse, inverse[..., :1], torch.rand(3, 1, 20), torch.rand(rows, 20))):
        expected = ops.affine_sq_norms_torch(g.double(), x.double(), m.double(), i.double(), True, True)
        with ops.use_backend(backend):
            norms = ops.affine_sq_norms(g, x, m, i)
            dx, same = ops.affine_pull(g, x, m, i, weight, own=False)
            assert ops.affine_sq_norms(g[:, :0], x[:0], torch.zeros(1).expand(20), inverse).shape == (2, 0)
        assert torch.equal(norms, same)
        torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(dx, ops.affine_back_torch(g, x, m, i, weight, False))


@pytest.mark.parametrize("mean", [torch.zeros(1).expand(4), torch.zeros(4, 2)[:, 0]], ids=["expanded", "strided"])
def test_running_statistics_of_any_strides(mean: Tensor) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    batch = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    norms, features = cape.per_sample_norms(model, batch), cape.probe(model, batch, lr=0.1, dataset_size=100)
    model[1].running_mean = mean  # the same numbers
    torch.testing.assert_close(cape.per_sample_norms(model, batch), norms)
    if mean.stride(0):  # torch's own train mode writes four numbers into one
        same = cape.probe(model, batch, lr=0.1, dataset_size=100)
        assert same.log_g2 == pytest.approx(features.log_g2, rel=1e-5)


def test_rows_of_their_own_statistics_refuse_a_channels() -> None:
    ops.native_module()
    g, x, one = torch.zeros(1, 2, 3, 4, 1), torch.zeros(2, 3, 4, 1), torch.ones(1, 1, 1)
    for mean, inverse in ((one.expand(1, 1, 4), one), (one, one.expand(1, 1, 4))):
        with pytest.raises(RuntimeError, match=r"must have shape \[B, R, 1\]"):
            torch.ops.cape.affine_pull(g, x, mean, inverse, None, True, True, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("steps", "batch", "hidden", "cotangents"), [(1, 1, 1, 1), (3, 2, 5, 2), (4, 19, 33, 3)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_cells(cell: str, steps: int, batch: int, hidden: int, cotangents: int, dtype: torch.dtype) -> None:
    """Against torch's own layer in float64: outputs, and gradients at the inputs' projections and first states."""
    gates = 4 if cell == "lstm" else 3
    torch.manual_seed(0)
    pre, w = torch.randn(steps, batch, gates * hidden), torch.randn(gates * hidden, hidden) / hidden**0.5
    bias, h0, c0 = torch.randn(gates * hidden), torch.randn(batch, hidden), torch.randn(batch, hidden)
    grad_h, grad_c = torch.randn(steps, cotangents, batch, hidden), torch.randn(cotangents, batch, hidden)

    layer = (nn.LSTM if cell == "lstm" else nn.GRU)(gates * hidden, hidden).double()
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(gates * hidden))
        layer.weight_hh_l0.copy_(w)
        layer.bias_ih_l0.zero_()
        layer.bias_hh_l0.copy_(bias if cell == "gru" else torch.zeros_like(bias))
    leaves = [t.double().requires_grad_() for t in ((pre, h0, c0) if cell == "lstm" else (pre, h0))]
    states = tuple(t.unsqueeze(0) for t in leaves[1:])
    out, last = layer(leaves[0], states if cell == "lstm" else states[0])
    outputs = (out, last[1][0]) if cell == "lstm" else (out,)
    expected = [
        torch.autograd.grad(
            outputs, leaves, (grad_h[:, k].double(), grad_c[k].double())[: len(outputs)], retain_graph=True
        )
        for k in range(cotangents)
    ]

    pre, w, bias, h0, c0, grad_h, grad_c = (t.to(dtype) for t in (pre, w, bias, h0, c0, grad_h, grad_c))
    for run in (lambda name, *args: getattr(torch.ops.cape, name)(*args), lambda name, *args: TWINS[name](*args)):
        if cell == "lstm":
            h, act, c = run("lstm_sequence", pre, w, h0, c0)
            back = run("lstm_sequence_backward", grad_h, grad_c, act, c, w, c0)
        else:
            h, act, side = run("gru_sequence", pre, w, bias, h0)
            d_pre, d_side, d_h0 = run("gru_sequence_backward", grad_h, act, side, h, w, h0)
            back = (d_pre, d_h0)
            r = act[:, :, :hidden].unsqueeze(1)  # the new gate's hidden side is multiplied by the reset gate
            torch.testing.assert_close(d_side[..., 2 * hidden :], d_pre[..., 2 * hidden :] * r)
        tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-12}
        torch.testing.assert_close(h.double(), out, **tolerance)
        for k in range(cotangents):
            ours = (back[0][:, k], *(b[k] for b in back[1:]))
            for a, e in zip(ours, expected[k], strict=True):
                torch.testing.assert_close(a.double(), e, **tolerance)


def test_a_vanishing_sum_is_not_negative() -> None:
    a = torch.ones(2, 2, 40)
    g = torch.randn(2, 1, 40).expand(2, 2, 40) * torch.tensor([1.0, -1.0]).view(1, 2, 1)
    for backend in BACKENDS:
        with ops.use_backend(backend):
            norms = ops.linear_sq_norms(a, g.unsqueeze(0))
        assert bool((norms >= 0).all()) and bool((norms < 1e-6).all())


def test_opcheck() -> None:
    ops.native_module()
    geometry = CONV[3][4]
    a, g = torch.randn(2, 5, 3), torch.randn(2, 2, 5, 4)
    torch.library.opcheck(torch.ops.cape.linear_sq_norms, (a, g, 1))
    torch.library.opcheck(torch.ops.cape.sq_norms, (a[0],))
    torch.library.opcheck(torch.ops.cape.size_sums, ([a, g, g[0].transpose(0, 2), a[:0]],))
    pairs, one = torch.randn(2, 3, 4, 5, 6), torch.ones(1, 1, 5)
    torch.library.opcheck(torch.ops.cape.affine_sq_norms, (pairs, pairs[0], one, one, True, True))
    torch.library.opcheck(torch.ops.cape.affine_pull, (pairs, pairs[0], one, one, one[0, 0], True, True, False))
    x, y = torch.randn(2, 1, 13, 9, 7), torch.randn(2, 2, 1, 33, 9, 7)
    c = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    torch.library.opcheck(torch.ops.cape.conv_sq_norms, (x, y, *c))
    h0, w, wide = torch.randn(2, 5), torch.randn(20, 5), torch.randn(3, 2, 20)
    h, gates, c = torch.ops.cape.lstm_sequence(wide, w, h0, h0)
    torch.library.opcheck(torch.ops.cape.lstm_sequence, (wide, w, h0, h0))
    back = (h.unsqueeze(1).contiguous(), h0.unsqueeze(0), gates, c, w, h0)
    torch.library.opcheck(torch.ops.cape.lstm_sequence_backward, back)
    narrow = (wide[..., :15].contiguous(), w[:15], w[:15, 0].contiguous(), h0)
    h, gates, side = torch.ops.cape.gru_sequence(*narrow)
    torch.library.opcheck(torch.ops.cape.gru_sequence, narrow)
    back = (h.unsqueeze(1).contiguous(), gates, side, h, w[:15], h0)
    torch.library.opcheck(torch.ops.cape.gru_sequence_backward, back)


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    ops.native_module()
    with pytest.raises(RuntimeError, match="agree in B and T"):
        torch.ops.cape.linear_sq_norms(torch.zeros(2, 3, 4), torch.zeros(1, 2, 4, 4))
    x = torch.zeros(1, 1, 3, 4)
    with pytest.raises(RuntimeError, match="do not reach"):
        torch.ops.cape.conv_sq_norms(x, torch.zeros(1, 1, 1, 2, 9), [3], [1], [0], [1], 1)
    with pytest.raises(RuntimeError, match="groups"):
        torch.ops.cape.conv_sq_norms(x, torch.zeros(1, 1, 1, 2, 2), [3], [1], [0], [1], 2)
    with pytest.raises(RuntimeError, match="no form 'winograd'"):
        torch.ops.cape.conv_sq_norms(x, torch.zeros(1, 1, 1, 2, 2), [3], [1], [0], [1], 1, "float32", "winograd")
    with pytest.raises(RuntimeError, match="unknown form 'best'"):
        torch.ops.cape.linear_sq_norms(torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4), 0, "float32", "best")


def refused(name: str, what: str, *args: object) -> None:
    with pytest.raises(RuntimeError, match=rf"cape: {name}: {what} must"):
        getattr(torch.ops.cape, name)(*args)


def test_recurrent_arguments_of_other_shapes_are_refused() -> None:
    ops.native_module()
    t, b, h = 3, 4, 5
    wide, w, state, kept = torch.zeros(t, b, 4 * h), torch.zeros(4 * h, h), torch.zeros(b, h), torch.zeros(t, b, h)
    grad, last, small = torch.zeros(t, 1, b, h), torch.zeros(1, b, h), torch.zeros(1, h)
    refused("lstm_sequence", "h0", wide, w, small, state)
    refused("lstm_sequence", "c0", wide, w, state, small)
    refused("lstm_sequence", "h0", wide, w, state.double(), state)
    refused("lstm_sequence", "w_hh", wide, w.double(), state, state)
    refused("lstm_sequence_backward", "grad_h", grad[:1], last, wide, kept, w, state)
    refused("lstm_sequence_backward", "grad_h", last, last, wide, kept, w, state)
    refused("lstm_sequence_backward", "grad_c", grad, last[:, :1], wide, kept, w, state)
    refused("lstm_sequence_backward", "c", grad, last, wide, kept[:1], w, state)
    refused("lstm_sequence_backward", "c0", grad, last, wide, kept, w, small)
    wide, w, bias = wide[..., : 3 * h], w[: 3 * h], torch.zeros(3 * h)
    refused("gru_sequence", "b_hh", wide, w, bias[:1], state)
    refused("gru_sequence", "h0", wide, w, bias, small)
    refused("gru_sequence_backward", "grad_h", grad[:1], wide, kept, kept, w, state)
    refused("gru_sequence_backward", "side", grad, wide, kept[:1], kept, w, state)
    refused("gru_sequence_backward", "h", grad, wide, kept, kept[:, :1], w, state)
    refused("gru_sequence_backward", "h0", grad, wide, kept, kept, w, small)


def test_unknown_backend() -> None:
    with pytest.raises(SpecError, match="Unknown backend"), ops.use_backend("fast"):
        pass
    with pytest.raises(SpecError, match="Unknown precision"), ops.use_precision("half"):
        pass


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 2, 5, 7), (2, 65, 33, 1), (2, 1, 3, 1134), (2, 1, 37, 1)], ids=str)
def test_affine_pull_of_given_statistics(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    b, r, c, _ = shape
    g, x = torch.randn(3, *shape, dtype=dtype), torch.randn(*shape, dtype=dtype) + 1
    mean, weight = torch.randn(1, 1, c, dtype=dtype), torch.randn(c, dtype=dtype)
    inverse = torch.rand(1, 1, c, dtype=dtype) + 0.5
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    with ops.use_backend(backend):
        for m, w, scale, shift in ((mean, weight, True, True), (None, None, True, False), (mean, weight, False, True)):
            dx, norms = ops.affine_pull(g, strided, m, inverse, w, own=False, scale=scale, shift=shift)
            factor = (inverse if w is None else inverse * w).unsqueeze(-1)
            torch.testing.assert_close(dx, g * factor)
            with ops.use_backend("torch"):
                expected = ops.affine_sq_norms(g.double(), x.double(), m if m is None else m.double(),
                                               inverse.double(), scale=scale, shift=shift)  # fmt: skip
            tolerance = 1e-4 if dtype == torch.float32 else 1e-11  # sums of signed terms
            torch.testing.assert_close(norms, expected, rtol=tolerance, atol=1e-5 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 2, 5), (2, 65, 33), (2, 1, 1134), (2, 17, 48)], ids=str)
def test_affine_pull_of_rows_with_statistics_of_their_own(
    shape: tuple[int, ...], dtype: torch.dtype, backend: str
) -> None:
    """Against autograd through a float64 layer norm, one cotangent and one sample at a time."""
    b, r, c = shape
    g, x = torch.randn(2, *shape, dtype=dtype), torch.randn(*shape, dtype=dtype) + 1
    weight = torch.randn(c, dtype=dtype)
    _, mean, inverse = torch.native_layer_norm(x, (c,), weight, None, 1e-3)
    with ops.use_backend(backend):
        dx, norms = ops.affine_pull(
            g.unsqueeze(-1), x.unsqueeze(-1), mean.view(b, r, 1), inverse.view(b, r, 1), weight, own=True
        )
    for k in range(2):
        for i in range(b):
            leaves = [x[i].double().requires_grad_(), weight.double().requires_grad_(), torch.zeros(c).double()]
            y = F.layer_norm(leaves[0], (c,), leaves[1], leaves[2].requires_grad_(), 1e-3)
            first, *others = torch.autograd.grad(y, leaves, g[k, i].double())
            tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
            torch.testing.assert_close(dx[k, i, :, :, 0].double(), first, **tolerance)
            torch.testing.assert_close(norms[k, i], sum(o.square().sum() for o in others), **tolerance)
