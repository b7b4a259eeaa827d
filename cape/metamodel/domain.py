"""Is a model inside what the meta-regressor was fitted on?

Two checks. Ranges: lr, N, ε, batch size and the model's sizes outside those of the training rows, each with its own
sentence. Distance: Mahalanobis distance of the standardized features to the row's family, flagged above the distance
that a share ``FALSE_ALARM`` of trials exceeds, each measured against statistics that it was left out of. A missing
feature adds nothing to the distance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cape.family_names import HEAD_AT_ZERO
from cape.metamodel.intervals import conformal_quantile
from cape.metamodel.rows import Rows

FALSE_ALARM = 0.02
RIDGE = 0.05
"""Added to the correlation matrix: features that never vary, or vary together, must not make every point far."""

UNSEEN = 1e12
"""Scale of a feature that no training row has: it then adds nothing to the distance."""

RANGED = (
    ("log_lr", "The learning rate {value:g}", "{low:g} to {high:g}"),
    ("log_n", "The training set size {value:.0f}", "{low:.0f} to {high:.0f}"),
    ("log_epsilon", "The target ε = {value:g}", "{low:g} to {high:g}"),
    ("log_b", "The batch size {value:.0f}", "{low:.0f} to {high:.0f}"),
    ("log_p", "The parameter count {value:.3g}", "{low:.3g} to {high:.3g}"),
    ("log_layers", "The number of weight tensors {value:.0f}", "{low:.0f} to {high:.0f}"),
    ("log_inputs", "The number of inputs {value:.0f}", "{low:.0f} to {high:.0f}"),
    ("log_outputs", "The number of outputs {value:.0f}", "{low:.0f} to {high:.0f}"),
)
_RANGED_NAMES = tuple(name for name, *_ in RANGED)


@dataclass(frozen=True)
class FamilyStatistics:
    """Mean [k], scale [k] and inverse of the regularized correlation matrix [k, k] of a family's features."""

    mean: np.ndarray
    scale: np.ndarray
    precision: np.ndarray
    threshold: float

    def distance(self, x: np.ndarray) -> np.ndarray:
        """Return the root mean squared Mahalanobis distance [n] of rows [n, k]; NaN entries count as the mean."""
        z = np.nan_to_num((_bounded(x) - self.mean) / self.scale, nan=0.0)
        return np.sqrt(np.einsum("ni,ij,nj->n", z, self.precision, z) / max(1, z.shape[1]))


@dataclass(frozen=True)
class Domain:
    """Statistics of the training rows.

    Attributes:
        features: numeric features that the distance looks at.
        families: statistics by family.
        ranges: smallest and largest value by feature of ``RANGED``, over all rows and by family (natural logs).
    """

    features: tuple[str, ...]
    families: Mapping[str, FamilyStatistics]
    ranges: Mapping[str, Mapping[str, tuple[float, float]]]

    @classmethod
    def fit(cls, rows: Rows, assigned: np.ndarray, features: Sequence[str]) -> Domain:
        """Take statistics from all rows, and thresholds from the distances of trials that were left out.

        Args:
            rows: what the boosters are fitted on. assigned: fold of each row, [n]; -1 for augmented rows, which are
                never left out: the false-alarm rate is that of plain trials.
            features: of the preset.
        """
        names = tuple(f for f in features if f != "family")
        families, ranges = {}, {"": _ranges(rows)}
        for family in rows.families:
            index = rows["family"] == family
            mine, folds = rows.take(index), assigned[index]
            x, trials = mine.matrix(names), mine.trials
            statistics = _statistics(x)
            distances, owners = [], []
            for fold in np.unique(folds[folds >= 0]):
                left = folds == fold
                if not left.all():
                    distances.append(_statistics(x[~left]).distance(x[left]))
                    owners.append(trials[left])
            found = np.concatenate(distances) if distances else np.empty(0)
            count = len(np.unique(np.concatenate(owners))) if owners else 0
            threshold = conformal_quantile(found, 1 - FALSE_ALARM, count)
            if math.isinf(threshold):  # too few trials to promise the rate: nothing nearer than any of them is far
                threshold = float(np.max(np.concatenate([found, statistics.distance(x)])))
            families[family] = FamilyStatistics(statistics.mean, statistics.scale, statistics.precision, threshold)
            # T* does not depend on N: a relative's trials say as well how large it may be. A head at zero is all that
            # tells such a family from its relative.
            shared = _RANGED_NAMES if family.endswith(HEAD_AT_ZERO) else ("log_n",)
            ranges[family] = {**_ranges(mine), **_ranges(rows.told(family)[1], shared)}
        return cls(names, families, ranges)

    def check(self, row: Rows) -> tuple[bool, list[str], float]:
        """Return (inside, warnings, distance over threshold) for one row."""
        warnings = []
        family = row["family"][0]
        known = family in self.families
        if not known:
            what = f"The family '{family}' is" if family else "The model's family is unknown, so it is"
            warnings.append(
                f"{what} not among those that the meta-regressor was fitted on ({', '.join(self.families)});"
                " expect errors larger than the interval says."
            )
        ranges = self.ranges.get(family if known else "", {})
        for name, subject, span in RANGED:
            value = float(row[name][0])
            if name not in ranges or not math.isfinite(value):
                continue
            low, high = ranges[name]
            if not low - 1e-4 <= value <= high + 1e-4:
                text = subject.format(value=math.exp(value))
                limits = span.format(low=math.exp(low), high=math.exp(high))
                warnings.append(f"{text} is outside {limits}, the range that the meta-regressor was fitted on.")
        x = row.matrix(self.features)
        candidates = [self.families[family]] if known else list(self.families.values())
        ratio = min((float(s.distance(x)[0]) / max(s.threshold, 1e-9) for s in candidates), default=math.inf)
        if ratio > 1.0:
            times = f"{ratio:.1f}" if ratio >= 1.05 else f"{ratio:.3f}"
            warnings.append(
                f"The probe features are {times} times as far from the training models as the domain check allows;"
                " treat the prediction as a guess."
            )
        return not warnings, warnings, ratio

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "features": list(self.features),
            "families": {
                k: {
                    "mean": s.mean.tolist(),
                    "scale": s.scale.tolist(),
                    "precision": s.precision.tolist(),
                    "threshold": s.threshold,
                }
                for k, s in self.families.items()
            },
            "ranges": {k: {n: list(v) for n, v in r.items()} for k, r in self.ranges.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Domain:
        """Read what ``to_dict`` wrote."""
        families = {
            k: FamilyStatistics(
                np.asarray(s["mean"]), np.asarray(s["scale"]), np.asarray(s["precision"]), float(s["threshold"])
            )
            for k, s in data["families"].items()
        }
        ranges = {k: {n: (float(v[0]), float(v[1])) for n, v in r.items()} for k, r in data["ranges"].items()}
        return cls(tuple(data["features"]), families, ranges)


def _ranges(rows: Rows, names: Sequence[str] = _RANGED_NAMES) -> dict[str, tuple[float, float]]:
    known = {name: rows[name][np.isfinite(rows[name])] for name in names}
    return {name: (float(values.min()), float(values.max())) for name, values in known.items() if len(values)}


def _bounded(x: np.ndarray) -> np.ndarray:
    """Clip natural logs to e^±50: an overflow along the line is far, but must not swamp the scale of its feature."""
    return np.clip(x, -50.0, 50.0)


def _statistics(x: np.ndarray) -> FamilyStatistics:
    x = _bounded(x)
    seen = np.isfinite(x).any(axis=0)
    mean, scale = np.zeros(x.shape[1]), np.full(x.shape[1], UNSEEN)
    mean[seen] = np.nanmean(x[:, seen], axis=0)
    scale[seen] = np.nanstd(x[:, seen], axis=0)
    # A feature that never varied (a single N, say) is measured on a unit log scale rather than on none.
    scale[scale < 1e-6] = 1.0
    z = np.nan_to_num((x - mean) / scale, nan=0.0)
    correlation = z.T @ z / max(1, len(z)) + RIDGE * np.eye(x.shape[1])
    return FamilyStatistics(mean, scale, np.linalg.inv(correlation), math.inf)
