"""XGBoost on log T*: from rows and a preset to boosters, and from boosters to predictions.

T* counts updates and is at least 1 wherever ε < 1 and L_0 > 0; ``log_steps`` floors it at 0.5 so that a loss that
starts at zero (T* = 0) stays finite. Predictions are ``exp`` of the regressor's output, in steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.errors import DataError, DependencyError
from cape.metamodel.line import POOLED, Line, fit_lines, margins
from cape.metamodel.presets import Preset
from cape.metamodel.rows import Rows, as_rows, family_codes
from cape.metamodel.surface import FAR, Surface, fit_surfaces, mix, smooth, spreads

if TYPE_CHECKING:
    import xgboost as xgb

FLOOR = 0.5
"""Steps that T* is raised to before the logarithm."""

MANY_ROWS = 200_000
"""Rows from which XGBoost uses every core."""

MONOTONE = {"log_epsilon": -1}
"""Constraints that hold by definition: a larger ε is never crossed later."""

AFT_SCALE = 0.15
"""Scale of log T* around its prediction under accelerated failure time: about the error that is left. Too large a scale
overshoots: 0.3 is worse than leaving censored rows out (``benchmarks/fit.py censored``)."""

STOPPING_SHARE = 10
"""Early stopping watches one trial in so many."""


def in_steps(log_hat: np.ndarray, whole: bool = False) -> np.ndarray:
    """Return log T* as T* in steps, float64 [n], at least 1 (no ε below 1 is reached without an update)."""
    steps = np.maximum(1.0, np.exp(log_hat))
    return np.rint(steps) if whole else steps


def log_steps(t_star: np.ndarray) -> np.ndarray:
    """Return log(max(T*, 0.5)), float64, NaN where T* is NaN."""
    return np.log(np.maximum(np.asarray(t_star, dtype=np.float64), FLOOR))


@dataclass(frozen=True)
class Design:
    """What a trainer needs of the rows.

    Attributes:
        x: matrix [n, k]. y: log T* [n], where ``censored`` [n] a lower bound of it. weight: [n].
        codes: family code [n]. trials: a number per trial [n]. margin: the line's log T* [n], zeros without one.
        families: what the codes mean. lines: the lines behind ``margin``, by family; empty without.
        surfaces: what is averaged with the trees, by family; empty without. Trainers have no use for it.
    """

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    codes: np.ndarray
    trials: np.ndarray
    censored: np.ndarray
    margin: np.ndarray
    families: tuple[str, ...]
    lines: Mapping[str, Line]
    surfaces: Mapping[str, Surface] = field(default_factory=dict)

    def take(self, index: np.ndarray) -> Design:
        """Return the rows of a mask, an index array or a slice's indices."""
        names = ("x", "y", "weight", "codes", "trials", "censored", "margin")
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in names})


def design(rows: Rows | Any, preset: Preset, families: Sequence[str], needed: Collection[str] | None = None) -> Design:
    """Return the design of the rows that a preset fits on, with surfaces of the ``needed`` families only, or of all.

    Raises:
        DataError: no row has a T*.
    """
    rows = as_rows(rows)
    if not preset.augmented:
        rows = rows.take(~rows.augmented)
    y = log_steps(rows.target(preset.censored))
    rows, y = rows.take(np.isfinite(y)), y[np.isfinite(y)]
    if not len(rows):
        raise DataError("No row of the meta-dataset has a T* to fit on; every trial failed or never reached its ε.")
    codes = family_codes(rows["family"], families)
    weight = np.where(rows.augmented, preset.augmented, 1.0)
    if preset.equal_families:
        for code in np.unique(codes[np.isfinite(codes)]):
            weight[codes == code] *= len(rows) / (len(families) * np.sum(weight[codes == code]))
    censored = ~rows.reached if preset.censored == "aft" else np.zeros(len(rows), dtype=bool)
    lines: dict[str, Line] = {}
    if (preset.line or censored.any()) and not censored.all():  # AFT starts from a level of its own: give it ours
        lines = fit_lines(rows.take(~censored), y[~censored], preset.line, weight[~censored], families)
    margin = margins(lines, rows)
    surfaces: dict[str, Surface] = {}
    if lines:
        having = [
            f for f in families if max(preset.share(f), preset.share(f, far=True)) and (needed is None or f in needed)
        ]
        surfaces = fit_surfaces(rows, y, lines, preset.features, having, censored, AFT_SCALE)
    x = rows.matrix(preset.features, families)
    return Design(x, y, weight, codes, rows.trials, censored, margin, tuple(families), lines, surfaces)


def thread_count(rows: int, threads: int = 0) -> int:
    """Return XGBoost's threads: those asked for, or for 0 one, and every core from ``MANY_ROWS`` on.

    One thread fits 17,000 rows in 1.4 s. More gain little there, and on a machine that is busy with other work their
    barriers cost fifty times as much (measured: 75 s).
    """
    return threads or (1 if rows < MANY_ROWS else 0)


def booster_parameters(preset: Preset, device: str = "cpu", threads: int = 1, survival: bool = False) -> dict[str, Any]:
    """Return XGBoost's parameters for a preset; with ``survival`` those of accelerated failure time."""
    parameters: dict[str, Any] = {
        "objective": "reg:squarederror",
        "tree_method": "hist",
        "max_depth": preset.depth,
        "learning_rate": preset.learning_rate,
        "subsample": preset.subsample,
        "colsample_bytree": preset.colsample,
        "reg_alpha": preset.alpha,
        "reg_lambda": preset.lambda_,
        "min_child_weight": preset.min_child_weight,
        "seed": preset.seed,
        "device": device,
        "nthread": threads,
        "verbosity": 1,
    }
    if survival:
        # Its hessian is 1/scale² of a squared error's: the same penalties then mean the same.
        parameters |= {
            "objective": "survival:aft",
            "eval_metric": "aft-nloglik",
            "aft_loss_distribution": "normal",
            "aft_loss_distribution_scale": AFT_SCALE,
            "reg_lambda": preset.lambda_ / AFT_SCALE**2,
            "min_child_weight": preset.min_child_weight / AFT_SCALE**2,
        }
    if preset.monotone:
        constraints = [MONOTONE.get(f, 0) for f in preset.features]
        if any(constraints):
            parameters["monotone_constraints"] = "(" + ",".join(map(str, constraints)) + ")"
    return parameters


def feature_types(features: Sequence[str]) -> list[str]:
    """Return XGBoost's type of each feature: ``family`` is categorical, all else numbers."""
    return ["c" if f == "family" else "float" for f in features]


def xgboost() -> Any:
    """Import XGBoost, or raise ``DependencyError``."""
    try:
        import xgboost as xgb
    except ImportError as error:
        raise DependencyError("The meta-regressor needs XGBoost; install it with `pip install xgboost`.") from error
    return xgb


def dmatrix(x: np.ndarray, features: Sequence[str], y: Any = None, weight: Any = None, margin: Any = None) -> Any:
    """Return XGBoost's matrix of float64 [n, k]; NaN is missing."""
    return xgboost().DMatrix(
        x,
        label=y,
        weight=weight,
        base_margin=margin,
        feature_names=list(features),
        feature_types=feature_types(features),
        enable_categorical=True,
        nthread=thread_count(len(x)),
    )


def _training_matrix(data: Design, preset: Preset, survival: bool) -> xgb.DMatrix:
    margin = data.margin if data.lines else None
    if not survival:
        return dmatrix(data.x, preset.features, data.y, data.weight, margin)
    matrix = dmatrix(data.x, preset.features, None, data.weight, margin)
    steps = np.exp(data.y)
    matrix.set_info(label_lower_bound=steps, label_upper_bound=np.where(data.censored, np.inf, steps))
    return matrix


def train_booster(
    data: Design, preset: Preset, device: str = "cpu", threads: int = 0, rank: int = 0, world: int = 1
) -> xgb.Booster:
    """Fit one booster on every ``world``-th row of ``data``, from ``rank`` on.

    Inside a Ray Train worker this is one collective fit: what is decided from ``data``, all workers decide alike.
    """
    survival = bool(data.censored.any())
    parameters = booster_parameters(preset, device, thread_count(len(data.y), threads), survival)
    trees = preset.trees
    order = np.unique(data.trials, return_inverse=True)[1]
    if preset.early_stopping and order.max() + 1 >= STOPPING_SHARE * max(2, world):  # else nothing could be watched
        watched = order % STOPPING_SHARE == 0
        parts = [np.flatnonzero(m)[rank::world] for m in (~watched, watched)]
        fitted, kept = (_training_matrix(data.take(p), preset, survival) for p in parts)
        first = xgboost().train(
            parameters,
            fitted,
            trees,
            evals=[(kept, "watched")],
            early_stopping_rounds=preset.early_stopping,
            verbose_eval=False,
        )
        trees = first.best_iteration + 1
    mine = data.take(np.arange(rank, len(data.y), world))
    return xgboost().train(parameters, _training_matrix(mine, preset, survival), trees)


def load_booster(source: Any) -> xgb.Booster:
    """Return a booster from a file or a bytearray; it predicts with one thread (see ``thread_count``)."""
    return xgboost().Booster({"nthread": 1}, model_file=source)


def train_boosters(
    data: Design,
    preset: Preset,
    device: str = "cpu",
    threads: int = 0,
    rank: int = 0,
    world: int = 1,
    needed: Collection[str] | None = None,
) -> dict[str, xgb.Booster]:
    """Fit the boosters of a preset: the pooled one, and one per family where the preset asks for it.

    A family whose predictions are its surface's alone, near and far, needs none (without a surface, after all, it has
    the pooled one). With ``needed`` only those that predict rows of these families are fitted.

    With ``world`` workers each fits on every ``world``-th row of each booster's rows (the collective adds their
    gradients), so that no row is lost and no worker is left without rows of a family.
    """
    parts = {POOLED: np.arange(len(data.y))}
    if preset.per_family:
        for code, name in enumerate(data.families):
            index = np.flatnonzero(data.codes == code)
            if not preset.all_surface(name) and len(index) >= max(2, world):
                parts[name] = index
    if needed is not None:
        wanted = {name if name in parts else POOLED for name in needed}
        parts = {name: index for name, index in parts.items() if name in wanted}
    return {n: train_booster(data.take(i), preset, device, threads, rank, world) for n, i in parts.items()}


def predict_log(
    boosters: Mapping[str, xgb.Booster],
    lines: Mapping[str, Line],
    surfaces: Mapping[str, Surface],
    rows: Rows,
    preset: Preset,
    families: Sequence[str],
) -> np.ndarray:
    """Return log T* [n]: each row by its family's booster, or by the pooled one, on top of its family's line.

    A family with a surface has the preset's share of it, near and far. Trees that count for nothing are not asked.
    """
    x, names, margin = rows.matrix(preset.features, families), rows["family"], margins(lines, rows)
    smoothed, share = np.full(len(x), np.nan), np.zeros(len(x))
    if surfaces:
        smoothed = smooth(margin, surfaces, rows)
        share = shares(preset, names, spreads(surfaces, rows) > FAR)
    trees = np.full(len(x), np.nan)
    which = np.array([n if n in boosters and n != POOLED else POOLED for n in names], dtype=object)
    which[np.isfinite(smoothed) & (share >= 1.0)] = None
    for name in set(which) - {None}:
        index = which == name
        matrix = dmatrix(x[index], preset.features, margin=margin[index] if lines else None)
        # The margin is log T* under both objectives; the output of accelerated failure time would be its exponential.
        trees[index] = boosters[name].predict(matrix, output_margin=True)
    return mix(trees, smoothed, share)


def shares(preset: Preset, families: Iterable[object], far: np.ndarray) -> np.ndarray:
    """Return the surface's share in each prediction, float64 [n]; ``far``: bool [n]."""
    return np.array([preset.share(f, bool(away)) for f, away in zip(families, far, strict=True)], dtype=np.float64)
