"""Conformal intervals for T*, one calibration per family (Mondrian), in log space.

Scores are |log T* - log prediction| on trials that the fit behind the prediction had not seen, over the width that the
family's surface expects there (normalized conformal prediction: Papadopoulos et al. 2008): an interval is wider away
from the training trials, and where T* is so short that one step is much of it; it still holds at its level. An interval
always holds the prediction, a whole number beside its centre: where that is T* the score is 0. The rows of one trial
(one per ε) are not exchangeable among themselves, so the finite-sample quantile counts *trials*: with n of them, level
1 - a takes the ceil((n + 1)(1 - a))/n quantile of all their rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from cape.errors import SpecError

KEPT_SCORES = 1000

FEWEST_TRIALS = 10
"""Calibration trials below which a family's own quantile is too noisy to use, whatever the level."""


def check_level(level: float) -> float:
    """Return a coverage level strictly between 0 and 1, or raise ``SpecError``."""
    if not isinstance(level, Real) or isinstance(level, bool) or not 0.0 < level < 1.0:
        raise SpecError(f"The level of an interval must lie strictly between 0 and 1, not {level!r}.")
    return float(level)


def conformal_quantile(scores: np.ndarray, level: float, trials: int | None = None) -> float:
    """Return the half-width that covers a new trial with probability ``level``.

    Args:
        scores: non-negative scores of the calibration rows, [m], any order.
        level: in (0, 1).
        trials: number of independent trials behind the scores; default m.

    Returns:
        The quantile, or ``inf`` where that many trials cannot promise the level.
    """
    n = len(scores) if trials is None else trials
    # The guard against 0.9 * 10 = 9.000000000000002, which would ask for one trial too many.
    rank = math.ceil((n + 1) * level - 1e-9)
    if n == 0 or rank > n:
        return math.inf
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    return float(ordered[min(len(ordered), math.ceil(rank / n * len(ordered))) - 1])


@dataclass(frozen=True)
class Conformal:
    """Calibration scores: ``pooled`` over all families and of each family with enough trials.

    Attributes:
        scores: sorted scores by family, and under ``"pooled"``; at most ``KEPT_SCORES`` evenly spaced order statistics.
        trials: number of calibration trials behind each.
    """

    scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    trials: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def calibrate(cls, errors: np.ndarray, families: np.ndarray, trials: np.ndarray) -> Conformal:
        """Build from errors |Δ log T*| / width of rows that were not fitted on, and each row's family and trial."""
        scores, counts = {}, {}
        for name in ("pooled", *sorted({str(f) for f in families})):
            index = np.ones(len(errors), dtype=bool) if name == "pooled" else families == name
            if index.any():
                scores[name] = _thin(np.sort(errors[index]))
                counts[name] = len(np.unique(trials[index]))
        return cls(scores, counts)

    def half_width(self, family: str | None, level: float) -> tuple[float, str]:
        """Return (half-width in log T* where the width is 1, its source: the family, ``"pooled"`` or ``"none"``).

        A family with fewer than ten trials, or too few for the level, is served by the pooled scores; where
        those too are too few the half-width is infinite.
        """
        check_level(level)
        for name in (family or "pooled", "pooled"):
            if self.trials.get(name, 0) >= (1 if name == "pooled" else FEWEST_TRIALS):
                width = conformal_quantile(self.scores[name], level, self.trials[name])
                if math.isfinite(width):
                    return width, name
        return math.inf, "none"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "scores": {k: [float(v) for v in np.round(s, 6)] for k, s in self.scores.items()},
            "trials": dict(self.trials),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Conformal:
        """Read what ``to_dict`` wrote."""
        return cls({k: np.asarray(v, dtype=np.float64) for k, v in data["scores"].items()}, dict(data["trials"]))


def _thin(ordered: np.ndarray) -> np.ndarray:
    """Keep at most ``KEPT_SCORES`` order statistics, always the largest (rounding up: never anti-conservative)."""
    if len(ordered) <= KEPT_SCORES:
        return ordered
    return ordered[np.ceil(np.arange(1, KEPT_SCORES + 1) * len(ordered) / KEPT_SCORES).astype(int) - 1]


def bounds(centre: float, steps: float, half_width: float) -> tuple[float, float]:
    """Return (low, high) in steps: around the centre, and with the prediction, which may be its whole number.

    T* is at least 1, so neither bound is below it.
    """
    low = 0.0 if math.isinf(half_width) else centre * math.exp(-half_width)
    high = math.inf if half_width > 700 else centre * math.exp(half_width)
    return max(1.0, min(low, steps)), max(1.0, high, steps)
