"""A plan is deterministic, complete, lazy, and does not change when it is extended."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cape.config import SweepSpec
from cape.errors import SpecError
from cape.sweep.plan import PRESETS, Plan, preset, read_spec
from cape.sweep.shards import LEAST_SECONDS, cut

ROOT = Path(__file__).resolve().parents[2]

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


def test_the_quick_ids_are_the_ids() -> None:
    """``Plan.ids`` hashes what a cell's trials share once; the numbers must be those of the trials themselves."""
    for spec in (
        SPEC,
        SPEC.replace(task="classification", epsilons=(0.5,), seed=7, precision="bf16", trials_per_cell=12),
        SPEC.replace(augmented=True),
        SPEC.replace(replicates=2),
        SPEC.replace(augmented=True, replicates=3, task="multilabel"),
    ):
        plan = Plan(spec)
        assert plan.all_ids().tolist() == [int(t.trial_id, 16) for t in plan.trials()]


def test_what_was_named_before_there_were_augmentations_keeps_its_name() -> None:
    """The ids and hashes of sweeps that exist: should one change, a resume would run everything again."""
    trial = next(Plan(SPEC).trials())
    assert (trial.trial_id, trial.seed) == ("f5516fa210b36653", 3700538388559200928)
    assert SPEC.spec_hash == "874d1f2189775a5c"
    assert SPEC.replace(augmented=True).spec_hash != SPEC.spec_hash != SPEC.replace(replicates=2).spec_hash
    assert SweepSpec.from_json(SPEC.replace(augmented=True).to_json()).augmented


@pytest.mark.parametrize("workers", [1, 2, 64])
def test_shards_hold_every_trial_once_and_can_train_side_by_side(workers: int) -> None:
    plan = Plan(SPEC)
    shards = cut(plan.missing(), workers)
    held = [t.trial_id for shard in shards for t in plan.trials_of(shard)]
    assert sorted(held) == sorted(t.trial_id for t in plan.trials())
    assert len({s.key for s in shards}) == len(shards)
    for shard in shards:
        kinds = {(t.family, t.dataset, t.batch_size) for t in plan.trials_of(shard)}
        assert kinds == {(shard.group.family, shard.group.dataset, shard.group.batch_size)}


def test_shards_leave_out_what_is_done_and_interleave_groups() -> None:
    plan = Plan(SPEC)
    ids = plan.all_ids()
    done = ids[::3]
    left = {t.trial_id for shard in cut(plan.missing(done), 2) for t in plan.trials_of(shard)}
    assert {int(i, 16) for i in left} == set(ids.tolist()) - set(done.tolist())
    assert plan.missing(ids) == []
    assert plan.missing(np.array([1, 2], np.uint64)) == plan.missing()
    assert {s.group.family for s in cut(plan.missing(), 2)[:8]} == {"mlp", "cnn"}


def test_shards_shrink_towards_the_end_and_a_slow_group_gets_smaller_ones() -> None:
    plan = Plan(SPEC.replace(trials_per_cell=500, trials_by_family={}))
    seconds = {"mlp": 0.5, "cnn": 5.0}
    shards = cut(plan.missing(), 4, lambda group: seconds[group.family])
    costs = [len(s) * seconds[s.group.family] for s in shards]
    total = sum(costs)
    assert max(costs) <= total / (3 * 4) * 1.05
    ends = costs[-8:]
    assert max(ends) < 0.01 * total and min(costs) >= 0.5
    assert max(ends) <= max(LEAST_SECONDS, 5.0) * 4
    largest = {f: max(len(s) for s in shards if s.group.family == f) for f in seconds}
    assert largest["mlp"] > 2 * largest["cnn"]
    assert len(shards) < 150  # of 8,000 trials


def test_every_family_begins_early() -> None:
    """Small groups are cut into no pieces; what each family costs is known only once it has begun."""
    plan = Plan(SweepSpec(trials_per_cell=5))
    shards = cut(
        plan.missing(), 2, lambda group: {"mlp": 0.1, "cnn": 10.0, "rnn": 10.0, "transformer": 60.0}[group.family]
    )
    assert [s.group.family for s in shards[:4]] == ["mlp", "cnn", "rnn", "transformer"]
    assert sum(map(len, shards)) == len(plan)


def test_a_million_trials_are_planned_in_seconds_and_little_memory() -> None:
    """In a process of its own, so that the peak memory is the plan's; ids, shards and what is missing of it."""
    code = """
import resource, time
import numpy as np
from cape.config import SweepSpec
from cape.sweep.plan import Plan
from cape.sweep.shards import cut
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
plan = Plan(SweepSpec(trials_per_cell=7000))
ids = plan.all_ids()
assert len(np.unique(ids)) == len(plan) == 1_008_000
shards = cut(plan.missing(), 64)
assert sum(map(len, shards)) == len(plan) and len(shards) < 3000
assert sum(map(len, plan.missing(ids[::2]))) == len(plan) // 2
print(time.process_time() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seconds, megabytes = map(float, done.stdout.split())
    assert seconds < 20  # of a processor; measured: 4 s (benchmarks/sweep.py)
    assert megabytes < 1000


def test_a_plan_has_an_end() -> None:
    assert len(Plan(SweepSpec(trials_per_cell=69_444))) == 9_999_936
    with pytest.raises(SpecError, match="more than 10000000"):
        Plan(SweepSpec(trials_per_cell=69_445))


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
    pipe = tmp_path / "pipe"  # as a shell's <(command) is
    os.mkfifo(pipe)
    threading.Thread(target=pipe.write_text, args=(SPEC.to_json(),)).start()
    assert read_spec(pipe) == SPEC
    path.write_text('{"famlies": ["mlp"]}')
    with pytest.raises(SpecError, match="Did you mean 'families'"):
        read_spec(path)


def test_the_corpus_is_a_set_of_plans() -> None:
    """The specs that are shipped: sizes as docs/data.md says, no trial in two of them."""
    plans = {path.stem: Plan(read_spec(path)) for path in sorted((ROOT / "ray_jobs" / "specs").glob("*.json"))}
    assert {name: len(plan) for name, plan in plans.items()} == {
        "augmented": 5832,
        "backbone": 128,
        "backbone_augmented": 36,
        "faint": 1584,
        "finer": 1656,
        "fresh": 1512,
        "held_out": 342,
        "language": 120,
        "language_cells": 96,
        "language_encoders": 120,
        "language_fresh": 36,
        "ordinary": 3456,
        "ordinary_augmented": 360,
        "ordinary_digits": 264,
        "ordinary_fresh": 432,
        "ordinary_replicates": 720,
        "ordinary_readers": 288,
        "ordinary_tables": 300,
        "ordinary_texts": 672,
        "ordinary_texts_augmented": 144,
        "ordinary_texts_fresh": 96,
        "ordinary_words": 288,
        "plain": 6228,
        "replicates": 960,
        "sizes": 128,
    }
    ids = np.concatenate([plan.all_ids() for plan in plans.values()])
    assert len(np.unique(ids)) == len(ids)
    groups = Counter((t.family, t.model_seed) for t in plans["replicates"].trials())
    assert len(groups) == 4 * 24 and set(groups.values()) == {10}
    augmented, finer, faint = ([t.augmentation for t in plans[n].trials()] for n in ("augmented", "finer", "faint"))
    assert all(a is not None for a in augmented) and all(a is not None and a.classes == 1.0 for a in finer)
    assert all(a is not None and a.log_scale <= -2.0 for a in faint)
