"""Models that write into what an operator gave them: the gradient before the write is the one that counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cape
from cape.probing.reference import per_sample_norms_reference


class Layers(nn.Module):
    def __init__(self, forward: Callable[[Layers, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.both, self.steps = nn.Bilinear(12, 12, 12), nn.GRU(12, 12, batch_first=True)
        self.elman, self.norm = nn.RNN(12, 12), nn.InstanceNorm1d(7, affine=True)
        self.attend = nn.TransformerEncoderLayer(12, 2, 20, 0.0, nn.ReLU(inplace=True), batch_first=True)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self, x).mean(1))


def _sliced(m: Layers, x: Tensor) -> Tensor:
    h = m.first(x)
    h += x
    g = m.second(h)
    g[:, :3].mul_(2.0)
    g[..., :2] = 0.5
    return g


WRITES: dict[str, Callable[[Layers, Tensor], Tensor]] = {
    "activations": lambda m, x: F.silu(m.second(F.relu(m.first(x), inplace=True)), inplace=True),
    "slices and sums": _sliced,
    "einsum": lambda m, x: torch.einsum("btd,od->bto", m.first(x).tanh(), m.second.weight).relu_(),
    "bilinear": lambda m, x: m.both(m.first(x), x).relu_(),
    "transformer": lambda m, x: m.attend(x),
    "instance norm": lambda m, x: m.norm(m.first(x)).relu_(),
    "gru": lambda m, x: m.steps(m.first(x))[0].relu_(),
    "elman": lambda m, x: m.elman(m.first(x).transpose(0, 1))[0].mul_(2.0).transpose(0, 1),
    "attached too": lambda m, x: m.second(m.first(x).relu_()).sub_((m.second.weight @ m.second.weight.T).sum()),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("backend", ("native", "torch"))
@pytest.mark.parametrize("name", WRITES)
def test_what_is_written_into(name: str, backend: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Layers(WRITES[name]).to(dtype)
    batch = torch.randn(6, 7, 12, dtype=dtype), torch.randint(0, 5, (6,))
    ours = cape.per_sample_norms(model, batch, backend=backend)
    for a, r in zip(ours, per_sample_norms_reference(model, batch), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-5 if dtype is torch.float32 else 1e-10, atol=0.0)


def test_prelu_at_zero_has_the_slope_for_derivative() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.PReLU(), nn.Linear(8, 3))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[0].bias)
    batch = torch.randn(5, 6), torch.randint(0, 3, (5,))
    for a, r in zip(cape.per_sample_norms(model, batch), per_sample_norms_reference(model, batch), strict=True):
        torch.testing.assert_close(a, r, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("watched", (True, False))
def test_gradients_of_tensors_that_are_no_parameters_stay(watched: bool) -> None:
    prompt = torch.randn(4, requires_grad=True)
    prompt.grad = torch.full((4,), 7.0)

    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x + prompt
            if watched:
                return self.inner(h)
            return torch.vmap(lambda row: self.inner.weight @ row)(h)  # seen by the fallback alone

    cape.per_sample_norms(Prompted(), (torch.randn(5, 4), torch.randint(0, 3, (5,))))
    assert torch.equal(prompt.grad, torch.full((4,), 7.0))
