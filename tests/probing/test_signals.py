"""The signals of slow regimes: each against its formula, and on models built to show what it is for."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cape.feature_names import FEATURE_NAMES, SLOW_FEATURES
from cape.metamodel.rows import NUMERIC
from cape.probing import Features, probe
from cape.probing.signals import FLOOR, layer_signals, own_decrease, spread

LR = 1e-3


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 5))


def batch(size: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 12, generator=generator), torch.randint(5, (size,), generator=generator)


def test_every_signal_is_what_its_formula_says() -> None:
    model, (x, y) = classifier(), batch()
    found = probe(model, (x, y), lr=LR, dataset_size=100)
    twin = copy.deepcopy(model).double().train()

    def run() -> Tensor:
        torch.manual_seed(0)  # one dropout mask; float64 draws the same one
        return twin(x.double())

    start = run()
    losses = F.cross_entropy(start, y, reduction="none")
    grads = torch.autograd.grad(losses.mean(), list(twin.parameters()), retain_graph=True)
    (residual,) = torch.autograd.grad(losses.sum(), start)
    flat, theta = torch.cat([g.flatten() for g in grads]), torch.cat([p.detach().flatten() for p in twin.parameters()])

    def rms(t: Tensor) -> Tensor:
        return t.square().mean().sqrt()

    expected = {
        "log_output_spread": 0.5 * math.log(float(start.detach().var(0, correction=0).mean())),
        "log_weakest_layer": math.log(min(rms(grads[0]), rms(grads[4])) / rms(flat)),
        "log_last_share": math.log(grads[4].abs().sum() / flat.abs().sum()),
        "log_move": math.log(LR * math.sqrt(len(flat)) / theta.norm()),
    }
    for k in (1, 16):
        with torch.no_grad():
            for p, own, g in zip(twin.parameters(), classifier().parameters(), grads):
                p.copy_(own.double() - k * LR * g.sign())
        after = F.cross_entropy(run(), y, reduction="none").detach()
        expected[f"spread_{k}"] = float(after.std(correction=0) / after.mean())
    expected["line_16"] = math.log(float(after.mean() / losses.detach().mean()))
    change, pull = run().detach() - start.detach(), residual.detach()
    own = sum(-(change[b] - change.mean(0)) @ (pull[b] - pull.mean(0)) for b in range(len(x))) / len(x)
    expected["log_own_16"] = math.log(float(own / losses.detach().mean()))
    assert {k: getattr(found, k) for k in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert set(expected) == set(SLOW_FEATURES) <= set(NUMERIC)


def test_they_repeat_and_leave_the_model_as_it_was() -> None:
    model, data = classifier(), batch()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = probe(model, data, lr=LR, dataset_size=100)
    torch.manual_seed(99)
    assert probe(model, data, lr=LR, dataset_size=100) == first
    torch.manual_seed(7)
    probe(model, data, lr=LR, dataset_size=100)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert tuple(first.as_dict()) == FEATURE_NAMES == tuple(Features.__dataclass_fields__)


def test_a_vanishing_gradient_shows_in_the_weakest_layer() -> None:
    def deep(activation: type[nn.Module], layers: int) -> float:
        torch.manual_seed(0)
        hidden = [m for _ in range(layers) for m in (nn.Linear(12, 12), activation())]
        return probe(nn.Sequential(*hidden, nn.Linear(12, 5)), batch(), lr=LR, dataset_size=100).log_weakest_layer

    assert deep(nn.Sigmoid, 6) < deep(nn.Sigmoid, 2) - 3 < deep(nn.Tanh, 2) - 3


def test_inputs_that_are_hardly_told_apart_show_in_the_own_movement() -> None:
    x, y = batch()
    plain = probe(classifier()[0:1].append(nn.Linear(24, 5)), (x, y), lr=LR, dataset_size=100)
    alike = probe(classifier()[0:1].append(nn.Linear(24, 5)), (x * 1e-2 + 1.0, y), lr=LR, dataset_size=100)
    assert alike.log_own_16 < plain.log_own_16 - 2 and alike.log_output_spread < plain.log_output_spread - 4
    outputs, residual = torch.zeros(4, 3), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert own_decrease(outputs, residual, outputs - 0.5, 1.0) == math.log(FLOOR)
    centred = residual - residual.mean(0)
    assert own_decrease(outputs, residual, outputs - 0.5 * centred, 2.0) == pytest.approx(
        math.log(float(0.5 * centred.square().sum()) / 4 / 2.0), rel=1e-6
    )
    assert own_decrease(outputs, residual, outputs * math.nan, 1.0) == math.log(FLOOR)


def test_the_spread_of_losses() -> None:
    assert spread(torch.full((8,), 2.0)) == 0.0
    assert spread(torch.tensor([0.0, 0.0, 0.0, 8.0])) == pytest.approx(math.sqrt(3))  # its largest is below √4
    assert spread(torch.tensor([1.0, math.inf])) == math.sqrt(2)
    assert spread(torch.tensor([3.0])) == 0.0


def test_models_without_weights_or_gradients_have_signals_too() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale)[:, :5]

    found = probe(Scale(), batch(), lr=LR, dataset_size=100)
    assert found.log_weakest_layer == pytest.approx(0.0, abs=1e-6) and found.log_last_share == pytest.approx(0.0)
    empty = layer_signals([], [], LR, 0.0, 0.0)
    assert (empty.weakest, empty.last_share, empty.move) == (math.log(FLOOR),) * 3
    assert all(v is None or math.isfinite(v) for v in found.as_dict().values())


@pytest.mark.parametrize("lr", [1e-3, 1e6])
def test_a_loss_that_is_a_mean_and_an_lr_out_of_this_world_stay_finite(lr: float) -> None:
    def mean_only(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets)

    named = probe(classifier(), batch(), lr=lr, dataset_size=100)
    custom = probe(classifier(), batch(), loss=mean_only, lr=lr, dataset_size=100)
    for name, value in custom.as_dict().items():
        assert value == (None if value is None else pytest.approx(getattr(named, name), rel=1e-4, abs=1e-4))
        assert value is None or math.isfinite(value)
