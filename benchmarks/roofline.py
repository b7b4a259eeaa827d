"""How close the products behind the probe come to what the GPU can do.

    python -m benchmarks.roofline --json FILE [--batch 32] [--precision float32 tf32 bf16] [--seconds 2]

For ViT-B/16 and ResNet-50 at 224 x 224 and two cotangents: the linear map and the convolution on which the norms do
the most work, every form of each, and the two bandwidth kernels at their largest use, timed with CUDA events.

    work   the multiply-accumulates that the form's definition needs, without padding: ``linear_macs``, ``conv_macs``
    peak   of the arithmetic: dense TF32 FLOP/s / 3 for float32 (three TF32 products per product), dense TF32, dense
           bfloat16 (PEAKS, from NVIDIA's data sheets); and bytes per second of the memory for the sums
    fraction of peak = 2 * macs / seconds / peak FLOP/s, or bytes / seconds / peak bytes per second
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import machine, write_json
from cape.errors import DependencyError
from cape.probing import ops

COTANGENTS = 2


@dataclass(frozen=True)
class Peak:
    """Dense peaks of a device: FLOP/s of TF32 and bfloat16 on tensor cores, bytes/s of its memory."""

    tf32: float
    bf16: float
    memory: float


# NVIDIA's data sheets (dense: half of what they print with sparsity); a device that is not here is timed without a
# fraction of its peak.
PEAKS = {
    "H100 80GB HBM3": Peak(494.7e12, 989.4e12, 3.35e12),
    "H100 PCIe": Peak(378e12, 756e12, 2.0e12),
    "H200": Peak(494.7e12, 989.4e12, 4.8e12),
    "A100-SXM4-80GB": Peak(156e12, 312e12, 2.039e12),
    "A100-SXM4-40GB": Peak(156e12, 312e12, 1.555e12),
}


@dataclass(frozen=True)
class Linear:
    """A linear map: T positions, d inputs, p outputs."""

    length: int
    d: int
    p: int


@dataclass(frozen=True)
class Conv:
    """A square two-dimensional convolution."""

    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1


# How often each shape occurs in the model: ViT-B/16 (197 tokens, width 768, 12 blocks) and ResNet-50 at 224 x 224.
VIT_B_16 = {
    Linear(197, 768, 2304): 12,
    Linear(197, 768, 768): 12,
    Linear(197, 768, 3072): 12,
    Linear(197, 3072, 768): 12,
}
RESNET_50 = {
    Conv(3, 64, 224, 7, 2): 1,
    Conv(64, 64, 56, 1, 1): 1, Conv(64, 64, 56, 3, 1): 3, Conv(64, 256, 56, 1, 1): 4, Conv(256, 64, 56, 1, 1): 2,
    Conv(256, 128, 56, 1, 1): 1, Conv(128, 128, 56, 3, 2): 1, Conv(128, 512, 28, 1, 1): 4,
    Conv(256, 512, 56, 1, 2): 1,
    Conv(512, 128, 28, 1, 1): 3, Conv(128, 128, 28, 3, 1): 3,
    Conv(512, 256, 28, 1, 1): 1, Conv(256, 256, 28, 3, 2): 1, Conv(256, 1024, 14, 1, 1): 6,
    Conv(512, 1024, 28, 1, 2): 1,
    Conv(1024, 256, 14, 1, 1): 5, Conv(256, 256, 14, 3, 1): 5,
    Conv(1024, 512, 14, 1, 1): 1, Conv(512, 512, 14, 3, 2): 1, Conv(512, 2048, 7, 1, 1): 3,
    Conv(1024, 2048, 14, 1, 2): 1,
    Conv(2048, 512, 7, 1, 1): 2, Conv(512, 512, 7, 3, 1): 2,
}  # fmt: skip


def linear_macs(s: Linear, form: str) -> float:
    """Multiply-accumulates per sample: K T d p (direct), half of T (T + 1) (d + K p) (Gram)."""
    if form == "direct":
        return float(COTANGENTS * s.length * s.d * s.p)
    return 0.5 * s.length * (s.length + 1) * (s.d + COTANGENTS * s.p)


def conv_macs(s: Conv, form: str) -> float:
    """The same for a convolution of k x k taps; shifted: half of T_in (T_in + 1) C, the taps' sums and the G-Gram."""
    t, taps = s.out**2, s.kernel**2
    half = 0.5 * t * (t + 1)
    if form in ("direct", "narrow"):
        return float(COTANGENTS * t * taps * s.channels * s.outputs)
    if form == "gram":
        return half * (taps * s.channels + COTANGENTS * s.outputs)
    return 0.5 * s.size**2 * (s.size**2 + 1) * s.channels + half * (taps + COTANGENTS * s.outputs)


def cheapest(macs: Callable[[Any, str], float], shape: Any, forms: Sequence[str]) -> float:
    return min(macs(shape, form) for form in forms)


def largest() -> tuple[Linear, Conv]:
    """The linear map of ViT-B/16 and the convolution of ResNet-50 on which the norms do the most work."""
    linear = max(VIT_B_16, key=lambda s: cheapest(linear_macs, s, ("direct", "gram")) * VIT_B_16[s])
    conv = max(RESNET_50, key=lambda s: cheapest(conv_macs, s, ("direct", "gram", "shifted")) * RESNET_50[s])
    return linear, conv


def peak_of(device: str) -> Peak | None:
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def flops_of(peak: Peak, precision: str) -> float:
    return {"float32": peak.tf32 / 3, "tf32": peak.tf32, "bf16": peak.bf16}[precision]


def seconds_of(call: Callable[[], Tensor], seconds: float) -> float:
    """Median time of a call by CUDA events, after two calls that are not counted."""
    for _ in range(2):
        call()
    times: list[float] = []
    while sum(times) < seconds and len(times) < 200:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def products(args: argparse.Namespace, peak: Peak | None) -> list[dict[str, Any]]:
    linear, conv = largest()
    batch = args.batch
    a = torch.randn(batch, linear.length, linear.d, device="cuda")
    g = torch.randn(COTANGENTS, batch, linear.length, linear.p, device="cuda")
    x = torch.randn(batch, 1, conv.channels, conv.size, conv.size, device="cuda")
    y = torch.randn(COTANGENTS, batch, 1, conv.outputs, conv.out, conv.out, device="cuda")
    window = ([conv.kernel] * 2, [conv.stride] * 2, [conv.padding] * 2, [1, 1], 1)
    linear_op, conv_op = torch.ops.cape.linear_sq_norms, torch.ops.cape.conv_sq_norms
    rows = []
    for precision in args.precision:
        cases: list[tuple[str, Any, str, Callable[[], Tensor], float]] = []
        for form in ("direct", "gram"):
            call = lambda form=form, p=precision: linear_op(a, g, 0, p, form)  # noqa: E731
            cases.append(("ViT-B/16", linear, form, call, linear_macs(linear, form)))
        for form in ("direct", "gram", "shifted"):
            call = lambda form=form, p=precision: conv_op(x, y, *window, p, form)  # noqa: E731
            cases.append(("ResNet-50", conv, form, call, conv_macs(conv, form)))
        for model, shape, form, call, macs in cases:
            seconds = seconds_of(call, args.seconds)
            rows.append(
                {
                    "model": model, "shape": asdict(shape), "batch": batch, "cotangents": COTANGENTS, "form": form,
                    "precision": precision, "seconds": seconds, "flops_per_second": 2 * macs * batch / seconds,
                    "fraction_of_peak": peak and 2 * macs * batch / seconds / flops_of(peak, precision),
                }
            )  # fmt: skip
    return rows


def sums(args: argparse.Namespace, peak: Peak | None) -> list[dict[str, Any]]:
    """Batch norm after ResNet-50's first convolution, layer norm of ViT-B/16, and rows of squares."""
    batch = args.batch
    images = torch.randn(COTANGENTS, batch, 1, 64, 112 * 112, device="cuda")
    tokens = torch.randn(COTANGENTS, batch, 197, 768, 1, device="cuda")
    pair, square = torch.ops.cape._pair_sums, torch.ops.cape.sq_norms
    cases: dict[str, tuple[Callable[[], Tensor], int]] = {
        "pair_sums, batch norm": (lambda: pair(images, images[0]), images.numel() + images[0].numel()),
        "pair_sums, layer norm": (lambda: pair(tokens, tokens[0]), tokens.numel() + tokens[0].numel()),
        "sq_norms": (lambda: square(images.flatten(2).flatten(0, 1)), images.numel()),
    }
    rows = []
    for name, (call, numbers) in cases.items():
        seconds = seconds_of(call, args.seconds)
        rate = 4 * numbers / seconds
        rows.append(
            {"kernel": name, "batch": batch, "seconds": seconds, "bytes_per_second": rate,
             "fraction_of_peak": peak and rate / peak.memory}
        )  # fmt: skip
    return rows


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--precision", nargs="+", choices=("float32", "tf32", "bf16"), default=["float32", "tf32", "bf16"])
    p.add_argument("--seconds", type=float, default=2.0, help="per case")
    return p


def main() -> None:
    args = parser().parse_args()
    module = ops.native_module()
    if not torch.cuda.is_available() or module is None or not module.build_info()["cuda"]:
        raise DependencyError("The roofline needs a CUDA device and CAPE built with CAPE_CUDA=1.")
    about = machine("cuda")
    peak = peak_of(about["device"])
    result = {
        "machine": about,
        "peaks": peak and asdict(peak),
        "formula": "2 * macs / seconds / (tf32 / 3, tf32 or bf16 peak); bytes / seconds / memory peak",
        "products": products(args, peak),
        "sums": sums(args, peak),
    }
    write_json(args.json, result)
    for row in result["products"]:
        share = "" if peak is None else f", {row['fraction_of_peak']:.0%} of peak"
        print(
            f"{row['model']} {row['form']} in {row['precision']}: {row['seconds'] * 1e3:.3f} ms,"
            f" {row['flops_per_second'] / 1e12:.1f} TFLOP/s{share}"
        )
    for row in result["sums"]:
        share = "" if peak is None else f", {row['fraction_of_peak']:.0%} of peak"
        print(f"{row['kernel']}: {row['seconds'] * 1e3:.3f} ms, {row['bytes_per_second'] / 1e12:.2f} TB/s{share}")


if __name__ == "__main__":
    main()
