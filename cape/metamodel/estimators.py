"""The regressors as scikit-learn estimators: the preset's XGBoost, and the comparators of appendix A.4, on log T*."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

from cape.errors import SpecError, did_you_mean
from cape.metamodel.presets import Preset
from cape.metamodel.regressors import booster_parameters, log_steps, xgboost


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
        from sklearn.utils.validation import _check_sample_weight, validate_data

        X, y = validate_data(self, X, y, ensure_all_finite="allow-nan", dtype=np.float64, y_numeric=True)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
            if not sample_weight.any():
                raise ValueError("Every sample weight is zero; give at least one row a positive weight.")
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
        tags.target_tags.positive_only = True  # steps
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
