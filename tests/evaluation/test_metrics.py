"""Metrics on cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cape.evaluation import metrics


def test_errors_by_hand() -> None:
    found = metrics.errors(np.array([1.0, 2.0, 10.0]), np.array([2.0, 2.0, 4.0]))
    assert found["mae"] == pytest.approx(7 / 3)
    assert found["rmse"] == pytest.approx(math.sqrt(37 / 3))
    assert found["median_ae"] == 1.0
    assert found["avg_accuracy"] == pytest.approx((0.0 + 1.0 + 0.4) / 3)
    spread = np.var([1, 2, 10]) * 3
    assert found["r2"] == pytest.approx(1 - 37 / spread)


def test_avg_accuracy_is_clipped_and_guards_small_truth() -> None:
    assert metrics.avg_accuracy(np.array([2.0]), np.array([100.0])) == 0.0
    assert metrics.avg_accuracy(np.array([0.0]), np.array([0.5])) == 0.5


def test_rows_without_prediction_are_not_counted() -> None:
    found = metrics.errors(np.array([1.0, 5.0]), np.array([1.0, np.nan]))
    assert found["rows"] == 1 and found["mae"] == 0.0
    assert math.isnan(metrics.errors(np.empty(0), np.empty(0))["mae"])


def test_interval_coverage_and_width() -> None:
    found = metrics.intervals(np.array([1.0, 5.0, 9.0]), np.array([1.0, 6.0, 8.0]), np.array([2.0, 12.0, 16.0]))
    assert found == {"coverage": pytest.approx(2 / 3), "width": 2.0}


def test_epoch_calibration_recovers_a_line_across_batch_sizes() -> None:
    rng = np.random.default_rng(0)
    batch, size = rng.choice([32.0, 64.0, 128.0], 50), np.full(50, 50_000.0)
    predicted = rng.uniform(5, 50, 50)
    true = (1.5 * predicted * batch / size + 0.01) * size / batch
    line = metrics.epoch_calibration(true, predicted, batch, size)
    assert line == (pytest.approx(1.5), pytest.approx(0.01))
    np.testing.assert_allclose(metrics.apply_calibration(line, predicted, batch, size), true)
    assert metrics.epoch_calibration(true[:2], predicted[:2], batch[:2], size[:2]) is None
    assert metrics.epoch_calibration(true, np.full(50, 3.0), np.full(50, 32.0), size) is None


def test_replicate_floor_is_the_group_median_of_five_or_more() -> None:
    keys = np.array(["a"] * 5 + ["b"] * 4, dtype=object)
    floor = metrics.replicate_floor(keys, np.array([1.0, 2, 3, 4, 100, 7, 7, 7, 7]))
    assert floor[:5].tolist() == [3.0] * 5
    assert np.isnan(floor[5:]).all()
