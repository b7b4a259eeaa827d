"""CAPE: predict how many optimizer steps a network needs, from one mini-batch at initialization."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cape.convergence import Trajectory, measure
    from cape.errors import CapeError, DataError, DependencyError, ModelError, SpecError, StoreError
    from cape.predict import Prediction, predict, rank
    from cape.probing import Features, per_sample_norms, probe

# Loaded on first use, so that `import cape` and `cape --help` stay instant.
_PUBLIC = {
    "probe": "cape.probing",
    "per_sample_norms": "cape.probing",
    "Features": "cape.probing",
    "measure": "cape.convergence",
    "Trajectory": "cape.convergence",
    "predict": "cape.predict",
    "rank": "cape.predict",
    "Prediction": "cape.predict",
    "CapeError": "cape.errors",
    "SpecError": "cape.errors",
    "DataError": "cape.errors",
    "ModelError": "cape.errors",
    "StoreError": "cape.errors",
    "DependencyError": "cape.errors",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'cape' has no attribute '{name}'")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
