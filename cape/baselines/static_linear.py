"""The learned static baseline: linear regression of log T* on what is known without any gradient.

The paper calls it non-learning although it is fitted; its four features are [log_p, log_b, log_lr, log_n].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cape.errors import DataError
from cape.metamodel.regressors import log_steps
from cape.metamodel.rows import CAP, STATIC_FEATURES, as_rows


@dataclass(frozen=True)
class StaticLinear:
    """Intercept and coefficients [4] of log T* on ``STATIC_FEATURES``."""

    intercept: float
    coefficients: np.ndarray

    @classmethod
    def fit(cls, table: Any) -> StaticLinear:
        """Fit by least squares on the rows that reached ε; raises ``DataError`` where there are none."""
        rows = as_rows(table)
        rows = rows.take(rows.reached)
        x = rows.matrix(STATIC_FEATURES)
        complete = np.isfinite(x).all(axis=1)
        if not complete.any():
            raise DataError("No row that reached ε has all four static features; the baseline cannot be fitted.")
        x, y = x[complete], log_steps(rows["t_star"][complete])
        # Centred, so that a feature that does not vary gets weight zero (the least-norm solution).
        mean = x.mean(axis=0)
        weights = np.linalg.lstsq(x - mean, y - y.mean(), rcond=1e-10)[0]
        return cls(float(y.mean() - mean @ weights), weights)

    def predict(self, table: Any) -> np.ndarray:
        """Return T* [n], clipped to 1..5,000 steps (a line in logs has no bounds); NaN where a feature is missing."""
        steps = np.exp(self.intercept + as_rows(table).matrix(STATIC_FEATURES) @ self.coefficients)
        return np.clip(steps, 1.0, CAP)
