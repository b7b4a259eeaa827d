"""Ground truth as the published code made it, written anew: the baseline of ``benchmarks.truth``.

For each ε a new model; per-sample gradients by a loop over the samples; one model at a time; textbook AdamW; the loss
read back by ``.item()`` at each step.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cape import datasets
from cape.config import TrialSpec
from cape.drawn import build_model, draw_model


def naive_rows(trial: TrialSpec, device: str, data_root: str | Path | None, *, every: bool) -> dict[str, Any]:
    """Time the rows of one trial, one ε after the other.

    Args:
        every: run each ε. Else run the smallest alone and time each of its steps: the run for a larger ε is the same up
            to its own end, so that its time is that of the same probe and of a beginning of the same trajectory.

    Returns:
        ``probe_seconds`` and ``truth_seconds`` of all the trial's rows, and ``t_star`` by ε.
    """
    epsilons = sorted(trial.epsilons, reverse=True)
    probe = truth = 0.0
    t_star: dict[float, int | None] = {}
    for epsilon in epsilons if every else epsilons[-1:]:
        one = _one_epsilon(trial, epsilon, device, data_root)
        if every:
            probe += one["probe_seconds"]
            truth += one["ends"][-1]
            t_star[epsilon] = one["t_star"]
            continue
        for each in epsilons:
            t = next((t for t, loss in enumerate(one["losses"]) if loss <= each * one["losses"][0]), None)
            t_star[each] = t
            probe += one["probe_seconds"]
            truth += one["ends"][-1 if t is None else t]
    return {"probe_seconds": probe, "truth_seconds": truth, "t_star": {str(e): t for e, t in t_star.items()}}


def _one_epsilon(trial: TrialSpec, epsilon: float, device: str, data_root: str | Path | None) -> dict[str, Any]:
    dataset = datasets.load(trial.dataset, data_root)
    began = time.perf_counter()
    spec = draw_model(trial, dataset)
    model = build_model(trial, spec).to(device)
    x, y = (t.to(device) for t in dataset.batch(trial.batch_size, trial.seed_for("batch"), spec.layout))
    parameters = list(model.parameters())
    model.eval()
    g2 = tau = 0.0
    with torch.backends.cudnn.flags(enabled=device == "cpu" or spec.family != "rnn"):  # cuDNN: no backward in eval mode
        for i in range(len(y)):
            outputs = model(x[i : i + 1])
            g2 += _squared_norm(F.cross_entropy(outputs, y[i : i + 1]), parameters)
            tau += _squared_norm(outputs[0, y[i]], parameters)
    probed = time.perf_counter()
    model.train()
    torch.manual_seed(trial.seed_for("train") % 2**63)
    optimizer = torch.optim.AdamW(parameters, lr=trial.lr, weight_decay=1e-4)
    losses: list[float] = []
    ends: list[float] = []
    stopping = trial.stopping
    while True:
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        ends.append(time.perf_counter() - probed)
        window = losses[-stopping.plateau_window :]
        flat = len(window) == stopping.plateau_window and (
            (window[0] - window[-1]) / window[0] < stopping.plateau_tolerance
        )
        if losses[-1] <= epsilon * losses[0] or losses[-1] != losses[-1] or flat or len(losses) > stopping.max_steps:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    reached = losses[-1] <= epsilon * losses[0]
    return {
        "probe_seconds": probed - began,
        "losses": losses,
        "ends": ends,
        "t_star": len(losses) - 1 if reached else None,
        "features": (g2, tau),
    }


def _squared_norm(scalar: Tensor, parameters: list[nn.Parameter]) -> float:
    grads = torch.autograd.grad(scalar, parameters, retain_graph=True, allow_unused=True)
    return sum(g.pow(2).sum().item() for g in grads if g is not None)
