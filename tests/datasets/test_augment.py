"""Augmented datasets: what each change does, on real images, tables and texts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cape import datasets, families
from cape.config import Augmentation, SweepSpec, TrialSpec
from cape.drawn import built
from cape.errors import DataError, SpecError
from cape.sweep.plan import Plan
from cape.trial import run_trials

LAYOUTS = ("vector", "rows", "image")


def test_it_has_a_json_of_its_own_and_draws_what_it_says() -> None:
    drawn = [Augmentation.draw(seed) for seed in range(2000)]
    assert all(Augmentation.from_json(a.to_json()) == a for a in drawn[:50])
    assert drawn[7] == Augmentation.draw(7) and len({a.to_json() for a in drawn}) == 2000

    def share(values: list[bool]) -> float:
        return sum(values) / len(values)

    assert share([a.classes < 1 for a in drawn]) == pytest.approx(0.7, abs=0.04)
    assert share([a.random_labels > 0 for a in drawn]) == pytest.approx(0.35, abs=0.04)
    assert share([a.zeroed > 0 for a in drawn]) == pytest.approx(0.4, abs=0.04)
    assert share([a.gray for a in drawn]) == pytest.approx(0.25, abs=0.04)
    scales, sizes = [a.log_scale for a in drawn], [math.log(a.samples or 0) for a in drawn]
    assert -4 <= min(scales) < -3.9 and 0.9 < max(scales) <= 1
    assert min(sizes) == pytest.approx(math.log(1e3), abs=0.1) and max(sizes) == pytest.approx(math.log(1e6), abs=0.1)
    assert np.median([a.zeroed for a in drawn if a.zeroed]) > 0.75  # hashed texts are nearly empty
    with pytest.raises(SpecError, match="share between 0 and 1"):
        Augmentation(zeroed=1.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_change_it_is_the_plain_dataset(layout: str) -> None:
    digits = datasets.load("digits")
    same = datasets.augmented(digits, Augmentation())
    assert (len(same), same.outputs, same.sample_shape(layout)) == (len(digits), 10, digits.sample_shape(layout))
    for got, known in zip(same.batch(64, 0, layout), digits.batch(64, 0, layout)):
        assert got.dtype == known.dtype and torch.equal(got, known)


def test_classes_are_kept_renumbered_and_enough_for_a_batch() -> None:
    digits = datasets.load("digits")
    some = datasets.augmented(digits, Augmentation(seed=4, classes=0.6, samples=321))
    assert some.outputs == round(2 * 5**0.6) == 5 == len(some.class_names)
    assert some.full_train_size == 321
    x, y = some.batch(len(some), 1, "vector")
    assert torch.bincount(y).tolist() == [int((digits.source.labels == int(c)).sum()) for c in some.class_names]  # type: ignore[attr-defined]
    # The images of each new class are those of the old one.
    plain, old = digits.batch(len(digits), 1, "vector")
    for new, name in enumerate(some.class_names):
        assert torch.equal(_sorted(x[y == new]), _sorted(plain[old == int(name)]))
    pair = datasets.augmented(digits, Augmentation(seed=4, classes=0.0))
    assert pair.outputs == 2 and pair.class_names == some.class_names[:2]
    wide = datasets.augmented(digits, Augmentation(seed=4, classes=0.0), at_least=1000)
    assert wide.outputs == 6 and len(wide) >= 1000
    with pytest.raises(DataError, match="cannot be drawn"):
        datasets.augmented(digits, Augmentation(), at_least=5000).batch(5000, 0, "vector")


def test_classes_without_rows_are_classes() -> None:
    features, labels = np.zeros((60, 4), np.float32), np.arange(60) % 5
    some = datasets.from_arrays("some", features, labels, outputs=7)
    for seed in range(20):
        kept = datasets.augmented(some, Augmentation(seed=seed, classes=0.6), at_least=30)
        names, y = kept.class_names, kept.batch(len(kept), 0, "vector")[1]
        assert kept.outputs == len(names) >= 4 and len(kept) >= 30
        assert torch.bincount(y, minlength=len(names)).tolist() == [12 if int(name) < 5 else 0 for name in names]
    random = datasets.augmented(some, Augmentation(random_labels=1.0)).batch(60, 0, "vector")[1]
    assert set(random.tolist()) == set(range(7))
    assert datasets.augmented(some, Augmentation(classes=0.0), at_least=60).outputs >= 5


def test_classes_are_cut_up_the_same_way_for_every_batch() -> None:
    digits = datasets.load("digits")
    fine = datasets.augmented(digits, Augmentation(seed=5, split=0.5))
    parts = round((200 / 10) ** 0.5)
    assert parts == 4 and fine.outputs == 40 == len(fine.class_names)
    assert datasets.augmented(digits, Augmentation(split=1.0)).outputs == 200
    assert datasets.augmented(digits, Augmentation(split=0.0)).outputs == 10
    (x, y), (plain, old) = (d.batch(len(digits), 2, "vector") for d in (fine, digits))
    assert torch.equal(x, plain)  # the same samples, in the same order
    assert torch.equal(y // parts, old)
    counts = torch.bincount(y, minlength=40)
    assert counts.min() > 20  # about 45 of 1,797 in each
    label = {tuple(row.tolist()): int(c) for row, c in zip(x, y, strict=True)}
    again = fine.batch(100, 9, "vector")
    assert [label[tuple(row.tolist())] for row in again[0]] == again[1].tolist()
    other = datasets.augmented(digits, Augmentation(seed=6, split=0.5)).batch(len(digits), 2, "vector")[1]
    assert torch.equal(other // parts, old) and not torch.equal(other, y)
    some = datasets.augmented(digits, Augmentation(seed=4, classes=0.6, split=0.5))
    assert some.outputs == 20 and int(some.batch(len(some), 1, "vector")[1].max()) == 19
    random = datasets.augmented(digits, Augmentation(seed=5, split=0.5, random_labels=1.0))
    assert len(set(random.batch(1000, 0, "vector")[1].tolist())) == 40


def test_a_sweep_of_finer_tasks_leaves_no_class_out() -> None:
    drawn = [Augmentation.draw(seed, finer=True) for seed in range(500)]
    assert all(a.classes == 1.0 for a in drawn)
    assert sum(a.split > 0 for a in drawn) / 500 == pytest.approx(0.7, abs=0.06)
    assert all(Augmentation.from_json(a.to_json()) == a for a in drawn[:50])
    assert "split" not in Augmentation.draw(3).to_dict()  # named as before there was one
    spec = SweepSpec(families=("mlp",), datasets=("digits",), trials_per_cell=2, augmented=True, finer=True, seed=4)
    trials = list(Plan(spec).trials())
    assert all(t.augmentation is not None and t.augmentation.classes == 1.0 for t in trials)
    assert len({t.augmentation.split for t in trials if t.augmentation}) > 3
    assert [int(t.trial_id, 16) for t in trials] == Plan(spec).all_ids().tolist()
    with pytest.raises(SpecError, match="'finer' says how trials are augmented"):
        SweepSpec(finer=True)


def test_a_sweep_of_faint_inputs_has_small_ones_and_zeros_everywhere() -> None:
    drawn = [Augmentation.draw(seed, faint=True) for seed in range(500)]
    usual = [Augmentation.draw(seed) for seed in range(500)]
    assert all(-4.5 <= a.log_scale <= -2.0 and 0.0 <= a.zeroed <= 0.98 for a in drawn)
    assert sum(a.zeroed > 0.8 for a in drawn) / 500 == pytest.approx(1 - math.log(0.2) / math.log(0.02), abs=0.06)
    changed = {"zeroed", "log_scale"}
    for one, other in zip(drawn, usual, strict=True):  # all else is drawn as ever
        differing = {k for k, v in one.to_dict().items() if other.to_dict()[k] != v}
        assert differing <= changed and "log_scale" in differing
    spec = SweepSpec(families=("mlp",), datasets=("digits",), trials_per_cell=2, augmented=True, faint=True, seed=5)
    trials = list(Plan(spec).trials())
    assert all(t.augmentation is not None and t.augmentation.log_scale <= -2.0 for t in trials)
    assert [int(t.trial_id, 16) for t in trials] == Plan(spec).all_ids().tolist()
    x, made = built(trials[0]).batch[0], trials[0].augmentation
    assert made is not None and x.std() < 0.3 and (x == 0).float().mean() > made.zeroed - 0.05
    with pytest.raises(SpecError, match="'faint' says how trials are augmented"):
        SweepSpec(faint=True)


def test_a_table_has_sums_of_the_inputs_for_columns() -> None:
    digits = datasets.load("digits")
    table = datasets.augmented(digits, Augmentation(seed=3, columns=5))
    assert table.layouts == ("vector",) and table.sample_shape("vector") == (5,) and table.outputs == 10
    (x, y), (inputs, labels) = table.batch(40, 1, "vector"), digits.batch(40, 1, "vector")
    assert x.shape == (40, 5) and torch.equal(y, labels)
    assert 0.2 < float(x.std() / inputs.std()) < 3.0
    more, known = table.batch(40, 2, "vector")[0], digits.batch(40, 2, "vector")[0]
    both, made = torch.cat([inputs, known]).double(), torch.cat([x, more]).double()
    assert torch.linalg.matrix_rank(both) < len(both)  # so that not any numbers are sums of these inputs
    torch.testing.assert_close(both @ torch.linalg.lstsq(both, made, driver="gelsd").solution, made, rtol=0, atol=1e-5)
    other = datasets.augmented(digits, Augmentation(seed=4, columns=5)).batch(40, 1, "vector")[0]
    assert not torch.equal(other, x)
    with pytest.raises(SpecError, match="vector"):
        families.get("cnn").layout_for(table)
    with pytest.raises(SpecError, match="columns"):
        Augmentation(columns=0)


def test_a_sweep_of_tables_has_few_columns_and_any_size() -> None:
    drawn = [Augmentation.draw(seed, narrow=True) for seed in range(500)]
    usual = [Augmentation.draw(seed) for seed in range(500)]
    columns = [a.columns or 0 for a in drawn]
    assert min(columns) == 2 and max(columns) == 64 and 9 <= sorted(columns)[250] <= 14
    assert all(-2.0 <= a.log_scale <= 1.0 and 100 <= (a.samples or 0) <= 10**6 for a in drawn)
    assert not any(a.gray or a.pooled for a in drawn)
    for one, other in zip(drawn, usual, strict=True):  # all else is drawn as ever
        same = ("seed", "classes", "random_labels", "noise", "zeroed", "split")
        assert all(getattr(one, k) == getattr(other, k) for k in same)
        assert "columns" not in other.to_dict() and Augmentation.from_json(one.to_json()) == one
    spec = SweepSpec(families=("dense",), datasets=("digits",), trials_per_cell=2, augmented=True, narrow=True, seed=5)
    trials = list(Plan(spec).trials())
    assert [int(t.trial_id, 16) for t in trials] == Plan(spec).all_ids().tolist()
    for trial in trials[:3]:
        assert trial.augmentation is not None
        assert built(trial).batch[0].shape == (trial.batch_size, trial.augmentation.columns)
    with pytest.raises(SpecError, match="'narrow' says how trials are augmented"):
        SweepSpec(narrow=True)


def _sorted(x: torch.Tensor) -> torch.Tensor:
    return x[np.lexsort(x.numpy().T)]


def test_inputs_are_made_noisy_then_zeroed_then_scaled() -> None:
    digits = datasets.load("digits")
    plain, labels = datasets.augmented(digits, Augmentation()).batch(256, 3, "vector")
    scaled, same = datasets.augmented(digits, Augmentation(log_scale=-2.0)).batch(256, 3, "vector")
    assert torch.equal(labels, same)
    torch.testing.assert_close(scaled, plain * math.exp(-2.0))
    noisy = datasets.augmented(digits, Augmentation(noise=0.5)).batch(256, 3, "vector")[0]
    assert (noisy - plain).std().item() == pytest.approx(0.5 * plain.std().item(), rel=0.02)
    zeroed = datasets.augmented(digits, Augmentation(zeroed=0.9, noise=0.5, log_scale=1.0)).batch(256, 3, "vector")[0]
    assert (zeroed == 0).float().mean().item() == pytest.approx(0.9, abs=0.01)
    assert zeroed[zeroed != 0].std().item() == pytest.approx(math.e * noisy.std().item(), rel=0.1)


def test_labels_are_drawn_at_random_among_the_classes_that_are_kept() -> None:
    digits = datasets.load("digits")
    keep = Augmentation(seed=4, classes=0.6)
    _, y = datasets.augmented(digits, keep).batch(800, 3, "rows")
    _, mixed = datasets.augmented(digits, keep.replace(random_labels=0.5)).batch(800, 3, "rows")
    assert (mixed != y).float().mean().item() == pytest.approx(0.5 * 4 / 5, abs=0.06)
    assert mixed.min() == 0 and mixed.max() == 4
    diabetes = datasets.load("diabetes")
    _, y = datasets.augmented(diabetes, Augmentation(classes=0.0)).batch(442, 3, "vector")
    _, mixed = datasets.augmented(diabetes, Augmentation(random_labels=1.0)).batch(442, 3, "vector")
    assert not torch.equal(mixed, y) and torch.equal(mixed.sort().values, y.sort().values)
    onehot = datasets.augmented(digits.with_task("multilabel"), keep).batch(16, 0, "vector")[1]
    assert onehot.shape == (16, 5) and torch.equal(onehot.sum(1), torch.ones(16))


def test_images_become_gray_and_small(data_root: Path) -> None:
    colour = datasets.load("cifar10", data_root)
    both = datasets.augmented(colour, Augmentation(gray=True, pooled=True))
    assert [both.sample_shape(layout) for layout in LAYOUTS] == [(256,), (16, 16), (3, 32, 32)]
    for layout in LAYOUTS:
        assert both.batch(4, 0, layout)[0].shape[1:] == both.sample_shape(layout)
    image = both.batch(4, 0, "image")[0]
    assert torch.equal(image[:, 0], image[:, 2])
    plain = datasets.augmented(colour, Augmentation()).batch(4, 0, "image")[0]
    small = both.batch(4, 0, "vector")[0].view(4, 16, 16)
    torch.testing.assert_close(small, plain.mean(1).unflatten(1, (16, 2)).unflatten(3, (16, 2)).mean((2, 4)))


def test_texts_have_no_colour_and_no_size(data_root: Path) -> None:
    imdb = datasets.load("imdb", data_root)
    changed = datasets.augmented(imdb, Augmentation(gray=True, pooled=True, classes=0.0, log_scale=1.0))
    assert changed.outputs == 2
    for layout in LAYOUTS:
        x, y = changed.batch(8, 5, layout)
        known, labels = imdb.batch(8, 5, layout)
        torch.testing.assert_close(x, known * math.e)
        assert torch.equal(y, labels)
    with pytest.raises(SpecError, match="whose targets are its inputs"):
        datasets.augmented(imdb.with_task("sequence"), Augmentation())


def test_of_words_some_are_left_out_and_texts_are_cut_into_more_classes(data_root: Path) -> None:
    words = datasets.load("imdb@40", data_root)
    changed = datasets.augmented(words, Augmentation(split=1.0, zeroed=0.5, noise=1.0, log_scale=-1.0))
    assert changed.outputs == 200 and changed.vocabulary == words.vocabulary and changed.layouts == ("tokens",)
    x, y = changed.batch(64, 3, "tokens")
    known, labels = words.batch(64, 3, "tokens")
    assert x.dtype == torch.int64 and torch.equal(y // 100, labels) and len(set(y.tolist())) > 40
    left = x != 0
    assert torch.equal(x[left], known[left]) and 0.4 < float(left.float().mean() / (known != 0).float().mean()) < 0.6
    with pytest.raises(SpecError, match="has no sums"):
        datasets.augmented(words, Augmentation(columns=4))


def test_a_trial_trains_on_it_and_its_rows_say_so() -> None:
    augmentation = Augmentation(seed=2, classes=0.0, log_scale=-1.0, pooled=True, samples=4321)
    trials = [TrialSpec("mlp", "digits", 16, 1e-3, seed=s, augmentation=augmentation) for s in range(3)]
    found = list(run_trials([*trials, TrialSpec("mlp", "digits", 16, 1e-3)]))
    assert all(row.get("error") is None for rows in found for row in rows)
    by_id = {rows[0]["trial_id"]: rows[0] for rows in found}
    for trial in trials:
        row = by_id[trial.trial_id]
        assert Augmentation.from_json(row["augmentation"]) == augmentation
        assert row["log_n"] == np.float32(math.log(4321))
        assert '"outputs":2' in row["model"] and '"input_shape":[16]' in row["model"]
        assert TrialSpec.from_json(trial.to_json()) == trial
    assert by_id[TrialSpec("mlp", "digits", 16, 1e-3).trial_id]["augmentation"] is None


def test_an_augmented_plan_draws_for_every_trial_and_replicates_share_their_draw() -> None:
    spec = SweepSpec(families=("mlp",), datasets=("digits",), batch_sizes=(16,), trials_per_cell=20, augmented=True)
    trials = list(Plan(spec).trials())
    assert len({t.augmentation for t in trials}) == len(trials) == 60
    assert {t.seed for t in trials} == {t.seed for t in Plan(spec.replace(augmented=False)).trials()}
    groups = list(Plan(spec.replace(replicates=10)).trials())
    shared = {(t.lr, t.model_seed): [g for g in groups if g.model_seed == t.model_seed] for t in groups}
    assert len(shared) == 6 and all(len({t.augmentation for t in g}) == 1 for g in shared.values())
    assert all(len({t.seed_for("model") for t in g}) == 1 for g in shared.values())
    assert len({t.seed_for("init") for t in groups}) == len({t.seed_for("batch") for t in groups}) == 60
