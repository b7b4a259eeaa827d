"""Presets of the meta-regressor and the comparators of appendix A.4, all on the target log T*.

T* counts updates and is at least 1 wherever ε < 1 and L_0 > 0; ``log_steps`` floors it at 0.5 so that a loss that
starts at zero (T* = 0) stays finite. Predictions are ``exp`` of the regressor's output, in steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

from cape.config import JsonConfig
from cape.errors import DataError, DependencyError, SpecError, did_you_mean
from cape.metamodel.rows import PAPER_FEATURES, PRODUCT_FEATURES, STATIC_FEATURES, Rows, as_rows, family_codes

if TYPE_CHECKING:
    import xgboost as xgb

FLOOR = 0.5
"""Steps that T* is raised to before the logarithm."""

MANY_ROWS = 200_000
"""Rows from which XGBoost uses every core."""

POOLED = "pooled"
"""Name of the booster that serves every family, and families it was never fitted on."""

MONOTONE = {"log_epsilon": -1}
"""Constraints that hold by definition: a larger ε is never crossed later."""


def log_steps(t_star: np.ndarray) -> np.ndarray:
    """Return log(max(T*, 0.5)), float64, NaN where T* is NaN."""
    return np.log(np.maximum(np.asarray(t_star, dtype=np.float64), FLOOR))


@dataclass(frozen=True)
class Preset(JsonConfig):
    """Everything that decides a meta-regressor, given its rows.

    Attributes:
        name: name of the preset.
        features: columns of the matrix, in order.
        trees, depth, learning_rate, subsample, colsample, alpha, lambda_, min_child_weight, seed: XGBoost's.
        per_family: one booster per family, with a pooled one for families without their own.
        equal_families: weight rows so that every family counts equally in the pooled booster.
        monotone: apply ``MONOTONE``.
        censored: ``"cap"`` regresses uncrossed rows as 5,000; ``"exclude"`` leaves them to p_reach.
        select: choose size and pooling among ``CANDIDATES`` by 3-fold cross-validation over trials.
    """

    name: str
    features: tuple[str, ...] = PAPER_FEATURES
    trees: int = 200
    depth: int = 4
    learning_rate: float = 0.05
    subsample: float = 0.9
    colsample: float = 0.9
    alpha: float = 0.0
    lambda_: float = 1.0
    min_child_weight: float = 1.0
    seed: int = 42
    per_family: bool = False
    equal_families: bool = False
    monotone: bool = False
    censored: str = "cap"
    select: bool = False


PRESETS: dict[str, Preset] = {
    p.name: p
    for p in (
        Preset("paper", per_family=True),
        Preset("paper_pooled"),
        Preset("static", features=STATIC_FEATURES, per_family=True),
        Preset("paper_appendix", trees=500, depth=6, per_family=True),
        Preset(
            "product",
            features=PRODUCT_FEATURES,
            trees=400,
            depth=4,
            equal_families=True,
            monotone=True,
            censored="exclude",
            select=True,
        ),
    )
}

CANDIDATES: tuple[dict[str, Any], ...] = (
    {"trees": 200, "depth": 3, "learning_rate": 0.05},
    {"trees": 400, "depth": 4, "learning_rate": 0.05},
    {"trees": 800, "depth": 5, "learning_rate": 0.03},
)


def preset_named(name: str | Preset) -> Preset:
    """Return a preset by name; raises ``SpecError`` for an unknown one."""
    if isinstance(name, Preset):
        return name
    if name not in PRESETS:
        raise SpecError(f"Unknown preset '{name}'.{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


@dataclass(frozen=True)
class Design:
    """What a trainer needs of the rows: matrix [n, k], log T* [n], weight [n], family code [n]."""

    x: np.ndarray
    y: np.ndarray
    weight: np.ndarray
    codes: np.ndarray
    families: tuple[str, ...]

    def take(self, index: np.ndarray) -> Design:
        """Return the rows of a mask, an index array or a slice's indices."""
        return Design(self.x[index], self.y[index], self.weight[index], self.codes[index], self.families)


def design(rows: Rows | Any, preset: Preset, families: Sequence[str]) -> Design:
    """Return the design of the rows that a preset fits on; raises ``DataError`` where there are none."""
    rows = as_rows(rows)
    y = log_steps(rows.target(preset.censored))
    rows, y = rows.take(np.isfinite(y)), y[np.isfinite(y)]
    if not len(rows):
        raise DataError("No row of the meta-dataset has a T* to fit on; every trial failed or never reached its ε.")
    codes = family_codes(rows["family"], families)
    weight = np.ones(len(rows))
    if preset.equal_families:
        for code in np.unique(codes[np.isfinite(codes)]):
            weight[codes == code] = len(rows) / (len(families) * np.sum(codes == code))
    return Design(rows.matrix(preset.features, families), y, weight, codes, tuple(families))


def thread_count(rows: int, threads: int = 0) -> int:
    """Return XGBoost's threads: those asked for, or for 0 one, and every core from ``MANY_ROWS`` on.

    One thread fits 17,000 rows in 1.4 s. More gain little there, and on a machine that is busy with other work their
    barriers cost fifty times as much (measured: 75 s).
    """
    return threads or (1 if rows < MANY_ROWS else 0)


def booster_parameters(preset: Preset, device: str = "cpu", threads: int = 1) -> dict[str, Any]:
    """Return XGBoost's parameters for a preset."""
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


def dmatrix(x: np.ndarray, features: Sequence[str], y: Any = None, weight: Any = None) -> xgb.DMatrix:
    """Return XGBoost's matrix of float64 [n, k]; NaN is missing."""
    return xgboost().DMatrix(
        x,
        label=y,
        weight=weight,
        feature_names=list(features),
        feature_types=feature_types(features),
        enable_categorical=True,
        nthread=thread_count(len(x)),
    )


def train_booster(data: Design, preset: Preset, device: str = "cpu", threads: int = 0) -> xgb.Booster:
    """Fit one booster on all rows of ``data``. Inside a Ray Train worker this is one collective fit."""
    matrix = dmatrix(data.x, preset.features, data.y, data.weight)
    parameters = booster_parameters(preset, device, thread_count(len(data.y), threads))
    return xgboost().train(parameters, matrix, num_boost_round=preset.trees)


def load_booster(source: Any) -> xgb.Booster:
    """Return a booster from a file or a bytearray; it predicts with one thread (see ``thread_count``)."""
    return xgboost().Booster({"nthread": 1}, model_file=source)


def train_boosters(
    data: Design, preset: Preset, device: str = "cpu", threads: int = 0, rank: int = 0, world: int = 1
) -> dict[str, xgb.Booster]:
    """Fit the boosters of a preset: the pooled one, and one per family where the preset asks for it.

    With ``world`` workers each fits on every ``world``-th row of each booster's rows (the collective adds their
    gradients), so that no row is lost and no worker is left without rows of a family.
    """
    parts = {POOLED: np.arange(len(data.y))}
    if preset.per_family:
        for code, name in enumerate(data.families):
            index = np.flatnonzero(data.codes == code)
            if len(index) >= max(2, world):
                parts[name] = index
    return {n: train_booster(data.take(i[rank::world]), preset, device, threads) for n, i in parts.items()}


def predict_log(
    boosters: dict[str, xgb.Booster], x: np.ndarray, names: np.ndarray, features: Sequence[str]
) -> np.ndarray:
    """Return log T* [n]: each row by its family's booster, or by the pooled one.

    Args:
        x: float64 [n, k]. names: object [n], the rows' families.
    """
    out = np.empty(len(x))
    which = np.array([n if n in boosters and n != POOLED else POOLED for n in names], dtype=object)
    for name in set(which):
        index = which == name
        out[index] = boosters[name].predict(dmatrix(x[index], features))
    return out


class StepsRegressor(RegressorMixin, BaseEstimator):
    """The preset's XGBoost as a scikit-learn regressor: ``fit(X, T*)``, ``predict(X)`` in steps.

    Args:
        n_estimators, max_depth, learning_rate, subsample, colsample_bytree, reg_alpha, reg_lambda, random_state:
            as the ``paper`` preset sets them.
        n_jobs: threads.
    """

    def __init__(
        self,
        n_estimators: int = 200,
        max_depth: int = 4,
        learning_rate: float = 0.05,
        subsample: float = 0.9,
        colsample_bytree: float = 0.9,
        reg_alpha: float = 0.0,
        reg_lambda: float = 1.0,
        random_state: int = 42,
        n_jobs: int = 1,
    ) -> None:
        self.n_estimators = n_estimators
        self.max_depth = max_depth
        self.learning_rate = learning_rate
        self.subsample = subsample
        self.colsample_bytree = colsample_bytree
        self.reg_alpha = reg_alpha
        self.reg_lambda = reg_lambda
        self.random_state = random_state
        self.n_jobs = n_jobs

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> StepsRegressor:
        """Fit on features [n, k] (NaN is missing) and T* in steps [n]."""
        from sklearn.utils.validation import validate_data

        X, y = validate_data(self, X, y, ensure_all_finite="allow-nan", dtype=np.float64, y_numeric=True)
        xgb = xgboost()
        spec = Preset(
            "custom",
            trees=self.n_estimators,
            depth=self.max_depth,
            learning_rate=self.learning_rate,
            subsample=self.subsample,
            colsample=self.colsample_bytree,
            alpha=self.reg_alpha,
            lambda_=self.reg_lambda,
            seed=self.random_state,
        )
        matrix = xgb.DMatrix(X, label=log_steps(y), weight=sample_weight)
        self.booster_ = xgb.train(booster_parameters(spec, threads=self.n_jobs), matrix, self.n_estimators)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return T* in steps, float64 [n]."""
        from sklearn.utils.validation import check_is_fitted, validate_data

        check_is_fitted(self)
        X = validate_data(self, X, ensure_all_finite="allow-nan", dtype=np.float64, reset=False)
        return np.exp(self.booster_.predict(xgboost().DMatrix(X)).astype(np.float64))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags


COMPARATORS = ("linear", "ridge", "random_forest", "svr", "mlp_regressor")


def comparator(name: str, seed: int = 42) -> Any:
    """Return a regressor of appendix A.4 on the target log T*, in scikit-learn's conventions.

    Ridge, SVR and the MLP see standardized features, without which their stated penalties depend on units. The random
    forest takes NaN as missing; for the others scikit-learn raises a ``ValueError`` that says NaN.

    Raises:
        SpecError: an unknown name.
    """
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.linear_model import LinearRegression, Ridge
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVR

    if name not in COMPARATORS:
        raise SpecError(f"Unknown comparator '{name}'.{did_you_mean(name, COMPARATORS)}")
    made: dict[str, Any] = {
        "linear": lambda: LinearRegression(),
        "ridge": lambda: make_pipeline(StandardScaler(), Ridge(alpha=1.0)),
        "random_forest": lambda: RandomForestRegressor(n_estimators=300, max_depth=12, random_state=seed),
        "svr": lambda: make_pipeline(StandardScaler(), SVR(kernel="rbf", C=10.0, epsilon=0.1, gamma="scale")),
        "mlp_regressor": lambda: make_pipeline(
            StandardScaler(),
            MLPRegressor(
                hidden_layer_sizes=(256, 128),
                activation="relu",
                solver="adam",
                alpha=1e-4,
                learning_rate="adaptive",
                learning_rate_init=1e-3,
                max_iter=500,
                early_stopping=True,
                random_state=seed,
            ),
        ),
    }
    return TransformedTargetRegressor(regressor=made[name](), func=log_steps, inverse_func=np.exp, check_inverse=False)
