"""Curve extrapolation and the static linear baseline."""

from __future__ import annotations

import math

import numpy as np
import pytest
from authors import rows

from cape.baselines.curve_extrapolation import curve, curves
from cape.baselines.static_linear import StaticLinear
from cape.errors import DataError
from cape.metamodel.rows import CAP, STATIC_FEATURES, Rows


def test_an_exponential_curve_is_extrapolated_exactly() -> None:
    losses = 2.3 * np.exp(-0.01 * np.arange(61))
    assert curve(losses, 0.1) == math.ceil(math.log(10) / 0.01)


def test_a_crossing_inside_the_warm_up_is_returned_as_seen() -> None:
    losses = np.linspace(2.0, 1.0, 61)
    losses[17] = 0.19  # once is enough, and the line through the rest says otherwise
    assert curve(losses, 0.1) == 17.0
    assert curve([2.0, 1.0, 0.2], 0.1) == 2.0


def test_only_the_warm_up_is_looked_at() -> None:
    slow = np.r_[np.linspace(2.0, 1.9, 61), 0.0]
    assert curve(slow, 0.1) > 61


def test_a_curve_that_does_not_fall_is_the_cap_and_never_before_the_last_step_seen() -> None:
    assert curve(np.linspace(1.0, 2.0, 61), 0.1) == CAP
    assert curve(np.r_[1.0, np.full(60, 0.101)], 0.1) >= 61
    assert math.isnan(curve([], 0.1)) and math.isnan(curve([float("nan")] * 5, 0.1))


def test_curves_takes_rows_without_losses() -> None:
    out = curves([None, np.array([1.0, 0.05])], np.array([0.1, 0.1]))
    assert math.isnan(out[0]) and out[1] == 1.0


def test_static_linear_is_least_squares_on_the_log_of_the_published_steps() -> None:
    from sklearn.linear_model import LinearRegression

    sample = Rows.from_table(rows(every=8, families=("rnn",)))
    x = sample.matrix(STATIC_FEATURES)
    expected = np.exp(LinearRegression().fit(x, np.log(sample["t_star"])).predict(x))
    found = StaticLinear.fit(sample).predict(sample)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    median = np.abs(np.median(sample["t_star"]) - sample["t_star"]).mean()
    assert np.abs(found - sample["t_star"]).mean() < 0.6 * median


def test_static_linear_needs_rows_and_survives_a_feature_that_never_varies() -> None:
    sample = Rows.from_table(rows(every=40, families=("mlp",)))
    one_n = sample.take(sample["log_n"] == sample["log_n"][0])
    assert np.isfinite(StaticLinear.fit(one_n).predict(one_n)).all()
    with pytest.raises(DataError, match="No row"):
        StaticLinear.fit(sample.take(np.zeros(len(sample), dtype=bool)))
