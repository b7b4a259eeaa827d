"""What a Gaussian process learns from its trials: a length scale for every feature, amplitudes and noises.

Plain trials are what is to be predicted, augmented ones tell of it from further away (Kennedy & O'Hagan 2000): one
function is common to both, a second one is what plain trials deviate from it by, and augmented trials have a noise of
their own beside that of all. Far from plain trials the common function is left.

All of it is the maximum of the marginal likelihood under weak priors (Rasmussen & Williams 2006, §5.4), found by L-BFGS
with the exact gradient. The kernels are Matérn's with ν = 5/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ITERATIONS = 80

# Medians of log-normal priors whose logarithm has a standard deviation of 1. T* of a configuration varies by some 7 %
# over its seeds and lies some 50 % from the line; points one standard deviation apart in each of k features are √(2k)
# apart, and that is a feature's length scale until the trials say otherwise; a deviation's is shorter by √e.
AMPLITUDE, DEVIATION, NOISE, EXTRA = 0.5, 0.1, 0.07, 0.1

_JITTER = 1e-6
_LOG_LENGTHS = (-3.0, 8.0)  # a feature with the largest says nothing
_LOG_LEVELS = (-6.0, 3.0)


@dataclass(frozen=True)
class Learned:
    """Hyperparameters of a process; the standard deviations are of its values.

    Attributes:
        lengths: length scales of the common function and, where some trials are augmented, of the deviation, float64
            [1 or 2, k]. amplitudes: standard deviations of these functions, [1 or 2].
        noise: standard deviation of a trial around them. extra: beside it, of an augmented trial; 0 where none is.
    """

    lengths: np.ndarray
    amplitudes: np.ndarray
    noise: float
    extra: float


def matern(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Matérn's correlation (ν = 5/2) of points [n, k] and [m, k] that are in length scales, float64 [n, m]."""
    return _matern(_squares(a, b))[0]


def learn(z: np.ndarray, y: np.ndarray, augmented: np.ndarray) -> Learned:
    """Learn from standardized features ``z`` [n, k] and values ``y`` [n] of mean about zero; ``augmented`` is bool [n].

    Work: some 80 times n³ + 2kn² floating-point operations, twice the second part where some trials are augmented.
    """
    from scipy.optimize import minimize

    count, k = z.shape
    plain = 1.0 - augmented
    parts = 2 if augmented.any() else 1
    masks = [np.ones((count, count)), np.outer(plain, plain)][:parts]
    usual = 0.5 * np.log(2.0 * max(1, k))
    levels = np.log([AMPLITUDE, DEVIATION][:parts] + [NOISE, EXTRA][:parts])
    medians = np.concatenate([np.full(k, usual), np.full((parts - 1) * k, usual - 0.5), levels])
    bounds = [*[_LOG_LENGTHS] * (parts * k), *[_LOG_LEVELS] * (2 * parts)]
    noisy = np.stack([np.ones(count), augmented.astype(np.float64)])[:parts]

    def split(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return lengths [parts, k], amplitudes [parts] and noises [parts]."""
        values = np.exp(theta)
        return values[: parts * k].reshape(parts, k), *np.split(values[parts * k :], 2)

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return -log p(y | θ) - log p(θ), less constants, and its gradient."""
        lengths, amplitudes, noises = split(theta)
        scaled = [z / length for length in lengths]
        kernels = [_matern(_squares(x, x)) for x in scaled]
        masked = [variance * mask for variance, mask in zip(amplitudes**2, masks, strict=True)]
        covariances = [m * value for m, (value, _) in zip(masked, kernels, strict=True)]
        total = sum(covariances[1:], start=covariances[0].copy())
        variances = noises[:, None] ** 2 * noisy
        total.flat[:: count + 1] += variances.sum(axis=0) + _JITTER
        fitted, inverse, half_log_determinant = _solve(total, y)
        far = theta - medians
        value = 0.5 * float(y @ fitted) + half_log_determinant + 0.5 * float(far @ far)
        pull = np.outer(fitted, fitted) - inverse  # the gradient by θ is -½ tr(pull · dK/dθ)
        by_length = []
        for x, m, (_, slope) in zip(scaled, masked, kernels, strict=True):
            along = pull * m * slope
            by_length.append((x * (along @ x)).sum(axis=0) - along.sum(axis=1) @ x**2)
        by_amplitude = [-np.sum(pull * covariance) for covariance in covariances]
        gradient = np.concatenate([*by_length, by_amplitude, -variances @ np.diag(pull)])
        return value, gradient + far

    found = minimize(loss, medians, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS})
    lengths, amplitudes, noises = split(found.x)
    return Learned(lengths, amplitudes, float(noises[0]), float(noises[1]) if parts == 2 else 0.0)


def _solve(covariance: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return K⁻¹y, K⁻¹ and ½·log|K| of a positive definite K."""
    from scipy.linalg import lapack

    factor, failed = lapack.dpotrf(covariance, lower=1)
    if failed:
        raise np.linalg.LinAlgError("The covariance of the trials is not positive definite.")
    inverse, _ = lapack.dpotri(factor, lower=1)
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    return inverse @ y, inverse, float(np.log(np.diag(factor)).sum())


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum((a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None, :] - 2.0 * (a @ b.T), 0.0)


def _matern(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the correlation at squared distances, and -2 times its derivative by them."""
    distance = np.sqrt(5.0 * squares)
    decay = np.exp(-distance)
    return (1.0 + distance + distance**2 / 3.0) * decay, 5.0 / 3.0 * (1.0 + distance) * decay
