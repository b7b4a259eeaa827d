"""p_reach: the probability that a model crosses ε at all, from censored trials.

A trial that hit a plateau, the cap or diverged says nothing about how many steps a crossing takes, and everything about
whether there is one. The rate of each family is smoothed by Laplace's rule; a small classifier on the features replaces
it only where trials that it was not fitted on say that it is better calibrated (log loss).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.metamodel.regressors import dmatrix, thread_count, xgboost
from cape.metamodel.rows import Rows

if TYPE_CHECKING:
    import xgboost as xgb

ENOUGH = 30
"""Rows of each outcome below which a rate is all that the data supports."""

COMPARED_FOLDS = 3


@dataclass(frozen=True)
class Reach:
    """Smoothed rate by family, ``"pooled"`` for unknown families, and a classifier where it earned its place."""

    rates: Mapping[str, float]
    booster: xgb.Booster | None = None

    @classmethod
    def fit(
        cls, rows: Rows, assigned: np.ndarray, features: Sequence[str], families: Sequence[str], seed: int
    ) -> Reach:
        """Fit on rows whose trial did not fail; rates are those of plain trials.

        Args:
            rows: what the boosters are fitted on. assigned: fold of each row, [n]; -1 for augmented rows.
        """
        rows, assigned = rows.take(~rows.failed), assigned[~rows.failed]
        plain, outcome = ~rows.augmented, rows.reached
        rates = {"pooled": _rate(outcome[plain])}
        for family in families:
            rates[family] = _rate(outcome[plain & (rows["family"] == family)])
        simple = cls(rates)
        if min(outcome.sum(), (~outcome).sum()) < ENOUGH or len(set(outcome[plain])) < 2:
            return simple
        chance = np.full(len(rows), np.nan)
        for fold in range(COMPARED_FOLDS):
            left = (assigned >= 0) & (assigned % COMPARED_FOLDS == fold)
            learned = cls(rates, _train(rows.take(~left), features, families, seed))
            chance[left] = learned.probability(rows.take(left), features, families)
        known = np.isfinite(chance)
        losses = [_log_loss(outcome[known], p[known]) for p in (simple.probability(rows, features, families), chance)]
        return cls(rates, _train(rows, features, families, seed)) if losses[1] < losses[0] else simple

    def probability(self, rows: Rows, features: Sequence[str], families: Sequence[str]) -> np.ndarray:
        """Return the probability of a crossing, [n]."""
        if self.booster is not None:
            matrix = dmatrix(rows.matrix(features, families), features)
            return np.asarray(self.booster.predict(matrix), dtype=np.float64)
        return np.array([self.rates.get(f, self.rates["pooled"]) for f in rows["family"]])

    def to_dict(self) -> dict[str, Any]:
        """Return the rates (the classifier is saved beside them)."""
        return {"rates": dict(self.rates)}


def _train(rows: Rows, features: Sequence[str], families: Sequence[str], seed: int) -> xgb.Booster:
    parameters = {
        "objective": "binary:logistic",
        "tree_method": "hist",
        "max_depth": 3,
        "learning_rate": 0.1,
        "subsample": 0.9,
        "min_child_weight": 5.0,
        "monotone_constraints": "(" + ",".join("1" if f == "log_epsilon" else "0" for f in features) + ")",
        "seed": seed,
        "nthread": thread_count(len(rows)),
    }
    matrix = dmatrix(rows.matrix(features, families), features, rows.reached.astype(float))
    return xgboost().train(parameters, matrix, num_boost_round=100)


def _rate(reached: np.ndarray) -> float:
    return float((reached.sum() + 1.0) / (len(reached) + 2.0))


def _log_loss(truth: np.ndarray, probability: np.ndarray) -> float:
    p = np.clip(probability, 1e-6, 1 - 1e-6)
    return float(-np.mean(np.where(truth, np.log(p), np.log(1 - p))))
