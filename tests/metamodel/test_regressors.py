"""Presets, comparators and the log target, on the authors' published rows."""

from __future__ import annotations

import numpy as np
import pytest
from authors import rows
from sklearn.base import clone

from cape.errors import DataError, SpecError
from cape.metamodel.regressors import (
    COMPARATORS,
    PRESETS,
    StepsRegressor,
    booster_parameters,
    comparator,
    design,
    log_steps,
    predict_log,
    preset_named,
    train_boosters,
)
from cape.metamodel.rows import PAPER_FEATURES, Rows


@pytest.fixture(scope="module")
def sample() -> Rows:
    return Rows.from_table(rows(every=12))


def test_log_target_floors_zero_steps() -> None:
    assert log_steps(np.array([0.0, 1.0, 10.0])).tolist() == [np.log(0.5), 0.0, np.log(10.0)]


def test_the_paper_preset_is_what_the_paper_says() -> None:
    paper, appendix = PRESETS["paper"], PRESETS["paper_appendix"]
    assert paper.features == ("log_p", "log_g2", "log_tau", "log_n", "log_lr", "log_b")
    assert (paper.trees, paper.depth, paper.learning_rate) == (200, 4, 0.05)
    assert (paper.subsample, paper.colsample, paper.alpha, paper.lambda_, paper.seed) == (0.9, 0.9, 0.0, 1.0, 42)
    assert (appendix.trees, appendix.depth) == (500, 6)


def test_unknown_names_are_refused_with_the_close_match() -> None:
    with pytest.raises(SpecError, match="Did you mean 'product'"):
        preset_named("prodct")
    with pytest.raises(SpecError, match="Did you mean 'ridge'"):
        comparator("rigde")


def test_product_falls_as_epsilon_grows(sample: Rows) -> None:
    preset = PRESETS["product"].replace(trees=60)
    assert "monotone_constraints" in booster_parameters(preset)
    data = design(sample, preset, sample.families)
    boosters = train_boosters(data, preset)
    column = preset.features.index("log_epsilon")
    steps = []
    for epsilon in (0.1, 0.13, 0.15, 0.18, 0.2):
        x = data.x[:300].copy()
        x[:, column] = np.log(epsilon)
        steps.append(predict_log(boosters, x, sample["family"][:300], preset.features))
    assert (np.diff(np.array(steps), axis=0) <= 1e-6).all()
    assert steps[0].mean() > steps[-1].mean() + 0.1


def test_families_weigh_the_same_in_the_product(sample: Rows) -> None:
    uneven = sample.take(np.flatnonzero((sample["family"] == "rnn") | (np.arange(len(sample)) % 5 == 0)))
    data = design(uneven, PRESETS["product"], uneven.families)
    totals = [data.weight[data.codes == code].sum() for code in range(2)]
    assert totals[0] == pytest.approx(totals[1])
    assert data.weight.sum() == pytest.approx(len(uneven))
    assert (design(uneven, PRESETS["paper"], uneven.families).weight == 1).all()


def test_censored_rows_are_5000_in_paper_mode_and_left_out_of_the_product(sample: Rows) -> None:
    columns = dict(sample.columns)
    reached = np.arange(len(sample)) % 10 != 0
    columns["converged"] = reached
    columns["t_star"] = np.where(reached, columns["t_star"], np.nan)
    columns["stop_reason"] = np.where(reached, None, "plateau")
    columns["stop_reason"][0] = "failed"
    censored = Rows(columns)
    paper = design(censored, PRESETS["paper"], censored.families)
    assert len(paper.y) == len(sample) - 1
    assert (paper.y == np.log(5000.0)).sum() == (~reached).sum() - 1
    assert len(design(censored, PRESETS["product"], censored.families).y) == reached.sum()
    with pytest.raises(DataError, match="No row"):
        design(censored.take(~reached), PRESETS["product"], censored.families)


def test_steps_regressor_keeps_the_conventions_and_agrees_with_the_preset(sample: Rows) -> None:
    x, y = sample.matrix(PAPER_FEATURES), sample["t_star"]
    regressor = clone(StepsRegressor(n_jobs=1)).fit(x, y)
    assert regressor.get_params()["max_depth"] == 4
    booster = train_boosters(design(sample, PRESETS["paper_pooled"], sample.families), PRESETS["paper_pooled"])
    expected = np.exp(predict_log(booster, x, sample["family"], PAPER_FEATURES))
    np.testing.assert_allclose(regressor.predict(x), expected, rtol=1e-6)
    missing = x.copy()
    missing[:, 1] = np.nan
    assert np.isfinite(regressor.predict(missing)).all()
    with pytest.raises(ValueError, match="features"):
        regressor.predict(x[:, :3])


@pytest.mark.parametrize("name", COMPARATORS)
def test_comparators_fit_log_steps_and_say_what_they_make_of_nan(name: str, sample: Rows) -> None:
    x, y = sample.matrix(PAPER_FEATURES)[:1000], sample["t_star"][:1000]
    made = clone(comparator(name))
    if name == "random_forest":
        assert made.regressor.get_params()["n_estimators"] == 300
        made.set_params(regressor__n_estimators=30)
    predicted = made.fit(x[::2], y[::2]).predict(x[1::2])
    assert (predicted > 0).all()
    constant = np.abs(np.median(y[::2]) - y[1::2]).mean()
    assert np.abs(predicted - y[1::2]).mean() < 0.75 * constant
    missing = np.full((1, 6), np.nan)
    if name == "random_forest":
        assert np.isfinite(made.predict(missing)).all()
        return
    with pytest.raises(ValueError, match="NaN"):
        made.predict(missing)
