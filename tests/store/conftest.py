"""Rows as a sweep would write them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cape.config import TrialSpec
from cape.feature_names import FEATURE_NAMES


def _make_rows(count: int, family: str = "mlp", dataset: str = "digits", first_seed: int = 0) -> list[dict[str, Any]]:
    """Return the rows (two ε each) of ``count`` trials whose values are all different."""
    rows = []
    for seed in range(first_seed, first_seed + count):
        trial = TrialSpec(family=family, dataset=dataset, batch_size=32, lr=1e-3, epsilons=(0.2, 0.1), seed=seed)
        for i, epsilon in enumerate(trial.epsilons):
            rows.append(
                {
                    "trial_id": trial.trial_id,
                    "sweep_hash": "abc",
                    "family": family,
                    "architecture": "mlp",
                    "dataset": dataset,
                    "batch_size": 32,
                    "lr": 1e-3,
                    "epsilon": epsilon,
                    "seed": seed,
                    **{name: seed + 0.25 * j for j, name in enumerate(FEATURE_NAMES)},
                    "log_epsilon": math.log(epsilon),
                    "t_star": 10 * seed + i,
                    "converged": True,
                    "losses": [2.0, 1.0, 0.5],
                }
            )
    return rows


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """Tiny trials gain nothing from threads, and two that wait for a busy core lose a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    """A function that makes the rows of some trials: ``make_rows(count, family=, dataset=, first_seed=)``."""
    return _make_rows
