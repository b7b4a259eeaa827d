"""The smooth surface: what it follows, where it ends, what lower bounds do to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cape.errors import SpecError
from cape.metamodel.crossfit import assign_datasets, select
from cape.metamodel.line import margins
from cape.metamodel.presets import PRESETS, SHARES, Preset
from cape.metamodel.regressors import AFT_SCALE, design, log_steps, predict_log, train_boosters
from cape.metamodel.rows import Rows
from cape.metamodel.surface import FAR, FEWEST_TRIALS, Surface, fit_surfaces, mix, smooth
from cape.store import reader

FEATURES = ("log_lr", "log_b")


def trials(count: int, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    columns = {name: rng.normal(size=count) for name in FEATURES}
    names = {"family": np.full(count, "mlp", object), "trial_id": np.array([f"{i:06d}" for i in range(count)], object)}
    return Rows({**columns, **names, "t_star": np.ones(count), "augmentation": np.full(count, None, object)})


def augment(rows: Rows) -> Rows:
    ids = np.array([f"a{t}" for t in rows["trial_id"]], object)
    return Rows({**rows.columns, "trial_id": ids, "augmentation": np.full(len(rows), "{}", object)})


def real() -> Rows:
    rows = Rows.from_table(reader.read(Path(__file__).resolve().parents[2] / "benchmarks" / "corpus" / "plain"))
    return rows.take((rows["family"] == "mlp") & rows.reached)


def truth(rows: Rows) -> np.ndarray:
    return np.sin(rows["log_lr"]) * np.cos(rows["log_b"])


def test_it_follows_what_is_smooth_from_few_trials() -> None:
    train, test = trials(200), trials(400, seed=1)
    noise = np.random.default_rng(2).normal(scale=0.1, size=200)
    surface = Surface.fit(train, truth(train) + noise, FEATURES)
    inside = (np.abs(test["log_lr"]) < 1.5) & (np.abs(test["log_b"]) < 1.5)
    gap = surface.predict(test)[inside] - truth(test)[inside]
    assert np.sqrt(np.mean(gap**2)) < 0.1


def test_far_away_it_leaves_the_line_alone() -> None:
    train = trials(200)
    surface = Surface.fit(train, truth(train) + 3.0, FEATURES)
    length = surface.scale[0] * surface.lengths[0, 0]
    far = Rows({**train.columns, "log_lr": train["log_lr"] + 30.0 * length})
    assert np.abs(surface.predict(train)).mean() > 2.0
    assert np.abs(surface.predict(far)).max() < 1e-6


@pytest.mark.parametrize("with_augmented", [False, True])
def test_the_spread_is_one_among_the_trials_grows_away_from_them_and_never_passes_what_nothing_is_known_of(
    with_augmented: bool,
) -> None:
    train, test = trials(200), trials(200, seed=1)
    y = truth(train) + np.random.default_rng(2).normal(scale=0.1, size=200)
    if with_augmented:
        train, y = train.join(augment(trials(150, seed=3))), np.concatenate([y, truth(trials(150, seed=3)) + 0.3])
    surface = Surface.fit(train, y, FEATURES)
    assert np.median(surface.spread(test)) == pytest.approx(1.0, abs=0.15)
    away = [np.median(surface.spread(Rows({**test.columns, "log_lr": test["log_lr"] + d}))) for d in (2.0, 4.0, 300.0)]
    assert 1.1 < away[0] < away[1] < away[2]
    most = np.sqrt(np.sum(surface.amplitudes**2) + surface.noise**2)
    assert away[2] * surface._typical == pytest.approx(most, rel=1e-3)
    assert surface.spread(test.take(np.zeros(200, dtype=bool))).shape == (0,)
    assert Surface.from_arrays(surface.to_arrays()).spread(test).tolist() == surface.spread(test).tolist()


def test_it_does_not_depend_on_the_order_of_the_rows_and_survives_a_file() -> None:
    train, test = trials(300), trials(50, seed=1)
    order = np.random.default_rng(3).permutation(300)
    one = Surface.fit(train, truth(train), FEATURES)
    other = Surface.fit(train.take(order), truth(train)[order], FEATURES)
    np.testing.assert_allclose(one.predict(test), other.predict(test), atol=1e-6)
    again = Surface.from_arrays(one.to_arrays())
    assert again.features == FEATURES and again.predict(test).tolist() == one.predict(test).tolist()
    assert one.predict(test.take(np.zeros(50, dtype=bool))).shape == (0,)


def test_features_that_are_never_there_or_never_vary_are_left_out_and_gaps_are_means() -> None:
    train = trials(100)
    train = Rows({**train.columns, "log_p": np.full(100, np.nan), "log_n": np.full(100, 4.0)})
    surface = Surface.fit(train, truth(train), (*FEATURES, "log_p", "log_n"))
    assert surface.features == FEATURES
    gap = Rows({**train.columns, "log_lr": np.full(100, np.nan)})
    mean = Rows({**train.columns, "log_lr": np.full(100, train["log_lr"].mean())})
    np.testing.assert_allclose(surface.predict(gap), surface.predict(mean), atol=1e-9)


def test_a_lower_bound_lifts_it_and_a_value_above_does_not_hold_it_down() -> None:
    train, rng = trials(400), np.random.default_rng(9)
    y = truth(train) + 0.1 * rng.normal(size=400)
    cut = np.minimum(y, 0.2)  # watched no longer than this
    censored, high = y > 0.2, truth(train) > 0.5
    bounds = Surface.fit(train, cut, FEATURES, censored, AFT_SCALE).predict(train)
    as_values = Surface.fit(train, cut, FEATURES).predict(train)
    left_out = Surface.fit(train.take(~censored), y[~censored], FEATURES).predict(train)
    error = {n: np.abs(p - truth(train))[high].mean() for n, p in (("b", bounds), ("v", as_values), ("o", left_out))}
    assert error["b"] < 0.5 * error["v"] and error["b"] < 0.5 * error["o"]
    low = Surface.fit(train, np.where(censored, -5.0, y), FEATURES, censored, AFT_SCALE)
    assert np.abs(low.predict(train) - truth(train))[~censored].mean() < 0.05  # a bound that says nothing does nothing


def test_augmented_trials_tell_of_what_plain_ones_do_not_reach() -> None:
    """Plain trials on the left only; augmented ones everywhere, half a unit higher and noisy."""
    rng, plain, more, test = np.random.default_rng(4), trials(150), augment(trials(300, seed=5)), trials(400, seed=1)
    plain = plain.take(plain["log_lr"] < 0)
    y, z = truth(plain), truth(more) + 0.1 * rng.normal(size=300)
    alone = Surface.fit(plain, y, FEATURES)
    both = Surface.fit(plain.join(more), np.concatenate([y, z]), FEATURES)
    assert len(alone.lengths) == 1 and len(both.lengths) == 2 and alone.extra == 0.0
    inside = (np.abs(test["log_lr"]) < 1.5) & (np.abs(test["log_b"]) < 1.5)
    left, right = inside & (test["log_lr"] < -0.1), inside & (test["log_lr"] > 0.5)
    error = {n: np.abs(s.predict(test) - truth(test)) for n, s in (("alone", alone), ("both", both))}
    assert error["both"][right].mean() < 0.5 * error["alone"][right].mean()
    assert error["both"][left].mean() < 0.05
    assert both.extra > 2.0 * both.noise  # and they are known to be noisier
    again = Surface.from_arrays(both.to_arrays())
    assert again.predict(test).tolist() == both.predict(test).tolist()


def test_families_with_few_trials_have_none_and_keep_the_trees() -> None:
    rows = trials(100)
    family = np.where(np.arange(100) < FEWEST_TRIALS - 1, "rnn", "mlp").astype(object)
    rows = Rows({**rows.columns, "family": family})
    no = np.zeros(100, dtype=bool)
    surfaces = fit_surfaces(rows, truth(rows), (*FEATURES, "family"), ("mlp", "rnn"), no, AFT_SCALE)
    assert sorted(surfaces) == ["mlp"]
    trees, line = np.full(100, 5.0), np.full(100, 1.0)
    mixed = mix(trees, smooth(line, surfaces, rows), np.full(100, 0.5))
    assert (mixed[family == "rnn"] == 5.0).all()
    mine = rows.take(family == "mlp")
    np.testing.assert_allclose(mixed[family == "mlp"], 0.5 * 5.0 + 0.5 * (1.0 + surfaces["mlp"].predict(mine)))


def test_with_few_real_trials_half_of_it_is_better_than_trees_alone_and_selection_sees_it() -> None:
    rows = real()
    rows = rows.take(rows["replicate"] < 17)
    few, test = rows.take(rows.trials % 3 == 0), rows.take(rows.trials % 3 != 0)
    error = {}
    for share in (0.0, 0.5):
        preset = PRESETS["product"].replace(trees=300, surface=share)
        data = design(few, preset, ("mlp",))
        assert bool(data.surfaces) == bool(share)
        log_hat = predict_log(train_boosters(data, preset), data.lines, data.surfaces, test, preset, ("mlp",))
        error[share] = np.abs(log_hat - log_steps(test["t_star"])).mean()
    assert error[0.5] < 0.8 * error[0.0]
    chosen, scores = select(few, PRESETS["product"], ("mlp",))
    assert chosen.shares["mlp"] > 0
    near, far = ([s for s in scores if "surface" in s and s["far"] == where] for where in (False, True))
    assert [s["surface"] for s in near] == [s["surface"] for s in far] == list(SHARES)
    assert all(0 < a["log_error"] < b["log_error"] for a, b in zip(near, far, strict=True))
    # Every row is judged twice, left out with its fold and with its dataset.
    assert near[0]["rows"] + far[0]["rows"] == 2 * int(few.reached.sum())


def test_far_from_the_trials_it_has_another_share() -> None:
    rows = real()
    rows = rows.take(rows["replicate"] < 8)
    preset = PRESETS["product"].replace(trees=50, shares={"mlp": 0.25}, far_shares={"mlp": 1.0})
    data = design(rows, preset, ("mlp",))
    boosters = train_boosters(data, preset)
    moved = Rows({**rows.columns, "line_16": rows["line_16"] + np.where(np.arange(len(rows)) % 2, 8.0, 0.0)})
    far = data.surfaces["mlp"].spread(moved) > FAR
    assert 0.3 < far.mean() < 0.7
    line = margins(data.lines, moved)
    trees = predict_log(boosters, data.lines, {}, moved, preset, ("mlp",))
    smoothed = line + data.surfaces["mlp"].predict(moved)
    expected = np.where(far, smoothed, 0.75 * trees + 0.25 * smoothed)
    np.testing.assert_allclose(predict_log(boosters, data.lines, data.surfaces, moved, preset, ("mlp",)), expected)


def test_a_family_that_is_all_surface_needs_no_trees_of_its_own() -> None:
    rows = real()
    rows = rows.take(rows["replicate"] < 8)
    preset = PRESETS["product"].replace(trees=20, per_family=True, shares={"mlp": 1.0}, far_shares={"mlp": 1.0})
    data = design(rows, preset, ("mlp",))
    assert set(train_boosters(data, preset)) == {"pooled"} == set(train_boosters(data, preset, needed=["mlp"]))
    assert set(train_boosters(data, preset.replace(far_shares={"mlp": 0.75}))) == {"pooled", "mlp"}
    alone = predict_log(train_boosters(data, preset), data.lines, data.surfaces, rows, preset, ("mlp",))
    np.testing.assert_allclose(alone, margins(data.lines, rows) + data.surfaces["mlp"].predict(rows))


def test_a_dataset_is_left_out_whole_with_its_augmented_trials() -> None:
    rows = trials(60).join(augment(trials(60)))
    rows = Rows({**rows.columns, "dataset": np.array(list("abcdef") * 20, object)})
    dealt = assign_datasets(rows)
    assert set(dealt) == {0, 1, 2, 3}
    assert all(len(set(dealt[rows["dataset"] == d])) == 1 for d in "abcdef")


def test_one_dataset_alone_is_judged_by_trials_only() -> None:
    rows = real()
    rows = rows.take((rows["dataset"] == "mnist") & (rows["replicate"] < 8))
    chosen, scores = select(rows, PRESETS["product"].replace(trees=20), ("mlp",))
    shares = [s for s in scores if "surface" in s]
    judged = {s["far"]: s["rows"] for s in shares}
    assert chosen.shares["mlp"] > 0 and len(shares) == len(SHARES) * len(judged)
    assert sum(judged.values()) <= int(rows.reached.sum())


def test_a_share_is_a_share() -> None:
    with pytest.raises(SpecError, match="from 0 to 1"):
        Preset("x", surface=1.5)
    with pytest.raises(SpecError, match="from 0 to 1"):
        Preset("x", shares={"mlp": -0.1})
    with pytest.raises(SpecError, match="from 0 to 1"):
        Preset("x", far_shares={"mlp": 2.0})
    preset = Preset("x", surface=0.5, shares={"mlp": 0.25}, far_shares={"mlp": 1.0})
    assert [preset.share("mlp"), preset.share("mlp", far=True)] == [0.25, 1.0]
    assert [preset.share("rnn"), preset.share("rnn", far=True)] == [0.5, 0.5]
    assert Preset.from_json(preset.to_json()) == preset
    chosen = Preset("x", surface=0.5, shares={"mlp": 0.25})
    assert (chosen.share("mlp"), chosen.share("rnn")) == (0.25, 0.5)
    assert Preset.from_json(chosen.to_json()) == chosen
