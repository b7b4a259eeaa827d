"""CAPE: predict how many optimizer steps a network needs, from one mini-batch at initialization."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from cape.convergence import Trajectory as Trajectory
    from cape.convergence import measure as measure
    from cape.errors import CapeError as CapeError
    from cape.errors import DataError as DataError
    from cape.errors import DependencyError as DependencyError
    from cape.errors import ModelError as ModelError
    from cape.errors import SpecError as SpecError
    from cape.errors import StoreError as StoreError
    from cape.predict import Prediction as Prediction
    from cape.predict import predict as predict
    from cape.predict import rank as rank
    from cape.probing import Features as Features
    from cape.probing import per_sample_norms as per_sample_norms
    from cape.probing import probe as probe

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
