"""Learning-curve extrapolation: train 60 warm-up steps from the trial's own initialization, fit, extrapolate.

Needs 60 training steps where the probe needs about two, and a crossing inside the warm-up is returned as it was seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from cape.config import check_epsilon
from cape.metamodel.rows import CAP

WARM_UP = 60


def curve(losses: ArrayLike, epsilon: float, warm_up: int = WARM_UP) -> float:
    """Return the predicted T* from the losses L_0, L_1, ... of the warm-up.

    Args:
        losses: L_0 and the loss after each update; only the first ``warm_up`` + 1 are looked at.
        epsilon: target ratio in (0, 1).

    Returns:
        The observed crossing where there is one; else where a line fitted by least squares to log L_t meets log(ε·L_0),
        clipped to (last step seen, 5,000], and 5,000 where the fitted loss does not fall. NaN without two finite
        positive losses.
    """
    epsilon = check_epsilon(epsilon)
    values = np.asarray(losses, dtype=np.float64)[: warm_up + 1]
    if not len(values) or not np.isfinite(values[0]) or values[0] <= 0:
        return float("nan")
    crossed = np.flatnonzero(values <= epsilon * values[0])
    if len(crossed):
        return float(crossed[0])
    steps = np.arange(len(values))
    good = np.isfinite(values) & (values > 0)
    if good.sum() < 2:
        return float("nan")
    slope, intercept = np.polyfit(steps[good], np.log(values[good]), 1)
    if slope >= -1e-12:
        return CAP
    meeting = (np.log(epsilon * values[0]) - intercept) / slope
    return float(np.clip(np.ceil(meeting), len(values), CAP))


def curves(losses: Iterable[ArrayLike | None], epsilons: ArrayLike, warm_up: int = WARM_UP) -> np.ndarray:
    """Return ``curve`` of each row, [n]; NaN for a row without recorded losses."""
    pairs = zip(losses, np.asarray(epsilons, dtype=np.float64), strict=True)
    return np.array([np.nan if row is None else curve(row, float(e), warm_up) for row, e in pairs])
