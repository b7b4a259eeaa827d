"""The smooth half of the product: kernel ridge regression of what the line leaves, averaged with the trees.

T* changes smoothly with the features, and trees answer in steps: they need many trials to follow what a smooth surface
follows with few (``docs/evidence.md`` has the measurements). Far from every trial the surface is zero, which leaves the
line. It has one value for a trial, whatever ε: the line and the trees say how log T* falls with ε, and neither rises.

Kernel ridge regression on inducing points (Smola & Schölkopf 2000; "subset of regressors"). The kernel is the mean of
two Gaussians: one whose length scale is √(2k) standard deviations for k features (points one deviation apart in every
feature have exp(-1/4)), and one of a third of that. Augmented trials spread wider than plain ones: the wide one
reaches what was never seen, the narrow one tells plain trials apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cape.metamodel.line import term_values
from cape.metamodel.rows import Rows

POINTS = 1200
"""Trials that the kernel is centred on, at most; a prediction costs as many kernel values."""

NOISE = 0.02
"""Variance of a row around the surface over the surface's own: T* of a configuration varies by some 7 % over its seeds,
and lies some 50 % from the line."""

FEWEST_TRIALS = 20
"""Trials from which a family has a surface."""

_NOT_SMOOTH = ("family", "log_epsilon")
_CHUNK = 8192  # rows whose kernel values are held at once
_NARROW = 3.0  # times shorter, the second Gaussian's length scale
_ROUNDS = 20  # of expectation maximization


@dataclass(frozen=True)
class Surface:
    """log T* - line ≈ Σ_j weight_j · kernel(z, point_j), z the standardized features, missing ones at the mean.

    Attributes:
        features: names [k]. centre, scale: of the features, float64 [k].
        points: standardized features of the trials that the kernel is centred on, float64 [m, k]; each is a float32,
            which is how a file holds it. weight: float64 [m].
    """

    features: tuple[str, ...]
    centre: np.ndarray
    scale: np.ndarray
    points: np.ndarray
    weight: np.ndarray

    @classmethod
    def fit(
        cls,
        rows: Rows,
        residual: np.ndarray,
        features: Sequence[str],
        weight: np.ndarray,
        censored: np.ndarray | None = None,
        spread: float = 0.0,
    ) -> Surface:
        """Fit to what the line leaves of log T*.

        Features that are never there or never vary say nothing of distance and are left out.

        Args:
            residual: float64 [n], where ``censored`` (bool [n]) a lower bound. weight: of the rows, [n].
            spread: standard deviation of log T* around the surface. A bound counts as what is expected above it under
                a normal law, found by expectation maximization (Tanner 1983; accelerated failure time, as the trees).
        """
        bound = np.zeros(len(rows), dtype=bool) if censored is None else censored
        x = term_values(rows, features)
        told = [j for j in range(x.shape[1]) if np.isfinite(x[:, j]).any() and np.nanstd(x[:, j]) > 1e-9]
        x = x[:, told]
        centre, scale = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
        z = np.nan_to_num((x - centre) / scale)
        # Sorted by trial id, so that the points do not depend on the order of the rows.
        first = np.unique(rows["trial_id"].astype(str), return_index=True)[1]
        points = z[np.random.default_rng(0).permutation(first)[:POINTS]].astype(np.float32).astype(np.float64)
        share = weight / weight.mean()
        gram = NOISE * _kernel(points, points) + 1e-6 * np.eye(len(points))
        known = np.zeros(len(points))
        crossed = np.flatnonzero(~bound)
        for i in range(0, len(crossed), _CHUNK):
            some = crossed[i : i + _CHUNK]
            k = _kernel(z[some], points)
            weighted = k.T * share[some]
            gram += weighted @ k
            known += weighted @ residual[some]
        found = np.linalg.solve(gram, known)
        if bound.any():  # from what the other rows say of these
            k, least = _kernel(z[bound], points), residual[bound]
            weighted = k.T * share[bound]  # [m, censored]
            start, pull = np.hsplit(np.linalg.solve(gram + weighted @ k, np.column_stack([known, weighted])), [1])
            for _ in range(_ROUNDS):
                found = start[:, 0] + pull @ _expected_above(least, k @ found, spread)
        return cls(tuple(features[j] for j in told), centre, scale, points, found)

    def predict(self, rows: Rows) -> np.ndarray:
        """Return what to add to the line, in log T*, float64 [n]."""
        z = np.nan_to_num((term_values(rows, self.features) - self.centre) / self.scale)
        parts = [_kernel(z[i : i + _CHUNK], self.points) @ self.weight for i in range(0, len(z), _CHUNK)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a file (``numpy.savez``), none of which needs pickle."""
        arrays = {name: getattr(self, name) for name in ("centre", "scale", "weight")}
        return {"features": np.array(self.features, dtype=np.str_), "points": self.points.astype(np.float32), **arrays}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Surface:
        """Read what ``to_arrays`` made."""
        numbers = {n: np.asarray(arrays[n], dtype=np.float64) for n in ("centre", "scale", "points", "weight")}
        return cls(tuple(str(f) for f in arrays["features"]), **numbers)


def fit_surfaces(
    rows: Rows,
    residual: np.ndarray,
    features: Sequence[str],
    weight: np.ndarray,
    families: Sequence[str],
    censored: np.ndarray,
    spread: float,
) -> dict[str, Surface]:
    """Return a surface for each family in which ``FEWEST_TRIALS`` or more reached ε; see ``Surface.fit``."""
    smooth = [f for f in features if f not in _NOT_SMOOTH]
    out = {}
    for family in families:
        mine = rows["family"] == family
        if len(set(rows["trial_id"][mine & ~censored])) >= FEWEST_TRIALS:
            out[family] = Surface.fit(rows.take(mine), residual[mine], smooth, weight[mine], censored[mine], spread)
    return out


def mix(
    log_hat: np.ndarray,
    line: np.ndarray,
    surfaces: Mapping[str, Surface],
    rows: Rows,
    share: Callable[[str], float],
) -> np.ndarray:
    """Return log T* [n]: trees on the line (``log_hat``) and, in families that have one, a share of the surface."""
    out = log_hat.copy()
    for family, surface in surfaces.items():
        mine = rows["family"] == family
        if mine.any():
            smooth = line[mine] + surface.predict(rows.take(mine))
            part = share(family)
            out[mine] = smooth if part == 1.0 else log_hat[mine] + part * (smooth - log_hat[mine])
    return out


def _expected_above(least: np.ndarray, mean: np.ndarray, spread: float) -> np.ndarray:
    """Return E[y | y > least] of a normal y with these means, [n]."""
    from scipy.special import log_ndtr

    gap = (least - mean) / spread
    ratio = np.exp(-0.5 * gap**2 - 0.5 * np.log(2.0 * np.pi) - log_ndtr(-gap))
    return mean + spread * ratio


def _kernel(z: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return ½·exp(-d²/4k) + ½·exp(-9·d²/4k) for the distances d of k features, [n, m]."""
    squares = (z**2).sum(axis=1)[:, None] + (points**2).sum(axis=1)[None, :] - 2.0 * (z @ points.T)
    exponent = -0.25 / max(1, z.shape[1]) * np.maximum(squares, 0.0)
    return 0.5 * (np.exp(exponent) + np.exp(_NARROW**2 * exponent))
