"""How hard a batch's targets are to tell apart by its inputs: what training on it must overcome, whatever the model.

Two batches of one loss and one gradient can need ten times as many updates from each other where inputs that are nearly
the same have different targets. Everything here follows from the squared distances between the samples' inputs and
between their targets (numbers: Euclidean; classes and tokens: how many differ), each over its mean, so that neither
scale counts. The model takes no part in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cape.samples import Samples
from cape.state import Inputs, as_real

MOST = 512
"""Samples that are looked at, the first ones: the work grows with their cube."""

NEAREST = 1e-4  # added to squared distances (whose mean is 1): two samples nearer than 1 % are the same
RIDGE = 1e-2
SLOWEST = 1e-3  # rate that every direction is given beside its own, whose mean is 1
LEFT = 0.02  # of the squared residual, at the end of the flow
_PIECE = 2**20  # numbers that are held in float64 at once


@dataclass(frozen=True)
class Separation:
    """Natural logarithms; see ``separation``."""

    steepness: float
    hardness: float
    flow: float


def separation(x: Inputs, y: Tensor) -> Separation:
    """Compare a batch's inputs with its targets [B, ...].

    ``steepness``: mean over the samples of log max_b' ‖y_b - y_b'‖² / ‖x_b - x_b'‖²: the local Lipschitz constant of
    what is to be learnt. ``hardness``: log of yᵀ(K + δI)⁻¹y / yᵀy, what a ridge regression with the Gaussian kernel
    K = exp(-‖x_b - x_b'‖²) of the inputs has to do (centred, K's mean eigenvalue 1). ``flow``: log of the time that
    gradient flow takes with that kernel until ``LEFT`` of the squared residual is left (Jacot et al. 2018, with a
    kernel of the inputs in place of the NTK).

    A batch of one, or of targets that are all the same, has nothing to tell apart: as of inputs at equal distances.
    """
    count = min(len(y), MOST)
    apart = torch.stack([_relative(_squares(t[:count])) for t in Samples.of(x, len(y)).tensors()]).mean(0)
    differ = _relative(_squares(y[:count]))
    if not differ.any():
        return Separation(0.0, -math.log1p(RIDGE), math.log(_time(np.ones(1), np.ones(1))))
    steepest = (differ / (apart + NEAREST)).fill_diagonal_(0.0).amax(1)
    values, vectors = torch.linalg.eigh(_centred(torch.exp(-apart)))
    # The first is the direction in which all samples are moved alike.
    rates, vectors = values[1:].clamp(min=0.0), vectors[:, 1:]
    rates /= rates.mean().clamp(min=1e-300)
    share = ((vectors.T @ _centred(-0.5 * differ)) * vectors.T).sum(1).clamp(min=0.0)
    share /= share.sum().clamp(min=1e-300)
    return Separation(
        steepness=float(steepest.clamp(min=NEAREST).log().mean()),
        hardness=math.log(float((share / (rates + RIDGE)).sum())),
        flow=math.log(_time(rates.numpy(), share.numpy())),
    )


def hardness(values: Tensor, y: Tensor) -> float:
    """Return the ``hardness`` of ``separation`` alone, of one tensor of values [B, ...], without eigenvalues."""
    count = min(len(y), MOST)
    differ = _relative(_squares(y[:count]))
    if not differ.any():
        return -math.log1p(RIDGE)
    kernel = _centred(torch.exp(-_relative(_squares(values[:count]))))
    kernel /= max(float(kernel.trace()) / (count - 1), 1e-300)
    wanted = _centred(-0.5 * differ)
    kernel.diagonal().add_(RIDGE)
    left = torch.cholesky_solve(wanted, torch.linalg.cholesky(kernel))
    return math.log(float(left.trace() / wanted.trace()))


def _squares(values: Tensor) -> Tensor:
    """Return the squared distances between samples [B, ...], float64 [B, B]; of integers, how many differ."""
    flat = as_real(values.detach().reshape(len(values), -1)).flatten(1)
    width = max(1, _PIECE // len(flat))
    if not flat.is_floating_point():
        width = max(1, width // len(flat))
        pieces = flat.split(width, 1)
        return sum(
            ((p[:, None] != p[None]).sum(2, dtype=torch.float64) for p in pieces),
            torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device),
        )
    centre = flat.mean(0)
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for piece, middle in zip(flat.split(width, 1), centre.split(width), strict=True):
        wide = (piece - middle).to(torch.float64)
        products.addmm_(wide, wide.T)
    norms = products.diagonal()
    return torch.nan_to_num(norms[:, None] + norms[None] - 2.0 * products).clamp(min=0.0).fill_diagonal_(0.0)


def _relative(squares: Tensor) -> Tensor:
    """Return squared distances over their mean between two samples, on the CPU; zeros where all are the same."""
    squares = squares.cpu()
    mean = float(squares.sum()) / max(1, len(squares) * (len(squares) - 1))
    return squares / mean if mean > 0.0 else squares


def _centred(matrix: Tensor) -> Tensor:
    """Return a symmetric matrix without its means, of rows and of columns."""
    means = matrix.mean(0)
    return matrix - means - means[:, None] + means.mean()


def _time(rates: np.ndarray, share: np.ndarray) -> float:
    """Return t with Σ share·exp(-2·(rates + ``SLOWEST``)·t) = ``LEFT``, by bisection of its logarithm."""
    decay = -2.0 * (rates + SLOWEST)
    low, high = -5.0, math.log(-math.log(LEFT) / SLOWEST)
    for _ in range(40):
        middle = 0.5 * (low + high)
        left = float((share * np.exp(decay * math.exp(middle))).sum())
        low, high = (middle, high) if left > LEFT else (low, middle)
    return math.exp(low)
