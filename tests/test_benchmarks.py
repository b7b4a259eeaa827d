"""The benchmarks count and compare what they say they do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.composition import from_rows
from benchmarks.features import CONSTANT, SETS, measure, table, together
from benchmarks.features import tests as held_out_tests
from benchmarks.naive import naive_rows
from benchmarks.truth import COMPOSITION, key_of, summary, units
from cape.config import SweepSpec, TrialSpec
from cape.metamodel.rows import NUMERIC, Rows
from cape.store.writer import write_shard
from cape.sweep.plan import Plan
from cape.trial import run_trials


@pytest.mark.parametrize("every", [True, False])
def test_the_naive_way_finds_the_same_t_star(every: bool) -> None:
    trial = TrialSpec("mlp", "digits", 16, 1e-3, seed=4)
    found = naive_rows(trial, "cpu", None, every=every)
    (rows,) = run_trials([trial])
    assert found["t_star"] == {str(row["epsilon"]): row["t_star"] for row in rows}
    assert found["probe_seconds"] > 0 and found["truth_seconds"] > 0


def test_units_hold_every_trial_of_the_papers_composition_once(data_root: Path) -> None:
    assert Plan(COMPOSITION).rows == 10_800 + 6_480 + 10_800 + 6_480
    held = units("mlp", "cpu", str(data_root), models=4)
    trials = [t for unit in held for t in unit]
    assert len({t.trial_id for t in trials}) == len(trials) == 2160
    assert len({key_of(unit, "w") for unit in held}) == len(held)
    assert len({(t.dataset, t.batch_size) for unit in held[:12] for t in unit}) == 12  # by turns


def test_the_whole_is_extrapolated_batch_size_by_batch_size() -> None:
    def unit(size: int, trials: int, seconds: float) -> dict[str, object]:
        ways = {"engine": {"seconds": seconds}}
        return {"family": "mlp", "batch_size": size, "purpose": "w", "trials": trials, "ways": ways}

    held = {"a": unit(32, 72, 7.2), "b": unit(64, 72, 14.4), "c": unit(128, 36, 14.4)}
    whole = summary({"units": held})["composition"]
    assert whole["mlp"]["share_of_trials"] == 180 / 2160
    assert whole["hours"] == pytest.approx((720 * 0.1 + 720 * 0.2 + 720 * 0.4) / 3600)


def test_the_whole_is_extrapolated_from_the_rows_of_a_sweep(tmp_path: Path) -> None:
    composition = SweepSpec(name="c", families=("mlp",), datasets=("digits", "mnist"), batch_sizes=(16, 32))
    trials = [TrialSpec("mlp", "digits", size, 1e-3, seed=seed) for size in (16, 32) for seed in range(3)]
    rows = [row for rows in run_trials(trials) for row in rows]
    for row in rows:
        row.update(probe_seconds=1.0, truth_seconds=1.0 if row["batch_size"] == 16 else 1.5)
        row.update(step_seconds=0.5, stopped_at=3)
    for row in rows[:3]:  # the first trial was stopped for a while, by its plain steps it takes two seconds
        row.update(truth_seconds=100.0)
    write_shard(rows, tmp_path)
    found = from_rows([tmp_path, tmp_path], composition, workers=2)
    about = found["families"]["mlp"]
    assert about["trials"] == 6 and about["share_of_trials"] == 6 / 1200
    assert about["borrowed"] == ["mnist 16", "mnist 32"]  # the digits' at the same batch size
    assert found["cells"]["mlp digits 16"]["steady"] == pytest.approx((3.0 + 2.0 + 2.0) / 3)
    assert about["hours"]["steady"] == pytest.approx(2 * 300 * (7.0 / 3 + 2.5) / 2 / 3600)
    assert about["hours"]["recorded"] == pytest.approx(2 * 300 * (105.0 / 3 + 2.5) / 2 / 3600)
    assert found["complete"] == ["mlp"] and found["hours"] == about["hours"]


def _rows(dataset: str, count: int, seed: int) -> Rows:
    """Rows whose T* follows from the loss after 16 updates, and from nothing else."""
    rng = np.random.default_rng(seed)
    columns = {name: rng.normal(size=count) for name in NUMERIC}
    columns["trial_id"] = np.array([f"{dataset}{seed}{i}" for i in range(count)], dtype=object)
    columns["dataset"], columns["family"] = np.full(count, dataset, object), np.full(count, "mlp", object)
    columns["t_star"] = np.round(np.exp(3 + columns["line_16"]))
    columns["converged"] = np.ones(count, dtype=bool)
    return Rows(columns)


def test_what_features_are_worth_is_told_on_data_that_was_not_fitted_on() -> None:
    plain = together(_rows("a", 60, 0), _rows("b", 60, 1))
    augmented, held = _rows("a", 60, 2), _rows("c", 40, 3)
    for name, base, more, test in held_out_tests(plain, augmented, held):
        fitted = {*base["trial_id"], *([] if more is None else more["trial_id"])}
        assert not fitted & set(test["trial_id"])
        assert name == "c" or not set(test["dataset"]) & {*base["dataset"], *([] if more is None else more["dataset"])}
    found = measure(plain, augmented, held)
    assert found["rows"] == {"plain": 120, "augmented": 60}
    for kind in ("plain", "plain + augmented"):
        for name, rows in (("c", 40), ("left out", 120)):
            scores = {label: found[kind][label][name] for label in found[kind]}
            assert {s["rows"] for s in scores.values()} == {rows}
            assert scores["+ slow-regime signals"]["mae"] < 0.5 * scores[CONSTANT]["mae"]
            assert scores["the paper's six"]["mae"] > 0.7 * scores[CONSTANT]["mae"]
    assert table({"mlp": found}).count("\n| ") == 1 + 1 + len(SETS)
