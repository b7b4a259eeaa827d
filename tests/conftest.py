"""Fixtures that every room shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    # Ray runs its workers at 15: beside anything else that keeps the cores busy, a test of seconds then takes minutes.
    os.environ.setdefault("RAY_worker_niceness", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The Parquet samples of the paper's datasets; the tests that need them skip where there are none."""
    root = Path(os.environ.get("CAPE_DATA") or ROOT.parent / "shared" / "data")
    if not (root / "mnist.parquet").exists():
        pytest.skip("no data root: set CAPE_DATA to a folder of Parquet files")
    return root


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for the whole test session (starting it takes seconds)."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # Workers take their path from Ray's own processes: this checkout, whatever is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    ray.init(
        address="local",  # not a cluster that somebody else has started on this machine
        num_cpus=2,
        num_gpus=0,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _system_config={"metrics_report_interval_ms": 100},  # ten seconds by default
    )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
