"""The domain check on real models: a meta-regressor of a real sweep, and models that it should or should not know."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from cape import datasets
from cape.config import SweepSpec
from cape.drawn import build_model, draw_model
from cape.metamodel.artifact import MetaModel
from cape.metamodel.domain import FALSE_ALARM
from cape.metamodel.fit import fit_table
from cape.metamodel.presets import PRESETS
from cape.metamodel.rows import row_from_features
from cape.predict import predict
from cape.probing import probe
from cape.store.schema import ROW_SCHEMA
from cape.sweep.plan import Plan
from cape.trial import run_trials

SPEC = SweepSpec(families=("mlp",), datasets=("digits",), batch_sizes=(16, 32), trials_per_cell=20, seed=7)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small gain nothing from a second thread, and lose much to it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def meta_model() -> MetaModel:
    rows = [row for trial in run_trials(Plan(SPEC).trials()) for row in trial]
    return fit_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), PRESETS["product"].replace(trees=50, select=False))


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    return datasets.load("digits").batch(32, seed=3, layout="vector")


def asked(model: nn.Module, batch: tuple[Tensor, Tensor], meta_model: MetaModel, **changes: object) -> list[str]:
    """Return the warnings of a prediction, and check that they and ``in_domain`` say the same."""
    options = {"lr": 1e-3, "dataset_size": datasets.load("digits").full_train_size, "epsilon": 0.1, **changes}
    made = predict(model, batch, meta_model=meta_model, **options)  # type: ignore[arg-type]
    assert made.in_domain == (not made.warnings)
    return list(made.warnings)


def network(width: int, inputs: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 10)]
    return nn.Sequential(*layers)


def test_false_alarms_on_models_of_other_seeds_are_rare(meta_model: MetaModel) -> None:
    dataset = datasets.load("digits")
    flagged = []
    for trial in Plan(SPEC.replace(seed=8, trials_per_cell=12)).trials():
        spec = draw_model(trial, dataset)
        x = dataset.batch(trial.batch_size, trial.seed_for("batch"), spec.layout)
        features = probe(build_model(trial, spec), x, lr=trial.lr, dataset_size=dataset.full_train_size)
        inside, warnings, _ = meta_model.domain.check(row_from_features(features.as_dict(), "mlp", 0.1))  # type: ignore[union-attr]
        flagged.append(not inside)
    # 72 models at a rate of FALSE_ALARM: five or more have a probability of one in a hundred.
    assert len(flagged) == 72 and np.sum(flagged) <= 4 and FALSE_ALARM == 0.02


def test_a_family_that_was_left_out_is_flagged_by_name_and_by_its_features(meta_model: MetaModel) -> None:
    dataset = datasets.load("digits")
    trial = next(iter(Plan(SPEC.replace(families=("rnn",))).trials()))
    spec = draw_model(trial, dataset)
    model = build_model(trial, spec)
    rows = dataset.batch(32, 0, spec.layout)
    assert any("'rnn' is not among those" in w for w in asked(model, rows, meta_model))
    # Passed off as a family that was fitted on, its features give it away.
    assert any("times as far" in w for w in asked(model, rows, meta_model, family="mlp"))


def test_a_fifty_times_larger_model_is_flagged(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    inputs = batch[0].shape[1]
    low, high = (np.exp(v) for v in meta_model.domain.ranges["mlp"]["log_p"])  # type: ignore[union-attr]
    usual, large = network(512, inputs), network(int(50 * high / (inputs + 10)), inputs)
    assert low < sum(p.numel() for p in usual.parameters()) < high
    assert not any("parameter count" in w for w in asked(usual, batch, meta_model))
    assert any("parameter count" in w for w in asked(large, batch, meta_model))


def test_a_learning_rate_of_one_is_flagged(meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    said = asked(network(256, batch[0].shape[1]), batch, meta_model, lr=1.0)
    assert any("The learning rate 1 is outside 0.0005 to 0.002" in w for w in said)


@pytest.mark.parametrize("loss", ["half_mse", nn.MultiMarginLoss()])
def test_a_loss_that_it_never_saw_is_flagged(loss: object, meta_model: MetaModel, batch: tuple[Tensor, Tensor]) -> None:
    model, targets = network(256, batch[0].shape[1]), batch[1]
    if loss == "half_mse":
        model, targets = nn.Sequential(model, nn.Linear(10, 1)), batch[1].float()[:, None]
    assert any(
        "The loss" in w and "is not one of" in w for w in asked(model, (batch[0], targets), meta_model, loss=loss)
    )


def test_every_trial_calibrates(meta_model: MetaModel) -> None:
    data = meta_model.card["data"]
    assert data["trials"] == data["calibration_trials"] == len(Plan(SPEC)) == 120
