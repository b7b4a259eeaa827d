"""The native operators and their twins, against a float64 loop over awkward shapes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cape.errors import SpecError
from cape.probing import ops
from cape.probing.ops import ConvGeometry

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
    a, g = a.double(), g.double()
    return torch.stack([(a[b].T @ g[b]).square().sum() for b in range(len(a))]) if len(a) else a.new_zeros(0)


def conv_reference(x: Tensor, g: Tensor, c: ConvGeometry) -> Tensor:
    """By autograd, one sample at a time."""
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    b, t, d, p = shape
    a, g = torch.randn(b, t, d, dtype=dtype), torch.randn(b, t, p, dtype=dtype)
    with ops.use_backend(backend):
        assert_close(ops.linear_sq_norms(a, g), linear_reference(a, g), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("t", "d", "p"), [(40, 15, 37), (5, 48, 64), (1, 9, 4)])
def test_linear_takes_any_strides(t: int, d: int, p: int, backend: str) -> None:
    time_major = torch.randn(t, 3, d).transpose(0, 1)
    feature_major = torch.randn(3, p, t).transpose(1, 2)
    sparse = torch.randn(3, t, 2 * d)[..., ::2]
    expanded = torch.randn(3, 1, p).expand(3, t, p)
    with ops.use_backend(backend):
        for a, g in itertools.product((time_major, sparse), (feature_major, expanded)):
            assert_close(ops.linear_sq_norms(a, g), linear_reference(a, g), torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", CONV, ids=lambda s: f"{s[0]}x{s[1]}to{s[2]}-{s[3]}-g{s[4].groups}")
def test_conv(setting: tuple, dtype: torch.dtype, backend: str) -> None:
    frames, channels, outputs, size, geometry = setting
    x = torch.randn(3, frames, channels, *size, dtype=dtype)
    g = torch.randn(3, frames, outputs, *out_size(size, geometry), dtype=dtype)
    with ops.use_backend(backend):
        assert_close(ops.conv_sq_norms(x, g, geometry), conv_reference(x, g, geometry), dtype)
        strided = x.transpose(-1, -2).contiguous().transpose(-1, -2)
        assert_close(ops.conv_sq_norms(strided, g, geometry), conv_reference(x, g, geometry), dtype)
        assert len(ops.conv_sq_norms(x[:0], g[:0], geometry)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_conv_gradients_have_these_norms(backend: str) -> None:
    for frames, channels, outputs, size, geometry in CONV:
        x, g = torch.randn(2, frames, channels, *size), torch.randn(2, frames, outputs, *out_size(size, geometry))
        norms = ops.conv_grads(x, g, geometry).flatten(1).double().square().sum(1)
        with ops.use_backend(backend):
            torch.testing.assert_close(ops.conv_sq_norms(x, g, geometry), norms, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 4), (2, 0), (5, 1134), (4, 3, 5), (6,)])
def test_sq_norms(shape: tuple[int, ...], backend: str) -> None:
    x = torch.randn(*shape)
    with ops.use_backend(backend):
        expected = x.double().reshape(shape[0], x.shape[1:].numel()).square().sum(1)
        torch.testing.assert_close(ops.sq_norms(x), expected, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (3, 2, 5, 7), (2, 65, 33, 1), (2, 1, 3, 1134), (0, 2, 3, 4), (2, 0, 3, 4)]
)
def test_pair_sums(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    g, x = torch.randn(*shape, dtype=dtype), torch.randn(*shape, dtype=dtype)
    strided = g.transpose(2, 3).contiguous().transpose(2, 3)
    expected = torch.stack([g.double().sum((1, 3)), (g.double() * x.double()).sum((1, 3))])
    with ops.use_backend(backend):
        for first in (g, strided):
            sums = ops.pair_sums(first, x)
            assert sums.dtype == torch.float64
            torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-11)


def test_a_vanishing_sum_is_not_negative() -> None:
    a = torch.ones(2, 2, 40)
    g = torch.randn(2, 1, 40).expand(2, 2, 40) * torch.tensor([1.0, -1.0]).view(1, 2, 1)
    for backend in BACKENDS:
        with ops.use_backend(backend):
            norms = ops.linear_sq_norms(a, g)
        assert bool((norms >= 0).all()) and bool((norms < 1e-6).all())


def test_opcheck() -> None:
    ops.native_module()
    geometry = CONV[3][4]
    a, g = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    torch.library.opcheck(torch.ops.cape.linear_sq_norms, (a, g))
    torch.library.opcheck(torch.ops.cape.sq_norms, (a[0],))
    torch.library.opcheck(torch.ops.cape.pair_sums, (torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)))
    x, y = torch.randn(2, 1, 13, 9, 7), torch.randn(2, 1, 33, 9, 7)
    c = (geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    torch.library.opcheck(torch.ops.cape.conv_sq_norms, (x, y, *c))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    ops.native_module()
    with pytest.raises(RuntimeError, match="agree in their first two dimensions"):
        torch.ops.cape.linear_sq_norms(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4))
    with pytest.raises(RuntimeError, match="do not reach"):
        torch.ops.cape.conv_sq_norms(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 9), [3], [1], [0], [1], 1)
    with pytest.raises(RuntimeError, match="groups"):
        torch.ops.cape.conv_sq_norms(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 2, 2), [3], [1], [0], [1], 2)


def test_unknown_backend() -> None:
    with pytest.raises(SpecError, match="Unknown backend"), ops.use_backend("fast"):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear_on_cuda(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, t, d, p = shape
    a, g = torch.randn(b, t, d, dtype=dtype), torch.randn(b, t, p, dtype=dtype)
    first = ops.linear_sq_norms(a.cuda(), g.cuda())
    assert_close(first.cpu(), linear_reference(a, g), dtype)
    assert torch.equal(first, ops.linear_sq_norms(a.cuda(), g.cuda()))
