"""Signals of slow regimes: by-products of the first step's backward and forward passes, each O(parameters) or less.

They say what a mean loss and a total norm hide: that the gradient vanishes on its way to some layer, that samples are
not told apart, that an update is long or short beside the weights it moves. Every function takes one model's tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cape.feature_names import FLOOR


@dataclass(frozen=True)
class LayerSignals:
    """Natural logarithms; see ``Features``."""

    weakest: float
    last_share: float
    move: float


def layer_signals(
    gradients: Sequence[Tensor], sums: Sequence[Sequence[float]], length: float, lr: float
) -> LayerSignals:
    """Compare the layers' gradients ∇_l L, and an update's length with that of the parameters.

    ``weakest`` = log min_l rms(∇_l L) / rms(∇L) over the weights (tensors of two dimensions or more; all tensors where
    there is none): very low where the gradient vanishes on its way to a layer. ``last_share`` = log ‖∇_last L‖₁ / ‖∇L‖₁
    of the last weight, in the order of ``model.parameters()``: how much of lr·‖∇L‖₁, the decrease that AdamW's first
    update promises, is the head's. ``move`` = log(lr·√P / ‖θ‖₂): that update's length beside the parameters'.

    Args:
        gradients: of the parameters that have one.
        sums: (Σ|g|, Σg²) of each.
        length: ‖θ‖₂ of the same parameters.
        lr: learning rate.
    """
    known = [(g.dim(), g.numel(), *pair) for g, pair in zip(gradients, sums, strict=True) if g.numel()]
    weights = [one for one in known if one[0] >= 2] or known
    if not weights:
        return LayerSignals(math.log(FLOOR), math.log(FLOOR), math.log(FLOOR))
    _, count, size, square = (sum(values) for values in zip(*known, strict=True))
    return LayerSignals(
        weakest=log_ratio(math.sqrt(min(s / n for _, n, _, s in weights)), math.sqrt(square / count)),
        last_share=log_ratio(weights[-1][2], size),
        move=log_ratio(lr * math.sqrt(count), length),
    )


def spread(losses: Tensor) -> float:
    """Return the standard deviation of the samples' losses [B] over their mean: 0 where all are alike, at most √B.

    A loss falls to ε·L_0 when the slowest samples have been learnt, which a mean does not show. √B where a loss is not
    finite.
    """
    values = losses.detach().double()
    if not bool(torch.isfinite(values).all()):
        return math.sqrt(len(values))
    return float(values.std(correction=0) / values.mean().abs().clamp(min=1e-300))


def output_spread(outputs: Tensor) -> float:
    """Return log of the deviation of an output over the samples, root mean square over the outputs [B, ...].

    No less than the logarithm of ``FLOOR``: of a batch of one it is that.
    """
    values = outputs.detach().double().flatten(1) if outputs.dim() > 1 else outputs.detach().double()[:, None]
    values = values.masked_fill(values.isneginf(), 0.0)  # what is masked is the same for all samples, or tells nothing
    return log_ratio(float(values.std(0, correction=0).square().mean().sqrt()), 1.0)


def draw_noise(outputs: Tensor, redrawn: Tensor) -> float:
    """Return the root mean square [B, ...] of how far another draw of dropout, or of any other noise, moves an output.

    Training with masks that change is slower, the more so the more a mask moves what the loss sees; a loss under one
    fixed mask does not show it. No more than 1 / ``FLOOR``, and that where an output is not finite.
    """
    moved = _movement(outputs, redrawn).square().mean().sqrt().item()
    return min(moved, 1.0 / FLOOR) if math.isfinite(moved) else 1.0 / FLOOR


def own_decrease(outputs: Tensor, residual: Tensor, moved: Tensor, l0: float) -> float:
    """Return the logarithm of what the samples' *own* movement of outputs takes off the loss, relative to L_0.

    The outputs f_b move to f_b + Δ_b. With residuals r_b = ∂ℓ_b/∂f_b and means over the samples r̄ and Δ̄,
    -⟨r_b, Δ_b⟩ summed is what the first order says; the part -⟨r_b - r̄, Δ_b - Δ̄⟩ is what is left when all samples are
    moved alike is taken away. Where inputs are hardly told apart (sparse texts, a gradient that vanished on its way to
    them), the first steps move all outputs alike, and the loss soon stops falling. It is the alignment of the NTK with
    the centred residual, for the kernel of signed gradients, without the kernel.

    Args:
        outputs, residual, moved: [B, ...]: before, ∂(Σℓ)/∂outputs, and after.
        l0: mean loss before.
    """
    count = len(outputs)
    change = _movement(outputs, moved).reshape(count, -1)
    pull = residual.detach().double().reshape(count, -1)
    own = -float(((change - change.mean(0)) * (pull - pull.mean(0))).sum()) / count
    return log_ratio(own, l0) if math.isfinite(own) else math.log(FLOOR)


def _movement(before: Tensor, after: Tensor) -> Tensor:
    """Return how far outputs moved, float64; what is masked (-∞) before and after did not."""
    a, b = before.detach().double(), after.detach().double()
    return torch.where(a == b, 0.0, b - a)


def log_ratio(part: float, whole: float) -> float:
    """Return log(part / whole), no less than the logarithm of ``FLOOR`` and no more than its negative."""
    if not whole > 0.0:
        return math.log(FLOOR)
    return math.log(min(max(part / whole, FLOOR), 1.0 / FLOOR))
