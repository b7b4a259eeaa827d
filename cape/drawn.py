"""What a trial's seed draws: its model, that model's initialization, and its batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cape import datasets, families
from cape.config import ModelSpec, TrialSpec
from cape.convergence import Subject
from cape.errors import CapeError, ModelError, first_line


@dataclass(frozen=True)
class Drawn:
    """A trial and what its seed draws, or the error of that."""

    trial: TrialSpec
    dataset: datasets.Dataset
    spec: ModelSpec | None
    error: Exception | None = None


def draw(trial: TrialSpec, data_root: str | Path | None) -> Drawn:
    """Return a trial with its dataset and the model that its seed draws; nothing is built yet."""
    dataset = datasets.load(trial.dataset, data_root)
    if trial.task is not None:
        dataset = dataset.with_task(trial.task)
    if trial.augmentation is not None:
        dataset = datasets.augmented(dataset, trial.augmentation, trial.batch_size)
    try:
        return Drawn(trial, dataset, trial.model or draw_model(trial, dataset))
    except (ModelError, RuntimeError) as error:
        return Drawn(trial, dataset, None, error)


def prepare(drawn: Drawn, device: torch.device) -> Subject:
    """Build a trial's model on a device and fetch its batch.

    Raises:
        ModelError, RuntimeError: the error of the draw, or that the model cannot be built.
    """
    if drawn.error is not None:
        raise drawn.error
    trial, dataset, spec = drawn.trial, drawn.dataset, drawn.spec
    assert spec is not None
    model = build_model(trial, spec).to(device)
    preprocess = families.get(spec.family).preprocess_for(trial.preprocess)
    x, y = dataset.batch(trial.batch_size, trial.seed_for("batch"), spec.layout, preprocess=preprocess)
    batch = (x.to(device), y.to(device))
    return Subject(model, batch, trial.lr, trial.epsilons, trial.stopping, trial.seed_for("train"))


def built(trial: TrialSpec, device: str | torch.device = "cpu", data_root: str | Path | None = None) -> Subject:
    """Return a trial's model at its initialization and its batch: bit for bit what ``trial.run_trials`` begins with.

    Raises:
        ModelError, SpecError, DataError: see ``trial.run_trials``.
    """
    return prepare(draw(trial, data_root), torch.device(device))


def draw_model(trial: TrialSpec, dataset: datasets.Dataset) -> ModelSpec:
    """Return the model that a trial's seed draws from its family; raises ``ModelError`` where the family fails."""
    rng = np.random.default_rng(trial.seed_for("model"))
    with _named(trial.family):
        spec = families.get(trial.family).sample(rng, dataset, reference=trial.preprocess == "reference")
        spec.to_json()  # a row holds it: options that are no JSON fail here
    return spec


def build_model(trial: TrialSpec, spec: ModelSpec) -> nn.Module:
    """Return the trial's model, initialized from its seed, on the CPU; the global RNG is left as it was.

    Raises:
        ModelError: the family fails, or builds no module.
    """
    family = families.get(spec.family)
    with torch.random.fork_rng(devices=[]), _named(spec.family):
        torch.random.default_generator.manual_seed(trial.seed_for("init"))
        model = family.build(spec)
        if not isinstance(model, nn.Module):
            raise TypeError(f"build returned {type(model).__name__}, not a torch.nn.Module")
    return model


@contextmanager
def _named(family: str) -> Iterator[None]:
    """Make whatever else a family raises (a user's own may raise anything) a ``ModelError``, which fails one trial."""
    try:
        yield
    except (CapeError, RuntimeError):
        raise
    except Exception as error:
        raise ModelError(f"The family '{family}' failed: {type(error).__name__}: {first_line(error)}.") from error
