"""A Gaussian process over trials: what it follows, where it ends, what lower bounds and known errors do to it."""

from __future__ import annotations

import numpy as np
import pytest

from cape.metamodel.gaussian import DRAWS, GaussianProcess, Size, _subsets
from cape.metamodel.regressors import AFT_SCALE
from cape.metamodel.rows import RELATIVE, Rows
from cape.metamodel.surface import LEVEL

FEATURES = ("log_lr", "log_b")


def trials(count: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    columns = {name: rng.normal(size=count) for name in FEATURES}
    names = {"family": np.full(count, "mlp", object), "trial_id": np.array([f"{i:06d}" for i in range(count)], object)}
    return Rows({**columns, **names, "t_star": np.ones(count), "augmentation": np.full(count, None, object)})


def augment(rows: Rows) -> Rows:
    ids = np.array([f"a{t}" for t in rows["trial_id"]], object)
    return Rows({**rows.columns, "trial_id": ids, "augmentation": np.full(len(rows), "{}", object)})


def truth(rows: Rows) -> np.ndarray:
    return np.sin(rows["log_lr"]) * np.cos(rows["log_b"])


def test_it_follows_what_is_smooth_from_few_trials() -> None:
    train, test = trials(200), trials(400, seed=1)
    noise = np.random.default_rng(2).normal(scale=0.1, size=200)
    process = GaussianProcess.fit(train, truth(train) + noise, FEATURES, LEVEL)
    inside = (np.abs(test["log_lr"]) < 1.5) & (np.abs(test["log_b"]) < 1.5)
    gap = process.predict(test)[inside] - truth(test)[inside]
    assert np.sqrt(np.mean(gap**2)) < 0.1


def test_its_own_augmented_trials_are_centred_on_before_a_relatives() -> None:
    plain, own, relatives = trials(20), augment(trials(10, seed=1)), trials(200, seed=2)
    marked = {"trial_id": [f"0{t}" for t in relatives["trial_id"]], "augmentation": [RELATIVE] * 200}
    relatives = Rows({**relatives.columns, **{k: np.array(v, object) for k, v in marked.items()}})
    rows = plain.join(relatives).join(own)
    process = GaussianProcess.fit(rows, truth(rows), FEATURES, Size(points=(20, 40), learned_from=(20, 40)))
    wanted = np.stack([own[name] for name in FEATURES], axis=1)
    centred = process.points[20:30] * process.scale + process.centre
    order = [int(np.argmin(np.abs(wanted - c).sum(axis=1))) for c in centred]
    assert len(process.points) == 40 and sorted(order) == list(range(10))
    np.testing.assert_allclose(centred, wanted[order], atol=0.01)


def test_far_away_it_leaves_the_line_alone() -> None:
    train = trials(200)
    process = GaussianProcess.fit(train, truth(train) + 3.0, FEATURES, LEVEL)
    length = process.scale[0] * process.lengths[0, 0]
    far = Rows({**train.columns, "log_lr": train["log_lr"] + 30.0 * length})
    assert np.abs(process.predict(train)).mean() > 2.0
    assert np.abs(process.predict(far)).max() < 1e-6


@pytest.mark.parametrize("with_augmented", [False, True])
def test_the_spread_is_one_among_the_trials_grows_away_from_them_and_never_passes_what_nothing_is_known_of(
    with_augmented: bool,
) -> None:
    train, test = trials(200), trials(200, seed=1)
    y = truth(train) + np.random.default_rng(2).normal(scale=0.1, size=200)
    if with_augmented:
        train, y = train.join(augment(trials(150, seed=3))), np.concatenate([y, truth(trials(150, seed=3)) + 0.3])
    process = GaussianProcess.fit(train, y, FEATURES, LEVEL)
    assert np.median(process.spread(test)) == pytest.approx(1.0, abs=0.15)
    away = [np.median(process.spread(Rows({**test.columns, "log_lr": test["log_lr"] + d}))) for d in (2.0, 4.0, 300.0)]
    assert 1.1 < away[0] < away[1] < away[2]
    most = np.sqrt(np.sum(process.amplitudes**2) + process.noise**2)
    assert away[2] * process.typical == pytest.approx(most, rel=1e-3)
    assert process.spread(test.take(np.zeros(200, dtype=bool))).shape == (0,)
    assert GaussianProcess.from_arrays(process.to_arrays()).spread(test).tolist() == process.spread(test).tolist()


def test_it_does_not_depend_on_the_order_of_the_rows_and_survives_a_file() -> None:
    train, test = trials(300), trials(50, seed=1)
    order = np.random.default_rng(3).permutation(300)
    one = GaussianProcess.fit(train, truth(train), FEATURES, LEVEL)
    other = GaussianProcess.fit(train.take(order), truth(train)[order], FEATURES, LEVEL)
    np.testing.assert_allclose(one.predict(test), other.predict(test), atol=1e-6)
    again = GaussianProcess.from_arrays(one.to_arrays())
    assert again.features == FEATURES and again.predict(test).tolist() == one.predict(test).tolist()
    assert one.predict(test.take(np.zeros(50, dtype=bool))).shape == (0,)


def test_features_that_are_never_there_or_never_vary_are_left_out_and_gaps_are_means() -> None:
    train = trials(100)
    train = Rows({**train.columns, "log_p": np.full(100, np.nan), "log_n": np.full(100, 4.0)})
    process = GaussianProcess.fit(train, truth(train), (*FEATURES, "log_p", "log_n"), LEVEL)
    assert process.features == FEATURES
    gap = Rows({**train.columns, "log_lr": np.full(100, np.nan)})
    mean = Rows({**train.columns, "log_lr": np.full(100, train["log_lr"].mean())})
    np.testing.assert_allclose(process.predict(gap), process.predict(mean), atol=1e-9)


def test_a_lower_bound_lifts_it_and_a_value_above_does_not_hold_it_down() -> None:
    train, rng = trials(400), np.random.default_rng(9)
    y = truth(train) + 0.1 * rng.normal(size=400)
    cut = np.minimum(y, 0.2)  # watched no longer than this
    censored, high = y > 0.2, truth(train) > 0.5
    bounds = GaussianProcess.fit(train, cut, FEATURES, LEVEL, None, censored, AFT_SCALE).predict(train)
    as_values = GaussianProcess.fit(train, cut, FEATURES, LEVEL).predict(train)
    left_out = GaussianProcess.fit(train.take(~censored), y[~censored], FEATURES, LEVEL).predict(train)
    error = {n: np.abs(p - truth(train))[high].mean() for n, p in (("b", bounds), ("v", as_values), ("o", left_out))}
    assert error["b"] < 0.5 * error["v"] and error["b"] < 0.5 * error["o"]
    low = GaussianProcess.fit(train, np.where(censored, -5.0, y), FEATURES, LEVEL, None, censored, AFT_SCALE)
    assert np.abs(low.predict(train) - truth(train))[~censored].mean() < 0.05  # a bound that says nothing does nothing


def test_augmented_trials_tell_of_what_plain_ones_do_not_reach() -> None:
    """Plain trials on the left only; augmented ones everywhere, half a unit higher and noisy."""
    rng, plain, more, test = np.random.default_rng(4), trials(150), augment(trials(300, seed=5)), trials(400, seed=1)
    plain = plain.take(plain["log_lr"] < 0)
    y, z = truth(plain), truth(more) + 0.1 * rng.normal(size=300)
    alone = GaussianProcess.fit(plain, y, FEATURES, LEVEL)
    both = GaussianProcess.fit(plain.join(more), np.concatenate([y, z]), FEATURES, LEVEL)
    assert len(alone.lengths) == 1 and len(both.lengths) == 2 and alone.extra == 0.0
    inside = (np.abs(test["log_lr"]) < 1.5) & (np.abs(test["log_b"]) < 1.5)
    left, right = inside & (test["log_lr"] < -0.1), inside & (test["log_lr"] > 0.5)
    error = {n: np.abs(s.predict(test) - truth(test)) for n, s in (("alone", alone), ("both", both))}
    assert error["both"][right].mean() < 0.5 * error["alone"][right].mean()
    assert error["both"][left].mean() < 0.05
    assert both.extra > 2.0 * both.noise  # and they are known to be noisier
    again = GaussianProcess.from_arrays(both.to_arrays())
    assert again.predict(test).tolist() == both.predict(test).tolist()


def test_a_value_that_is_known_to_be_off_counts_for_less() -> None:
    train, test, rng = trials(300), trials(400, seed=1), np.random.default_rng(6)
    deviation = np.where(np.arange(300) % 2, 1.0, 0.02)
    y = truth(train) + deviation * rng.normal(size=300)
    inside = (np.abs(test["log_lr"]) < 1.5) & (np.abs(test["log_b"]) < 1.5)
    error = {}
    for name, variance in (("told", deviation**2), ("not told", None)):
        process = GaussianProcess.fit(train, y, FEATURES, LEVEL, variance)
        error[name] = np.abs(process.predict(test) - truth(test))[inside].mean()
    assert error["told"] < 0.5 * error["not told"]
    assert GaussianProcess.fit(train, y, FEATURES, LEVEL, deviation**2).noise < 0.1  # what is known is not learned


def test_it_learns_from_several_draws_where_there_are_more_trials_than_one_takes() -> None:
    able, augmented = np.arange(10, 60), np.arange(60) >= 40
    alike = _subsets(able, augmented, (30, 50))
    assert len(alike) == 1 and alike[0].tolist() == able.tolist()
    drawn = _subsets(able, augmented, (10, 15))
    assert len(drawn) == DRAWS and len({tuple(sorted(d)) for d in drawn}) == DRAWS
    for d in drawn:
        assert len(set(d)) == 15 and set(d) <= set(able) and int(augmented[d].sum()) == 5
