"""Split-conformal quantiles: exact on small cases, covering on exchangeable draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cape.errors import SpecError
from cape.metamodel.intervals import KEPT_SCORES, Conformal, bounds, check_level, conformal_quantile


@pytest.mark.parametrize(
    ("n", "level", "rank"),
    [(9, 0.9, 9), (19, 0.9, 18), (99, 0.9, 90), (10, 0.5, 6), (4, 0.8, 4)],
)
def test_quantile_is_the_ceil_of_n_plus_one_times_the_level(n: int, level: float, rank: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert conformal_quantile(scores, level) == rank


def test_too_few_trials_promise_nothing() -> None:
    assert conformal_quantile(np.arange(8.0), 0.9) == math.inf
    assert conformal_quantile(np.empty(0), 0.5) == math.inf


def test_trials_not_rows_decide_whether_a_level_can_be_promised() -> None:
    scores = np.repeat(np.arange(8.0), 3)
    assert math.isfinite(conformal_quantile(scores, 0.9))
    assert conformal_quantile(scores, 0.9, trials=8) == math.inf


def test_coverage_of_exchangeable_draws_is_the_level() -> None:
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(3000):
        draws = np.abs(rng.standard_t(3, 40))
        inside.append(draws[-1] <= conformal_quantile(draws[:-1], 0.8))
    # The exact coverage is ceil(40 * 0.8) / 40 = 0.8; 3,000 draws have a standard error of 0.0073.
    assert abs(np.mean(inside) - 0.8) < 0.022


def test_mondrian_calibration_keeps_families_apart() -> None:
    rng = np.random.default_rng(0)
    families = np.repeat(np.array(["mlp", "rnn"], dtype=object), 200)
    errors = np.where(families == "mlp", 0.1, 1.0) * rng.random(400)
    conformal = Conformal.calibrate(errors, families, np.arange(400))
    narrow, wide = (conformal.half_width(f, 0.9)[0] for f in ("mlp", "rnn"))
    assert narrow < 0.1 < 0.8 < wide
    assert conformal.half_width("unknown", 0.9)[1] == "pooled"


def test_a_family_with_few_trials_is_served_by_all() -> None:
    families = np.array(["mlp"] * 44 + ["cnn"] * 9, dtype=object)
    conformal = Conformal.calibrate(np.linspace(0, 1, 53), families, np.arange(53))
    assert conformal.half_width("cnn", 0.5)[1] == "pooled"
    assert conformal.half_width("mlp", 0.999) == (math.inf, "none")


def test_thinned_scores_never_narrow_an_interval_and_survive_json() -> None:
    errors = np.random.default_rng(1).random(10 * KEPT_SCORES + 7)
    families = np.full(len(errors), "mlp", dtype=object)
    conformal = Conformal.calibrate(errors, families, np.arange(len(errors)))
    assert len(conformal.scores["mlp"]) == KEPT_SCORES
    again = Conformal.from_dict(conformal.to_dict())
    for level in (0.5, 0.9, 0.99):
        exact, kept = conformal_quantile(errors, level), again.half_width("mlp", level)[0]
        assert exact - 1e-6 <= kept <= exact + 0.002


def test_bounds_never_go_below_one_step() -> None:
    assert bounds(3.0, 3.0, 2.0) == (1.0, pytest.approx(3.0 * math.exp(2.0)))
    assert bounds(3.0, 3.0, math.inf) == (1.0, math.inf)
    # Around the centre, and no further from it on the other side than it says; the prediction is always inside.
    assert bounds(2.45, 2.0, 0.1) == (2.0, pytest.approx(2.45 * math.exp(0.1)))
    assert bounds(2.55, 3.0, 0.1) == (pytest.approx(2.55 * math.exp(-0.1)), 3.0)


def test_a_level_may_be_numpys() -> None:
    assert check_level(np.float32(0.5)) == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, float("nan"), "0.9", True])
def test_bad_levels_are_refused(level: object) -> None:
    with pytest.raises(SpecError, match="between 0 and 1"):
        Conformal().half_width(None, level)  # type: ignore[arg-type]
