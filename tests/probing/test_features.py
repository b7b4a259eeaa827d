"""The features of every model that the norms are tested on: they are there, and the model is as it was."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cape.errors import SpecError
from cape.probing import ops, probe
from tests.cases import CASES, Case, labels, vectors


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_model_has_features(case: Case) -> None:
    model, batch = case.make()
    held = {k: v.clone() for k, v in model.state_dict().items()}
    found = probe(model, batch, loss=case.loss, lr=1e-3, dataset_size=100).as_dict()
    assert all(value is None or math.isfinite(value) for value in found.values())
    assert all(torch.equal(v, held[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class ComplexLinear(nn.Module):
    """y = Re(W (x + i x)), with W complex, or as its real and imaginary parts."""

    def __init__(self, parts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(10, 20, dtype=torch.complex64)
        self.weight = nn.Parameter(torch.view_as_real(weight).clone() if parts else weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.is_complex() else torch.view_as_complex(self.weight)
        return F.linear(torch.complex(x, x), weight).real


def test_complex_parameters_move_as_pairs_of_real_ones() -> None:
    """As AdamW moves them: each part by lr in the direction of its own sign."""
    batch = (vectors(), labels(6))
    whole, parts = (probe(ComplexLinear(parts), batch, lr=1e-2, dataset_size=100).as_dict() for parts in (False, True))
    for name in ("log_first_step", "log_grad_l1", "log_grad_l2", "line_1", "line_16", "log_move", "spread_16"):
        assert whole[name] == pytest.approx(parts[name], rel=1e-5), name


def test_the_backend_asked_for_runs_all_of_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = CASES[0].make()
    seen = []
    taken = ops.native
    monkeypatch.setattr(ops, "native", lambda *tensors: seen.append(taken(*tensors)) or seen[-1])
    probe(model, batch, lr=1e-3, dataset_size=100, backend="torch")
    assert seen and not any(seen)


def test_an_unknown_backend_is_said_before_any_pass() -> None:
    class Unused(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    with pytest.raises(SpecError, match="Unknown backend 'cuda'"):
        probe(Unused(20, 10), (vectors(), labels(6)), lr=1e-3, dataset_size=100, backend="cuda")
