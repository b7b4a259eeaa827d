"""The signals of slow regimes: each against its formula, and on models built to show what it is for."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cape.feature_names import FEATURE_NAMES, SHAPE_FEATURES, SLOW_FEATURES
from cape.metamodel.rows import NUMERIC
from cape.probing import Features, probe
from cape.probing.signals import FLOOR, draw_noise, layer_signals, own_decrease, spread

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

    def run(seed: int = 0) -> Tensor:
        torch.manual_seed(seed)  # one dropout mask; float64 draws the same one
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
        "log_layers": math.log(2),
        "log_inputs": math.log(12),
        "log_outputs": math.log(5),
        "draw_noise": float(rms(run(seed=1) - start).detach()),
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
    assert set(expected) == {*SLOW_FEATURES, *SHAPE_FEATURES, "draw_noise"} <= set(NUMERIC)


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


def test_noise_is_seen_wherever_it_is_drawn() -> None:
    class Functional(nn.Module):
        def __init__(self, p: float) -> None:
            super().__init__()
            self.p = p
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(x, self.p, self.training))

    def noise(p: float) -> tuple[float, int]:
        torch.manual_seed(0)
        model, calls = Functional(p), []
        model.head.register_forward_hook(lambda *_: calls.append(1))
        return probe(model, batch(), lr=LR, dataset_size=100).draw_noise, len(calls)

    none, some, much = noise(0.0), noise(0.1), noise(0.5)
    assert none[0] == 0.0 < some[0] < much[0]
    assert some[1] == none[1] + 1  # what draws nothing pays nothing
    outputs = torch.zeros(4, 3)
    assert draw_noise(outputs, outputs + 2.0) == 2.0
    assert draw_noise(outputs, outputs * math.nan) == draw_noise(outputs, outputs + 1e30) == 1.0 / FLOOR


def test_sizes_count_every_input() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a[:, :4] + b[:, 0, :4] + self.shift

    y = torch.randint(4, (6,), generator=torch.Generator().manual_seed(0))
    found = probe(Pair(), ((torch.randn(6, 10), torch.randn(6, 2, 7)), y), lr=LR, dataset_size=100)
    assert found.log_inputs == math.log(24) and found.log_outputs == math.log(4) and found.log_layers == 0.0


def test_models_without_weights_or_gradients_have_signals_too() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(12))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale)[:, :5]

    found = probe(Scale(), batch(), lr=LR, dataset_size=100)
    assert found.log_weakest_layer == pytest.approx(0.0, abs=1e-6) and found.log_last_share == pytest.approx(0.0)
    empty = layer_signals([], [], 0.0, LR)
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
