"""Every exact form of a layer's norms on a CPU, beside the one that the cost model chooses.

    python -m benchmarks.forms --json results.json [--seconds 0.2]

The *regret* of a row is the time of the chosen form over that of the fastest; the constants of csrc/include/cape/cost.h
are those that keep it small. ``weight_gradients`` is what two ordinary backward passes pay for the same layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import interleave, machine, write_json
from cape.probing import ops
from cape.probing.ops import ConvGeometry

COTANGENTS = 2
# samples, channels, outputs, size, kernel, stride, groups
CONVOLUTIONS = [
    (16, 3, 64, 32, 3, 1, 1), (16, 64, 64, 32, 3, 1, 1), (16, 128, 128, 16, 3, 1, 1), (16, 256, 256, 8, 3, 1, 1),
    (16, 64, 128, 32, 3, 2, 1), (16, 128, 256, 16, 3, 2, 1), (16, 96, 24, 16, 1, 1, 1), (16, 24, 144, 16, 1, 1, 1),
    (16, 96, 96, 16, 3, 1, 96), (16, 192, 192, 8, 3, 1, 192), (16, 64, 64, 16, 3, 1, 16),
]  # fmt: skip
# samples, positions, inputs, outputs
LINEAR = [
    (64, 65, 192, 576), (64, 65, 192, 192), (64, 65, 192, 384), (64, 65, 384, 192), (16, 256, 128, 384),
    (16, 256, 128, 256), (64, 32, 352, 1024), (64, 32, 512, 1024), (4, 197, 768, 3072),
]  # fmt: skip
FORMS = ("direct", "gram", "shifted", "winograd", "channelwise", "narrow")


def convolution(shape: tuple[int, ...]) -> tuple[str, dict[str, Callable[[], Tensor]]]:
    batch, channels, outputs, size, kernel, stride, groups = shape
    pad = kernel // 2
    geometry = ConvGeometry((kernel,) * 2, (stride,) * 2, (pad,) * 2, (1, 1), groups)
    x = torch.randn(batch, 1, channels, size, size)
    g = torch.randn(COTANGENTS, batch, 1, outputs, size // stride, size // stride)
    w = torch.randn(outputs, channels // groups, kernel, kernel)

    def weights() -> Tensor:
        return torch.ops.aten.convolution_backward(
            g[0, :, 0], x[:, 0], w, None, geometry.stride, geometry.padding, (1, 1), False, (0, 0), groups,
            [False, True, False],
        )[1]  # fmt: skip

    name = f"{channels} to {outputs} at {size}, kernel {kernel}, stride {stride}, groups {groups}"
    return name, {
        "weight_gradient": weights,
        **{f: lambda f=f: ops.conv_sq_norms(x, g, geometry, form=f) for f in ("auto", *FORMS)},
    }


def linear(shape: tuple[int, ...]) -> tuple[str, dict[str, Callable[[], Tensor]]]:
    batch, t, d, p = shape
    a, g = torch.randn(batch, t, d), torch.randn(COTANGENTS, batch, t, p)
    calls: dict[str, Callable[[], Tensor]] = {
        "weight_gradient": lambda: g[0].reshape(-1, p).T @ a.reshape(-1, d),
        **{f: lambda f=f: ops.linear_sq_norms(a, g, form=f) for f in ("auto", "direct", "gram")},
    }
    return f"linear {d} to {p}, {t} positions", calls


def measure(name: str, calls: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, Any]:
    runnable = {}
    for form, call in calls.items():
        try:
            call()
        except RuntimeError:  # a form that this layer does not have
            continue
        runnable[form] = call
    ms = {form: t["median_ms"] for form, t in interleave(runnable, "cpu", seconds).items()}
    fastest = min((form for form in ms if form in FORMS), key=ms.__getitem__)
    return {
        "layer": name,
        "median_ms": ms,
        "fastest": fastest,
        "regret": ms["auto"] / ms[fastest],
        "norms_over_weight_gradients": ms["auto"] / (COTANGENTS * ms["weight_gradient"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json")
    parser.add_argument("--seconds", type=float, default=0.2, help="per form and layer")
    args = parser.parse_args()
    torch.manual_seed(0)
    result: dict[str, Any] = {"machine": machine("cpu"), "cotangents": COTANGENTS, "rows": []}
    with ops.use_backend("native"):
        for make, shapes in ((convolution, CONVOLUTIONS), (linear, LINEAR)):
            for shape in shapes:
                row = measure(*make(shape), args.seconds)
                result["rows"].append(row)
                write_json(args.json, result)
                print(
                    f"{row['layer']}: fastest {row['fastest']}, regret {row['regret']:.2f};"
                    f" {row['norms_over_weight_gradients']:.2f}x the weight gradients of two backward passes"
                )


if __name__ == "__main__":
    main()
