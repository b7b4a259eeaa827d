"""The smooth surface: its slopes, which families have one, and how much of it a prediction takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cape.errors import SpecError
from cape.metamodel.crossfit import assign_datasets, assign_folds, fold_parts, out_of_fold, select
from cape.metamodel.line import EPSILON_TERM, POOLED, Line, margins
from cape.metamodel.presets import PRESETS, SHARES, Preset
from cape.metamodel.regressors import AFT_SCALE, design, log_steps, predict_log, train_boosters
from cape.metamodel.rows import Rows
from cape.metamodel.surface import FAR, FEWEST_TRIALS, Surface, fit_surfaces, mix, smooth
from cape.store import reader
from tests.metamodel.test_gaussian import FEATURES, augment, trials, truth


def real() -> Rows:
    rows = Rows.from_table(reader.read(Path(__file__).resolve().parents[2] / "benchmarks" / "corpus" / "plain"))
    return rows.take((rows["family"] == "mlp") & rows.reached)


EPSILONS = (0.2, 0.15, 0.1)
FLAT = Line((EPSILON_TERM,), np.array([0.65]), np.array([0.15]), np.array([0.1]), 0.0)


def steep(rows: Rows) -> np.ndarray:
    """How much more steeply than ``FLAT`` a trial's log T* rises, from -0.3 to 0.3."""
    return 0.3 * np.sin(rows["log_b"])


def watched(count: int, seed: int = 0, epsilons: tuple[float, ...] = EPSILONS) -> tuple[Rows, np.ndarray]:
    """Return the rows of trials watched to several ε, and log T* before it is a whole number."""
    one = trials(count, seed)
    times = np.repeat(np.arange(count), len(epsilons))
    rows = one.take(times)
    rows = Rows({**rows.columns, "log_epsilon": np.log(np.tile(epsilons, count))})
    t = FLAT.predict(rows) / 0.1
    return rows, 3.0 + truth(rows) + (0.1 + np.maximum(steep(rows), -0.1)) * t


def test_it_knows_which_trials_are_steeper_than_the_line() -> None:
    rows, exact = watched(300)
    test, wanted = watched(300, seed=1)
    y = np.log(np.ceil(np.exp(exact)))
    surface = Surface.fit(rows, y, FLAT, FEATURES)
    inside = (np.abs(test["log_lr"]) < 1.5) & (np.abs(test["log_b"]) < 1.5)

    def bent(log_steps: np.ndarray) -> np.ndarray:
        """What differs among the rows of a trial."""
        by_trial = log_steps.reshape(-1, len(EPSILONS))
        return (by_trial - by_trial.mean(axis=1, keepdims=True)).ravel()[inside]

    line = FLAT.predict(test)
    without = np.abs(bent(line) - bent(wanted)).mean()
    assert np.abs(bent(line + surface.predict(test)) - bent(wanted)).mean() < 0.3 * without
    again = Surface.from_arrays(surface.to_arrays())
    assert again.predict(test).tolist() == surface.predict(test).tolist()
    assert again.spread(test).tolist() == surface.spread(test).tolist()


def test_log_t_star_never_falls_with_epsilon_and_far_away_has_the_slope_of_the_line() -> None:
    rows, y = watched(300)
    surface = Surface.fit(rows, y, FLAT, FEATURES)
    assert surface.slope is not None and (surface.slope.predict(rows) < -0.15).any()  # steeper down than the line up
    some, _ = watched(100, seed=1, epsilons=tuple(np.geomspace(0.97, 1e-6, 40).tolist()))
    found = (FLAT.predict(some) + surface.predict(some)).reshape(100, 40)
    assert (np.diff(found, axis=1) > -1e-9).all()
    far = Rows({**some.columns, "log_b": some["log_b"] + 1e4})
    np.testing.assert_allclose(surface.predict(far), 0.0, atol=1e-6)


def test_a_larger_batch_has_a_narrower_width_and_the_same_spread() -> None:
    rows, rng = trials(300), np.random.default_rng(4)
    rows = Rows({**rows.columns, "log_b": np.log(rng.choice([32.0, 64.0, 128.0], size=300))})
    noise = 0.2 * np.exp(-0.5 * (rows["log_b"] - np.log(64.0))) * rng.normal(size=300)
    surface = Surface.fit(rows, 6.0 + np.sin(rows["log_lr"]) + noise, Line((), *(np.zeros(0),) * 3, 6.0), ("log_lr",))
    long = np.full(300, 6.0)  # T* of 400, where it is no matter that T* is whole
    assert "log_b" not in surface.level.features  # else the spread would also say how many trials there are of each B
    for made in (surface, Surface.from_arrays(surface.to_arrays())):
        spread, found = made.spread(rows), []
        for b in (32.0, 64.0, 128.0):
            of_size = Rows({**rows.columns, "log_b": np.full(300, np.log(b))})
            assert made.spread(of_size).tolist() == spread.tolist()
            found.append(float(np.median(made.width(of_size, long, spread))))
        assert 1.2 < found[0] / found[1] < 1.5 and 1.2 < found[1] / found[2] < 1.5  # √2
        unknown = Rows({**rows.columns, "log_b": np.full(300, np.nan)})
        np.testing.assert_allclose(made.width(unknown, long, spread), spread, rtol=1e-3)


def test_a_surface_that_was_saved_before_the_noise_knew_of_the_batch_has_one_width_for_all() -> None:
    rows = trials(100)
    arrays = Surface.fit(rows, 6.0 + truth(rows), Line((), *(np.zeros(0),) * 3, 6.0), FEATURES).to_arrays()
    old = Surface.from_arrays({**arrays, "level_noises": arrays["level_noises"][:2]})
    assert not old.level.extra_noise(rows).any()


@pytest.mark.parametrize("line", [FLAT, Line((), *(np.zeros(0),) * 3, 0.0)])
def test_trials_of_one_epsilon_and_lines_without_it_have_no_slopes(line: Line) -> None:
    rows, y = watched(100, epsilons=(0.1,) if line.terms else EPSILONS)
    surface = Surface.fit(rows, y, line, FEATURES)
    assert surface.slope is None
    assert surface.predict(rows).tolist() == surface.level.predict(rows).tolist()
    again = Surface.from_arrays(surface.to_arrays())
    assert again.slope is None and again.predict(rows).tolist() == surface.predict(rows).tolist()
    arrays = {name: a for name, a in surface.to_arrays().items() if not name.startswith("level")}
    with pytest.raises(ValueError, match="no level"):
        Surface.from_arrays(arrays)


def test_real_trials_have_slopes_of_their_own() -> None:
    rows = real()
    rows = rows.take(rows["replicate"] < 17)
    preset = PRESETS["product"]
    known, test = rows.take(rows.trials % 3 != 0), rows.take(rows.trials % 3 == 0)
    data = design(known, preset, ("mlp",))
    surface = data.surfaces["mlp"]
    line, y = margins(data.lines, test), log_steps(test["t_star"])
    error = {}
    for name, added in (("all", surface.predict(test)), ("level", surface.level.predict(test))):
        gap = y - line - added
        mean = np.bincount(test.trials, gap) / np.maximum(1, np.bincount(test.trials))
        error[name] = np.abs(gap - mean[test.trials]).mean()
    assert error["all"] < 0.95 * error["level"]


def test_an_interval_knows_that_t_star_is_whole() -> None:
    """Left out, real trials of few steps err by as much, in widths, as those of many; in spreads by far more."""
    rows = real()
    rows = rows.take(rows["replicate"] < 17)
    assigned = assign_folds(rows, 3)
    preset = PRESETS["product"].replace(trees=5, surface=1.0)
    made = np.nansum([fold_parts(rows, assigned, preset, ("mlp",), k) for k in range(3)], axis=0)
    steps, error = np.exp(made[1]), np.abs(made[1] - log_steps(rows["t_star"]))
    short, long = steps < np.quantile(steps, 0.25), steps > np.quantile(steps, 0.5)
    ratio = {}
    for name, scale in (("spread", made[2]), ("width", made[3])):
        ratio[name] = np.quantile((error / scale)[short], 0.9) / np.quantile((error / scale)[long], 0.9)
    assert ratio["spread"] > 1.5 and 1 / 1.3 < ratio["width"] < 1.3


def test_families_with_few_trials_have_none_and_keep_the_trees() -> None:
    rows = trials(100)
    family = np.where(np.arange(100) < FEWEST_TRIALS - 1, "rnn", "mlp").astype(object)
    rows = Rows({**rows.columns, "family": family})
    no = np.zeros(100, dtype=bool)
    lines = {POOLED: Line((), *(np.zeros(0),) * 3, 1.0)}
    surfaces = fit_surfaces(rows, 1.0 + truth(rows), lines, (*FEATURES, "family"), ("mlp", "rnn"), no, AFT_SCALE)
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
    assigned = assign_folds(rows, 2)
    made = fold_parts(rows, assigned, preset, ("mlp",), 0)
    assert np.isnan(made[0]).all() and np.isfinite(made[1:, assigned == 0]).all()
    with_trees = fold_parts(rows, assigned, preset.replace(far_shares={"mlp": 0.75}), ("mlp",), 0)
    assert np.isfinite(with_trees[0, assigned == 0]).all()
    log_hat, _ = out_of_fold(rows, np.where(assigned == 0, 0, -1), preset, ("mlp",))
    np.testing.assert_array_equal(log_hat[assigned == 0], made[1, assigned == 0])


def test_a_dataset_is_left_out_whole_with_its_augmented_trials() -> None:
    rows = trials(60).join(augment(trials(60)))
    rows = Rows({**rows.columns, "dataset": np.array(list("abcdef") * 20, object)})
    dealt = assign_datasets(rows)
    sized = np.array([f"{d}@{i % 3}" for i, d in enumerate(rows["dataset"])], dtype=object)
    assert (dealt == assign_datasets(Rows({**rows.columns, "dataset": sized}))).all()
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


def test_a_family_learns_from_its_relative_and_not_the_other_way() -> None:
    def of(family: str, rows: Rows) -> Rows:
        ids = np.array([f"{family}-{i}" for i in rows["trial_id"]], dtype=object)
        return Rows({**rows.columns, "family": np.full(len(rows), family, dtype=object), "trial_id": ids})

    many, few, test = of("mlp", trials(300)), of("dense", trials(FEWEST_TRIALS + 5, seed=1)), trials(200, seed=2)
    both, shifted = many.join(few), np.concatenate([truth(many), truth(few) + 0.2])
    line = {name: Line((), *(np.zeros(0),) * 3, 0.0) for name in ("mlp", "dense", POOLED)}

    def fitted(rows: Rows, y: np.ndarray, families: tuple[str, ...]) -> dict[str, Surface]:
        return fit_surfaces(rows, y, line, FEATURES, families, np.zeros(len(rows), dtype=bool), AFT_SCALE)

    together = fitted(both, shifted, ("mlp", "dense"))
    alone = {**fitted(many, truth(many), ("mlp",)), **fitted(few, truth(few) + 0.2, ("dense",))}
    errors = [
        np.abs(smooth(np.zeros(len(test)), surfaces, of("dense", test)) - truth(test) - 0.2).mean()
        for surfaces in (together, alone)
    ]
    assert errors[0] < 0.5 * errors[1]
    for key, array in alone["mlp"].to_arrays().items():
        np.testing.assert_array_equal(together["mlp"].to_arrays()[key], array)
    mask, told = both.told("dense")
    assert mask.all() and told.augmented.tolist() == [True] * 300 + [False] * (FEWEST_TRIALS + 5)
    assert not both.augmented.any() and not both.told("mlp")[1].augmented.any()
