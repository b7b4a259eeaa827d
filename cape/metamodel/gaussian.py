"""A Gaussian process over trials: one value for each, smooth in its features and zero far from every trial.

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
from cape.metamodel.rows import RELATIVE, Rows

WITNESSES = (300, 400)
"""Plain points, and points of both kinds, that the spread is judged by, at most."""

DRAWS = 4
"""Subsets that the length scales are learned from, each alone, where there are more trials than one takes. Their mean
carries further than those of one larger subset at the same price, which take a feature for decisive by chance."""

_CHUNK = 8192  # trials whose kernel values are held at once
_ROUNDS = 20  # of expectation maximization


@dataclass(frozen=True)
class Size:
    """How much a process takes in at most; each is (plain trials, trials of both kinds).

    Attributes:
        points: that the kernel is centred on; a prediction costs as many values.
        learned_from: that the length scales are learned from, ``DRAWS`` times; more cost their cube.
    """

    points: tuple[int, int]
    learned_from: tuple[int, int]


@dataclass(frozen=True)
class _Told:
    """What the rows of each trial say of its value, float64 [n] each.

    Attributes:
        count: rows. crossed: of these, values that are no lower bounds. known: their sum. mean: their mean (0 where
            there are none). variance: of the error of that mean.
    """

    count: np.ndarray
    crossed: np.ndarray
    known: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, trial: np.ndarray, values: np.ndarray, variance: np.ndarray, bound: np.ndarray) -> _Told:
        """Sum up values of rows, each with the variance of its error, by the number of their trial."""
        count, crossed = np.bincount(trial).astype(np.float64), np.bincount(trial, ~bound)
        known = np.bincount(trial, np.where(bound, 0.0, values))
        some = np.maximum(1.0, crossed)
        return cls(count, crossed, known, known / some, np.bincount(trial, np.where(bound, 0.0, variance)) / some**2)


@dataclass(frozen=True)
class GaussianProcess:
    """value ≈ Σ_c Σ_j weight_cj · kernel(z / length_c, point_j / length_c), z the standardized features.

    The common function (c = 0) is centred on all points, the plain trials' deviation from it (c = 1) on the first ones.
    A missing feature counts as the mean.

    Attributes:
        features: names [k]. centre, scale: of the features, float64 [k].
        points: standardized features of the trials that the kernels are centred on, float64 [m, k], plain ones first;
            each is a float16, which is how a file holds it: a centre is as good a little beside its trial.
        lengths: float64 [1 or 2, k]. amplitudes: float64 [1 or 2]. weight: float64 [m + the deviation's points].
        noise: learned standard deviation of a trial's value around the process, where log B is ``log_batch``.
        extra: what an augmented trial's has beside it. fall: power of 1/B by which the noise falls.
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
    fall: float
    log_batch: float

    @classmethod
    def fit(
        cls,
        rows: Rows,
        values: np.ndarray,
        features: Sequence[str],
        size: Size,
        variance: np.ndarray | None = None,
        censored: np.ndarray | None = None,
        sigma: float = 0.0,
    ) -> GaussianProcess:
        """Fit to values of rows, those of a trial as their mean.

        Features that are never there or never vary say nothing of distance and are left out.

        Args:
            values: float64 [n], where ``censored`` (bool [n]) a lower bound; one row at least is none.
            variance: of what is known about the error of each value, beside the noise that is learned, [n].
            sigma: standard deviation of a value around the process. A bound counts as what is expected above it under
                a normal law, found by expectation maximization (Tanner 1983; accelerated failure time, as the trees).
        """
        bound = np.zeros(len(rows), dtype=bool) if censored is None else censored
        # Sorted by trial id, so that nothing depends on the order of the rows.
        first, trial = np.unique(rows["trial_id"].astype(str), return_index=True, return_inverse=True)[1:]
        x, augmented = term_values(rows.take(first), features), rows.augmented[first]
        varying = [j for j in range(x.shape[1]) if np.isfinite(x[:, j]).any() and np.nanstd(x[:, j]) > 1e-9]
        names, x = tuple(features[j] for j in varying), x[:, varying]
        centre, scale = np.nanmean(x, axis=0), np.nanstd(x, axis=0)
        z = np.nan_to_num((x - centre) / scale)
        told = _Told.of(trial, values, np.zeros(len(rows)) if variance is None else variance, bound)
        log_batch = rows["log_b"][first]
        usual = float(np.nanmean(log_batch)) if np.isfinite(log_batch).any() else 0.0
        trials = process.Trials(z, told.mean, augmented, told.variance, np.nan_to_num(log_batch - usual))

        order = np.random.default_rng(0).permutation(len(first))
        able = order[told.crossed[order] > 0]
        drawn = _subsets(able, augmented, size.learned_from)
        learned = process.average([process.learn(trials.take(some)) for some in drawn])
        relative = rows["augmentation"][first] == RELATIVE  # they are many, and the family's own say more of it
        chosen = _first(order[np.argsort(relative[order], kind="stable")], augmented, size.points)
        points = z[chosen].astype(np.float16).astype(np.float64)
        deviating = int(np.sum(~augmented[chosen])) if len(learned.lengths) > 1 else 0
        made = cls(
            features=names,
            centre=centre,
            scale=scale,
            points=points,
            lengths=learned.lengths,
            amplitudes=learned.amplitudes,
            weight=np.zeros(len(points) + deviating),
            noise=learned.noise,
            extra=learned.extra,
            fall=learned.fall,
            log_batch=usual,
        )
        return replace(made, weight=made._weights(trials, able, told, trial[bound], values[bound], sigma))

    def _weights(
        self,
        trials: process.Trials,
        able: np.ndarray,
        told: _Told,
        watched: np.ndarray,
        least: np.ndarray,
        sigma: float,
    ) -> np.ndarray:
        """Return the weights given trials and, of ``watched`` ones, lower bounds ``least``, one for each row cut off.

        Args:
            able: trials that have a value that is no bound. sigma: see ``fit``.
        """
        z, augmented = trials.z, trials.augmented
        own = self._noise_variance(trials.log_batch) + self.extra**2 * augmented
        precision = 1.0 / (own + trials.variance)
        basis = self._basis()
        gram, right = self._normal(basis, z[able], augmented[able], precision[able], trials.y[able])
        gram += np.eye(len(gram))
        found = np.linalg.solve(gram, right)
        if len(watched):  # from what the other rows say of these
            cut = np.unique(watched)
            silent = cut[told.crossed[cut] == 0]
            gram += self._normal(basis, z[silent], augmented[silent], precision[silent], told.known[silent])[0]
            k = self._kernels(z[cut], augmented[cut]) @ basis
            right += k.T @ (precision[cut] * (told.known / told.count - told.mean)[cut])
            solved = np.linalg.solve(gram, np.column_stack([right, k.T * (precision / told.count)[cut]]))
            start, pull = solved[:, 0], solved[:, 1:]
            place = np.searchsorted(cut, watched)
            for _ in range(_ROUNDS):
                expected = _expected_above(least, (k @ found)[place], sigma)
                found = start + pull @ np.bincount(place, expected, len(cut))
        return basis @ found

    def predict(self, rows: Rows) -> np.ndarray:
        """Return the value of plain trials, float64 [n]."""
        return self._by_chunk(rows, lambda z: self._kernels(z) @ self.weight)

    def spread(self, rows: Rows) -> np.ndarray:
        """Return how uncertain a trial's value is, float64 [n]: about 1 among the points, more away from them.

        It is the posterior standard deviation (with the noise) given some of the points alone, over its median at the
        plain ones when each is left out.
        """
        return self._by_chunk(rows, self._deviation) / self.typical

    def extra_noise(self, rows: Rows) -> np.ndarray:
        """Return what a trial's variance has beside the square of its ``spread``, for its batch size: float64 [n].

        It is negative where the batch is larger than usual. The spread itself knows nothing of it: how much is known of
        a trial and how much its seed decides are two things.
        """
        larger = np.nan_to_num(rows["log_b"] - self.log_batch)
        return (self._noise_variance(larger) - self.noise**2) / self.typical**2

    def _noise_variance(self, larger: np.ndarray) -> np.ndarray:
        """Return the variance that seeds make, [n], of trials whose log B is so much larger than usual."""
        return self.noise**2 * np.exp(-2.0 * self.fall * larger)

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
    def typical(self) -> float:
        """The standard deviation of a plain trial's value, noise included, given some of the others."""
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
        noises = np.array([self.noise, self.extra, self.fall, self.log_batch])
        points = self.points.astype(np.float16)
        return {"features": np.array(self.features, dtype=np.str_), "points": points, "noises": noises, **arrays}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> GaussianProcess:
        """Read what ``to_arrays`` made."""
        names = ("centre", "scale", "points", "lengths", "amplitudes", "weight")
        numbers = {n: np.asarray(arrays[n], dtype=np.float64) for n in names}
        noises = np.append(arrays["noises"], [0.0, 0.0])  # models were saved before the noise knew of B
        noise, extra, fall, log_batch = (float(v) for v in noises[:4])
        named = tuple(str(f) for f in arrays["features"])
        return cls(named, **numbers, noise=noise, extra=extra, fall=fall, log_batch=log_batch)

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


def _expected_above(least: np.ndarray, mean: np.ndarray, sigma: float) -> np.ndarray:
    """Return E[y | y > least] of a normal y with these means, [n]."""
    from scipy.special import log_ndtr

    gap = (least - mean) / sigma
    ratio = np.exp(-0.5 * gap**2 - 0.5 * np.log(2.0 * np.pi) - log_ndtr(-gap))
    return mean + sigma * ratio


def _subsets(able: np.ndarray, augmented: np.ndarray, most: tuple[int, int]) -> list[np.ndarray]:
    """Return the trials to learn from: all at once where they are no more than ``most``, else ``DRAWS`` draws."""
    if len(_first(able, augmented, most)) == len(able):
        return [able]
    return [_first(np.random.default_rng([0, k]).permutation(able), augmented, most) for k in range(DRAWS)]


def _first(order: np.ndarray, augmented: np.ndarray, most: tuple[int, int]) -> np.ndarray:
    """Return the first plain trials of an order, ``most[0]`` at most, and augmented ones up to ``most[1]`` in all."""
    plain = order[~augmented[order]][: most[0]]
    return np.concatenate([plain, order[augmented[order]][: most[1] - len(plain)]])
