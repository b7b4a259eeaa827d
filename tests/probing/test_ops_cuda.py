"""The operators on a CUDA device, every form and precision, against float64 loops over awkward shapes."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cape.probing import ops

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64]
# Worst relative error of one norm: the operands' rounding, with room for short, cancelling sums.
TOLERANCE = {"float32": 1e-5, "tf32": 1e-2, "bf16": 8e-2}

# [K, B, T, d, p]: one, odd, large, empty, several tiles each way, both copy widths.
LINEAR = [
    (1, 1, 1, 1, 1), (2, 3, 1, 7, 5), (2, 2, 5, 3, 1), (2, 4, 7, 13, 11), (2, 2, 129, 17, 33), (2, 3, 64, 32, 4),
    (2, 2, 3, 151, 257), (11, 5, 33, 64, 48), (2, 1, 300, 12, 32), (101, 2, 6, 24, 10), (2, 0, 4, 3, 2),
    (2, 2, 0, 3, 2), (2, 2, 4, 0, 2), (0, 2, 4, 3, 2), (2, 2, 17, 96, 1134), (2, 2, 320, 512, 300),
    (1, 1, 5000, 70, 70), (2, 16, 197, 768, 768),
]  # fmt: skip

# frames, channels, outputs, size, (kernel, stride, padding, dilation), groups
Conv = tuple[int, int, int, tuple[int, ...], tuple[tuple[int, ...], ...], int]
CONV: list[Conv] = [
    (1, 3, 4, (8,), ((3,), (1,), (1,), (1,)), 1),
    (1, 4, 6, (9,), ((4,), (2,), (3,), (2,)), 2),
    (1, 3, 8, (16, 16), ((3, 3), (1, 1), (1, 1), (1, 1)), 1),
    (1, 13, 33, (9, 7), ((3, 3), (1, 1), (1, 1), (1, 1)), 1),
    (1, 12, 32, (32, 32), ((3, 3), (2, 2), (0, 0), (1, 1)), 1),
    (1, 3, 64, (64, 64), ((7, 7), (2, 2), (3, 3), (1, 1)), 1),
    (1, 3, 96, (32, 32), ((4, 4), (4, 4), (0, 0), (1, 1)), 1),
    (2, 8, 16, (7, 9), ((3, 5), (2, 1), (2, 0), (2, 1)), 4),
    (1, 64, 70, (4, 4), ((3, 3), (1, 1), (1, 1), (1, 1)), 1),
    (1, 128, 256, (28, 28), ((3, 3), (1, 1), (1, 1), (1, 1)), 1),
    (3, 16, 16, (5, 11), ((3, 3), (1, 2), (1, 1), (1, 1)), 16),
    (1, 8, 8, (70, 70), ((7, 7), (1, 1), (3, 3), (1, 1)), 8),
    (1, 5, 7, (6, 6), ((1, 1), (1, 1), (0, 0), (1, 1)), 1),
    (2, 5, 7, (6, 6), ((1, 1), (2, 2), (0, 0), (1, 1)), 1),
    (1, 2, 3, (4, 5, 3), ((2, 3, 1), (1, 2, 1), (1, 1, 0), (1, 1, 1)), 1),
    (1, 3, 4, (1, 1), ((1, 1), (1, 1), (0, 0), (1, 1)), 1),
    (1, 3, 2, (5, 5), ((5, 5), (3, 3), (4, 4), (1, 1)), 1),
    (1, 2, 3, (40, 40), ((3, 3), (1, 1), (12, 12), (12, 12)), 1),
]  # fmt: skip

PAIRS = [
    (2, 1, 1, 1, 1), (2, 3, 2, 5, 7), (3, 2, 65, 33, 1), (1, 2, 1, 3, 1134), (2, 0, 2, 3, 4), (2, 2, 0, 3, 4),
    (11, 2, 4, 8, 16), (2, 1, 1, 2, 50000), (2, 2, 3000, 40, 1),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _native() -> None:
    assert ops.native_module() is not None and ops.native_module().build_info()["cuda"]


def linear_reference(a: Tensor, g: Tensor) -> Tensor:
    """[K, B] in float64: one product per cotangent and sample."""
    return (
        torch.stack([(a.double().mT @ one.double()).square().sum((1, 2)) for one in g])
        if len(g)
        else g.new_zeros(0, len(a), dtype=torch.float64)
    )


def linear_case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    k, b, t, d, p = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(b, t, d, dtype=torch.float64, generator=generator)
    g = torch.randn(k, b, t, p, dtype=torch.float64, generator=generator)
    return a.to("cuda", dtype), g.to("cuda", dtype)


def conv_case(
    setting: Conv, dtype: torch.dtype = torch.float32, cotangents: int = 2, batch: int = 3
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    frames, channels, outputs, size, window, groups = setting
    out = tuple((n + 2 * p - (k - 1) * d - 1) // s + 1 for n, k, s, p, d in zip(size, *window, strict=True))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, frames, channels, *size, dtype=torch.float64, generator=generator)
    g = torch.randn(cotangents, batch, frames, outputs, *out, dtype=torch.float64, generator=generator)
    return x.to("cuda", dtype), g.to("cuda", dtype), (*window, groups)


def conv_reference(x: Tensor, g: Tensor, window: tuple[Any, ...]) -> Tensor:
    """[K, B] in float64, by autograd on the CPU, one sample at a time."""
    kernel, stride, padding, dilation, groups = window
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    x, g = x.double().cpu(), g.double().cpu()
    norms = torch.zeros(g.shape[:2], dtype=torch.float64)
    for k, b in itertools.product(range(g.shape[0]), range(g.shape[1])):
        w = torch.zeros(g.shape[3], x.shape[2] // groups, *kernel, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(conv(x[b], w, None, stride, padding, dilation, groups), w, g[k, b])
        norms[k, b] = grad.square().sum()
    return norms.cuda()


@cache
def conv_expected(setting: Conv, dtype: torch.dtype) -> Tensor:
    """The reference of ``conv_case(setting, dtype)``, computed once for all forms."""
    return conv_reference(*conv_case(setting, dtype))


def assert_close(ours: Tensor, reference: Tensor, dtype: torch.dtype, precision: str = "float32") -> None:
    assert ours.dtype == torch.float64 and ours.shape == reference.shape
    rtol = 1e-11 if dtype == torch.float64 else TOLERANCE[precision]
    torch.testing.assert_close(ours, reference.to(ours.device), rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("form", ["auto", "direct", "gram"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", LINEAR, ids=str)
def test_linear(shape: tuple[int, ...], dtype: torch.dtype, form: str, precision: str) -> None:
    a, g = linear_case(shape, dtype)
    reference = linear_reference(a, g)
    assert_close(torch.ops.cape.linear_sq_norms(a, g, 0, precision, form), reference, dtype, precision)
    if form == "auto":
        ours = torch.ops.cape.linear_sq_norms(a, g, 0, precision)
        assert_close(ours, reference, dtype, precision)
        assert torch.equal(ours, torch.ops.cape.linear_sq_norms(a, g, 0, precision))


@pytest.mark.parametrize("form", ["auto", "direct", "gram"])
@pytest.mark.parametrize(("t", "d", "p"), [(40, 15, 37), (5, 48, 64), (1, 9, 4), (70, 68, 132)])
def test_linear_takes_any_strides(t: int, d: int, p: int, form: str) -> None:
    time_major = torch.randn(t, 3, d, device="cuda").transpose(0, 1)
    feature_major = torch.randn(3, d, t, device="cuda").transpose(1, 2)
    sparse = torch.randn(3, t, 2 * d, device="cuda")[..., ::2]
    offset = torch.randn(3, t, d + 1, device="cuda")[..., 1:]
    columns = torch.randn(2, 3, p, t, device="cuda").transpose(2, 3)
    expanded = torch.randn(2, 3, 1, p, device="cuda").expand(2, 3, t, p)
    cotangent_last = torch.randn(3, t, p, 2, device="cuda").movedim(3, 0)
    for a, g in itertools.product((time_major, feature_major, sparse, offset), (columns, expanded, cotangent_last)):
        ours = torch.ops.cape.linear_sq_norms(a, g, 0, "float32", form)
        assert_close(ours, linear_reference(a, g), torch.float32)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("form", ["auto", "direct", "gram", "shifted", "narrow"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", CONV, ids=lambda s: f"{s[0]}x{s[1]}to{s[2]}-{s[3]}-{s[4][0]}-g{s[5]}")
def test_conv(setting: Conv, dtype: torch.dtype, form: str, precision: str) -> None:
    x, g, window = conv_case(setting, dtype)
    reference = conv_expected(setting, dtype)
    assert_close(torch.ops.cape.conv_sq_norms(x, g, *window, precision, form), reference, dtype, precision)
    if form != "auto":
        return
    first = torch.ops.cape.conv_sq_norms(x, g, *window, precision)
    assert torch.equal(first, torch.ops.cape.conv_sq_norms(x, g, *window, precision))
    last = x.movedim(2, -1).contiguous().movedim(-1, 2)  # channels last
    assert_close(torch.ops.cape.conv_sq_norms(last, g, *window, precision), reference, dtype, precision)
    mixed = g.movedim(0, 2).contiguous().movedim(2, 0)  # cotangents next to channels
    assert_close(torch.ops.cape.conv_sq_norms(x, mixed, *window, precision), reference, dtype, precision)
    assert torch.ops.cape.conv_sq_norms(x[:0], g[:, :0], *window, precision).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_pair_sums(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g, x = torch.randn(*shape, dtype=dtype, device="cuda"), torch.randn(*shape[1:], dtype=dtype, device="cuda")
    channels_last = g.transpose(3, 4).contiguous().transpose(3, 4)
    expected = torch.stack([g.double().sum((2, 4)), (g.double() * x.double()).sum((2, 4))])
    scale = max(1.0, float(shape[2] * shape[4]) ** 0.5)
    for first in (g, channels_last):
        sums = torch.ops.cape._pair_sums(first, x)
        assert sums.dtype == torch.float64
        atol = (1e-5 if dtype == torch.float32 else 1e-12) * scale
        torch.testing.assert_close(sums, expected, rtol=1e-5 if dtype == torch.float32 else 1e-11, atol=atol)
        assert torch.equal(sums, torch.ops.cape._pair_sums(first, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (0, 4), (2, 0), (5, 1134), (2, 100003), (4000, 33)])
def test_sq_norms(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(*shape, dtype=dtype, device="cuda")
    for rows in (x, x.t().contiguous().t(), torch.cat([x, x], 1)[:, ::2]):
        expected = rows.double().square().sum(1)
        torch.testing.assert_close(torch.ops.cape.sq_norms(rows), expected, rtol=1e-12, atol=0.0)


def test_a_vanishing_sum_is_not_negative_and_nan_stays() -> None:
    a = torch.ones(2, 40, 40, device="cuda")
    sign = torch.tensor([1.0, -1.0], device="cuda").repeat(20).view(1, 1, 40, 1)
    g = torch.randn(1, 2, 1, 40, device="cuda").expand(1, 2, 40, 40) * sign
    a[1, 0, 0] = float("nan")
    for form in ("direct", "gram"):
        norms = torch.ops.cape.linear_sq_norms(a, g, 0, "float32", form)
        assert 0.0 <= float(norms[0, 0]) < 1e-2 and bool(norms[0, 1].isnan())


def calls() -> dict[str, Any]:
    """Every operator on fixed inputs."""
    a, g = linear_case((2, 8, 33, 40, 24))
    x, y, window = conv_case(CONV[3])
    pairs = torch.randn(2, 4, 2, 5, 64, device="cuda")
    return {
        "linear": lambda: torch.ops.cape.linear_sq_norms(a, g),
        "linear direct": lambda: torch.ops.cape.linear_sq_norms(a, g, 0, "float32", "direct"),
        "rows": lambda: torch.ops.cape.linear_sq_norms(a[:, :1], g[:, :, :1]),
        **{
            f"conv {form}": lambda form=form: torch.ops.cape.conv_sq_norms(x, y, *window, "float32", form)
            for form in ("direct", "gram", "shifted", "narrow")
        },
        "pair_sums": lambda: torch.ops.cape._pair_sums(pairs, pairs[0]),
        "sq_norms": lambda: torch.ops.cape.sq_norms(a.flatten(1)),
    }


def test_every_operator_once_for_the_sanitizer() -> None:
    """Few launches, all kernels of float32: what compute-sanitizer runs."""
    for name, call in calls().items():
        assert bool(call().isfinite().all()), name
    for shape, precision in itertools.product([(2, 2, 70, 133, 67), (2, 1, 17, 300, 12)], TOLERANCE):
        a, g = linear_case(shape)
        reference = linear_reference(a, g)
        for form in ("direct", "gram"):
            ours = torch.ops.cape.linear_sq_norms(a, g, 0, precision, form)
            assert_close(ours, reference, torch.float32, precision)
    for setting, precision in itertools.product((CONV[1], CONV[3], CONV[7], CONV[14]), TOLERANCE):
        x, g, window = conv_case(setting, batch=1)
        reference = conv_reference(x, g, window)
        for form in ("direct", "gram", "shifted", "narrow"):
            ours = torch.ops.cape.conv_sq_norms(x, g, *window, precision, form)
            assert_close(ours, reference, torch.float32, precision)


def test_work_goes_to_the_current_stream() -> None:
    """Inputs that change late on a side stream: an operator on any other stream would see the old ones."""
    a, g = linear_case((2, 8, 33, 40, 24))
    x, y, window = conv_case(CONV[3])
    pairs = torch.randn(2, 4, 2, 5, 64, device="cuda")
    cases = {
        "linear": (lambda: torch.ops.cape.linear_sq_norms(a, g), a),
        "conv": (lambda: torch.ops.cape.conv_sq_norms(x, y, *window), x),
        "pair_sums": (lambda: torch.ops.cape._pair_sums(pairs, pairs[0]), pairs),
        "sq_norms": (lambda: torch.ops.cape.sq_norms(pairs.flatten(1)), pairs),
    }
    side = torch.cuda.Stream()
    for name, (call, changed) in cases.items():
        changed.mul_(2)
        expected = call()
        changed.div_(2)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
            changed.mul_(2)
            result = call()
        side.synchronize()
        assert torch.equal(result, expected), name


def test_cuda_graphs_capture_and_replay() -> None:
    for name, call in calls().items():
        expected = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(2):
            captured.fill_(-1.0)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured, expected), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used() -> None:
    a, g = linear_case((2, 3, 33, 40, 24))
    ours = torch.ops.cape.linear_sq_norms(a.to("cuda:1"), g.to("cuda:1"))
    assert ours.device == torch.device("cuda:1")
    assert torch.equal(ours.to(a.device), torch.ops.cape.linear_sq_norms(a, g))


def test_affine_and_biases_agree_with_the_twins() -> None:
    torch.manual_seed(0)
    for shape, statistics in (((2, 3, 5, 7, 1), (3, 5, 1)), ((2, 3, 1, 7, 6), (1, 1, 7)), ((2, 3, 4, 7, 6), (3, 4, 7))):
        g, x = torch.randn(shape, device="cuda"), torch.randn(shape[1:], device="cuda")
        mean, inverse = torch.randn(statistics, device="cuda"), torch.rand(statistics, device="cuda") + 0.5
        for scale, shift in ((True, True), (True, False), (False, True)):
            ours = torch.ops.cape.affine_sq_norms(g, x, mean, inverse, scale, shift)
            twin = ops.affine_sq_norms_torch(g, x, mean, inverse, scale, shift)
            torch.testing.assert_close(ours, twin, rtol=1e-5, atol=0.0)
    a, g = linear_case((2, 3, 33, 20, 24))
    ours = torch.ops.cape.linear_sq_norms(a, g, 2)
    torch.testing.assert_close(ours, ops.linear_sq_norms_torch(a, g, 2), rtol=1e-5, atol=0.0)


def test_opcheck() -> None:
    a, g = linear_case((2, 2, 5, 3, 4))
    x, y, window = conv_case(CONV[3], batch=2)
    torch.library.opcheck(torch.ops.cape.linear_sq_norms, (a, g))
    torch.library.opcheck(torch.ops.cape.sq_norms, (a[0],))
    pairs = torch.randn(2, 3, 4, 5, 6, device="cuda")
    torch.library.opcheck(torch.ops.cape._pair_sums, (pairs, pairs[0]))
    torch.library.opcheck(torch.ops.cape.conv_sq_norms, (x, y, *window))


def test_what_cannot_be_is_refused() -> None:
    a, g = linear_case((2, 2, 5, 3, 4))
    with pytest.raises(RuntimeError, match="agree in samples and positions"):
        torch.ops.cape.linear_sq_norms(a, g[:, :, :4])
    with pytest.raises(RuntimeError, match="Unknown precision 'half'"):
        torch.ops.cape.linear_sq_norms(a, g, 0, "half")
    x, y, window = conv_case(CONV[3])
    with pytest.raises(RuntimeError, match="Unknown form 'best'"):
        torch.ops.cape.conv_sq_norms(x, y, *window, "float32", "best")
    with pytest.raises(RuntimeError, match="share dtype and device"):
        torch.ops.cape.linear_sq_norms(a, g.double())
