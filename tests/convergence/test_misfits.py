"""Trials that a stack must not take as they come: what it says of each is what ``measure`` says."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cape.config import StoppingRule
from cape.convergence import Subject, measure_many
from cape.convergence.stack import loss_gradients
from cape.errors import ModelError, SpecError
from cape.tasks import Loss
from tests.convergence.test_batched import alone, losses, together

SHORT = StoppingRule(max_steps=8)


def chain(activation: Callable[[], nn.Module] = nn.Tanh, p: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 24), activation(), nn.Dropout(p), nn.Linear(24, 4))


class Own(nn.Module):
    """Not a chain: ``vmap`` runs it."""

    def __init__(self, scale: Any = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.scale = nn.Linear(8, 12), nn.Linear(12, 4), scale

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale(x[:, :1]) if callable(self.scale) else self.scale
        if isinstance(scale, (list, dict, np.ndarray)):
            scale = torch.as_tensor(scale["of"] if isinstance(scale, dict) else scale, dtype=x.dtype)
        out: Tensor = self.b(self.a(x).tanh() * scale)
        return out


class Shifted(Own):
    def __init__(self, shift: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.shift is None else x + self.shift / 2)


def subject(model: nn.Module, batch: int = 16, **changes: Any) -> Subject:
    torch.manual_seed(7)
    given = {"lr": 1e-2, "stopping": SHORT, "seed": 3, **changes}
    return Subject(model, (torch.randn(batch, 8), torch.arange(batch) % 4), **given)


def frozen() -> nn.Module:
    model = chain()
    model[0].weight.requires_grad_(False)
    return model


def shifted(shift: Tensor | None) -> nn.Module:
    return Shifted(shift)


def patched(p: float = 0.0, **methods: Any) -> nn.Module:
    model = chain(p=p).eval()
    for name, method in methods.items():
        setattr(model[2] if name == "forward" else model, name, method)
    return model


def hooked() -> nn.Module:
    model = chain()
    model[0].weight.register_hook(lambda g: g * 0)
    return model


@pytest.mark.parametrize(
    "models",
    [
        lambda: [chain(nn.ReLU), chain(nn.Tanh), chain(nn.GELU)],
        lambda: [chain(p=0.1), chain(p=0.5)],
        lambda: [chain(), frozen()],
        lambda: [chain(), hooked()],
        lambda: [Own(1.0), Own(2.0)],
        lambda: [Own(torch.ones(12)), Own(torch.full((12,), 2.0))],
        lambda: [Own(torch.ones(1).expand(12)), Own(torch.tensor([2.0]).expand(12))],
        lambda: [Own([1.0]), Own([2.0])],
        lambda: [Own({"of": 1.0}), Own({"of": 2.0})],
        lambda: [Own(np.float32(1.0)), Own(np.float32(2.0))],
        lambda: [Own(np.ones(12)), Own(np.full(12, 2.0))],
        lambda: [Own(torch.sin), Own(torch.cos)],
        lambda: [shifted(None), shifted(torch.ones(8))],
        lambda: [shifted(torch.ones(8, dtype=torch.int64)), shifted(torch.full((8,), 1.5))],
        lambda: [patched(forward=lambda x: x), patched(forward=lambda x: 2 * x)],
        lambda: [patched(train=lambda mode=True: None, p=0.5) for _ in range(2)],
    ],
    ids=[
        *("activations", "dropout", "frozen", "gradient hooks", "a number", "a tensor", "an expanded one", "a list"),
        *("a dict", "a NumPy scalar", "an array", "a function", "no buffer", "a buffer of another type", "a forward"),
        "a mode",
    ],
)
def test_a_trial_that_is_not_like_the_first_runs_beside_the_stack(models: Callable[[], list[nn.Module]]) -> None:
    trials = [subject(m) for m in models()]
    for outcome, one in zip(together(trials), trials, strict=True):
        torch.testing.assert_close(losses(outcome), losses(alone(one)), rtol=1e-6, atol=0)


def test_what_every_module_calls_is_called_in_a_stack_too() -> None:
    trials = [subject(chain()) for _ in range(2)]
    handle = nn.modules.module.register_module_forward_hook(lambda m, x, y: y * 2 if isinstance(m, nn.Tanh) else None)
    try:
        hooked = [losses(o).tolist() for o in together(trials)]
        expected = losses(alone(trials[0])).tolist()
    finally:
        handle.remove()
    assert hooked == [expected] * 2 and expected != losses(alone(trials[0])).tolist()


class KeepsEval(nn.Module):
    """The usual way to freeze batch norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.norm, self.b = nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Linear(12, 4)

    def train(self, mode: bool = True) -> KeepsEval:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.norm(self.a(x)).tanh())
        return out


class Rebinds(Own):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return super().forward(x - self.mean)


class Counts(Own):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return super().forward(x * (1 + 0.1 * self.calls))


class Throws(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + random.random()))


@pytest.mark.parametrize("make", [KeepsEval, Rebinds, Counts, Throws], ids=lambda m: m.__name__)
def test_models_with_a_life_of_their_own_run_singly(make: Callable[[], nn.Module]) -> None:
    trials = [subject(make()) for _ in range(2)]
    before = random.getstate()
    for outcome, one in zip(together(trials), trials, strict=True):
        assert losses(outcome).tolist() == losses(alone(one)).tolist()
    assert random.getstate() == before


@pytest.mark.parametrize("model", [chain, lambda p: nn.Sequential(Own(), nn.Dropout(p))], ids=["layers", "vmap"])
def test_dropout_that_keeps_nothing(model: Any) -> None:
    trials = [subject(model(p=1.0)) for _ in range(2)]
    for outcome, one in zip(together(trials), trials, strict=True):
        torch.testing.assert_close(losses(outcome), losses(alone(one)), rtol=1e-6, atol=0)


def test_a_batch_norm_over_one_sample_is_refused_as_measure_refuses_it() -> None:
    normed = lambda: nn.Sequential(nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Linear(24, 4))  # noqa: E731
    outcomes = together([subject(normed(), batch=1) for _ in range(2)])
    assert all(isinstance(o.error, ModelError) and "at least 2 samples" in str(o.error) for o in outcomes)


class Raises(Own):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = [error]

    def forward(self, x: Tensor) -> Tensor:
        if self.error[0] is not None:
            raise self.error[0]
        return super().forward(x)


def test_whatever_a_model_raises_is_its_own_trials_error_and_none_is_lost() -> None:
    models: list[nn.Module] = [Own(), Raises(ValueError("v")), Raises(KeyError("k")), nn.Sequential(nn.LazyLinear(4))]
    models += [nn.Sequential(nn.Tanh()), Own()]
    outcomes = together([subject(m) for m in models])
    assert [o.error is None for o in outcomes] == [True, False, False, False, False, True]
    assert losses(outcomes[0]).tolist() == losses(outcomes[5]).tolist()


def test_targets_that_are_no_tensor_are_their_own_trials_error() -> None:
    x, y = subject(chain()).batch
    trials = [Subject(chain(), (x, labels), stopping=SHORT) for labels in (y, [0] * 16, y)]  # type: ignore[arg-type]
    assert [type(o.error) for o in together(trials)] == [type(None), ModelError, type(None)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_every_whole_type(dtype: torch.dtype) -> None:
    outputs, labels = torch.randn(2, 5, 4), torch.randint(0, 4, (2, 5))
    expected = loss_gradients(Loss("cross_entropy"), outputs, labels)
    for found, wanted in zip(loss_gradients(Loss("cross_entropy"), outputs, labels.to(dtype)), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("batch", [3, 16])
def test_several_labels_a_sample_are_the_plain_engines_bit_for_bit(batch: int) -> None:
    """torch rounds a sigmoid at the end of its vectors otherwise than within them."""
    torch.manual_seed(2)
    trials = []
    for seed in range(5):
        model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 10))
        batch_of = (torch.randn(batch, 8), (torch.rand(batch, 10) < 0.3).float())
        trials.append(
            Subject(model, batch_of, lr=1e-2, epsilons=(1e-6,), stopping=StoppingRule(max_steps=40), seed=seed)
        )
    for outcome, one in zip(together(trials, loss="bce"), trials, strict=True):
        assert losses(outcome).tolist() == losses(alone(one, loss="bce")).tolist()


def test_tokens_below_zero_are_no_row_of_the_table() -> None:
    from cape import families
    from cape.config import ModelSpec

    spec = ModelSpec(
        "rnn", "gru", "tokens", (6,), 9, "sequence", {"layers": 1, "hidden": 8, "bidirectional": False, "embedding": 4}
    )
    good, bad = torch.randint(0, 9, (4, 6)), torch.randint(0, 9, (4, 6))
    bad[0, 0] = -1
    trials = [Subject(families.build(spec), (x, x.clamp(min=0)), stopping=SHORT) for x in (good, bad, good)]
    outcomes = together(trials, loss="sequence_cross_entropy")
    assert [o.error is None for o in outcomes] == [True, False, True]


def test_bad_settings_are_the_trials_own_errors_and_bad_arguments_the_callers() -> None:
    trials = [subject(chain()), subject(chain(), lr=-1e-3), subject(chain(), epsilons=(3.0,)), subject(chain())]
    outcomes = together(trials)
    assert [type(o.error) for o in outcomes] == [type(None), SpecError, SpecError, type(None)]
    for wrong in ({"width": 0}, {"width": -1}, {"precision": "float23"}):
        with pytest.raises(SpecError):
            list(measure_many([subject(chain())], step_seconds=1e-3, **wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [2, 3, 8])
@pytest.mark.parametrize("units", [5, 48, 33])
@pytest.mark.parametrize("kind", [nn.Sigmoid, nn.SiLU, nn.GELU, nn.Tanh, nn.ReLU])
def test_units_that_fill_no_whole_registers_are_the_plain_engines_bit_for_bit(
    kind: type[nn.Module], units: int, rows: int
) -> None:
    def made(seed: int) -> Subject:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(7, units), nn.BatchNorm1d(units), kind(), nn.Linear(units, 3))
        return Subject(model, (torch.randn(rows, 7), torch.arange(rows) % 3), lr=1e-2, stopping=SHORT, seed=seed)

    trials = [made(seed) for seed in range(4)]
    for outcome, one in zip(together(trials), trials, strict=True):
        assert losses(outcome).tolist() == losses(alone(one)).tolist()


@pytest.mark.parametrize("rows", [2, 5, 7, 32])
@pytest.mark.parametrize("inputs", [8, 9, 17])
def test_tiny_layers_are_the_plain_engines_bit_for_bit(inputs: int, rows: int) -> None:
    """torch has kernels of their own for batches of small products, and for the rows that are left over."""

    def made() -> Subject:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(inputs, 18), nn.Tanh(), nn.Linear(18, 4))
        return Subject(model, (torch.randn(rows, inputs), torch.arange(rows) % 4), lr=1e-2, stopping=SHORT)

    trials = [made() for _ in range(3)]
    for outcome, one in zip(together(trials), trials, strict=True):
        assert losses(outcome).tolist() == losses(alone(one)).tolist()
