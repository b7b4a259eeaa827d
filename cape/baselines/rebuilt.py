"""Baselines that need the model itself, and what every method costs beside one probe.

A row names its model and its seed, so that the trial's model and batch can be built again, bit for bit, though neither
is stored. That is slow: it is done for a few trials of each family.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.baselines.curve_extrapolation import WARM_UP
from cape.baselines.ntk import ntk_ode, true_logit_gram
from cape.config import StoppingRule, TrialSpec
from cape.errors import DataError
from cape.metamodel.rows import CAP, Rows
from cape.tasks import TASK_LOSS

if TYPE_CHECKING:
    from torch import nn

UNREACHABLE = 1e-9  # an ε that no warm-up crosses
REPEATS = 3


@dataclass(frozen=True)
class Cost:
    """What one prediction of a method takes: median seconds, and in units of the same model's probe."""

    family: str
    method: str
    trials: int
    seconds: float
    probes: float


def rebuild(
    rows: Rows, index: int, data_root: str | os.PathLike[str] | None = None
) -> tuple[TrialSpec, nn.Module, Any]:
    """Return (trial, model at its initialization, (x, y)) of a row that a sweep wrote.

    Raises:
        DataError: the row names no model or no seed (imported rows do not).
    """
    from cape.drawn import built
    from cape.trial import trial_of

    if rows["model"][index] is None or rows["seed"][index] is None:
        raise DataError("Imported rows name no model; only the rows of a sweep can be rebuilt.")
    trial = trial_of({name: column[index] for name, column in rows.columns.items()})
    subject = built(trial, data_root=None if data_root is None else Path(data_root))
    return trial, subject.model, subject.batch


def rebuilt(
    rows: Rows, per_family: int, data_root: str | os.PathLike[str] | None = None, seed: int = 0
) -> tuple[np.ndarray, list[Cost]]:
    """Rebuild some trials of each family, predict them by ``ntk_ode``, and time what every method needs of them.

    Args:
        rows: of a sweep. per_family: trials. data_root: where its datasets are. seed: draws the trials.

    Returns:
        Steps [n] by ``ntk_ode``, clipped to 1..5,000, NaN for trials that were not rebuilt; and the costs by family:
        ``probe``, ``ntkl`` (its norms alone), ``ntk_ode`` (B gradients), ``curve`` (60 training steps).
    """
    steps = np.full(len(rows), np.nan)
    costs = []
    trials, named = rows.trials, ~rows.augmented & np.array([m is not None for m in rows["model"]], dtype=bool)
    for family in rows.families:
        mine = np.unique(trials[(rows["family"] == family) & named])
        timed: dict[str, list[float]] = {}
        for trial in np.random.default_rng([seed, len(mine)]).permutation(mine)[:per_family]:
            index = np.flatnonzero(trials == trial)
            spec, model, batch = rebuild(rows, int(index[0]), data_root)
            assert spec.model is not None
            loss = TASK_LOSS[spec.model.task]
            gram, residual = _timed(timed, model, batch, spec.lr, loss)
            values = [ntk_ode(gram, residual, spec.lr, float(e)) for e in rows["epsilon"][index]]
            steps[index] = np.clip(values, 1.0, CAP)
        ratios = {name: np.divide(seconds, timed["probe"]) for name, seconds in timed.items()}
        costs += [
            Cost(family, name, len(seconds), float(np.median(seconds)), float(np.median(ratios[name])))
            for name, seconds in timed.items()
        ]
    return steps, costs


def _timed(
    timed: dict[str, list[float]], model: nn.Module, batch: Any, lr: float, loss: str
) -> tuple[np.ndarray, np.ndarray]:
    """Append the seconds that each method takes of one model to ``timed``; return its Gram matrix and residual."""
    from cape.convergence import measure
    from cape.probing import per_sample_norms, probe

    rule = StoppingRule(max_steps=6)
    runs: dict[str, Callable[[], Any]] = {
        "probe": lambda: probe(model, batch, loss=loss, lr=lr, dataset_size=1),
        "ntkl": lambda: per_sample_norms(model, batch, loss=loss),
        "ntk_ode": lambda: true_logit_gram(model, batch, loss),
    }
    found: Any = None
    for name, run in runs.items():
        taken = []
        for _ in range(1 if name == "ntk_ode" else REPEATS):
            start = time.perf_counter()
            found = run()
            taken.append(time.perf_counter() - start)
        timed.setdefault(name, []).append(min(taken))
    warm = measure(model, batch, loss=loss, lr=lr, epsilons=(UNREACHABLE,), stopping=rule)
    timed.setdefault("curve", []).append(WARM_UP * warm.step_seconds)
    return found
