"""One trial from its seed to its rows: the one place where the probe and T* meet. Knows nothing of Ray."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cape import datasets, families
from cape.config import ModelSpec, TrialSpec, canonical_json
from cape.convergence import Trajectory, measure
from cape.errors import ModelError
from cape.probing import probe
from cape.store.schema import KEPT_LOSSES
from cape.tasks import TASK_LOSS

Row = dict[str, Any]


def run_trials(
    trials: Iterable[TrialSpec],
    device: str | torch.device = "cpu",
    data_root: str | Path | None = None,
    sweep_hash: str = "",
) -> Iterator[list[Row]]:
    """Probe and train each trial, and yield its rows (one for each ε) as soon as it is done.

    A trial's numbers follow from its seed alone: the model's choice, its initialization, the batch and the dropout
    masks each have a seed of their own. A trial whose model fails (``ModelError``, out of memory, any other
    ``RuntimeError``) yields rows with ``stop_reason`` "failed" and its error; it does not disturb the next.

    Args:
        trials: what to run.
        device: where to run it.
        data_root: folder of the data; see ``datasets.data_root``.
        sweep_hash: written into every row.

    Raises:
        SpecError, DataError: an unknown family or dataset, data that is missing or does not fit: no trial of the
            same kind could succeed.
        RuntimeError: the device itself failed (a sticky CUDA error); nothing after it in this process can be trusted.
    """
    device = torch.device(device)
    for trial in trials:
        rows = _base_rows(trial, device, sweep_hash)
        try:
            _fill(rows, trial, device, data_root)
        except (ModelError, RuntimeError) as error:
            if _poisoned(error):
                raise
            for row in rows:
                row.update(converged=False, stop_reason="failed", t_star=None, error=_one_line(error))
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield rows


def failed_rows(trial: TrialSpec, device: str | torch.device, sweep_hash: str, error: str) -> list[Row]:
    """Return the rows of a trial that was given up: what is known without running it, and the error."""
    rows = _base_rows(trial, torch.device(device), sweep_hash)
    for row in rows:
        row.update(converged=False, stop_reason="failed", t_star=None, error=error[:500])
    return rows


def _base_rows(trial: TrialSpec, device: torch.device, sweep_hash: str) -> list[Row]:
    """Return what is known of a trial's rows before it runs."""
    shared = {
        "trial_id": trial.trial_id,
        "sweep_hash": sweep_hash,
        "family": trial.family,
        "dataset": trial.dataset,
        "task": trial.task,
        "batch_size": trial.batch_size,
        "lr": trial.lr,
        "seed": trial.seed,
        "replicate": trial.replicate,
        "precision": trial.precision,
        "preprocess": trial.preprocess,
        "device": device_name(device),
    }
    return [{**shared, "epsilon": e, "log_epsilon": math.log(e)} for e in trial.epsilons]


def _fill(rows: list[Row], trial: TrialSpec, device: torch.device, data_root: str | Path | None) -> None:
    dataset = datasets.load(trial.dataset, data_root)
    if trial.task is not None:
        dataset = dataset.with_task(trial.task)
    spec = trial.model or draw_model(trial, dataset)
    described = {"architecture": spec.architecture, "model": canonical_json(spec.to_dict()), "task": dataset.task}
    for row in rows:
        row.update(described)
    model = build_model(trial, spec).to(device)
    preprocess = families.get(spec.family).preprocess_for(trial.preprocess)
    x, y = dataset.batch(trial.batch_size, trial.seed_for("batch"), spec.layout, preprocess=preprocess)
    batch = (x.to(device), y.to(device))
    loss = TASK_LOSS[dataset.task]

    start = time.perf_counter()
    features = probe(model, batch, loss=loss, lr=trial.lr, dataset_size=dataset.full_train_size).as_dict()
    probe_seconds = time.perf_counter() - start
    trajectory = measure(
        model,
        batch,
        loss=loss,
        lr=trial.lr,
        epsilons=trial.epsilons,
        stopping=trial.stopping,
        seed=trial.seed_for("train"),
        precision=trial.precision,
    )
    for row in rows:
        row.update(features)
        row.update(_truth(trajectory, row["epsilon"]))
        row.update(probe_seconds=probe_seconds)


def _truth(trajectory: Trajectory, epsilon: float) -> Row:
    """Return the columns of one row that the trajectory decides."""
    t_star = trajectory.t_star[epsilon]
    return {
        "t_star": t_star,
        "converged": t_star is not None,
        "stop_reason": None if t_star is not None else trajectory.stop_reason,
        "stopped_at": trajectory.stopped_at,
        "l0": trajectory.l0,
        "final_loss": float(trajectory.losses[-1]),
        "losses": trajectory.losses[:KEPT_LOSSES].tolist(),
        "truth_seconds": trajectory.seconds,
        "step_seconds": trajectory.step_seconds if math.isfinite(trajectory.step_seconds) else None,
    }


def draw_model(trial: TrialSpec, dataset: datasets.Dataset) -> ModelSpec:
    """Return the model that a trial's seed draws from its family."""
    rng = np.random.default_rng(trial.seed_for("model"))
    return families.get(trial.family).sample(rng, dataset, reference=trial.preprocess == "reference")


def build_model(trial: TrialSpec, spec: ModelSpec) -> nn.Module:
    """Return the trial's model, initialized from its seed, on the CPU; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(trial.seed_for("init"))
        return families.get(spec.family).build(spec)


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """Return what a person calls the device: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _poisoned(error: Exception) -> bool:
    """Return whether the device failed for good (out of memory is the trial's fault, not the device's)."""
    return isinstance(error, torch.AcceleratorError)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]
