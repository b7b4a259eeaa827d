"""When one forward pass of two samples is enough, and that it is not trusted where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cape
from cape.probing.reference import per_sample_norms_reference


class Counted(nn.Module):
    """Two linear maps around a function of the hidden layer, and how often it ran, on how many samples."""

    def __init__(self, between: Callable[[Tensor], Tensor], positions: int, passes: list[int]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(4, 3)
        self.between = between
        self.positions = positions  # their dimension
        self.passed = passes.append  # a list of the model's own would be put back

    def forward(self, x: Tensor) -> Tensor:
        self.passed(len(x))
        return self.second(self.between(self.first(x).tanh().view(len(x), 2, 4))).sum(self.positions)


BATCH = 7
ENDS = 2  # the first and the last sample beside each other
ONCE, TWICE = [2, ENDS, BATCH], [2, 2, ENDS, BATCH]
MODELS: dict[str, tuple[Callable[[Tensor], Tensor], int, list[int]]] = {
    "batch first": (lambda h: h, 1, ONCE),
    "three positions first": (lambda h: torch.cat([h, h[:, :1]], 1).transpose(0, 1), 0, TWICE),
    # As many positions as samples in a scan: only the whole batch shows which is which.
    "two positions first": (lambda h: h.transpose(0, 1), 0, [*ONCE, *TWICE]),
    "nothing of the sample": (lambda h: h * 0 + 1, 1, TWICE),
}


@pytest.mark.parametrize("name", MODELS)
def test_passes_and_norms(name: str) -> None:
    between, positions, expected = MODELS[name]
    torch.manual_seed(0)
    passes: list[int] = []
    model = Counted(between, positions, passes).double()
    batch = torch.randn(BATCH, 6, dtype=torch.float64), torch.randint(0, 3, (BATCH,))
    ours = cape.per_sample_norms(model, batch)
    assert passes[: len(expected)] == expected and len(passes) - len(expected) <= 3
    for a, r in zip(ours, per_sample_norms_reference(model, batch), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-10, atol=0.0)


def test_equal_samples_take_a_second_scan() -> None:
    torch.manual_seed(0)
    passes: list[int] = []
    model = Counted(lambda h: h, 1, passes).double()
    x = torch.randn(1, 6, dtype=torch.float64).expand(BATCH, 6).contiguous()
    batch = x, torch.randint(0, 3, (BATCH,))
    ours = cape.per_sample_norms(model, batch)
    assert passes == TWICE
    for a, r in zip(ours, per_sample_norms_reference(model, batch), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-10, atol=0.0)
