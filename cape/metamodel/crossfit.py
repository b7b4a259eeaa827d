"""Predictions of trials that were not fitted on, without losing any: cross-fitting, and selection by it.

Every fold leaves whole trials of every family out and is predicted by boosters that were fitted on the rest. Intervals,
p_reach and the domain's thresholds are calibrated on these out-of-fold predictions (cross-conformal: Vovk 2015; the
final boosters see every trial, so the intervals err on the wide side, a little). Augmented trials are
only ever fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from cape.metamodel.line import margins
from cape.metamodel.presets import SHARES, SIZES, STRUCTURE_SIZE, STRUCTURES, Preset
from cape.metamodel.regressors import design, log_steps, predict_log, train_boosters
from cape.metamodel.rows import Rows
from cape.metamodel.surface import mix

FOLDS = 10
ENOUGH = 500
"""Calibration trials of a family from which further folds are not run: coverage is then within about 1.3 points."""

SELECTION_FOLDS = 3
STRUCTURE_ROWS = 4_000
SIZE_ROWS = 12_000
"""Plain rows, and as many augmented ones, on which structures and sizes are compared: the best size grows with the rows
(800 trees of depth 5 beat all others on 12,000 rows and none on 2,000), the best structure does not."""

Call = Callable[..., np.ndarray]
Mapper = Callable[[Call, Iterable[tuple[Any, ...]]], list[np.ndarray]]


def map_here(function: Call, arguments: Iterable[tuple[Any, ...]]) -> list[np.ndarray]:
    """Run the calls one after the other in this process."""
    return [function(*a) for a in arguments]


def assign_folds(rows: Rows, folds: int, seed: int = 0) -> np.ndarray:
    """Return int [n]: the fold of each row's trial; -1 for augmented rows, which are never left out.

    The trials of a family are dealt to the folds in a random order, so that every fold holds as many of each.
    """
    out = np.full(len(rows), -1)
    trials, plain = rows.trials, ~rows.augmented
    for family in rows.families:
        # np.unique sorts by trial id, which makes the deal independent of the order of the rows.
        mine = np.unique(trials[(rows["family"] == family) & plain])
        dealt = np.random.default_rng([seed, len(mine)]).permutation(len(mine)) % folds
        index = (rows["family"] == family) & plain
        out[index] = dealt[np.searchsorted(mine, trials[index])]
    return out


def folds_needed(rows: Rows, assigned: np.ndarray) -> int:
    """Return how many folds give every family ``ENOUGH`` calibration trials; all of them where none do."""
    count = int(assigned.max()) + 1
    plain = ~rows.augmented
    smallest = min((len(set(rows["trial_id"][plain & (rows["family"] == f)])) for f in rows.families), default=0)
    return min(count, max(1, -(-ENOUGH * count // max(1, smallest))))


def fold_prediction(
    rows: Rows, assigned: np.ndarray, preset: Preset, families: tuple[str, ...], fold: int
) -> np.ndarray:
    """Return log T* [n] of the rows of one fold by boosters fitted on the others; NaN for all other rows."""
    data = design(rows.take(assigned != fold), preset, families)
    out = np.full(len(rows), np.nan)
    left = np.flatnonzero(assigned == fold)
    unseen = rows.take(left)
    if len(unseen):
        boosters = train_boosters(data, preset, needed=unseen.families)
        out[left] = predict_log(boosters, data.lines, data.surfaces, unseen, preset, families)
    return out


def fold_surface(rows: Rows, assigned: np.ndarray, preset: Preset, families: tuple[str, ...], fold: int) -> np.ndarray:
    """Return log T* [n] of the rows of one fold by the surfaces of the others alone; NaN where there is none."""
    data = design(rows.take(assigned != fold), preset.replace(surface=1.0, shares={}), families)
    out = np.full(len(rows), np.nan)
    left = np.flatnonzero(assigned == fold)
    unseen = rows.take(left)
    nothing = np.full(len(left), np.nan)
    line = margins(data.lines, unseen)
    out[left] = mix(nothing, line, data.surfaces, unseen, lambda _: 1.0)
    return out


def out_of_fold(
    rows: Rows, assigned: np.ndarray, preset: Preset, families: Sequence[str], mapper: Mapper = map_here
) -> np.ndarray:
    """Return out-of-fold log T* [n]; NaN for augmented rows and for folds that are not needed."""
    count = folds_needed(rows, assigned)
    return _joined(mapper(fold_prediction, [(rows, assigned, preset, tuple(families), k) for k in range(count)]))


def select(
    rows: Rows, base: Preset, families: Sequence[str], mapper: Mapper = map_here
) -> tuple[Preset, list[dict[str, Any]]]:
    """Choose structure, then size, then how much of the surface, by 3-fold cross-validation over trials.

    Returns:
        The preset with the smallest mean over families of the mean |Δ log T*| (the surface's share: with the smallest
        of each family), and the score of each candidate.
    """
    reached = rows.take(rows.reached & ~rows.augmented)
    if len(set(reached["trial_id"])) < 2 * SELECTION_FOLDS:
        return base.replace(select=False), []
    trees = base.replace(surface=0.0)
    structures = [trees.replace(**STRUCTURE_SIZE, **s) for s in STRUCTURES if len(families) > 1 or not s["per_family"]]
    best, _, scores = _best(_sample(rows, STRUCTURE_ROWS), structures, families, mapper)
    sample = _sample(rows, SIZE_ROWS)
    best, log_hat, more = _best(sample, [best.replace(**size) for size in SIZES], families, mapper)
    scores = [*scores, *more]
    if base.surface and best.line:
        best, more = _shares(sample, best.replace(surface=base.surface), log_hat, families, mapper)
        scores += more
    return best.replace(select=False), scores


def _shares(
    rows: Rows, base: Preset, log_hat: np.ndarray, families: Sequence[str], mapper: Mapper
) -> tuple[Preset, list[dict[str, Any]]]:
    """Choose each family's share of the surface beside trees whose out-of-fold log T* is known, ``log_hat`` [n]."""
    assigned = assign_folds(rows, SELECTION_FOLDS)
    made = mapper(fold_surface, [(rows, assigned, base, tuple(families), k) for k in range(SELECTION_FOLDS)])
    smooth = _joined(made)
    chosen, scores = {}, []
    for family in families:
        mine = rows.take(rows["family"] == family)
        trees, surface = (values[rows["family"] == family] for values in (log_hat, smooth))
        surface = np.where(np.isfinite(surface), surface, trees)
        errors = [_log_error(mine, trees + share * (surface - trees), (family,)) for share in SHARES]
        if np.isfinite(errors).all():
            chosen[family] = SHARES[int(np.argmin(errors))]
            scores += [{"log_error": e, "family": family, "surface": s} for e, s in zip(errors, SHARES, strict=True)]
    return base.replace(shares=chosen), scores


def _best(
    rows: Rows, options: Sequence[Preset], families: Sequence[str], mapper: Mapper
) -> tuple[Preset, np.ndarray, list[dict[str, Any]]]:
    """Return the option with the smallest cross-validated error, its out-of-fold log T* [n], and the score of each."""
    assigned = assign_folds(rows, SELECTION_FOLDS)
    jobs = [(rows, assigned, option, tuple(families), k) for option in options for k in range(SELECTION_FOLDS)]
    made = mapper(fold_prediction, jobs)
    found = [_joined(made[i : i + SELECTION_FOLDS]) for i in range(0, len(made), SELECTION_FOLDS)]
    errors = [_log_error(rows, log_hat, families) for log_hat in found]
    scores = [{"log_error": e, **_describe(option)} for e, option in zip(errors, options, strict=True)]
    best = int(np.argmin(errors))
    return options[best], found[best], scores


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return what the folds predicted, each its own rows, as one array [n]; NaN where none did."""
    out = np.full(len(parts[0]), np.nan)
    for values in parts:
        out = np.where(np.isfinite(values), values, out)
    return out


def _log_error(rows: Rows, log_hat: np.ndarray, families: Sequence[str]) -> float:
    """Return the mean over families of the mean |Δ log T*| of plain rows that reached ε."""
    gap = np.abs(log_hat - log_steps(rows["t_star"]))
    index = rows.reached & ~rows.augmented
    means = [gap[index & (rows["family"] == f)] for f in families]
    return float(np.mean([m.mean() for m in means if len(m)]))


def _describe(preset: Preset) -> dict[str, Any]:
    about = {name: getattr(preset, name) for name in ("trees", "depth", "learning_rate", "per_family")}
    return {**about, "line": bool(preset.line)}


def _sample(rows: Rows, most: int) -> Rows:
    """Return whole trials of about ``most`` plain rows, as many of each family, and as many augmented ones."""
    kept = np.zeros(len(rows), dtype=bool)
    trials, augmented = rows.trials, rows.augmented
    for part in (~augmented, augmented):
        for family in rows.families:
            index = part & (rows["family"] == family)
            mine = np.unique(trials[index])
            count = most * len(mine) // max(1, len(rows.families) * int(index.sum()))
            kept |= np.isin(trials, np.random.default_rng([1, len(mine)]).permutation(mine)[:count])
    return rows.take(kept)
