"""The probe of several dense models at once says of each what ``probe`` says of it alone."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from cape import datasets, families
from cape.config import ModelSpec
from cape.convergence import Subject
from cape.convergence.convert import Unstackable
from cape.convergence.stacked_probe import probe_many, probed_together
from cape.errors import ModelError
from cape.probing import probe

WIDE = ModelSpec("mlp", "mlp", "vector", (64,), 10, options={"depth": 3, "width": 96, "activation": "gelu"})


def trained(model: nn.Module, seed: int) -> nn.Module:
    """Give batch norms statistics and scales that tell them from the identity."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d):
            assert m.running_mean is not None and m.running_var is not None
            m.running_mean.normal_(0.0, 0.3, generator=generator)
            m.running_var.uniform_(0.5, 2.0, generator=generator)
            if m.affine:
                m.weight.data.uniform_(0.5, 1.5, generator=generator)
                m.bias.data.normal_(0.0, 0.2, generator=generator)
    return model


def chain(kind: str) -> nn.Module:
    if kind == "family":
        return families.build(WIDE)
    if kind == "image":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 20, bias=False), nn.Tanh(), nn.Linear(20, 10))
    if kind == "no affine":
        front = [nn.Linear(64, 32), nn.BatchNorm1d(32, affine=False), nn.SiLU(), nn.Dropout(0.5)]
        return nn.Sequential(*front, nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 10))
    return nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.1), nn.BatchNorm1d(24), nn.Linear(24, 1))


def subjects(kind: str, count: int, batch: int = 12) -> list[Subject]:
    made = []
    for i in range(count):
        x, y = datasets.load("digits").batch(batch, i, "vector")
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(i)
            model = trained(chain(kind), i)
        x = x.view(-1, 8, 8) if kind == "image" else x
        y = y.float() / 9 if kind == "regression" else y
        made.append(Subject(model, (x, y), lr=(5e-4, 1e-3, 2e-3)[i % 3]))
    return made


@pytest.mark.parametrize("kind", ["family", "image", "no affine", "regression"])
@pytest.mark.parametrize("count", [1, 5])
def test_several_at_once_are_each_alone(kind: str, count: int) -> None:
    loss = "half_mse" if kind == "regression" else "cross_entropy"
    trials = subjects(kind, count)
    assert probed_together(trials[0].model, trials[0].batch, loss) == 8
    before = [copy.deepcopy(t.model.state_dict()) for t in trials]
    state = torch.get_rng_state()
    found = probe_many(trials, [100 + i for i in range(count)], loss)
    assert torch.equal(torch.get_rng_state(), state)
    for i, (trial, features, held) in enumerate(zip(trials, found, before, strict=True)):
        alone = probe(trial.model, trial.batch, loss=loss, lr=trial.lr, dataset_size=100 + i).as_dict()
        for name, value in features.as_dict().items():
            expected = alone[name]
            assert value == expected, name
        assert all(torch.equal(v, held[k]) for k, v in trial.model.state_dict().items())
        assert all(p.grad is None for p in trial.model.parameters()) and trial.model.training


@pytest.mark.parametrize("kind", ["family", "regression"])
def test_the_neighbours_change_no_digit(kind: str) -> None:
    loss = "half_mse" if kind == "regression" else "cross_entropy"
    trials = subjects(kind, 5, batch=32)
    together = probe_many(trials, [50] * 5, loss)
    assert together[::-1] == probe_many(trials[::-1], [50] * 5, loss)
    assert [probe_many([t], [50], loss)[0] for t in trials] == together


def test_what_is_no_dense_chain_is_left_to_the_probe() -> None:
    x, y = torch.randn(4, 64), torch.tensor([0, 1, 2, 3])

    def taken(model: nn.Module, loss: str = "cross_entropy", size: int = 4) -> int:
        return probed_together(model, (x[:size], y[:size]), loss)

    assert taken(chain("family")) == 8
    assert taken(chain("family"), size=1) == 0
    assert taken(chain("family").double()) == 0
    assert taken(nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 10))) == 0
    assert taken(nn.Sequential(nn.Linear(64, 8), nn.LayerNorm(8), nn.Linear(8, 10))) == 0
    assert taken(nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.Linear(4096, 10))) == 1
    rnn = families.build(ModelSpec("rnn", "gru", "rows", (8, 8), 10, options={"layers": 1, "hidden": 8}))
    assert probed_together(rnn, (x.view(4, 8, 8), y), "cross_entropy") == 0
    positions = nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(64, 10))
    assert probed_together(positions, (x.view(4, 8, 8), y), "cross_entropy") == 0
    with pytest.raises(Unstackable, match="over vectors"):
        probe_many([Subject(positions, (x.view(4, 8, 8), y))], [10], "cross_entropy")


def test_one_that_cannot_be_probed_is_refused() -> None:
    trials = subjects("family", 3)
    with torch.no_grad():
        next(trials[1].model.parameters()).fill_(math.nan)
    with pytest.raises(ModelError):
        probe_many(trials, [10] * 3, "cross_entropy")
    labels = subjects("family", 2)
    labels[1].batch[1][0] = 10
    with pytest.raises(ModelError, match="Labels run from . to 10"):
        probe_many(labels, [10] * 2, "cross_entropy")
