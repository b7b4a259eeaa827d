"""The baseline that the benchmarks compare with counts the same updates as the engines do."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.naive import naive_rows
from benchmarks.truth import COMPOSITION, key_of, summary, units
from cape.config import TrialSpec
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
