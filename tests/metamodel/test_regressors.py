"""Presets, comparators and the log target, on the authors' published rows."""

from __future__ import annotations

import numpy as np
import pytest
from authors import rows
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from benchmarks.fit import capped
from cape.errors import DataError, SpecError
from cape.metamodel.estimators import COMPARATORS, StepsRegressor, comparator
from cape.metamodel.line import FARTHEST, Line
from cape.metamodel.presets import PRESETS, Preset, preset_named
from cape.metamodel.regressors import booster_parameters, design, log_steps, predict_log, train_boosters
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
    few = sample.take(np.arange(300))
    steps = []
    for epsilon in (0.1, 0.13, 0.15, 0.18, 0.2):
        changed = Rows({**few.columns, "log_epsilon": np.full(300, np.log(epsilon))})
        steps.append(predict_log(boosters, data.lines, data.surfaces, changed, preset, sample.families))
    assert (np.diff(np.array(steps), axis=0) <= 1e-6).all()
    assert steps[0].mean() > steps[-1].mean() + 0.1


def test_families_weigh_the_same_in_the_product(sample: Rows) -> None:
    uneven = sample.take(np.flatnonzero((sample["family"] == "rnn") | (np.arange(len(sample)) % 5 == 0)))
    data = design(uneven, PRESETS["product"], uneven.families)
    totals = [data.weight[data.codes == code].sum() for code in range(2)]
    assert totals[0] == pytest.approx(totals[1])
    assert data.weight.sum() == pytest.approx(len(uneven))
    assert (design(uneven, PRESETS["paper"], uneven.families).weight == 1).all()


def test_censored_rows_are_5000_in_paper_mode_and_lower_bounds_in_the_product(sample: Rows) -> None:
    censored = capped(sample, 30)
    gone = ~censored.reached
    censored["stop_reason"][np.flatnonzero(gone)[0]] = "failed"
    paper = design(censored, PRESETS["paper"], censored.families)
    assert len(paper.y) == len(sample) - 1 and not paper.censored.any()
    assert (paper.y == np.log(5000.0)).sum() == gone.sum() - 1
    product = design(censored, PRESETS["product"], censored.families)
    assert len(product.y) == len(sample) - 1 and product.censored.sum() == gone.sum() - 1
    assert (product.y[product.censored] == np.log(30.0)).all()
    excluded = PRESETS["product"].replace(censored="exclude")
    assert len(design(censored, excluded, censored.families).y) == censored.reached.sum()
    with pytest.raises(DataError, match="No row"):
        design(censored.take(gone), excluded, censored.families)
    with pytest.raises(SpecError, match="Did you mean 'aft'"):
        Preset("x", censored="atf")


def test_failure_time_recovers_what_a_short_sweep_could_not_watch(sample: Rows) -> None:
    rnn = sample.take(sample["family"] == "rnn")
    train, test = rnn.take(np.arange(len(rnn)) % 3 != 0), rnn.take(np.arange(len(rnn)) % 3 == 0)
    short, late = capped(train, 40), test.take(test["t_star"] > 40)
    error = {}
    for censored in ("aft", "exclude"):
        preset = PRESETS["product"].replace(trees=200, censored=censored)
        data = design(short, preset, short.families)
        found = predict_log(train_boosters(data, preset), data.lines, data.surfaces, late, preset, short.families)
        error[censored] = np.abs(np.exp(found) - late["t_star"]).mean()
    assert len(late) > 50
    assert error["aft"] < 0.85 * error["exclude"]


def test_without_censored_rows_failure_time_is_the_squared_error(sample: Rows) -> None:
    preset = PRESETS["product"].replace(trees=20)
    one, other = (design(sample, preset.replace(censored=c), sample.families) for c in ("aft", "exclude"))
    saved = [bytes(train_boosters(d, preset)["pooled"].save_raw("ubj")) for d in (one, other)]
    assert saved[0] == saved[1]


def test_early_stopping_ends_before_the_last_tree_and_fits_every_row(sample: Rows) -> None:
    preset = PRESETS["paper_pooled"].replace(trees=3000, learning_rate=0.3, early_stopping=20)
    data = design(sample, preset, sample.families)
    booster = train_boosters(data, preset)["pooled"]
    assert 5 < booster.num_boosted_rounds() < 1000
    same = train_boosters(data, preset.replace(trees=booster.num_boosted_rounds(), early_stopping=0))["pooled"]
    assert bytes(booster.save_raw("ubj")) == bytes(same.save_raw("ubj"))


def test_augmented_rows_weigh_what_the_preset_says_and_nothing_in_the_paper(sample: Rows) -> None:
    marks = np.where(np.arange(len(sample)) % 2 == 0, None, '{"kind": "noise"}')
    mixed = Rows({**sample.columns, "augmentation": marks.astype(object)})
    assert len(design(mixed, PRESETS["paper"], mixed.families).y) == (~mixed.augmented).sum()
    half = PRESETS["product"].replace(augmented=0.5, equal_families=False)
    weight = design(mixed, half, mixed.families).weight
    assert (weight[mixed.augmented] == 0.5).all() and (weight[~mixed.augmented] == 1).all()


def test_the_line_extrapolates_and_bounds_how_far() -> None:
    rng = np.random.default_rng(0)
    step = rng.normal(-2, 0.5, 400)
    columns = {"log_epsilon": np.full(400, np.log(0.1)), "log_first_step": step, "family": np.full(400, "mlp", object)}
    rows = Rows({**columns, "t_star": np.exp(1 - step)})
    line = Line.fit(rows, 1 - step, ("log_log_inverse_epsilon", "log_first_step"), np.ones(400))
    assert Line.from_dict(line.to_dict()).predict(rows).tolist() == line.predict(rows).tolist()
    far = Rows({**rows.columns, "log_first_step": np.linspace(-3.5, -40, 400)})
    found = line.predict(far)
    assert found[0] == pytest.approx(4.5, abs=0.1)
    assert found[-1] == pytest.approx(1 + 2 + FARTHEST * 0.5, abs=0.15)


def test_check_estimator_and_a_pipeline() -> None:
    check_estimator(StepsRegressor(n_estimators=30, subsample=1.0, colsample_bytree=1.0))
    # With the paper's 0.9 a repeated row is not a row of weight two: either copy may be left out of a tree.
    expected = {"check_sample_weight_equivalence_on_dense_data": "rows are subsampled"}
    check_estimator(StepsRegressor(n_estimators=30), expected_failed_checks=expected)
    x, y = np.random.default_rng(0).random((60, 3)), np.arange(1, 61)
    made = make_pipeline(StandardScaler(), clone(StepsRegressor(n_estimators=20))).fit(x, y)
    assert made.set_params(stepsregressor__max_depth=2).get_params()["stepsregressor__max_depth"] == 2
    assert made.predict(x).shape == (60,)


def test_steps_regressor_keeps_the_conventions_and_agrees_with_the_preset(sample: Rows) -> None:
    x, y = sample.matrix(PAPER_FEATURES), sample["t_star"]
    regressor = clone(StepsRegressor(n_jobs=1)).fit(x, y)
    assert regressor.get_params()["max_depth"] == 4
    booster = train_boosters(design(sample, PRESETS["paper_pooled"], sample.families), PRESETS["paper_pooled"])
    expected = np.exp(predict_log(booster, {}, {}, sample, PRESETS["paper_pooled"], sample.families))
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
