"""Metrics of predictions of T*: errors in steps, AvgAccuracy, intervals, calibration and the replicate floor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FEWEST_REPLICATES = 5


def avg_accuracy(true: np.ndarray, predicted: np.ndarray) -> float:
    """Return the mean of clip(1 - |error|/max(T, 1), 0, 1)."""
    return float(np.mean(np.clip(1.0 - np.abs(predicted - true) / np.maximum(true, 1.0), 0.0, 1.0)))


def errors(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return rows, mae, rmse, median_ae, r2 and avg_accuracy of steps [n]; NaN where there is no row.

    Rows whose prediction is NaN (a method that cannot take them) are left out and not counted. R² is NaN for
    constant truth.
    """
    true, predicted = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    good = np.isfinite(predicted) & np.isfinite(true)
    true, predicted = true[good], predicted[good]
    if not len(true):
        names = ("mae", "rmse", "median_ae", "r2", "avg_accuracy")
        return {"rows": 0.0, **dict.fromkeys(names, float("nan"))}
    gap = np.abs(predicted - true)
    spread = float(np.sum((true - true.mean()) ** 2))
    return {
        "rows": float(len(true)),
        "mae": float(gap.mean()),
        "rmse": float(np.sqrt(np.mean(gap**2))),
        "median_ae": float(np.median(gap)),
        "r2": 1.0 - float(np.sum(gap**2)) / spread if spread > 0 else float("nan"),
        "avg_accuracy": avg_accuracy(true, predicted),
    }


def intervals(true: np.ndarray, low: np.ndarray, high: np.ndarray) -> dict[str, float]:
    """Return the coverage, and the median width as the ratio high/low, of intervals [n]."""
    if not len(true):
        return {"coverage": float("nan"), "width": float("nan")}
    return {
        "coverage": float(np.mean((true >= low) & (true <= high))),
        "width": float(np.median(high / np.maximum(low, 1e-12))),
    }


def epoch_calibration(
    true: np.ndarray, predicted: np.ndarray, batch_size: np.ndarray, size: np.ndarray
) -> tuple[float, float] | None:
    """Return (a, b) of the least-squares line true = a·predicted + b, both in epochs (T·B/N).

    None where fewer than three finite rows, or predictions that do not vary, leave no line to fit.
    """
    x, y = predicted * batch_size / size, true * batch_size / size
    good = np.isfinite(x) & np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) < 3 or np.ptp(x) <= 1e-9 * max(float(np.max(np.abs(x))), 1e-300):
        return None
    slope = float(np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2))
    return slope, float(y.mean() - slope * x.mean())


def apply_calibration(
    line: tuple[float, float], predicted: np.ndarray, batch_size: np.ndarray, size: np.ndarray
) -> np.ndarray:
    """Return calibrated steps, at least 1."""
    return np.maximum(1.0, (line[0] * predicted * batch_size / size + line[1]) * size / batch_size)


def replicate_floor(configuration: Sequence[object] | np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the floor's predictions [n]: the median T* of trials that differ in nothing but the seed.

    NaN for rows whose configuration has fewer than five trials. Of all predictors that know the configuration only, the
    median has the smallest mean absolute error; a probe of the actual initialization may go below it.
    """
    keys = np.unique(np.asarray(configuration).astype(str), return_inverse=True)[1]
    true = np.asarray(true, dtype=np.float64)
    out = np.full(len(true), np.nan)
    order = np.argsort(keys, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
        if len(group) >= FEWEST_REPLICATES:
            out[group] = np.median(true[group])
    return out
