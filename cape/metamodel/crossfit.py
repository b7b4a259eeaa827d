"""Predictions of trials that were not fitted on, without losing any: cross-fitting, and selection by it.

Every fold leaves whole trials of every family out and is predicted by boosters that were fitted on the rest. Intervals,
p_reach and the domain's thresholds are calibrated on these out-of-fold predictions (cross-conformal: Vovk 2015; the
final boosters see every trial, so the intervals err on the wide side, a little). Augmented trials are
only ever fitted on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from cape.family_names import relative_of
from cape.logs import counted
from cape.metamodel.line import margins
from cape.metamodel.presets import SHARES, SIZES, STRUCTURE_SIZE, STRUCTURES, Preset
from cape.metamodel.process import one_thread
from cape.metamodel.regressors import design, log_steps, predict_log, shares, train_boosters
from cape.metamodel.rows import Rows
from cape.metamodel.surface import FAR, mix, smooth, spreads, widths

FOLDS = 10
ENOUGH = 1000
"""Calibration trials of a family from which further folds are not run: coverage is then within about a point (of 500,
which served before, 1.3)."""

SELECTION_FOLDS = 3
DATASET_FOLDS = 4
STRUCTURE_ROWS = 1_000
SIZE_ROWS = 3_000
"""Plain rows of each family, and as many augmented ones, on which structures and sizes are compared: the best size
grows with the rows (of four families, 800 trees of depth 5 beat all others on 12,000 rows and none on 2,000), the best
structure does not."""

AS_GOOD = 1.01
"""Errors closer than this are the same: the simpler structure or the smaller size, which is listed first, is taken."""

FEWEST_ROWS = 60
"""Rows near or far from which a family has a share of its own there."""

Call = Callable[..., np.ndarray]
Mapper = Callable[[Call, Sequence[tuple[Any, ...]]], list[np.ndarray]]


def map_threads(function: Call, arguments: Sequence[tuple[Any, ...]]) -> list[np.ndarray]:
    """Run the calls in this process, as many at once as it has cores.

    A call is XGBoost and BLAS on one thread each, neither of which holds Python's lock; its numbers are those of a call
    that runs alone.
    """
    with one_thread(), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(counted(pool.map(lambda a: function(*a), arguments), len(arguments), "folds fitted"))


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


def assign_datasets(rows: Rows) -> np.ndarray:
    """Return int [n]: the fold of the data of each row, augmented rows' too; at most ``DATASET_FOLDS`` folds."""
    index = np.unique(rows.sources, return_inverse=True)[1]
    return np.random.default_rng(0).permutation(int(index.max()) + 1)[index] % DATASET_FOLDS


def enough(rows: Rows, assigned: np.ndarray) -> np.ndarray:
    """Return the folds [n] with those that a family of ``ENOUGH`` calibration trials has no need of as -1."""
    out, count, plain = assigned.copy(), int(assigned.max()) + 1, ~rows.augmented
    for family in rows.families:
        mine = rows["family"] == family
        trials = len(set(rows["trial_id"][mine & plain]))
        out[mine & (assigned >= -(-ENOUGH * count // max(1, trials)))] = -1
    return out


def fold_parts(rows: Rows, assigned: np.ndarray, preset: Preset, families: tuple[str, ...], fold: int) -> np.ndarray:
    """Return [4, n] of one fold's rows, fitted on the others: log T* by trees, by surface, its spread and its width.

    NaN for all other rows; where there is no surface its log T* is NaN, spread and width are 1; where it is all that
    counts the trees are NaN.
    """
    out = np.full((4, len(rows)), np.nan)
    left = np.flatnonzero(assigned == fold)
    unseen = rows.take(left)
    if len(unseen):
        data = design(rows.take(assigned != fold), preset, families, needed=unseen.families)
        needed = [f for f in unseen.families if f not in data.surfaces or not preset.all_surface(f)]
        boosters = train_boosters(data, preset, threads=1, needed=needed)
        by_trees = np.isin(unseen["family"].astype(str), needed)
        out[0, left[by_trees]] = predict_log(boosters, data.lines, {}, unseen.take(by_trees), preset, families)
        log_steps, spread = smooth(margins(data.lines, unseen), data.surfaces, unseen), spreads(data.surfaces, unseen)
        out[1:, left] = log_steps, spread, widths(data.surfaces, unseen, log_steps, spread)
    return out


def out_of_fold(
    rows: Rows, assigned: np.ndarray, preset: Preset, families: Sequence[str], mapper: Mapper = map_threads
) -> tuple[np.ndarray, np.ndarray]:
    """Return out-of-fold log T* [n] and its width [n]; NaN for rows of no fold."""
    made = _joined(
        mapper(fold_parts, [(rows, assigned, preset, tuple(families), k) for k in range(assigned.max() + 1)])
    )
    return mix(made[0], made[1], shares(preset, rows["family"], made[2] > FAR)), made[3]


def select(
    rows: Rows, base: Preset, families: Sequence[str], mapper: Mapper = map_threads
) -> tuple[Preset, list[dict[str, Any]]]:
    """Choose structure, then size, then family by family the surface's shares, by cross-validation.

    Structure and size are judged over trials that were left out, of the families that others learn from where there
    are such (``family_names.relative_of``): what is chosen for these depends on no family beside them. A share is
    judged over these and over datasets that were left out, once by the rows that then lie near the trials fitted on and
    once by those that lie far from them: a model is used on both, and what is best near is not always best far.

    Returns:
        The preset with the smallest mean over families of the mean |Δ log T*| (a share: of the family's rows near or
        far), and the score of each candidate.
    """
    reached = rows.take(rows.reached & ~rows.augmented)
    if len(set(reached["trial_id"])) < 2 * SELECTION_FOLDS:
        return base.replace(select=False), []
    trees = base.replace(surface=0.0)
    structures = [trees.replace(**STRUCTURE_SIZE, **s) for s in STRUCTURES if len(families) > 1 or not s["per_family"]]
    first = [f for f in families if relative_of(f) is None] or list(families)
    judged = rows.take(np.isin(rows["family"].astype(str), first))
    best, scores = _best(_sample(judged, STRUCTURE_ROWS), structures, first, mapper)
    best, more = _best(_sample(judged, SIZE_ROWS), [best.replace(**size) for size in SIZES], first, mapper)
    scores += more
    if base.surface and best.line:
        best, more = _shares(_sample(rows, SIZE_ROWS), best.replace(surface=base.surface), families, mapper)
        scores += more
    return best.replace(select=False), scores


def _shares(rows: Rows, base: Preset, families: Sequence[str], mapper: Mapper) -> tuple[Preset, list[dict[str, Any]]]:
    """Choose each family's share of the surface beside the trees, near the trials fitted on and far from them."""
    both = (assign_folds(rows, SELECTION_FOLDS), assign_datasets(rows))
    # A fold without which nothing would be left to fit on cannot be left out.
    deals = [dealt for dealt in both if all(rows.reached[dealt != k].any() for k in set(dealt))]
    counts = [int(dealt.max()) + 1 for dealt in deals]
    jobs = [(rows, d, base, tuple(families), k) for d, count in zip(deals, counts, strict=True) for k in range(count)]
    made = iter(mapper(fold_parts, jobs))
    parts = [_joined([next(made) for _ in range(count)]) for count in counts]
    trees, surface, spread, _ = np.concatenate([np.full((4, 0), np.nan), *parts], axis=1)
    target, names = np.tile(log_steps(rows["t_star"]), len(parts)), np.tile(rows["family"], len(parts))
    judged = np.tile(rows.reached & ~rows.augmented, len(parts)) & np.isfinite(surface)
    chosen: dict[bool, dict[str, float]] = {False: {}, True: {}}
    scores = []
    for family in families:
        for far, best in chosen.items():
            mine = np.flatnonzero(judged & (names == family) & ((spread > FAR) == far))
            if len(mine) < FEWEST_ROWS:
                continue
            mixed = [mix(trees[mine], surface[mine], np.full(len(mine), share)) for share in SHARES]
            errors = [float(np.abs(m - target[mine]).mean()) for m in mixed]
            best[family] = SHARES[int(np.argmin(errors))]
            about = {"family": family, "far": far, "rows": len(mine)}
            scores += [{"log_error": e, **about, "surface": share} for e, share in zip(errors, SHARES, strict=True)]
    return base.replace(shares=chosen[False], far_shares=chosen[True]), scores


def _best(
    rows: Rows, options: Sequence[Preset], families: Sequence[str], mapper: Mapper
) -> tuple[Preset, list[dict[str, Any]]]:
    """Return the first option whose cross-validated error is the smallest or as good as that, and the score of each."""
    assigned = assign_folds(rows, SELECTION_FOLDS)
    jobs = [(rows, assigned, option, tuple(families), k) for option in options for k in range(SELECTION_FOLDS)]
    made = mapper(fold_parts, jobs)
    found = [_joined(made[i : i + SELECTION_FOLDS])[0] for i in range(0, len(made), SELECTION_FOLDS)]
    errors = [_log_error(rows, log_hat, families) for log_hat in found]
    scores = [{"log_error": e, **_describe(option)} for e, option in zip(errors, options, strict=True)]
    return next(o for o, e in zip(options, errors, strict=True) if e <= AS_GOOD * min(errors)), scores


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return what the folds predicted, each its own rows, as one array [..., n]; NaN where none did."""
    out = np.full(parts[0].shape, np.nan)
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
    """Return whole trials of about ``most`` plain rows of each family, and as many augmented ones."""
    kept = np.zeros(len(rows), dtype=bool)
    trials, augmented = rows.trials, rows.augmented
    for part in (~augmented, augmented):
        for family in rows.families:
            index = part & (rows["family"] == family)
            mine = np.unique(trials[index])
            count = most * len(mine) // max(1, int(index.sum()))
            kept |= np.isin(trials, np.random.default_rng([1, len(mine)]).permutation(mine)[:count])
    return rows.take(kept)
