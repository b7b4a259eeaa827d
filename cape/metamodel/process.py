"""What a Gaussian process learns from its trials: a length scale for every feature, amplitudes and noises.

The noise of a trial is what its seed decides, and falls as its batch grows: a larger one's mean loss varies less from
draw to draw. It is a power of B, learned too.

Plain trials are what is to be predicted, augmented ones tell of it from further away (Kennedy & O'Hagan 2000): one
function is common to both, a second one is what plain trials deviate from it by, and augmented trials have a noise of
their own beside that of all. Far from plain trials the common function is left.

All of it is the maximum of the marginal likelihood under weak priors (Rasmussen & Williams 2006, §5.4), found by L-BFGS
with the exact gradient. The kernels are Matérn's with ν = 5/2.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np

ITERATIONS = 80
COARSE = 3
"""The search begins with one in so many of the trials, at a tenth of the price or less, and ends with all of them."""
_ENOUGH = 1e-5  # relative reduction of the loss (some hundreds of nats) that is not worth another step

# Medians of log-normal priors whose logarithm has a standard deviation of 1. T* of a configuration varies by some 7 %
# over its seeds and lies some 50 % from the line; points one standard deviation apart in each of k features are √(2k)
# apart, and that is a feature's length scale until the trials say otherwise; a deviation's is shorter by √e.
AMPLITUDE, DEVIATION, NOISE, EXTRA = 0.5, 0.1, 0.07, 0.1

_JITTER = 1e-6
_LOG_LENGTHS = (-3.0, 8.0)  # a feature with the largest says nothing
_LOG_LEVELS = (-6.0, 3.0)
_FALLS = (0.0, 1.0)
FALL, _FALL_SCALE = 0.25, 0.25
"""Mean and standard deviation of the prior of the power: initial values do not care for B (0), draws are means of B
samples (1/2)."""


@dataclass(frozen=True)
class Trials:
    """What a process is told of trials.

    Attributes:
        z: standardized features, float64 [n, k]. y: values, float64 [n]. augmented: bool [n].
        variance: what is known of each value's error, beside the noises, float64 [n].
        log_batch: log B around some mean, float64 [n].
    """

    z: np.ndarray
    y: np.ndarray
    augmented: np.ndarray
    variance: np.ndarray
    log_batch: np.ndarray

    def take(self, some: np.ndarray | slice) -> Trials:
        """Return the trials of an index."""
        return Trials(self.z[some], self.y[some], self.augmented[some], self.variance[some], self.log_batch[some])


@dataclass(frozen=True)
class Learned:
    """Hyperparameters of a process; the standard deviations are of its values.

    Attributes:
        lengths: length scales of the common function and, where some trials are augmented, of the deviation, float64
            [1 or 2, k]. amplitudes: standard deviations of these functions, [1 or 2].
        noise: standard deviation of a trial around them, where its log B is 0 (see ``Trials``). fall: power of 1/B by
            which it falls. extra: standard deviation beside it, of an augmented trial; 0 where none is.
    """

    lengths: np.ndarray
    amplitudes: np.ndarray
    noise: float
    extra: float
    fall: float


def one_thread() -> AbstractContextManager[object]:
    """Return a block in which numpy's and scipy's linear algebra takes one thread.

    Their two pools wait for each other spinning (measured: three times as long with two threads), and another number of
    threads is another rounding. scipy is imported first: what is not loaded yet cannot be limited.
    """
    import scipy.linalg
    import scipy.optimize  # noqa: F401
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "blas")


def matern(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Matérn's correlation (ν = 5/2) of points [n, k] and [m, k] that are in length scales, float64 [n, m]."""
    squares = _squares(a, b)
    return _matern(squares, *_distance_and_decay(squares))


def learn(trials: Trials) -> Learned:
    """Learn from trials whose values have a mean of about zero.

    Work: at most some 100 times n³ + 2kn² floating-point operations, twice the second part where some are augmented.
    """
    from scipy.optimize import minimize

    posterior = _Posterior(trials)
    theta = posterior.medians
    for some in (trials.take(slice(None, None, COARSE)), trials):
        theta = minimize(
            posterior.loss,
            theta,
            args=(some,),
            jac=True,
            method="L-BFGS-B",
            bounds=posterior.bounds,
            options={"maxiter": ITERATIONS, "ftol": _ENOUGH},
        ).x
    lengths, amplitudes, noises, fall = posterior.split(theta)
    return Learned(lengths, amplitudes, float(noises[0]), float(noises[1]) if len(noises) == 2 else 0.0, fall)


class _Posterior:
    """The density of hyperparameters θ given trials: logarithms of ``Learned``'s, and the power by which noise falls.

    θ is [parts·k lengths, parts amplitudes, parts noises, 1]; ``parts`` is 2 where some trials are augmented, else 1.

    Args:
        trials: all of those that are learned from.
    """

    def __init__(self, trials: Trials) -> None:
        k = trials.z.shape[1]
        self.shape = (parts, _) = (2 if trials.augmented.any() else 1, k)
        usual = 0.5 * np.log(2.0 * max(1, k))
        levels = np.log([AMPLITUDE, DEVIATION][:parts] + [NOISE, EXTRA][:parts])
        self.medians = np.concatenate([np.full(k, usual), np.full((parts - 1) * k, usual - 0.5), levels, [FALL]])
        self.scales = np.append(np.ones(len(self.medians) - 1), _FALL_SCALE)
        falls = _FALLS if np.ptp(trials.log_batch) > 0 else (0.0, 0.0)  # those of one batch size say nothing of others
        self.medians[-1] = np.clip(FALL, *falls)
        self.bounds = [*[_LOG_LENGTHS] * (parts * k), *[_LOG_LEVELS] * (2 * parts), falls]

    def split(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """Return lengths [parts, k], amplitudes [parts], noises [parts] and the power by which the first falls."""
        values, lengths = np.exp(theta[:-1]), int(np.prod(self.shape))
        return values[:lengths].reshape(self.shape), *np.split(values[lengths:], 2), float(theta[-1])

    def loss(self, theta: np.ndarray, trials: Trials) -> tuple[float, np.ndarray]:
        """Return -log p(y | θ) - log p(θ), less constants, and its gradient."""
        lengths, amplitudes, noises, fall = self.split(theta)
        count, augmented = len(trials.y), trials.augmented
        who = [np.arange(count), np.flatnonzero(~augmented)]  # the trials that each function counts in
        noisy = np.stack([np.exp(-2.0 * fall * trials.log_batch), augmented.astype(np.float64)])[: len(noises)]
        total = np.zeros((count, count))
        functions = []
        for index, length, amplitude in zip(who[: len(lengths)], lengths, amplitudes, strict=True):
            x = trials.z[index] / length
            squares = _squares(x, x)
            distance, decay = _distance_and_decay(squares)
            covariance = _matern(squares, distance, decay)
            covariance *= amplitude**2
            total[np.ix_(index, index)] += covariance
            functions.append((index, x, covariance, amplitude**2 * _slope(distance, decay)))
        variances = noises[:, None] ** 2 * noisy
        total.flat[:: count + 1] += variances.sum(axis=0) + trials.variance + _JITTER
        fitted, inverse, half_log_determinant = _solve(total, trials.y)
        far = (theta - self.medians) / self.scales
        value = 0.5 * float(trials.y @ fitted) + half_log_determinant + 0.5 * float(far @ far)
        pull = np.outer(fitted, fitted) - inverse  # the gradient by θ is -½ tr(pull · dK/dθ)
        by_length, by_amplitude = [], []
        for index, x, covariance, slope in functions:
            mine = pull[np.ix_(index, index)]
            by_amplitude.append(-np.vdot(mine, covariance))
            slope *= mine
            by_length.append((x * (slope @ x)).sum(axis=0) - slope.sum(axis=1) @ x**2)
        by_noise = -variances * np.diag(pull)
        by_fall = -by_noise[0] @ trials.log_batch
        gradient = np.concatenate([*by_length, by_amplitude, by_noise.sum(axis=1), [by_fall]])
        return value, gradient + far / self.scales


def average(learned: Sequence[Learned]) -> Learned:
    """Return the geometric means of what was learned from several sets of trials, each with or without augmented ones.

    An ``extra`` of zero, where none is augmented, stays zero; of powers it is the mean.
    """

    lengths, amplitudes = (
        np.exp(np.mean([np.log(getattr(one, name)) for one in learned], axis=0)) for name in ("lengths", "amplitudes")
    )
    noises = np.array([[one.noise, one.extra] for one in learned])
    noise, extra = np.exp(np.log(noises, where=noises > 0, out=np.full_like(noises, -np.inf)).mean(axis=0))
    return Learned(lengths, amplitudes, float(noise), float(extra), float(np.mean([one.fall for one in learned])))


def _solve(covariance: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return K⁻¹y, K⁻¹ and ½·log|K| of a positive definite K."""
    from scipy.linalg import lapack

    factor, failed = lapack.dpotrf(covariance, lower=1, clean=1)
    if failed:
        raise np.linalg.LinAlgError("The covariance of the trials is not positive definite.")
    inverse, _ = lapack.dpotri(factor, lower=1)
    inverse += np.tril(inverse, -1).T  # dpotri leaves the upper triangle of dpotrf, which is zero
    return inverse @ y, inverse, float(np.log(np.diag(factor)).sum())


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2.0 * (a @ b.T), 0.0)


def _distance_and_decay(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return √5·d and exp(-√5·d) for squared distances d²."""
    distance = np.sqrt(5.0 * squares)
    return distance, np.exp(-distance)


def _matern(squares: np.ndarray, distance: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """Return (1 + √5·d + 5d²/3)·exp(-√5·d)."""
    out = 5.0 / 3.0 * squares
    out += distance
    out += 1.0
    out *= decay
    return out


def _slope(distance: np.ndarray, decay: np.ndarray) -> np.ndarray:
    """Return -2 times the derivative of the correlation by d²; overwrites both arguments."""
    distance += 1.0
    decay *= 5.0 / 3.0
    decay *= distance
    return decay
