"""Fit a meta-regressor: Ray Train + XGBoost for ``cape fit``, the same functions in-process for everything else.

Steps, whoever does them: hold back calibration trials of each family; choose the preset's size by 3-fold
cross-validation over trials; fit the boosters on the rest; calibrate intervals, domain thresholds and p_reach on the
held-back trials, which nothing was fitted on.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cape
from cape.errors import DataError, SpecError
from cape.metamodel.artifact import MetaModel, check_out
from cape.metamodel.domain import Domain
from cape.metamodel.intervals import Conformal
from cape.metamodel.reach import Reach
from cape.metamodel.regressors import (
    CANDIDATES,
    Design,
    Preset,
    design,
    log_steps,
    predict_log,
    preset_named,
    train_boosters,
    xgboost,
)
from cape.metamodel.rows import Rows, as_rows

if TYPE_CHECKING:
    import os

    import xgboost as xgb

Trainer = Callable[[Design, Preset], "dict[str, xgb.Booster]"]

CALIBRATION_SHARE = 0.2
CALIBRATION_LEAST = 10  # trials: the fewest that give a 90 % interval of its own to a family, and one to spare
CALIBRATION_MOST = 500  # trials: coverage is then within about 1.3 points; more would only cost accuracy
FEWEST_TRIALS = 8
FOLDS = 3
SMALL = 1000


def split_calibration(rows: Rows, seed: int = 0) -> np.ndarray:
    """Return bool [n]: rows of the trials held back for calibration, drawn per family, whole trials only.

    A fifth of a family's trials, at least 10 where that leaves two thirds to fit on, at most 500.
    """
    held = np.zeros(len(rows), dtype=bool)
    trials = rows.trials
    for family in rows.families:
        mine = np.unique(trials[(rows["family"] == family) & ~rows.failed])
        count = max(math.ceil(CALIBRATION_SHARE * len(mine)), min(CALIBRATION_LEAST, len(mine) // 3))
        # Sorting by name first makes the draw independent of the order of the rows (np.unique sorts trial ids).
        rng = np.random.default_rng([seed, len(mine)])
        chosen = rng.permutation(mine)[: min(count, CALIBRATION_MOST, len(mine) // 2)]
        held |= np.isin(trials, chosen)
    return held


def fold_error(rows: Rows, candidate: Preset, families: Sequence[str], fold: int) -> list[float]:
    """Return the held-out errors |Δ log T*| summed per family, interleaved with counts, of one selection fold."""
    usable = rows.take(np.isfinite(rows.target(candidate.censored)) & rows.reached)
    assigned = np.random.default_rng(0).permutation(int(usable.trials.max()) + 1)[usable.trials] % FOLDS
    train, test = usable.take(assigned != fold), usable.take(assigned == fold)
    boosters = train_boosters(design(train, candidate, families), candidate)
    x = test.matrix(candidate.features, families)
    errors = np.abs(predict_log(boosters, x, test["family"], candidate.features) - log_steps(test["t_star"]))
    out: list[float] = []
    for family in families:
        mine = errors[test["family"] == family]
        out += [float(mine.sum()), float(len(mine))]
    return out


def candidates(base: Preset, rows: int, families: int) -> list[Preset]:
    """Return the presets that selection compares: three sizes (two below 1,000 rows), pooled or per family."""
    sizes = CANDIDATES if rows >= SMALL else CANDIDATES[:-1]
    pooling = (False, True) if families > 1 else (False,)
    return [base.replace(per_family=p, **size) for size in sizes for p in pooling]


Mapper = Callable[[Callable[..., list[float]], Iterable[tuple[Any, ...]]], "list[list[float]]"]


def _map_here(function: Callable[..., list[float]], arguments: Iterable[tuple[Any, ...]]) -> list[list[float]]:
    return [function(*a) for a in arguments]


def select(rows: Rows, base: Preset, families: Sequence[str], mapper: Mapper = _map_here) -> tuple[Preset, list[dict]]:
    """Choose among ``candidates`` by 3-fold cross-validation over trials.

    Returns:
        The preset with the smallest mean over families of the mean |Δ log T*|, and the score of each candidate.
    """
    reached = rows.take(rows.reached)
    if not len(reached) or int(reached.trials.max()) + 1 < 2 * FOLDS:
        return base.replace(select=False), []
    options = candidates(base, len(reached), len(families))
    jobs = [(rows, option, tuple(families), fold) for option in options for fold in range(FOLDS)]
    results = mapper(fold_error, jobs)
    scores = []
    for i, option in enumerate(options):
        totals = np.sum(results[i * FOLDS : (i + 1) * FOLDS], axis=0).reshape(-1, 2)
        totals = totals[totals[:, 1] > 0]
        scores.append(
            {
                "trees": option.trees,
                "depth": option.depth,
                "learning_rate": option.learning_rate,
                "per_family": option.per_family,
                "log_error": float(np.mean(totals[:, 0] / totals[:, 1])),
            }
        )
    best = min(range(len(options)), key=lambda i: scores[i]["log_error"])
    return options[best].replace(select=False), scores


def fit_table(
    table: Any,
    preset: str | Preset = "product",
    *,
    calibrate: bool = True,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 0,
    trainer: Trainer | None = None,
    mapper: Mapper = _map_here,
) -> MetaModel:
    """Fit a meta-regressor on a table of rows, in this process and without Ray.

    Args:
        table: ``pyarrow.Table`` in the meta-dataset's schema, or ``Rows``.
        preset: name or ``Preset``.
        calibrate: hold trials back for intervals, domain and p_reach; without, every row is fitted on and the model
            has none of the three.
        seed: draws the calibration trials.
        device: XGBoost's device. threads: see ``regressors.thread_count``.
        trainer, mapper: how boosters are trained and selection folds run (Ray passes its own).

    Raises:
        SpecError: an unknown preset. DataError: too few trials, or none that reached its ε.
    """
    base, rows = preset_named(preset), as_rows(table)
    rows = rows.take(~rows.failed)
    families = rows.families
    trials = len(np.unique(rows["trial_id"].astype(str)))
    if trials < FEWEST_TRIALS or not rows.reached.any():
        raise DataError(
            f"The meta-dataset has {trials} usable trials and {int(rows.reached.sum())} rows that reached ε; fitting"
            f" needs at least {FEWEST_TRIALS} trials, some of which reach it. Run a larger sweep."
        )
    held = split_calibration(rows, seed) if calibrate else np.zeros(len(rows), dtype=bool)
    fitted, kept = rows.take(~held), rows.take(held)
    chosen = base
    scores: list[dict[str, Any]] = []
    if base.select:
        chosen, scores = select(fitted, base, families, mapper)
    data = design(fitted, chosen, families)
    boosters = trainer(data, chosen) if trainer else train_boosters(data, chosen, device, threads)
    conformal, metrics = Conformal(), {}
    domain: Domain | None = None
    reach: Reach | None = None
    if calibrate:
        known = kept.take(kept.reached)
        x = known.matrix(chosen.features, families)
        log_true, log_hat = log_steps(known["t_star"]), predict_log(boosters, x, known["family"], chosen.features)
        conformal = Conformal.calibrate(log_true, log_hat, known["family"], known.trials)
        metrics = _metrics(known, np.exp(log_hat), families)
        domain = Domain.fit(fitted, kept, chosen.features)
        reach = Reach.fit(fitted, kept, chosen.features, families, chosen.seed)
    card = _card(rows, kept, base, metrics, scores, trials)
    return MetaModel(chosen, families, boosters, conformal, domain, reach, card)


def fit(
    meta_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    preset: str | Preset = "product",
    workers: int = 1,
    seed: int = 0,
    address: str | None = None,
) -> MetaModel:
    """Fit a meta-regressor with Ray Train and write its directory.

    Ray is used as it is where it runs already; else a local one starts quietly and stops at the end. Training uses
    CUDA exactly where this cluster has a GPU for every worker and torch sees one.

    Args:
        meta_dir: a meta-dataset. out: model directory to write.
        preset: name or ``Preset``. workers: Ray Train workers; at tens of thousands of rows one is fastest.
        seed: draws the calibration trials. address: a Ray cluster to connect to.

    Raises:
        SpecError, DataError, StoreError: as ``fit_table``, and where ``out`` holds something else.
    """
    from cape.metamodel.train import ray_trainer
    from cape.store import reader

    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise SpecError(f"workers must be a whole number of at least 1, not {workers!r}.")
    preset_named(preset)  # an unknown name must fail before Ray starts
    directory = check_out(out)
    rows = as_rows(reader.read(Path(meta_dir)))
    with ray_trainer(directory, workers, address) as (trainer, mapper):
        model = fit_table(rows, preset, seed=seed, trainer=trainer, mapper=mapper)
    model.save(directory)
    return MetaModel.load(directory)


def _metrics(known: Rows, steps: np.ndarray, families: Sequence[str]) -> dict[str, Any]:
    """Return MAE and median relative error on held-back rows, by family (never fitted on, so honest)."""
    error = np.abs(steps - known["t_star"])
    out = {}
    for family in families:
        mine = known["family"] == family
        if mine.any():
            relative = float(np.median(error[mine] / known["t_star"][mine]))
            out[family] = {"rows": int(mine.sum()), "mae": float(error[mine].mean()), "median_relative_error": relative}
    return out


def _card(
    rows: Rows, kept: Rows, base: Preset, metrics: dict[str, Any], scores: list[dict], trials: int
) -> dict[str, Any]:
    def span(name: str) -> list[float]:
        values = rows[name][np.isfinite(rows[name])]
        return [float(values.min()), float(values.max())] if len(values) else []

    tasks = sorted({str(t) for t in rows["task"] if t is not None})
    return {
        "name": base.name,
        "target": "log of the updates until the loss is at most epsilon times its first value",
        "data": {
            "fingerprint": rows.fingerprint(),
            "rows": len(rows),
            "trials": trials,
            "calibration_trials": len(np.unique(kept["trial_id"].astype(str))) if len(kept) else 0,
            "censored_rows": int((~rows.reached).sum()),
            "datasets": sorted({str(d) for d in rows["dataset"]}),
            "tasks": tasks,
            "rows_by_family": {f: int((rows["family"] == f).sum()) for f in rows.families},
        },
        "ranges": {name: span(name) for name in ("lr", "epsilon", "batch_size", "log_n", "log_p")},
        "metrics": {"held_back": metrics, "selection": scores},
        "versions": {
            "cape": cape.__version__,
            "xgboost": xgboost().__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }


def load_or_fit(model: MetaModel | str | Path | None, rows: Rows) -> MetaModel:
    """Return a given meta-regressor, read one from its directory, or fit the product preset on the rows."""
    if isinstance(model, MetaModel):
        return model
    return MetaModel.load(model) if model is not None else fit_table(rows)
