"""Fitting: splits by trial, the product beats the paper, honest intervals, p_reach, the directory, and Ray Train."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from authors import FAMILIES, reference, rows

from cape.errors import DataError, DependencyError, SpecError, StoreError
from cape.metamodel import artifact, train
from cape.metamodel.artifact import WEIGHTS, MetaModel, default_model
from cape.metamodel.crossfit import AS_GOOD, assign_folds, enough, map_threads, select
from cape.metamodel.fit import fit, fit_table
from cape.metamodel.intervals import Conformal
from cape.metamodel.line import POOLED
from cape.metamodel.presets import PRESETS, SHARES, SIZES, STRUCTURES
from cape.metamodel.reach import Reach
from cape.metamodel.rows import PRODUCT_FEATURES, Rows

SMALL = PRESETS["product"].replace(trees=150, learning_rate=0.1, select=False, per_family=True)


def trios(table: Rows) -> Rows:
    """The same rows named as if every three in a row were one trial, to see that trials stay whole."""
    names = np.array([f"{f}{i // 3}" for i, f in enumerate(table["family"])], dtype=object)
    return Rows({**table.columns, "trial_id": names})


@pytest.fixture(scope="module")
def sample() -> Rows:
    return Rows.from_table(rows(every=6))


@pytest.fixture(scope="module")
def model(sample: Rows) -> MetaModel:
    return fit_table(sample.take(np.arange(len(sample)) % 5 != 0), SMALL)


def test_folds_leave_out_whole_plain_trials_of_each_family(sample: Rows) -> None:
    grouped = trios(sample)
    marks = np.where(np.char.endswith(grouped["trial_id"].astype(str), "7"), "{}", None).astype(object)
    grouped = Rows({**grouped.columns, "augmentation": marks})
    assigned = assign_folds(grouped, 10)
    assert (assigned[grouped.augmented] == -1).all() and assigned.max() == 9
    for trial in np.unique(grouped.trials)[::50]:
        assert len(set(assigned[grouped.trials == trial])) == 1
    for family in FAMILIES:
        mine = (grouped["family"] == family) & ~grouped.augmented
        counts = [len(set(grouped.trials[mine & (assigned == fold)])) for fold in range(10)]
        assert max(counts) - min(counts) <= 1
    backwards = grouped.take(np.arange(len(grouped))[::-1])
    assert (assign_folds(backwards, 10)[::-1] == assigned).all()
    assert (assign_folds(grouped, 10, seed=1) != assigned).any()


def test_many_trials_need_few_folds(sample: Rows) -> None:
    assigned = assign_folds(sample, 10)
    needed = enough(sample, assigned)
    for family, folds in (("mlp", 10), ("rnn", 6)):  # 1,080 and 1,800 trials: 108 and 180 a fold
        mine = sample["family"] == family
        assert set(needed[mine]) == {*range(folds), *([-1] if folds < 10 else [])}
        assert (needed[mine] == np.where(assigned[mine] < folds, assigned[mine], -1)).all()
    few = sample.take(np.arange(len(sample)) % 8 == 0)
    assert (enough(few, assign_folds(few, 10)) == assign_folds(few, 10)).all()


def test_folds_that_take_long_say_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cape.logs._EVERY_S", 0.0)
    assert map_threads(np.add, [(1, 1), (2, 2)]) == [2, 4]
    assert "1/2 folds fitted" in capsys.readouterr().err


def test_product_beats_the_paper_and_covers_on_rows_it_never_saw(sample: Rows, model: MetaModel) -> None:
    unseen = sample.take(np.arange(len(sample)) % 5 == 0)
    paper = fit_table(sample.take(np.arange(len(sample)) % 5 != 0), "paper", calibrate=False)
    low, high = model.interval(unseen, 0.9)
    for family in FAMILIES:
        mine = unseen["family"] == family
        error = np.abs(model.predict(unseen) - unseen["t_star"])[mine].mean()
        assert error < 0.85 * np.abs(paper.predict(unseen) - unseen["t_star"])[mine].mean()
        covered = ((low <= unseen["t_star"]) & (unseen["t_star"] <= high))[mine].mean()
        assert 0.84 < covered < 0.96  # some 215 and 360 rows: a standard error of about two points


def test_predictions_are_whole_and_every_interval_holds_its_own(sample: Rows, model: MetaModel) -> None:
    steps = model.predict(sample)
    exact = np.maximum(1.0, np.exp(model.predict_log(sample)))
    assert (steps == np.rint(steps)).all() and (steps >= 1).all() and (np.abs(steps - exact) <= 0.5).all()
    before: tuple[np.ndarray, np.ndarray] | None = None
    for level in (0.05, 0.5, 0.9):
        low, high = model.interval(sample, level)
        assert (low <= steps).all() and (low <= exact).all() and (exact <= high).all() and (steps <= high).all()
        assert before is None or ((low <= before[0]).all() and (before[1] <= high).all())
        before = low, high
    plain = fit_table(sample, PRESETS["paper"], calibrate=False)
    assert (plain.predict(sample) != np.rint(plain.predict(sample))).any()  # the paper's are what its trees say


def test_every_preset_fits_and_knows_its_families(sample: Rows) -> None:
    few = sample.take(np.arange(len(sample)) % 8 == 0)
    for name, per_family in (("paper", True), ("paper_pooled", False), ("static", True)):
        made = fit_table(few, PRESETS[name].replace(trees=20))
        assert set(made.boosters) == ({POOLED, *FAMILIES} if per_family else {POOLED})
        assert np.isfinite(made.predict(few)).all()


def test_selection_prefers_what_predicts_left_out_trials(sample: Rows) -> None:
    few = sample.take(np.arange(len(sample)) % 12 == 0)
    chosen, scores = select(few, PRESETS["product"], few.families)
    sizes, shares = scores[len(STRUCTURES) :][: len(SIZES)], scores[len(STRUCTURES) + len(SIZES) :]
    best = next(s for s in sizes if s["log_error"] <= AS_GOOD * min(other["log_error"] for other in sizes))
    assert (chosen.trees, chosen.depth, chosen.per_family) == (best["trees"], best["depth"], best["per_family"])
    assert bool(chosen.line) == best["line"] and not chosen.select
    for family in few.families:
        for far, picked in ((False, chosen.shares), (True, chosen.far_shares)):
            mine = [s for s in shares if s["family"] == family and s["far"] == far]
            if family in picked:
                assert [s["surface"] for s in mine] == list(SHARES)
                assert picked[family] == min(mine, key=lambda s: s["log_error"])["surface"]
            else:
                assert not mine


def test_p_reach_learns_which_models_never_get_there(sample: Rows) -> None:
    columns = dict(sample.columns)
    # Real features and T*, with a cap of 40 steps: a trial that needs more is censored.
    columns["converged"] = columns["t_star"] <= 40
    columns["stop_reason"] = np.where(columns["converged"], None, "cap")
    capped = Rows({**columns, "t_star": np.where(columns["converged"], columns["t_star"], np.nan)})
    train, test = (np.arange(len(capped)) % 5 < 2), np.arange(len(capped)) % 5 == 2
    known = capped.take(train)
    made = Reach.fit(known, assign_folds(known, 10), PRODUCT_FEATURES, FAMILIES, seed=0)
    assert made.booster is not None
    probability = made.probability(capped.take(test), PRODUCT_FEATURES, FAMILIES)
    truth = capped.take(test).reached
    assert probability[truth].mean() - probability[~truth].mean() > 0.3
    known = sample.take(train)
    always = Reach.fit(known, assign_folds(known, 10), PRODUCT_FEATURES, FAMILIES, seed=0)
    assert always.booster is None
    assert 0.99 < always.rates["mlp"] < 1


def test_directory_round_trip_is_exact_and_holds_no_pickle(sample: Rows, model: MetaModel, tmp_path: Path) -> None:
    model.save(tmp_path / "m")
    again = MetaModel.load(tmp_path / "m")
    np.testing.assert_array_equal(again.predict(sample), model.predict(sample))
    np.testing.assert_allclose(again.interval(sample)[1], model.interval(sample)[1], rtol=1e-5)
    np.testing.assert_array_equal(again.p_reach(sample), model.p_reach(sample))
    assert {p.suffix for p in (tmp_path / "m").iterdir()} == {".gz", ".json", ".npz"}
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    assert card["preset"]["features"] == list(PRODUCT_FEATURES)
    assert card["families"] == list(FAMILIES)
    assert card["ranges"]["lr"] == [5e-4, 2e-3] and card["ranges"]["epsilon"] == [0.1, 0.2]
    assert set(card["metrics"]["out_of_fold"]) == set(FAMILIES)
    assert len(card["data"]["fingerprint"]) == 16


def test_a_feature_of_a_later_version_is_named(model: MetaModel, tmp_path: Path) -> None:
    model.save(tmp_path / "model")
    card = json.loads((tmp_path / "model" / "card.json").read_text())
    card["preset"]["features"].append("log_foo")
    (tmp_path / "model" / "card.json").write_text(json.dumps(card))
    with pytest.raises(StoreError, match="'log_foo', which this version of CAPE does not compute"):
        MetaModel.load(tmp_path / "model")


def test_damaged_or_foreign_directories_are_refused(model: MetaModel, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cape fit"):
        MetaModel.load(tmp_path / "none")
    whole = model.save(tmp_path / "m")
    for pattern in ("model.*.ubj.gz", "calibration.*.json.gz", "card.json"):
        (name,) = (file.name for file in whole.glob(pattern))
        broken = tmp_path / f"broken-{name}"
        shutil.copytree(whole, broken)
        (broken / name).write_bytes((broken / name).read_bytes()[:-20])
        with pytest.raises(StoreError, match="damaged"):
            MetaModel.load(broken)
    card = json.loads((whole / "card.json").read_text())
    for version, match in ((card["format"] + 1, "upgrade CAPE"), (4, "of an older version")):
        (whole / "card.json").write_text(json.dumps({**card, "format": version, "surfaces": ["mlp"]}))
        with pytest.raises(StoreError, match=match):
            MetaModel.load(whole)
    heads = [*card["families"], "dense, head at zero"]
    (whole / "card.json").write_text(json.dumps({**card, "format": 9, "families": heads}))
    with pytest.raises(StoreError, match="two are made now; run `cape fit` again"):
        MetaModel.load(whole)
    (whole / "card.json").write_text(json.dumps(card))
    MetaModel.load(whole)
    lacking: list[dict[str, object]] = [
        {"data": None}, {"data": {**card["data"], "tasks": None}}, {"families": []}, {"families": "mlp"},
        {"surfaces": []}, {"format": 0}, {"format": -1}, {"format": "7"},
    ]  # fmt: skip
    for changes in lacking:
        (whole / "card.json").write_text(json.dumps({**card, **changes}))
        with pytest.raises(StoreError, match="damaged"):
            MetaModel.load(whole)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="no meta-regressor"):
        model.save(tmp_path / "other")


def test_a_model_is_named_by_a_path_that_may_begin_at_home(
    model: MetaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model.save("~/m") == tmp_path / "m" and MetaModel.load("~/m").families == model.families
    with pytest.raises(SpecError, match="MetaModel or the path"):
        MetaModel.load(3)  # type: ignore[arg-type]


def test_a_negative_seed_is_refused_before_anything_is_fitted(sample: Rows) -> None:
    with pytest.raises(SpecError, match="seed"):
        fit_table(sample, seed=-1)


@pytest.mark.parametrize("version", [7, 8, 9])
def test_a_directory_of_before_its_boosters_were_compressed_or_its_names_had_digests_is_read(
    sample: Rows, model: MetaModel, tmp_path: Path, version: int
) -> None:
    whole = model.save(tmp_path / "m")
    card, files = json.loads((whole / "card.json").read_text()), {}
    for name, digest in card["files"].items():
        data, plain = (whole / name).read_bytes(), name if version == 9 else name.replace(f".{digest[:8]}.", ".")
        if version == 7 and name.endswith(".gz"):
            data, plain = gzip.decompress(data), plain.removesuffix(".gz")
        (whole / name).unlink()
        (whole / plain).write_bytes(data)
        files[plain] = hashlib.blake2b(data, digest_size=16).hexdigest()
    (whole / "card.json").write_text(json.dumps({**card, "format": version, "files": files}))
    np.testing.assert_array_equal(MetaModel.load(whole).predict(sample), model.predict(sample))
    model.save(whole)
    assert {f.name for f in whole.iterdir()} == {*card["files"], "card.json"}  # nothing stale stays


def test_what_a_killed_fit_left_is_written_over(model: MetaModel, tmp_path: Path) -> None:
    whole = model.save(tmp_path / "m")
    (whole / "card.json").unlink()
    half, another = whole / ".model.01234567.ubj.gz.4711", whole / "calibration.01234567.json.gz"
    for file in (half, another):
        file.write_bytes(b"half")
    os.utime(half, (0, 0))
    assert MetaModel.load(model.save(whole)).families == model.families
    assert not half.exists() and another.exists()  # which a save that goes on has just written


def test_a_save_that_is_killed_leaves_the_model_that_was_there(
    sample: Rows, model: MetaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, other = model.save(tmp_path / "m"), dataclasses.replace(model, conformal=Conformal())
    with monkeypatch.context() as killed:

        def replace(temporary: Path, final: Path) -> None:
            if final.name == "card.json":
                raise KeyboardInterrupt
            os.rename(temporary, final)

        killed.setattr(os, "replace", replace)
        with pytest.raises(KeyboardInterrupt):
            other.save(whole)
    np.testing.assert_allclose(MetaModel.load(whole).interval(sample), model.interval(sample), rtol=1e-5)
    other.save(whole)
    assert np.isinf(MetaModel.load(whole).interval(sample)[1]).all()


def test_a_model_is_loaded_while_another_is_saved_over_it(
    sample: Rows, model: MetaModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, other = model.save(tmp_path / "m"), dataclasses.replace(model, conformal=Conformal())
    check, saves = artifact._check_card, iter([other])

    def meanwhile(card: object) -> None:
        check(card)
        for save in saves:  # between the card and its files, once
            save.save(whole)

    monkeypatch.setattr(artifact, "_check_card", meanwhile)
    assert np.isinf(MetaModel.load(whole).interval(sample)[1]).all()


def test_what_cannot_be_written_leaves_no_directory(model: MetaModel, tmp_path: Path) -> None:
    wrong = dataclasses.replace(model, card={**model.card, "metrics": float("inf")})
    with pytest.raises(ValueError, match="JSON"):
        wrong.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_trials_that_begin_below_epsilon_and_features_without_end_can_be_fitted(sample: Rows, tmp_path: Path) -> None:
    changed = {name: values.copy() for name, values in sample.columns.items()}
    changed["t_star"][::7] = 0.0
    changed["log_p"][::11] = np.inf
    made = fit_table(Rows(changed), SMALL.replace(surface=0.0))
    assert np.isfinite(MetaModel.load(made.save(tmp_path / "m")).predict(sample)).all()


def test_too_small_or_unreached_is_one_clear_sentence(sample: Rows) -> None:
    with pytest.raises(DataError, match="larger sweep"):
        fit_table(sample.take(np.arange(5)))
    columns = {**sample.columns, "converged": np.zeros(len(sample), dtype=bool)}
    with pytest.raises(DataError, match="0 rows that reached"):
        fit_table(Rows(columns))
    with pytest.raises(SpecError, match="Unknown preset"):
        fit_table(sample, "nothing")


def test_a_hundred_trials_of_four_families_are_enough(sample: Rows) -> None:
    few = sample.take(np.arange(0, len(sample), len(sample) // 100)[:100])
    families = np.array([f"{f}{i % 2}" for i, f in enumerate(few["family"])], dtype=object)
    made = fit_table(Rows({**few.columns, "family": families}), "product")
    low, high = made.interval(few, 0.9)
    assert np.isfinite(high).all() and (low < high).all()


def test_default_model_is_there_or_says_how_to_make_one() -> None:
    if (WEIGHTS / "card.json").is_file():
        assert default_model().preset.name == "product"
    else:
        with pytest.raises(StoreError, match="cape fit"):
            default_model()


def test_ray_train_gives_the_same_model_as_this_process(ray_session: None, sample: Rows, tmp_path: Path) -> None:
    from cape.store.importers import import_csv
    from cape.store.reader import read

    import_csv(reference() / "authors_meta_dataset_mlp.csv", "mlp", tmp_path / "meta")
    preset = PRESETS["product"].replace(trees=60, select=False)
    made = fit(tmp_path / "meta", tmp_path / "model", preset=preset)
    table = read(tmp_path / "meta")
    np.testing.assert_allclose(made.predict(table), fit_table(table, preset).predict(table), rtol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["meta", "model"]  # Ray's own files are gone
    with pytest.raises(SpecError, match="workers need at least"):
        fit(tmp_path / "meta", tmp_path / "many", workers=64)


def test_a_ray_without_its_train_extra_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    done: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: done.append("shut down"))
    monkeypatch.setattr(train, "_start", lambda *a: done.append("started"))
    monkeypatch.setitem(sys.modules, "ray.train.xgboost", None)
    with pytest.raises(DependencyError, match="ray.train"), train.ray_trainer(tmp_path / "m", 1, None):
        pass
    assert done == ["started", "shut down"] and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_ray_workers_fit_a_model_as_good_as_one_and_stop_early_together(sample: Rows, tmp_path: Path) -> None:
    from cape.store.reader import read
    from cape.store.writer import write_shard

    few = [r for i, r in enumerate(rows(every=6).to_pylist()) if i % 5]
    write_shard(few, tmp_path / "meta")
    command = [*(sys.executable, "-m", "cape.cli", "fit", str(tmp_path / "meta"), "--out", str(tmp_path / "model"))]
    # A process of its own: the Ray of this session has no CPU for two workers and their data.
    options = ["--preset", "paper_epsilon", "--workers", "2", "--early-stopping", "15"]
    env = {**os.environ, "RAY_memory_monitor_refresh_ms": "0"}  # else Ray kills workers where others fill the memory
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr
    two = MetaModel.load(tmp_path / "model")
    preset = PRESETS["paper_epsilon"].replace(early_stopping=15)
    one = fit_table(read(tmp_path / "meta"), preset, calibrate=False)
    unseen = sample.take(np.arange(len(sample)) % 5 == 0)
    mae = [np.abs(m.predict(unseen) - unseen["t_star"]).mean() for m in (one, two)]
    assert mae[1] == pytest.approx(mae[0], rel=0.02)
    assert two.preset.early_stopping == 15 and set(two.boosters) == set(one.boosters) == {POOLED, *FAMILIES}


def test_fitting_needs_no_torch() -> None:
    """Every process of a fit would import it, for a second or two each."""
    code = "import sys, cape.cli, cape.metamodel.train, cape.metamodel.fit, cape.store; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
