"""Fit a meta-regressor: Ray Train + XGBoost for ``cape fit``, the same functions in-process for everything else.

Steps, whoever does them: choose the preset's structure, size and what differs by family by cross-validation; predict
every trial by boosters and surfaces that never saw it (``crossfit``); calibrate intervals, domain thresholds and
p_reach on those predictions; fit what is kept on every trial.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

import cape
from cape.config import check_count
from cape.errors import DataError
from cape.metamodel.artifact import MetaModel, check_out
from cape.metamodel.crossfit import FOLDS, Mapper, assign_folds, enough, map_threads, out_of_fold, select
from cape.metamodel.domain import Domain
from cape.metamodel.intervals import Conformal
from cape.metamodel.presets import Preset, preset_named
from cape.metamodel.reach import Reach
from cape.metamodel.regressors import Design, design, in_steps, log_steps, train_boosters, xgboost
from cape.metamodel.rows import Rows, as_rows, read_rows

if TYPE_CHECKING:
    import os

    import xgboost as xgb

T = TypeVar("T")
U = TypeVar("U")
Trainer = Callable[[Design, Preset], "dict[str, xgb.Booster]"]

FEWEST_TRIALS = 8


def fit_table(
    table: Any,
    preset: str | Preset = "product",
    *,
    calibrate: bool = True,
    seed: int = 0,
    device: str = "cpu",
    threads: int = 0,
    trainer: Trainer | None = None,
    mapper: Mapper = map_threads,
) -> MetaModel:
    """Fit a meta-regressor on a table of rows, in this process and without Ray.

    Args:
        table: ``pyarrow.Table`` in the meta-dataset's schema, or ``Rows``.
        preset: name or ``Preset``.
        calibrate: cross-fit for intervals, domain and p_reach; without, the model has none of the three.
        seed: deals the trials to the folds of calibration.
        device: XGBoost's device. threads: see ``regressors.thread_count``.
        trainer, mapper: how boosters are trained and selection folds run (Ray passes its own).

    Raises:
        SpecError: an unknown preset, a negative seed. DataError: too few trials, or none that reached its ε.
    """
    check_count(seed, "seed", minimum=0)
    base, rows = preset_named(preset), as_rows(table)
    rows = rows.take(~rows.failed)
    families = rows.families
    trials = len(set(rows["trial_id"][~rows.augmented]))
    if trials < FEWEST_TRIALS or not rows.reached.any():
        kind = "trials that are not augmented" if rows.augmented.any() else "usable trials"
        raise DataError(
            f"The meta-dataset has {trials} {kind} and {int(rows.reached.sum())} rows that reached ε; fitting needs at"
            f" least {FEWEST_TRIALS} such trials, some of which reach it. Run a larger sweep."
        )
    chosen, scores = select(rows, base, families, mapper) if base.select else (base, [])
    data = design(rows, chosen, families)
    used = rows if chosen.augmented else rows.take(~rows.augmented)
    assigned = assign_folds(used, min(FOLDS, trials), seed)

    def left_out() -> tuple[np.ndarray, np.ndarray] | None:
        return out_of_fold(used, enough(used, assigned), chosen, families, mapper) if calibrate else None

    if trainer is None:
        boosters, found = train_boosters(data, chosen, device, threads), left_out()
    else:
        boosters, found = _beside(lambda: trainer(data, chosen), left_out)
    conformal, metrics, calibrated = Conformal(), {}, 0
    domain: Domain | None = None
    reach: Reach | None = None
    if found is not None:
        log_hat, width = found
        index = np.isfinite(log_hat) & used.reached
        known, log_hat, width = used.take(index), log_hat[index], width[index]
        steps = in_steps(log_hat, chosen.whole)  # an interval holds it, whatever its level
        errors = np.where(steps == known["t_star"], 0.0, np.abs(log_steps(known["t_star"]) - log_hat) / width)
        conformal = Conformal.calibrate(errors, known["family"], known.trials)
        metrics, calibrated = _metrics(known, steps, families), len(set(known["trial_id"]))
        domain = Domain.fit(used, assigned, chosen.features)
        reach = Reach.fit(used, assigned, chosen.features, families, chosen.seed)
    card = _card(rows, calibrated, base, metrics, scores)
    return MetaModel(chosen, families, boosters, data.lines, data.surfaces, conformal, domain, reach, card)


def _beside(waiting: Callable[[], T], working: Callable[[], U]) -> tuple[T, U]:
    """Return what two functions give, the second one run in a thread while the first one waits for other processes.

    Where the first one fails or is interrupted, nobody waits for the second.
    """
    pool = ThreadPoolExecutor(1)
    other = pool.submit(working)
    try:
        return waiting(), other.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def fit(
    meta_dir: Any,
    out: str | os.PathLike[str],
    *,
    preset: str | Preset = "product",
    workers: int = 1,
    early_stopping: int | None = None,
    seed: int = 0,
    address: str | None = None,
) -> MetaModel:
    """Fit a meta-regressor with Ray Train and write its directory.

    Ray is used as it is where it runs already; else a local one starts quietly and stops at the end. Training uses
    CUDA exactly where this cluster has a GPU for every worker and torch sees one.

    Args:
        meta_dir: a meta-dataset's directory, or several. out: model directory to write.
        preset: name or ``Preset``. workers: Ray Train workers; at tens of thousands of rows one is fastest.
        early_stopping: rounds; overrides the preset's. seed: deals the trials to the calibration's folds.
        address: a Ray cluster to connect to.

    Raises:
        SpecError, DataError, StoreError: as ``fit_table``, and where ``out`` holds something else.
    """
    from cape.metamodel.train import ray_trainer

    workers, seed = check_count(workers, "workers"), check_count(seed, "seed", minimum=0)
    wanted = preset_named(preset)  # an unknown name must fail before Ray starts
    if early_stopping is not None:
        wanted = wanted.replace(early_stopping=early_stopping)
    directory = check_out(out)
    rows = read_rows(meta_dir)
    with ray_trainer(directory, workers, address) as (trainer, mapper):
        model = fit_table(rows, wanted, seed=seed, trainer=trainer, mapper=mapper)
    model.save(directory)
    return MetaModel.load(directory)


def _metrics(known: Rows, steps: np.ndarray, families: Sequence[str]) -> dict[str, Any]:
    """Return MAE and median relative error of out-of-fold predictions, by family."""
    error = np.abs(steps - known["t_star"])
    out = {}
    for family in families:
        mine = known["family"] == family
        if mine.any():
            relative = float(np.median(error[mine] / np.maximum(1.0, known["t_star"][mine])))
            out[family] = {"rows": int(mine.sum()), "mae": float(error[mine].mean()), "median_relative_error": relative}
    return out


def _card(
    rows: Rows, calibrated: int, base: Preset, metrics: dict[str, Any], scores: list[dict[str, Any]]
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
            "trials": len(set(rows["trial_id"])),
            "augmented_trials": len(set(rows["trial_id"][rows.augmented])),
            "calibration_trials": calibrated,
            "censored_rows": int((~rows.reached).sum()),
            "datasets": sorted({str(d) for d in rows["dataset"]}),
            "tasks": tasks,
            "rows_by_family": {f: int((rows["family"] == f).sum()) for f in rows.families},
        },
        "ranges": {name: span(name) for name in ("lr", "epsilon", "batch_size", "log_n", "log_p")},
        "metrics": {"out_of_fold": metrics, "selection": scores},
        "versions": {
            "cape": cape.__version__,
            "xgboost": xgboost().__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    }
