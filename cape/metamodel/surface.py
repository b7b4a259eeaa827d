"""The smooth half of the product: a Gaussian process on what the line leaves, averaged with the trees.

T* changes smoothly with the features, and trees answer in steps: they need many trials to follow what a smooth surface
follows with few (``docs/evidence.md`` has the measurements). Far from every trial the surface is zero, which leaves the
line. It has one value for a trial, whatever ε: the line and the trees say how log T* falls with ε, and neither rises.

``cape.metamodel.process`` says what the process learns, and how. The answer is that of inducing points ("subset of
regressors"; Smola & Schölkopf 2000): exact where there are no more trials than points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from cape.metamodel import process
from cape.metamodel.line import term_values
from cape.metamodel.rows import Rows

POINTS = (600, 900)
"""Plain trials, and trials of both kinds, that the kernel is centred on, at most; a prediction costs as many values."""

LEARNED_FROM = (400, 600)
"""Plain trials, and trials of both kinds, that the length scales are learned from, at most: more cost their cube."""

WITNESSES = (300, 400)
"""Plain points, and points of both kinds, that the spread is judged by, at most."""

FAR = 2.0**0.5
"""Spread from which a trial is far from those fitted on: its variance is twice theirs, who are mostly noise."""

FEWEST_TRIALS = 20
"""Trials from which a family has a surface."""

_NOT_SMOOTH = ("family", "log_epsilon")
_CHUNK = 8192  # trials whose kernel values are held at once
_ROUNDS = 20  # of expectation maximization


@dataclass(frozen=True)
class Surface:
    """log T* - line ≈ Σ_c Σ_j weight_cj · kernel(z / length_c, point_j / length_c), z the standardized features.

    The common function (c = 0) is centred on all points, the plain trials' deviation from it (c = 1) on the first ones.
    A missing feature counts as the mean.

    Attributes:
        features: names [k]. centre, scale: of the features, float64 [k].
        points: standardized features of the trials that the kernels are centred on, float64 [m, k], plain ones first;
            each is a float16, which is how a file holds it: a centre is as good a little beside its trial.
        lengths: float64 [1 or 2, k]. amplitudes: float64 [1 or 2]. weight: float64 [m + the deviation's points].
        noise: learned standard deviation of a trial's log T* around the surface. extra: what an augmented trial's has
            beside it.
    """

    features: tuple[str, ...]
    centre: np.ndarray
    scale: np.ndarray
    points: np.ndarray
    lengths: np.ndarray
    amplitudes: np.ndarray
    weight: np.ndarray
    noise: float
    extra: float

    @classmethod
    def fit(
        cls,
        rows: Rows,
        residual: np.ndarray,
        features: Sequence[str],
        censored: np.ndarray | None = None,
        sigma: float = 0.0,
    ) -> Surface:
        """Fit to what the line leaves of log T*, a trial's rows as their mean.

        Features that are never there or never vary say nothing of distance and are left out.

        Args:
            residual: float64 [n], where ``censored`` (bool [n]) a lower bound; one row at least is none.
            sigma: standard deviation of log T* around the surface. A bound counts as what is expected above it under
                a normal law, found by expectation maximization (Tanner 1983; accelerated failure time, as the trees).
        """
        bound = np.zeros(len(rows), dtype=bool) if censored is None else censored
        # Sorted by trial id, so that nothing depends on the order of the rows.
        first, trial = np.unique(rows["trial_id"].astype(str), return_index=True, return_inverse=True)[1:]
        x, augmented = term_values(rows.take(first), features), rows.augmented[first]
        told = [j for j in range(x.shape[1]) if np.isfinite(x[:, j]).any() and np.nanstd(x[:, j]) > 1e-9]
        names, x = tuple(features[j] for j in told), x[:, told]
        centre, scale = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
        z = np.nan_to_num((x - centre) / scale)
        size, crossed = np.bincount(trial).astype(np.float64), np.bincount(trial, ~bound)
        known = np.bincount(trial, np.where(bound, 0.0, residual))

        order = np.random.default_rng(0).permutation(len(first))
        able = order[crossed[order] > 0]
        some = _first(able, augmented, LEARNED_FROM)
        learned = process.learn(z[some], known[some] / crossed[some], augmented[some])
        chosen = _first(order, augmented, POINTS)
        points = z[chosen].astype(np.float16).astype(np.float64)
        deviating = int(np.sum(~augmented[chosen])) if len(learned.lengths) > 1 else 0
        weight = np.zeros(len(points) + deviating)
        made = cls(
            names, centre, scale, points, learned.lengths, learned.amplitudes, weight, learned.noise, learned.extra
        )

        precision = 1.0 / (learned.noise**2 + learned.extra**2 * augmented)
        basis = made._basis()
        gram, right = made._normal(basis, z[able], augmented[able], precision[able], known[able] / crossed[able])
        gram += np.eye(len(gram))
        found = np.linalg.solve(gram, right)
        if bound.any():  # from what the other rows say of these
            cut = np.unique(trial[bound])
            silent = cut[crossed[cut] == 0]
            gram += made._normal(basis, z[silent], augmented[silent], precision[silent], known[silent])[0]
            k = made._kernels(z[cut], augmented[cut]) @ basis
            right += k.T @ (precision[cut] * (known / size - known / np.maximum(1, crossed))[cut])
            solved = np.linalg.solve(gram, np.column_stack([right, k.T * (precision / size)[cut]]))
            start, pull = solved[:, 0], solved[:, 1:]
            place, least = np.searchsorted(cut, trial[bound]), residual[bound]
            for _ in range(_ROUNDS):
                expected = _expected_above(least, (k @ found)[place], sigma)
                found = start + pull @ np.bincount(place, expected, len(cut))
        weight = basis @ found
        return replace(made, weight=weight)

    def predict(self, rows: Rows) -> np.ndarray:
        """Return what to add to the line of plain trials, in log T*, float64 [n]."""
        return self._by_chunk(rows, lambda z: self._kernels(z) @ self.weight)

    def spread(self, rows: Rows) -> np.ndarray:
        """Return how uncertain a trial's log T* is, float64 [n]: about 1 among the points, more away from them.

        It is the posterior standard deviation (with the noise) given some of the points alone, over its median at the
        plain ones when each is left out.
        """
        return self._by_chunk(rows, self._deviation) / self._typical

    def _by_chunk(self, rows: Rows, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Return a function of the standardized features [m, k] over all rows, a part at a time: float64 [n]."""
        z = np.nan_to_num((term_values(rows, self.features) - self.centre) / self.scale)
        return np.concatenate([np.zeros(0), *(function(z[i : i + _CHUNK]) for i in range(0, len(z), _CHUNK))])

    @cached_property
    def _witnesses(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return points [q, k], which of them are plain [q], and the inverse of their covariance with noise [q, q]."""
        plain = len(self.weight) - len(self.points) if len(self.lengths) > 1 else len(self.points)
        chosen = _first(np.arange(len(self.points)), np.arange(len(self.points)) >= plain, WITNESSES)
        points, known = self.points[chosen], chosen < plain
        covariance = self._covariance(points, points, known, known)
        covariance.flat[:: len(points) + 1] += self.noise**2 + self.extra**2 * ~known + 1e-6
        return points, known, np.linalg.inv(covariance)

    @cached_property
    def _typical(self) -> float:
        _, known, inverse = self._witnesses
        left_out = 1.0 / np.sqrt(np.diag(inverse))  # Rasmussen & Williams 2006, eq. 5.12
        return float(np.median(left_out[known] if known.any() else left_out))

    def _deviation(self, z: np.ndarray) -> np.ndarray:
        """Return the posterior standard deviation of plain trials [n], with noise."""
        points, known, inverse = self._witnesses
        k = self._covariance(z, points, np.ones(len(z), dtype=bool), known)
        explained = ((k @ inverse) * k).sum(axis=1)
        return np.sqrt(np.maximum(np.sum(self.amplitudes**2) - explained, 0.0) + self.noise**2)

    def _covariance(self, a: np.ndarray, b: np.ndarray, plain_a: np.ndarray, plain_b: np.ndarray) -> np.ndarray:
        """Return the covariance of the function at trials [n, k] and [m, k], some of them plain: [n, m]."""
        parts = [v * process.matern(a / s, b / s) for v, s in zip(self.amplitudes**2, self.lengths, strict=True)]
        return parts[0] + parts[1] * np.outer(plain_a, plain_b) if len(parts) > 1 else parts[0]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a file (``numpy.savez``), none of which needs pickle."""
        arrays = {name: getattr(self, name) for name in ("centre", "scale", "lengths", "amplitudes", "weight")}
        noises = np.array([self.noise, self.extra])
        points = self.points.astype(np.float16)
        return {"features": np.array(self.features, dtype=np.str_), "points": points, "noises": noises, **arrays}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Surface:
        """Read what ``to_arrays`` made."""
        names = ("centre", "scale", "points", "lengths", "amplitudes", "weight")
        numbers = {n: np.asarray(arrays[n], dtype=np.float64) for n in names}
        noise, extra = (float(v) for v in arrays["noises"])
        return cls(tuple(str(f) for f in arrays["features"]), **numbers, noise=noise, extra=extra)

    def _centres(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the length scales of each function and the points that it is centred on, in them."""
        parts = [self.points, self.points[: len(self.weight) - len(self.points)]]
        return [(length, part / length) for length, part in zip(self.lengths, parts, strict=False)]

    def _kernels(self, z: np.ndarray, augmented: np.ndarray | None = None) -> np.ndarray:
        """Return what each weight counts by in each trial [n, weights]; the deviation is none of augmented ones."""
        parts = [process.matern(z / length, points) for length, points in self._centres()]
        if augmented is not None and len(parts) > 1:
            parts[1] *= ~augmented[:, None]
        return np.hstack(parts)

    def _basis(self) -> np.ndarray:
        """Return [weights, weights] that makes weights of independent standard normal ones (which are well scaled)."""
        out = np.zeros((len(self.weight), len(self.weight)))
        start = 0
        for amplitude, (_, points) in zip(self.amplitudes, self._centres(), strict=True):
            part = slice(start, start + len(points))
            prior = np.linalg.cholesky(process.matern(points, points) + 1e-6 * np.eye(len(points)))
            out[part, part] = amplitude * np.linalg.inv(prior).T
            start += len(points)
        return out

    def _normal(
        self, basis: np.ndarray, z: np.ndarray, augmented: np.ndarray, precision: np.ndarray, y: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the weighted normal equations of a basis over trials [n, k]: [weights, weights] and [weights]."""
        gram, right = np.zeros(basis.shape), np.zeros(len(basis))
        root = np.sqrt(precision)
        for i in range(0, len(z), _CHUNK):
            some = slice(i, i + _CHUNK)
            weighted = self._kernels(z[some], augmented[some]) @ basis
            weighted *= root[some, None]
            gram += weighted.T @ weighted  # numpy sees the symmetry and does half the work
            right += weighted.T @ (root[some] * y[some])
        return gram, right


def fit_surfaces(
    rows: Rows,
    residual: np.ndarray,
    features: Sequence[str],
    families: Sequence[str],
    censored: np.ndarray,
    sigma: float,
) -> dict[str, Surface]:
    """Return a surface for each family in which ``FEWEST_TRIALS`` or more reached ε; see ``Surface.fit``."""
    smooth = [f for f in features if f not in _NOT_SMOOTH]
    out = {}
    with process.one_thread():
        for family in families:
            mine = rows["family"] == family
            if len(set(rows["trial_id"][mine & ~censored])) >= FEWEST_TRIALS:
                out[family] = Surface.fit(rows.take(mine), residual[mine], smooth, censored[mine], sigma)
    return out


def smooth(line: np.ndarray, surfaces: Mapping[str, Surface], rows: Rows) -> np.ndarray:
    """Return log T* [n] by line and surface alone; NaN in families that have no surface."""
    out = np.full(len(rows), np.nan)
    for family, surface in surfaces.items():
        mine = rows["family"] == family
        if mine.any():
            out[mine] = line[mine] + surface.predict(rows.take(mine))
    return out


def spreads(surfaces: Mapping[str, Surface], rows: Rows) -> np.ndarray:
    """Return ``Surface.spread`` of each row by its family's surface, [n]; 1 where there is none."""
    out = np.ones(len(rows))
    for family, surface in surfaces.items():
        mine = rows["family"] == family
        if mine.any():
            out[mine] = surface.spread(rows.take(mine))
    return out


def mix(trees: np.ndarray, surface: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return log T* [n]: the trees' and, where there is a surface (else NaN), a share of it; all arguments [n]."""
    return np.where(np.isfinite(surface), trees + share * (surface - trees), trees)


def _expected_above(least: np.ndarray, mean: np.ndarray, sigma: float) -> np.ndarray:
    """Return E[y | y > least] of a normal y with these means, [n]."""
    from scipy.special import log_ndtr

    gap = (least - mean) / sigma
    ratio = np.exp(-0.5 * gap**2 - 0.5 * np.log(2.0 * np.pi) - log_ndtr(-gap))
    return mean + sigma * ratio


def _first(order: np.ndarray, augmented: np.ndarray, most: tuple[int, int]) -> np.ndarray:
    """Return the first plain trials of an order, ``most[0]`` at most, and augmented ones up to ``most[1]`` in all."""
    plain = order[~augmented[order]][: most[0]]
    return np.concatenate([plain, order[augmented[order]][: most[1] - len(plain)]])
