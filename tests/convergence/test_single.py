"""T* of one model: against a loop written anew, deterministic, and without a trace on the model."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cape.config import StoppingRule
from cape.convergence import measure
from cape.errors import ModelError, SpecError

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Batch:
    """64 of the bundled handwritten digits, scaled to [0, 1]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return torch.tensor(bunch.data[:64] / 16.0, dtype=torch.float32), torch.tensor(bunch.target[:64])


def mlp(dropout: float = 0.2, width: int = 64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(64, width), nn.BatchNorm1d(width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, 10)
    )


def plain_loop(model: nn.Module, batch: Batch, lr: float, steps: int, seed: int) -> list[float]:
    """The textbook loop: L_0 before any update, one batch, train mode, unfused AdamW."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.999), foreach=False)
    torch.manual_seed(seed)
    losses = []
    for _ in range(steps + 1):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("lr", [5e-4, 2e-3])
def test_equals_the_plain_loop(digits: Batch, dropout: float, lr: float) -> None:
    model = mlp(dropout)
    result = measure(model, digits, lr=lr, seed=11)
    expected = plain_loop(model, digits, lr, result.stopped_at, seed=11)
    np.testing.assert_allclose(result.losses, expected, rtol=1e-4)
    assert result.stop_reason == "reached"
    assert result.l0 == pytest.approx(expected[0], rel=1e-6)  # to rounding: on some CPUs the last bit differs
    for epsilon in (0.1, 0.15, 0.2):
        assert result.t_star[epsilon] == next(t for t, v in enumerate(expected) if v <= epsilon * expected[0])
        assert result.reached(epsilon)
    assert not result.reached(0.001)
    assert result.stopped_at == result.t_star[0.1] == len(result.losses) - 1 > 1


def test_the_model_and_the_random_state_are_left_untouched(digits: Batch) -> None:
    model = mlp()
    model[3].eval()
    model[0].bias.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    handle = model[0].register_forward_hook(lambda *_: None)
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    grad, pointers = model[4].weight.grad, [p.data_ptr() for p in model.parameters()]
    state = torch.get_rng_state()
    measure(model, digits, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert not model[0].bias.requires_grad and model[0].bias.grad is None
    assert model[4].weight.grad is grad and bool((grad == 1).all())
    assert model[0].weight.grad is None
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert list(model[0]._forward_hooks) == [handle.id]


def test_the_seed_decides_and_nothing_else_does(digits: Batch) -> None:
    model = mlp(dropout=0.5)
    first = measure(model, digits, seed=5)
    torch.rand(17)
    again = measure(model, digits, seed=5)
    np.testing.assert_array_equal(first.losses, again.losses)
    other = measure(model, digits, seed=6)
    assert not np.array_equal(first.losses, other.losses)


@pytest.mark.parametrize("read_every", [2, 7, 64])
def test_running_ahead_of_the_rule_changes_nothing(digits: Batch, read_every: int) -> None:
    model = mlp()
    step_by_step, ahead = measure(model, digits), measure(model, digits, read_every=read_every)
    assert ahead.t_star == step_by_step.t_star
    assert (ahead.stop_reason, ahead.stopped_at) == (step_by_step.stop_reason, step_by_step.stopped_at)
    np.testing.assert_array_equal(ahead.losses, step_by_step.losses)


def test_one_trajectory_serves_all_epsilons(digits: Batch) -> None:
    model = mlp()
    together = measure(model, digits, epsilons=(0.1, 0.5, 0.3))
    assert list(together.t_star) == [0.5, 0.3, 0.1]
    for epsilon in (0.1, 0.3, 0.5):
        assert measure(model, digits, epsilons=(epsilon,)).t_star == {epsilon: together.t_star[epsilon]}


def test_censored_trajectories_say_why_and_keep_the_crossings_they_had(digits: Batch) -> None:
    model = mlp()
    known = measure(model, digits, epsilons=(0.5, 0.1))
    capped = measure(model, digits, epsilons=(0.5, 0.1), stopping=StoppingRule(max_steps=known.t_star[0.5] or 0))
    assert capped.t_star == {0.5: known.t_star[0.5], 0.1: None}
    assert (capped.stop_reason, capped.stopped_at) == ("cap", known.t_star[0.5])

    frozen = nn.Sequential(nn.Linear(64, 10))
    flat = measure(frozen, (torch.zeros(8, 64), torch.arange(8)), lr=1e-12)  # nothing to learn from at this rate
    assert (flat.stop_reason, flat.stopped_at, len(flat.losses)) == ("plateau", 199, 200)
    assert set(flat.t_star.values()) == {None}


def test_a_loss_that_is_not_finite_is_divergence_at_once(digits: Batch) -> None:
    x, y = digits
    at_once = measure(mlp(), (torch.full_like(x, float("nan")), y))
    assert (at_once.stop_reason, at_once.stopped_at, len(at_once.losses)) == ("diverged", 0, 1)
    assert math.isnan(at_once.l0) and set(at_once.t_star.values()) == {None}
    wild = measure(nn.Sequential(nn.Linear(64, 10)), (x, y.float()[:, None].expand(-1, 10)), loss="mse", lr=1e30)
    assert wild.stop_reason == "diverged" and wild.stopped_at > 0
    assert np.isfinite(wild.losses[:-1]).all() and not np.isfinite(wild.losses[-1])


def test_losses_of_every_form(digits: Batch) -> None:
    x, y = digits
    model = mlp(dropout=0.0)
    by_name = measure(model, digits).t_star
    assert measure(model, digits, loss=nn.CrossEntropyLoss()).t_star == by_name
    per_sample = measure(model, digits, loss=lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"))
    assert per_sample.t_star == by_name
    regression = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    assert measure(regression, (x, y.float()), loss="half_mse", lr=5e-3).stop_reason == "reached"


@pytest.mark.parametrize("constant", [-1.0, 0.0])
def test_a_loss_that_does_not_start_above_zero_is_refused(digits: Batch, constant: float) -> None:
    with pytest.raises(ModelError, match="before any update"):
        measure(mlp(), digits, loss=lambda o, t: o.sum() * 0 + constant)


def test_bad_arguments_get_one_sentence(digits: Batch) -> None:
    x, y = digits
    with pytest.raises(ModelError, match="batch is empty"):
        measure(mlp(), (x[:0], y[:0]))
    with pytest.raises(ModelError, match="labels must lie in 0..9"):
        measure(mlp(), (x, y + 90))
    with pytest.raises(ModelError, match="classes last .* 'sequence_cross_entropy'"):
        measure(nn.Embedding(10, 10), (y.view(16, 4), y.view(16, 4)))
    with pytest.raises(ModelError, match="no trainable parameter"):
        measure(mlp().requires_grad_(False), digits)
    with pytest.raises(SpecError, match="learning rate"):
        measure(mlp(), digits, lr=-1.0)
    with pytest.raises(SpecError, match="between 0 and 1"):
        measure(mlp(), digits, epsilons=(1.5,))
    with pytest.raises(SpecError, match="Did you mean 'float32'"):
        measure(mlp(), digits, precision="float23")


def test_bf16_follows_float32_roughly_and_keeps_parameters_float32(digits: Batch) -> None:
    model = mlp(dropout=0.0)
    single, half = measure(model, digits), measure(model, digits, precision="bf16")
    assert half.stop_reason == "reached"
    assert not np.array_equal(single.losses[:3], half.losses[:3])
    assert abs(half.stopped_at - single.stopped_at) <= 0.1 * single.stopped_at + 1
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_works_under_no_grad_and_counts_a_step(digits: Batch) -> None:
    with torch.no_grad():
        quick = measure(mlp(), digits, epsilons=(0.95,))
    assert quick.stopped_at < 5
    assert 0.0 < quick.step_seconds < 1.0  # taken from steps beyond the end where the trajectory was short
    assert quick.seconds > 0.0


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_cuda_agrees_with_the_cpu(digits: Batch, precision: str) -> None:
    model = mlp(dropout=0.0)
    cpu = measure(model, digits)
    cuda = measure(copy.deepcopy(model).cuda(), digits, precision=precision)
    slack = 1 if precision == "float32" else 3
    assert all(abs((cuda.t_star[e] or 0) - (cpu.t_star[e] or 0)) <= slack for e in cpu.t_star)
    again = measure(copy.deepcopy(model).cuda(), digits, precision=precision, read_every=1)
    np.testing.assert_array_equal(cuda.losses, again.losses)
