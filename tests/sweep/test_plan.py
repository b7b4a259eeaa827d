"""A plan is deterministic, complete, lazy, and does not change when it is extended."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from cape.config import SweepSpec
from cape.errors import SpecError
from cape.sweep.plan import PRESETS, Plan, preset, read_spec

SPEC = SweepSpec(
    families=("mlp", "cnn"),
    datasets=("digits", "mnist"),
    lrs=(1e-3, 2e-3),
    batch_sizes=(16, 32),
    trials_per_cell=3,
    trials_by_family={"mlp": 5},
)


def test_every_cell_holds_its_trials_once() -> None:
    plan = Plan(SPEC)
    trials = list(plan.trials())
    assert len(trials) == len(plan) == 2 * 4 * (5 + 3)
    assert plan.rows == 3 * len(plan) and plan.cells == 16
    assert len({t.trial_id for t in trials}) == len(trials)
    assert len({t.seed for t in trials}) == len(trials)
    per_cell = Counter(t.cell for t in trials)
    assert {count for cell, count in per_cell.items() if cell[0] == "mlp"} == {5}
    assert {count for cell, count in per_cell.items() if cell[0] == "cnn"} == {3}
    assert [t.trial_id for t in Plan(SPEC).trials()] == [t.trial_id for t in trials]


def test_extending_a_sweep_keeps_the_trials_that_it_had() -> None:
    before = {t.trial_id for t in Plan(SPEC).trials()}
    larger = SPEC.replace(trials_per_cell=7, trials_by_family={}, datasets=("digits", "mnist", "cifar10"))
    assert before < {t.trial_id for t in Plan(larger).trials()}
    assert not before & {t.trial_id for t in Plan(SPEC.replace(seed=1)).trials()}


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_shards_hold_every_trial_once_and_mix_their_cells(workers: int) -> None:
    plan = Plan(SPEC)
    shards = plan.shards(workers)
    held = [t.trial_id for shard in shards for t in plan.trials_of(shard)]
    assert sorted(held) == sorted(t.trial_id for t in plan.trials())
    assert len({s.key for s in shards}) == len(shards)
    for shard in shards:
        trials = list(plan.trials_of(shard))
        assert {(t.family, t.dataset) for t in trials} == {(shard.family, shard.dataset)}
        assert len({t.cell for t in trials}) == min(len(trials), 4)


def test_shards_leave_out_what_is_done_and_interleave_families() -> None:
    plan = Plan(SPEC)
    done = {t.trial_id for t in list(plan.trials())[::3]}
    left = {t.trial_id for shard in plan.shards(2, done) for t in plan.trials_of(shard)}
    assert left == {t.trial_id for t in plan.trials()} - done
    assert plan.shards(2, {t.trial_id for t in plan.trials()}) == []
    first = [s.family for s in plan.shards(2)[:4]]
    assert set(first) == {"mlp", "cnn"}


def test_more_workers_get_more_shards_and_a_large_plan_stays_lazy() -> None:
    plan = Plan(SweepSpec(trials_per_cell=7000))  # 1,008,000 trials
    start = time.perf_counter()
    few, many = plan.shards(2), plan.shards(4000)
    assert sum(map(len, few)) == sum(map(len, many)) == len(plan) == 1_008_000
    assert max(map(len, few)) == 64 and max(map(len, many)) == 15
    assert time.perf_counter() - start < 5.0


def test_presets_are_plans_and_the_paper_is_the_papers() -> None:
    assert {"demo", "smoke", "paper", "cpu"} <= set(PRESETS)
    paper = Plan(PRESETS["paper"])
    assert paper.cells == 4 * 4 * 3 * 3 and len(paper) == 100 * paper.cells
    assert set(PRESETS["demo"].families) == {"mlp", "cnn", "rnn", "transformer"}
    assert len(Plan(PRESETS["smoke"])) <= 4


def test_the_demo_takes_what_the_data_root_has(tmp_path: Path) -> None:
    assert preset("demo").datasets == ("digits",)
    assert preset("demo", tmp_path).datasets == ("digits",)
    for name in ("svhn", "mnist", "imdb", "fashion_mnist"):
        (tmp_path / f"{name}.parquet").touch()
    assert preset("demo", tmp_path).datasets == ("mnist", "fashion_mnist")
    assert len(Plan(preset("demo", tmp_path))) == len(Plan(preset("demo")))
    assert preset("paper", tmp_path) == PRESETS["paper"]


def test_a_spec_is_a_preset_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(SPEC.to_json())
    assert read_spec(path) == SPEC
    assert read_spec("smoke") == PRESETS["smoke"]
    with pytest.raises(SpecError, match="Did you mean 'paper'"):
        read_spec("papr")
    with pytest.raises(SpecError, match="no file"):
        read_spec(tmp_path / "absent.json")
    path.write_text('{"famlies": ["mlp"]}')
    with pytest.raises(SpecError, match="Did you mean 'families'"):
        read_spec(path)
