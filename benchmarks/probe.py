"""What the probe costs, beside every other way to get the same numbers and beside the floor.

    python -m benchmarks.probe --device cpu --json results.json [--batch 32 128] [--models ViT VGG] [--seconds 4]

Columns: ``loop`` (one sample at a time), ``vmap`` and ``vmap 16`` (torch.func, whole batch and chunks of 16),
``BackPACK`` and ``Opacus`` where installed (a peer that cannot take the model says so), ``native`` and ``torch``
(ours), ``lower`` (one forward, two input-gradient backwards) and ``two`` (one forward, two ordinary backwards), the
last two each the better of the whole batch and micro-batches of 16. All compute ‖∇ℓ_b‖² and the same for the true
logit.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cape
from benchmarks import models
from benchmarks.timing import interleave, machine, synchronize, write_json
from cape.memory import give_back
from cape.probing.reference import per_sample_norms_reference

Batch = tuple[Tensor, Tensor]
Variant = Callable[[], Any]


def losses(out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss and the summed true logit: their gradients are the two cotangents."""
    return F.cross_entropy(out, y, reduction="sum"), out.gather(1, y[:, None]).sum()


def loop(model: nn.Module, batch: Batch) -> None:
    params = list(model.parameters())
    for x, y in zip(*batch, strict=True):
        loss, logit = losses(model(x[None]), y[None])
        for scalar, keep in ((loss, True), (logit, False)):
            grads = torch.autograd.grad(scalar, params, retain_graph=keep)
            sum(g.square().sum() for g in grads)


def vmapped(model: nn.Module, batch: Batch, chunk: int | None) -> None:
    params = {n: p.detach() for n, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def one(x: Tensor, y: Tensor) -> Tensor:
        def forward(ps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return losses(torch.func.functional_call(model, {**ps, **buffers}, (x[None],)), y[None])

        (loss, logit), pull = torch.func.vjp(forward, params)
        unit, zero = torch.ones_like(loss), torch.zeros_like(logit)
        first, second = pull((unit, zero))[0], pull((zero, unit))[0]
        return torch.stack([sum(g.square().sum() for g in grads.values()) for grads in (first, second)])

    torch.func.vmap(one, chunk_size=chunk)(*batch)


def two_passes(model: nn.Module, batch: Batch, chunk: int, weights: bool) -> None:
    """One forward and two backward passes, with or without weight gradients."""
    params = list(model.parameters())
    for p in params:
        p.requires_grad_(weights)
    for lo in range(0, len(batch[1]), chunk):
        x, y = batch[0][lo : lo + chunk], batch[1][lo : lo + chunk]
        x = x if weights else x.detach().requires_grad_()
        loss, logit = losses(model(x), y)
        wanted = params if weights else [x]
        torch.autograd.grad(loss, wanted, retain_graph=True)
        torch.autograd.grad(logit, wanted)
    for p in params:
        p.requires_grad_(True)


def backpack(model: nn.Module, batch: Batch) -> Variant:
    from backpack import backpack as run
    from backpack import extend
    from backpack.extensions import BatchL2Grad

    extended = extend(model, use_converter=True)
    criterion = extend(nn.CrossEntropyLoss(reduction="sum"))

    def both() -> None:
        out = extended(batch[0])
        with run(BatchL2Grad()):
            criterion(out, batch[1]).backward()
        extended.zero_grad()
        out = extended(batch[0])  # the extension frees its quantities with the graph
        with run(BatchL2Grad()):
            out.gather(1, batch[1][:, None]).sum().backward()
        extended.zero_grad()

    both()
    return both


def opacus(model: nn.Module, batch: Batch) -> Variant:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping as Ghost

    for module in model.train().modules():  # it records activations in train mode only: dropout off by hand
        if isinstance(getattr(module, "dropout", None), float):  # recurrent layers, attention
            module.dropout = 0.0  # type: ignore[assignment]
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    ghost = Ghost(model, loss_reduction="sum", max_grad_norm=1.0, use_ghost_clipping=True)

    def both() -> None:
        for pick in (0, 1):
            losses(ghost(batch[0]), batch[1])[pick].backward()
            ghost.get_norm_sample()
            ghost.zero_grad()

    both()
    return both


def peak_mb(run: Variant, device: str) -> float:
    """Return the peak memory above what is held before the run, in MB.

    On a CPU it is the process's: what earlier runs freed goes back to the system first, or it would count as nobody's.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before_kb = _status("VmRSS")
    run()
    return (_status("VmHWM") - before_kb) / 1024


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(key)))


def measure(name: str, size: int, device: str, seconds: float, slow: bool) -> dict[str, Any]:
    build, shape = {**models.SMALL, **models.LARGE}[name]

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return build().eval().to(device)

    model, batch = fresh(), models.batch(shape, size, device)
    variants: dict[str, Variant] = {
        "native": lambda: cape.per_sample_norms(model, batch),
        "torch": lambda: cape.per_sample_norms(model, batch, backend="torch"),
        "lower whole": lambda: two_passes(model, batch, size, False),
        "two whole": lambda: two_passes(model, batch, size, True),
    }
    if size > 16:
        variants["lower 16"] = lambda: two_passes(model, batch, 16, False)
        variants["two 16"] = lambda: two_passes(model, batch, 16, True)
    refused: dict[str, str] = {}
    if slow:
        others: dict[str, Callable[[], Variant]] = {
            "loop": lambda: lambda: loop(model, batch),
            "vmap": lambda: lambda: vmapped(model, batch, None),
            "BackPACK": lambda: backpack(fresh(), batch),
            "Opacus": lambda: opacus(fresh(), batch),
        }
        if size > 16:
            others["vmap 16"] = lambda: lambda: vmapped(model, batch, 16)
        for other, make in others.items():
            try:
                variants[other] = make()
                variants[other]()
            except Exception as error:  # a refusal, of whatever kind, is a result of the benchmark
                variants.pop(other, None)
                refused[other] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    times = interleave(variants, device, seconds)
    memory = {n: round(peak_mb(run, device), 1) for n, run in variants.items()}
    ms = {n: t["median_ms"] for n, t in times.items()}
    lowest = min((n for n in ms if n.startswith("lower")), key=ms.__getitem__)
    lower = ms[lowest]
    two = min(v for n, v in ms.items() if n.startswith("two"))
    g2, tau = cape.per_sample_norms(model, batch)
    again = cape.per_sample_norms(model, batch)
    exact = min(size, 8)
    ref_g2, ref_tau = per_sample_norms_reference(model.cpu(), (batch[0][:exact].cpu(), batch[1][:exact].cpu()))
    error = max(float(((a[:exact].cpu() - r).abs() / r).max()) for a, r in ((g2, ref_g2), (tau, ref_tau)))
    return {
        "model": name,
        "batch": size,
        "times": times,
        "peak_mb": memory,
        "refused": refused,
        "native_over_lower": ms["native"] / lower,
        "native_over_two": ms["native"] / two,
        "native_peak_over_lower": memory["native"] / max(memory[lowest], 0.1),
        "largest_relative_error": error,
        "repeats_bitwise": bool(torch.equal(g2, again[0]) and torch.equal(tau, again[1])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json")
    parser.add_argument("--batch", type=int, nargs="+", default=None)
    parser.add_argument("--models", nargs="+", help="only models whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=4.0, help="per variant")
    parser.add_argument("--ours-only", action="store_true", help="leave out the slow ways and the peers")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    names = [*models.SMALL, *(models.LARGE if args.device == "cuda" else ())]
    names = [n for n in names if not args.models or any(m in n for m in args.models)]
    sizes = args.batch or ([1, 8, 32, 128, 512] if args.device == "cuda" else [32, 128])
    result: dict[str, Any] = {"machine": machine(args.device), "rows": []}
    for name in names:
        for size in sizes:
            row = measure(name, size, args.device, args.seconds, not args.ours_only)
            result["rows"].append(row)
            write_json(args.json, result)
            shown = "  ".join(f"{n} {t['median_ms']:.1f}" for n, t in row["times"].items())
            print(f"{name}, B={size}: {shown} ms")
            print(
                f"    native is {row['native_over_lower']:.2f}x the lower bound, {row['native_over_two']:.2f}x two"
                f" backwards, {row['native_peak_over_lower']:.2f}x the lower bound's peak memory;"
                f" error {row['largest_relative_error']:.1e}; refused: {row['refused'] or 'none'}"
            )


if __name__ == "__main__":
    main()
