"""Fit the constants that choose among the forms of a squared norm on a GPU (csrc/include/cape/time_model.h).

    python -m benchmarks.calibrate --json FILE [--precision float32] [--seconds 0.3]

Every form is timed on linear maps and convolutions of many shapes. The constants are then searched, one after another
and by factors, so that the sum over shapes of (time of the chosen form / time of the fastest) is least. The result is
printed as lines for time_model.h and as JSON.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.roofline import COTANGENTS, RESNET_50, VIT_B_16, Conv, Linear, seconds_of
from benchmarks.timing import machine, write_json
from cape.errors import DependencyError
from cape.probing import ops

CONSTANTS = ("launch", "rate_3xtf32", "rate_tf32", "rate_bf16", "rate_simt32", "rate_simt64", "copies", "gathers")
LINEAR_FORMS = ("direct", "gram")
CONV_FORMS = ("direct", "gram", "shifted", "narrow")
FACTORS = (0.1, 0.25, 0.5, 0.7, 0.85, 1.18, 1.4, 2.0, 4.0, 10.0)
LARGEST_GRAM = 64 * 1024**2 // 4  # numbers of a pixel Gram matrix, as in conv_sq_norms.cuh

LINEAR = [
    *VIT_B_16,
    *(Linear(t, d, p) for t in (2, 8, 32, 65, 128, 512) for d, p in ((64, 64), (128, 512), (192, 576), (512, 10))),
]
CONV = [
    *(c for c in RESNET_50 if c.kernel > 1),
    *(Conv(c, o, s, 3, 1) for c, o in ((3, 64), (32, 32), (64, 64), (128, 256), (256, 256)) for s in (4, 8, 16, 32)),
]


def forms_of(shape: Linear | Conv) -> tuple[str, ...]:
    """The forms worth timing: no pixel Gram matrix larger than the kernels allow, dot products only when short."""
    if isinstance(shape, Linear):
        return LINEAR_FORMS
    work = shape.channels * shape.outputs * shape.out**2 * shape.kernel**2
    allowed = {"direct": True, "gram": shape.out**2 <= 1024, "shifted": shape.size**4 <= LARGEST_GRAM,
               "narrow": work <= 1 << 27}  # fmt: skip
    return tuple(form for form in CONV_FORMS if allowed[form])


def regret(times: Sequence[dict[str, float]], chosen: Sequence[str]) -> float:
    """Mean over shapes of (time of the chosen form / time of the fastest); a form that was not timed counts as 10."""
    return math.fsum(
        t.get(c, 10 * min(t.values())) / min(t.values()) for t, c in zip(times, chosen, strict=True)
    ) / len(times)


def search(
    start: Sequence[float], loss: Callable[[Sequence[float]], float], rounds: int = 4
) -> tuple[list[float], float]:
    """Coordinate search by factors: keep every change of one constant that lowers the loss."""
    best, least = list(start), loss(start)
    for _ in range(rounds):
        before = least
        for i in range(len(best)):
            for factor in FACTORS:
                trial = [*best[:i], best[i] * factor, *best[i + 1 :]]
                value = loss(trial)
                if value < least - 1e-9:
                    best, least = trial, value
        if least == before:
            break
    return best, least


def case(shape: Linear | Conv, batch: int, precision: str) -> tuple[Callable[[str], Any], Callable[[], str]]:
    """Return what runs a form on the shape, and what names the form that the model chooses."""
    if isinstance(shape, Linear):
        a = torch.randn(batch, shape.length, shape.d, device="cuda")
        g = torch.randn(COTANGENTS, batch, shape.length, shape.p, device="cuda")
        return (
            lambda form: torch.ops.cape.linear_sq_norms(a, g, 0, precision, form),
            lambda: torch.ops.cape._linear_form(a, g, precision),
        )
    x = torch.randn(batch, 1, shape.channels, shape.size, shape.size, device="cuda")
    y = torch.randn(COTANGENTS, batch, 1, shape.outputs, shape.out, shape.out, device="cuda")
    window = ([shape.kernel] * 2, [shape.stride] * 2, [shape.padding] * 2, [1, 1], 1)
    return (
        lambda form: torch.ops.cape.conv_sq_norms(x, y, *window, precision, form),
        lambda: torch.ops.cape._conv_form(x, y, *window, precision),
    )


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json")
    p.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    p.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    p.add_argument("--seconds", type=float, default=0.1, help="per shape and form")
    return p


def main() -> None:
    args = parser().parse_args()
    module = ops.native_module()
    if not torch.cuda.is_available() or module is None or not module.build_info()["cuda"]:
        raise DependencyError("Calibration needs a CUDA device and CAPE built with CAPE_CUDA=1.")
    like = torch.zeros(1, device="cuda")
    shapes = [(shape, batch) for shape in (*LINEAR, *CONV) for batch in args.batch]
    choices, times = [], []
    for shape, batch in shapes:
        run, choose = case(shape, batch, args.precision)
        times.append({form: seconds_of(lambda f=form, r=run: r(f), args.seconds) for form in forms_of(shape)})
        choices.append(choose)

    def loss(constants: Sequence[float]) -> float:
        torch.ops.cape._cuda_time_model(like, list(constants))
        return regret(times, [choose() for choose in choices])

    start = torch.ops.cape._cuda_time_model(like, [])
    before = loss(start)
    best, after = search(start, loss)
    rows = [{"shape": str(s), "batch": b, "seconds": t} for (s, b), t in zip(shapes, times, strict=True)]
    constants = dict(zip(CONSTANTS, best, strict=True))
    write_json(args.json, {"machine": machine("cuda"), "precision": args.precision, "regret_before": before,
                           "regret_after": after, "constants": constants, "rows": rows})  # fmt: skip
    print(f"mean time of the chosen form over the fastest: {before:.3f} before, {after:.3f} after")
    for name, value in constants.items():
        print(f"  double {name} = {value:.3g};")


if __name__ == "__main__":
    main()
