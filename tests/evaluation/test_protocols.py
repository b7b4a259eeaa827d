"""Splits: trials stay whole, cells are spread, nothing left out is fitted on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from authors import rows

from cape.errors import DataError, SpecError
from cape.evaluation.protocols import FOLDS, calibration_rows, configurations, splits
from cape.metamodel.rows import Rows


@pytest.fixture(scope="module")
def sample() -> Rows:
    every = Rows.from_table(rows(every=4))
    # Three rows of one cell become one trial, as in a sweep where a trial has three ε.
    order = np.argsort(np.array(["|".join(map(str, c)) for c in every.cells]), kind="stable")
    sorted_rows = every.take(order)
    names = np.array([f"{c}-{i // 3}" for i, c in enumerate(sorted_rows.cells)], dtype=object)
    return Rows({**sorted_rows.columns, "trial_id": names})


def test_in_corpus_folds_group_trials_and_spread_cells(sample: Rows) -> None:
    made, notes = splits(sample, "in-corpus")
    assert len(made) == FOLDS and not notes
    assert sum(len(s.test) for s in made) == len(sample)
    cells = Counter(sample.cells)
    for split in made:
        assert not set(split.train["trial_id"]) & set(split.test["trial_id"])
        for cell, count in Counter(split.test.cells).items():
            assert abs(count - cells[cell] / FOLDS) <= 6  # at most two trials of three rows from even


def test_calibration_rows_are_whole_trials_and_a_tenth(sample: Rows) -> None:
    test = splits(sample, "in-corpus")[0][0].test
    held = calibration_rows(test)
    assert not set(test["trial_id"][held]) & set(test["trial_id"][~held])
    assert 0.08 < held.mean() < 0.13
    few = test.take(np.isin(test["trial_id"], np.unique(test["trial_id"].astype(str))[:9]))
    assert not calibration_rows(few).any()


@pytest.mark.parametrize(("protocol", "column"), [("lodo", "dataset"), ("lofo", "family")])
def test_what_is_left_out_is_not_fitted_on(sample: Rows, protocol: str, column: str) -> None:
    made, _ = splits(sample, protocol)
    assert {s.name for s in made} == set(sample[column])
    for split in made:
        assert set(split.test[column]) == {split.name}
        assert split.name not in set(split.train[column])


def test_a_dataset_is_left_out_at_every_size(sample: Rows) -> None:
    sized = np.array([f"{d}@28" if i % 2 else d for i, d in enumerate(sample["dataset"])], dtype=object)
    made, _ = splits(Rows({**sample.columns, "dataset": sized}), "lodo")
    assert {s.name for s in made} == set(sample["dataset"])
    for split in made:
        assert set(split.test["dataset"]) == {split.name, f"{split.name}@28"}
        assert not set(split.train["dataset"]) & set(split.test["dataset"])
    renamed = np.array([f"svhn@{i % 40}" if d == "cifar10" else d for i, d in enumerate(sized)], dtype=object)
    ((split,), _) = splits(Rows({**sample.columns, "dataset": renamed}), "held-out")
    assert {d.split("@")[0] for d in split.test["dataset"]} == {"svhn"}
    assert not any(d.startswith("svhn") for d in split.train["dataset"])


def test_augmented_trials_are_fitted_on_but_not_those_of_what_is_left_out(sample: Rows) -> None:
    trials = np.unique(sample["trial_id"].astype(str))[::4]
    marks = np.where(np.isin(sample["trial_id"].astype(str), trials), "{}", None).astype(object)
    mixed = Rows({**sample.columns, "augmentation": marks})
    for protocol, column in (("in-corpus", None), ("lodo", "dataset"), ("lofo", "family")):
        made, notes = splits(mixed, protocol)
        assert any("augmented trials" in n for n in notes)
        assert sum(len(s.test) for s in made) == (~mixed.augmented).sum()
        for split in made:
            assert not split.test.augmented.any() and split.train.augmented.any()
            if column:
                assert split.name not in set(split.train[column])


def test_leave_one_architecture_out_keeps_the_family(sample: Rows) -> None:
    names = np.where(sample["family"] == "rnn", np.where(sample["log_p"] > 13.8, "lstm", "gru"), "mlp")
    made, notes = splits(Rows({**sample.columns, "architecture": names.astype(object)}), "loao")
    assert {s.name for s in made} == {"lstm", "gru"}
    assert any("only architecture" in n for n in notes)
    with pytest.raises(DataError, match="needs at least two"):
        splits(sample, "loao")  # the published rows name no architecture


def test_held_out_is_svhn_and_imdb_by_default(sample: Rows) -> None:
    renamed = np.where(sample["dataset"] == "cifar100", "svhn", sample["dataset"])
    made, _ = splits(Rows({**sample.columns, "dataset": renamed}), "held-out")
    assert [s.name for s in made] == ["svhn"]
    assert "svhn" not in set(made[0].train["dataset"])
    with pytest.raises(DataError, match="SVHN or IMDB"):
        splits(sample, "held-out")


def test_fresh_needs_a_test_set_that_shares_no_trial(sample: Rows) -> None:
    with pytest.raises(SpecError, match="test_dir"):
        splits(sample, "fresh")
    with pytest.raises(DataError, match="in both"):
        splits(sample, "fresh", sample)
    half = np.isin(sample["trial_id"], np.unique(sample["trial_id"].astype(str))[::2])
    made, _ = splits(sample.take(half), "fresh", sample.take(~half))
    assert len(made) == 1 and len(made[0].test) == (~half).sum()
    with pytest.raises(SpecError, match="takes no test"):
        splits(sample, "lodo", sample)


def test_small_meta_datasets_shrink_or_say_so(sample: Rows) -> None:
    names = np.unique(sample["trial_id"][sample["family"] == "rnn"].astype(str))[:3]
    few = sample.take(np.isin(sample["trial_id"], names) | (sample["family"] == "mlp"))
    made, notes = splits(few, "in-corpus")
    assert len(made) == 3 and "3 folds instead of 5" in notes[0]
    with pytest.raises(DataError, match="larger sweep"):
        splits(sample.take(np.arange(12)), "in-corpus")
    with pytest.raises(SpecError, match="Unknown protocol"):
        splits(sample, "incorpus")


def test_configurations_differ_by_all_but_the_seed(sample: Rows) -> None:
    keys, approximate = configurations(sample)
    assert approximate
    named, exact = configurations(Rows({**sample.columns, "model": np.full(len(sample), "{}", dtype=object)}))
    assert not exact
    assert len(set(named)) < len(set(keys)) <= len(sample)
