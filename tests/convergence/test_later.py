"""A model whose head starts at zero is looked at again after two updates, and put back."""

from __future__ import annotations

import logging
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cape.convergence.later import with_later
from cape.convergence.single import BETAS, WEIGHT_DECAY
from cape.feature_names import FEATURE_NAMES, LATER_COLUMNS, LATER_FEATURES, head_at_zero
from cape.probing import probe

LR, SIZE = 1e-2, 1000


def net(head: float = 0.0, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    with torch.no_grad():
        for p in model[-1].parameters():
            p.mul_(head)
    return model


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 12, generator=generator), torch.randint(3, (count,), generator=generator)


def looked(model: nn.Module, data: tuple[Tensor, Tensor], lr: float = LR, loss: object = "cross_entropy") -> dict:
    features = probe(model, data, loss=loss, lr=lr, dataset_size=SIZE)  # type: ignore[arg-type]
    return with_later(features, model, data, loss=loss, lr=lr, dataset_size=SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_is_the_probe_after_two_updates(dropout: float) -> None:
    model, data = net(dropout=dropout), batch()
    found = looked(model, data)
    trained = deepcopy(model).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    torch.manual_seed(0)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(trained(data[0]), data[1]).backward()
        optimizer.step()
    after = probe(trained, data, lr=LR, dataset_size=SIZE).as_dict()
    at_first = probe(model, data, lr=LR, dataset_size=SIZE).as_dict()
    assert tuple(found) == (*FEATURE_NAMES, *LATER_COLUMNS)
    for name, column in zip(LATER_FEATURES, LATER_COLUMNS, strict=True):
        assert found[column] == pytest.approx(after[name], rel=1e-5, abs=1e-6)
    assert {name: found[name] for name in FEATURE_NAMES} == at_first
    # No gradient reached the layers before the head at first: now it does.
    assert head_at_zero(found["log_hidden_pull"]) and not head_at_zero(found["later_log_hidden_pull"])
    # What an update does not move has no second column.
    assert all(after[n] == at_first[n] for n in FEATURE_NAMES if n not in LATER_FEATURES and n != "draw_noise")


def test_the_model_the_batch_and_the_draws_are_as_they_were() -> None:
    model, data = net(dropout=0.3).eval(), batch()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    state, kept, given = deepcopy(model.state_dict()), model[0].weight.grad.clone(), data[0].clone()
    drawn = torch.get_rng_state()
    looked(model, data)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, kept) and model[-1].weight.grad is None
    assert not any(m.training for m in model.modules()) and torch.equal(data[0], given)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_other_models_are_looked_at_once() -> None:
    model, data = net(head=1e-3), batch()
    assert tuple(looked(model, data)) == FEATURE_NAMES


def test_where_two_updates_leave_no_loss_it_is_the_first_look(caplog: pytest.LogCaptureFixture) -> None:
    """A learning rate without measure: the loss is no number any more, and the first look's says what is known."""

    def explosive(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") + torch.exp(outputs.square().sum(1) * 1e3) - 1

    with caplog.at_level(logging.WARNING):
        found = looked(net(), batch(), lr=1.0, loss=explosive)
    assert "cannot be probed after its first updates" in caplog.text
    assert all(found[column] == found[name] for name, column in zip(LATER_FEATURES, LATER_COLUMNS, strict=True))
