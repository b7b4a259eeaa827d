"""Neural-tangent-kernel baselines.

``ntkl`` is the published one: T ≈ log(1/ε) over the mean eigenvalue of the batch's true-logit gradient Gram. It
ignores the learning rate. ``ntk_ode`` is the honest one after Zancato et al. 2020: the whole spectrum, the residual's
projection on it, and the learning rate; both describe gradient descent on a linearized network, not AdamW.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cape.config import check_epsilon, check_lr
from cape.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from cape.tasks import LossLike


def ntkl(log_tau: ArrayLike, epsilon: ArrayLike) -> np.ndarray:
    """Return log(1/ε) / mean eigenvalue, clipped to at least one step, float64 [n].

    The mean eigenvalue of the B×B Gram is its trace over B, which is the mean over samples of the squared norm of the
    true logit's gradient: exp(``log_tau``) exactly, so no further pass over the model is needed.
    """
    steps = np.log(1.0 / np.asarray(epsilon, dtype=np.float64)) / np.exp(np.asarray(log_tau, dtype=np.float64))
    return np.maximum(steps, 1.0)


def ntk_ode(gram: ArrayLike, residual: ArrayLike, lr: float, epsilon: float = 0.1) -> float:
    """Return the steps after which the linearized loss falls to ε of its start, integrated exactly.

    The loss is ½·mean(r²) of the residuals r on the batch; gradient flow of step ``lr`` gives
    r(t) = exp(-lr·t·Θ/B) r(0). With Θ = V diag(λ) Vᵀ and c = Vᵀ r(0), the loss ratio at t is
    Σ c_k² exp(-2·lr·t·λ_k/B) / Σ c_k², which falls monotonically and is solved for ε by bisection.

    Args:
        gram: Θ, [B, B], inner products of the per-sample gradients of the true logit.
        residual: r(0), [B]: prediction minus target (for cross-entropy, p_y - 1).
        lr: learning rate. epsilon: target ratio in (0, 1).

    Returns:
        Steps (not rounded, zero only for a zero residual), or ``inf`` where the part of the residual in the Gram's null
        space alone exceeds ε.

    Raises:
        ModelError: shapes that do not fit, or values that are not finite.
    """
    lr, epsilon = check_lr(lr), check_epsilon(epsilon)
    theta = np.asarray(gram, dtype=np.float64)
    r = np.asarray(residual, dtype=np.float64).reshape(-1)
    if theta.shape != (len(r), len(r)) or not len(r):
        raise ModelError(
            f"The Gram has shape {theta.shape} and the residual {len(r)} entries; they must be [B, B] and [B]."
        )
    if not (np.isfinite(theta).all() and np.isfinite(r).all()):
        raise ModelError("The Gram or the residual holds NaN or infinite values; check the model's outputs.")
    values, vectors = np.linalg.eigh((theta + theta.T) / 2)
    values = np.where(values > values[-1] * len(r) * np.finfo(np.float64).eps, values, 0.0)
    power = (vectors.T @ r) ** 2
    if power.sum() == 0.0:
        return 0.0
    power /= power.sum()
    if power[values == 0.0].sum() > epsilon:
        return math.inf
    rate = 2.0 * lr * values / len(r)

    def ratio(t: float) -> float:
        return float(power @ np.exp(-rate * t))

    high = 1.0
    while ratio(high) > epsilon:
        high *= 2.0
        if high > 1e18:
            return math.inf
    low = 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if ratio(middle) > epsilon else (low, middle)
    return high


def true_logit_gram(model: nn.Module, batch: Any, loss: LossLike = "cross_entropy") -> tuple[np.ndarray, np.ndarray]:
    """Return (Gram [B, B] float64, residual [B]) of a model at its initialization, for ``ntk_ode``.

    One forward and one backward pass per sample and B gradients held at once: for baselines, not for the product.
    Batch norm in eval mode and dropout off, as in the probe. The residual is p_y - 1 for classification, output minus
    target otherwise.
    """
    import torch

    from cape.checks import check_batch, trainable
    from cape.samples import Samples
    from cape.state import call, preserved
    from cape.tasks import Loss

    inputs, targets, size = check_batch(batch)
    criterion, samples = Loss(loss), Samples.of(inputs, size)
    with preserved(model), torch.enable_grad():
        model.eval()
        parameters = list(trainable(model).values())
        with torch.no_grad():
            outputs = call(model, inputs)
        criterion.check(outputs, targets)
        logit = criterion.target_logit(outputs, targets)
        if not targets.is_floating_point():
            residual = (-criterion.per_sample(outputs, targets)).exp() - 1.0
        else:
            residual = logit - targets.reshape(size, -1).to(logit.dtype).mean(1)
        rows = []
        for i in range(size):
            # Two copies of a sample: see probing/reference.py. A pass over the whole batch would cost B times as much.
            pair = call(model, samples.take(torch.tensor([i, i])).inputs)[:1]
            one = criterion.target_logit(pair, targets[i : i + 1])[0]
            grads = torch.autograd.grad(one, parameters, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
            rows.append(torch.cat([g.reshape(-1) for g in flat]).detach())
        jacobian = torch.stack(rows)
        gram = sum(((part.double() @ part.double().T) for part in jacobian.split(1 << 18, dim=1)), torch.zeros(()))
    return gram.cpu().numpy(), residual.detach().double().cpu().numpy()
