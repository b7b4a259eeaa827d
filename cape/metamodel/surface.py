"""The smooth half of the product: what the line leaves of log T*, smooth in the features; averaged with the trees.

T* changes smoothly with the features, and trees answer in steps: they need many trials to follow what a smooth surface
follows with few (``docs/evidence.md`` has the measurements). Two Gaussian processes make it: one says how far a trial
lies above the line, the other by how much its log T* rises more steeply than the line as ε falls. Far from every trial
both are zero, which leaves the line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cape.metamodel.gaussian import GaussianProcess, Size
from cape.metamodel.line import EPSILON_TERM, POOLED, Line, standardized, term_values
from cape.metamodel.process import one_thread
from cape.metamodel.rows import Rows

LEVEL = Size(points=(1000, 1400), learned_from=(250, 375))
SLOPE = Size(points=(200, 300), learned_from=(150, 225))
"""Slopes are mostly noise, for T* is whole: three times as many points say no more of them (docs/evidence.md)."""

FAR = 2.0**0.5
"""Spread from which a trial is far from those fitted on: its variance is twice theirs, who are mostly noise."""

FEWEST_TRIALS = 20
"""Trials from which a family has a surface; of trials that reached several ε, from which it has slopes."""

ROUNDING = 1.0 / 12.0
"""Variance of T* around the moment at which the loss crosses ε·L_0: it lies anywhere in the last update."""

_NOT_SMOOTH = ("family", "log_epsilon")


@dataclass(frozen=True)
class Surface:
    """log T* - line ≈ level + max(slope, -weight)·t, t the line's standardized term of ε and ``weight`` its weight.

    So log T* never falls as ε does, whatever the slopes say, and has no slope where the line has none.

    Attributes:
        level, slope: processes; no slope where trials have one ε each or the line has no term of ε.
        term: centre, scale and weight of the line's term of ε; zeros where it has none.
    """

    level: GaussianProcess
    slope: GaussianProcess | None = None
    term: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def fit(
        cls,
        rows: Rows,
        y: np.ndarray,
        line: Line,
        features: Sequence[str],
        censored: np.ndarray | None = None,
        sigma: float = 0.0,
    ) -> Surface:
        """Fit to log T* ``y`` [n], where ``censored`` (bool [n]) a lower bound; one row at least is none.

        Args:
            line: whose residuals are fitted.
            sigma: see ``GaussianProcess.fit``.
        """
        bound = np.zeros(len(rows), dtype=bool) if censored is None else censored
        residual, variance = y - line.predict(rows), ROUNDING * np.exp(-2.0 * y)
        slope, term = None, (0.0, 0.0, 0.0)
        if EPSILON_TERM in line.terms:
            j = line.terms.index(EPSILON_TERM)
            term = (float(line.centre[j]), float(line.scale[j]), float(line.weight[j]))
            crossed = rows.take(~bound)
            first, slopes, unsure = _slopes(crossed, _scaled(crossed, term), residual[~bound], variance[~bound])
            if len(first) >= FEWEST_TRIALS:
                slope = GaussianProcess.fit(crossed.take(first), slopes, features, SLOPE, unsure)
        residual = residual - _tilt(slope, term, rows)
        return cls(GaussianProcess.fit(rows, residual, features, LEVEL, variance, bound, sigma), slope, term)

    def predict(self, rows: Rows) -> np.ndarray:
        """Return what to add to the line, in log T*, float64 [n]."""
        return self.level.predict(rows) + _tilt(self.slope, self.term, rows)

    def spread(self, rows: Rows) -> np.ndarray:
        """Return how uncertain the level of a trial is, float64 [n]; see ``GaussianProcess.spread``."""
        return self.level.spread(rows)

    def width(self, rows: Rows, log_steps: np.ndarray, spread: np.ndarray) -> np.ndarray:
        """Return how uncertain log T* is, [n]: the spread, by the batch size, and that T* is whole where it is short.

        Args:
            log_steps: log T* by line and surface, [n]. spread: of the same trials, [n].
        """
        whole = ROUNDING * np.exp(-2.0 * log_steps) / self.level.typical**2
        return np.sqrt(spread**2 + self.level.extra_noise(rows) + whole)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a file (``numpy.savez``), none of which needs pickle."""
        parts = {"level": self.level, **({"slope": self.slope} if self.slope else {})}
        named = {f"{name}_{key}": array for name, part in parts.items() for key, array in part.to_arrays().items()}
        return {"term": np.array(self.term), **named}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Surface:
        """Read what ``to_arrays`` made."""
        made = {}
        for name in ("level", "slope"):
            mine = {key.removeprefix(f"{name}_"): arrays[key] for key in arrays if key.startswith(f"{name}_")}
            made[name] = GaussianProcess.from_arrays(mine) if mine else None
        if made["level"] is None:
            raise ValueError("a surface has no level")
        centre, scale, weight = (float(v) for v in arrays["term"])
        return cls(made["level"], made["slope"], (centre, scale, weight))


def _scaled(rows: Rows, term: tuple[float, float, float]) -> np.ndarray:
    """Return the line's standardized term of ε, float64 [n]."""
    centre, scale, _ = term
    return standardized(term_values(rows, (EPSILON_TERM,)), np.array([centre]), np.array([scale]))[:, 0]


def _tilt(slope: GaussianProcess | None, term: tuple[float, float, float], rows: Rows) -> np.ndarray:
    """Return what slopes add to log T*, float64 [n]."""
    if slope is None:
        return np.zeros(len(rows))
    return np.maximum(slope.predict(rows), -term[2]) * _scaled(rows, term)


def _slopes(
    rows: Rows, t: np.ndarray, residual: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a row of each trial that has several ``t``, its least-squares slope, and the variance of that."""
    first, trial, count = np.unique(
        rows["trial_id"].astype(str), return_index=True, return_inverse=True, return_counts=True
    )[1:]
    away = t - (np.bincount(trial, t) / count)[trial]
    square = np.bincount(trial, away**2)
    having = square > 1e-9
    slopes = np.bincount(trial, away * residual)[having] / square[having]
    return first[having], slopes, np.bincount(trial, away**2 * variance)[having] / square[having] ** 2


def fit_surfaces(
    rows: Rows,
    y: np.ndarray,
    lines: Mapping[str, Line],
    features: Sequence[str],
    families: Sequence[str],
    censored: np.ndarray,
    sigma: float,
) -> dict[str, Surface]:
    """Return a surface for each family in which ``FEWEST_TRIALS`` or more reached ε; see ``Surface.fit``."""
    smooth = [f for f in features if f not in _NOT_SMOOTH]
    out = {}
    with one_thread():
        for family in families:
            if len(set(rows["trial_id"][(rows["family"] == family) & ~censored])) >= FEWEST_TRIALS:
                mine, told = rows.told(family)
                line = lines.get(family, lines[POOLED])
                out[family] = Surface.fit(told, y[mine], line, smooth, censored[mine], sigma)
    return out


def smooth(line: np.ndarray, surfaces: Mapping[str, Surface], rows: Rows) -> np.ndarray:
    """Return log T* [n] by line and surface alone; NaN in families that have no surface."""
    return line + _by_family(surfaces, rows, np.nan, lambda surface, mine: surface.predict(rows.take(mine)))


def spreads(surfaces: Mapping[str, Surface], rows: Rows) -> np.ndarray:
    """Return ``Surface.spread`` of each row by its family's surface, [n]; 1 where there is none."""
    return _by_family(surfaces, rows, 1.0, lambda surface, mine: surface.spread(rows.take(mine)))


def widths(surfaces: Mapping[str, Surface], rows: Rows, log_steps: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Return ``Surface.width`` of each row from what ``smooth`` and ``spreads`` say of it, [n]; 1 without a surface."""
    return _by_family(
        surfaces, rows, 1.0, lambda surface, mine: surface.width(rows.take(mine), log_steps[mine], spread[mine])
    )


def _by_family(
    surfaces: Mapping[str, Surface], rows: Rows, otherwise: float, function: Callable[[Surface, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return a function of each family's surface and the mask of its rows, over all rows: [n]."""
    out = np.full(len(rows), otherwise)
    for family, surface in surfaces.items():
        mine = rows["family"] == family
        if mine.any():
            out[mine] = function(surface, mine)
    return out


def mix(trees: np.ndarray, surface: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Return log T* [n]: the trees' and, where there is a surface (else NaN), a share of it; all arguments [n].

    Where the surface is all, the trees may be NaN.
    """
    alone = np.isfinite(surface) & (share >= 1.0)
    return np.where(alone, surface, np.where(np.isfinite(surface), trees + share * (surface - trees), trees))
