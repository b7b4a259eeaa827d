"""The physical guess under the trees: a ridge regression of log T* on a few terms that must matter.

Trees cannot extrapolate: outside their rows they answer with the nearest leaf. A line in logarithms can, and AdamW's
first step says most of what a line needs: the loss has log(1/ε) to go and each step takes about exp(``log_first_step``)
of it. One line per family and one over all (for families without their own); the trees fit what is left. In far
territory a term counts as if it were ``FARTHEST`` standard deviations from its mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cape.metamodel.rows import Rows

POOLED = "pooled"
"""Name of what serves every family, and families that nothing was fitted on."""

RIDGE = 10.0
"""Penalty on standardized terms, in rows: a family of a hundred rows keeps its line, one of ten hardly has one."""

FARTHEST = 4.0

EPSILON_TERM = "log_log_inverse_epsilon"
"""log(log(1/ε)): an exponential decay takes log(1/ε) over its rate."""


@dataclass(frozen=True)
class Line:
    """log T* ≈ intercept + Σ weight·(term - centre)/scale; every array is [terms]. A missing term adds nothing."""

    terms: tuple[str, ...]
    centre: np.ndarray
    scale: np.ndarray
    weight: np.ndarray
    intercept: float

    @classmethod
    def fit(cls, rows: Rows, y: np.ndarray, terms: Sequence[str], weight: np.ndarray) -> Line:
        """Fit to log T* ``y`` [n] of rows that reached ε, by weighted ridge regression."""
        x = term_values(rows, terms)
        centre, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
        seen = np.isfinite(x).any(axis=0)
        centre[seen] = np.nanmean(x[:, seen], axis=0)
        scale[seen] = np.nanstd(x[:, seen], axis=0)
        scale[scale < 1e-9] = 1.0  # a term that never varies gets weight zero below
        z = standardized(x, centre, scale)
        mean_z, mean_y = np.average(z, axis=0, weights=weight), float(np.average(y, weights=weight))
        share = weight / weight.mean()
        gram = (z - mean_z).T @ ((z - mean_z) * share[:, None]) + RIDGE * np.eye(z.shape[1])
        found = np.linalg.solve(gram, (z - mean_z).T @ ((y - mean_y) * share))
        # A smaller ε never takes fewer steps, whatever the noise of a few rows says.
        found = np.where([t == EPSILON_TERM for t in terms], np.maximum(found, 0.0), found)
        return cls(tuple(terms), centre, scale, found, mean_y - float(mean_z @ found))

    def contributions(self, rows: Rows) -> np.ndarray:
        """Return what each term adds to log T*, [n, terms]."""
        return standardized(term_values(rows, self.terms), self.centre, self.scale) * self.weight

    def predict(self, rows: Rows) -> np.ndarray:
        """Return log T*, [n]."""
        return self.intercept + self.contributions(rows).sum(axis=1)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        arrays = {name: getattr(self, name).tolist() for name in ("centre", "scale", "weight")}
        return {"terms": list(self.terms), "intercept": self.intercept, **arrays}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Line:
        """Read what ``to_dict`` wrote."""
        centre, scale, weight = (np.asarray(data[n], dtype=np.float64) for n in ("centre", "scale", "weight"))
        return cls(tuple(data["terms"]), centre, scale, weight, float(data["intercept"]))


def fit_lines(
    rows: Rows, y: np.ndarray, terms: Sequence[str], weight: np.ndarray, families: Sequence[str]
) -> dict[str, Line]:
    """Return a line per family that has rows, and ``POOLED``. All arrays are [n], of rows that reached ε."""
    out = {POOLED: Line.fit(rows, y, terms, weight)}
    for family in families:
        mine = rows["family"] == family
        if mine.any():
            out[family] = Line.fit(rows.take(mine), y[mine], terms, weight[mine])
    return out


def margins(lines: Mapping[str, Line], rows: Rows) -> np.ndarray:
    """Return each row's line, log T* [n], by its family or pooled; zeros where there are no lines."""
    out = np.zeros(len(rows))
    if lines:
        own = np.array([f if f in lines else POOLED for f in rows["family"]], dtype=object)
        for name in set(own):
            out[own == name] = lines[name].predict(rows.take(own == name))
    return out


def term_values(rows: Rows, terms: Sequence[str]) -> np.ndarray:
    """Return float64 [n, terms], NaN where a feature is missing."""
    x = np.empty((len(rows), len(terms)))
    for j, term in enumerate(terms):
        x[:, j] = np.log(-rows["log_epsilon"]) if term == EPSILON_TERM else rows[term]
    x[~np.isfinite(x)] = np.nan
    return x


def standardized(x: np.ndarray, centre: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return terms [n, terms] in standard deviations from their mean, ``FARTHEST`` at most; a missing one is zero."""
    return np.clip(np.nan_to_num((x - centre) / scale, nan=0.0), -FARTHEST, FARTHEST)
