"""Recurrent layers: how their cells step on each device, by torch's own layer too, and what that gives as norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cape.probing import recurrent
from cape.probing.per_sample import all_norms
from cape.probing.recurrent import _CELLS, _LAYERS
from cape.probing.reference import per_sample_norms_reference
from tests.cases import labels, sequences
from tests.probing.test_per_sample import relative

GATES = {torch.lstm: 4, torch.gru: 3, torch.rnn_tanh: 1, torch.rnn_relu: 1}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("steps", "batch", "hidden", "cotangents"), [(1, 1, 1, 1), (3, 2, 5, 2), (4, 19, 33, 3)])
@pytest.mark.parametrize("func", GATES, ids=lambda f: f.__name__)
def test_torchs_own_layer_gives_what_the_cells_give(
    func: object, steps: int, batch: int, hidden: int, cotangents: int, bias: bool
) -> None:
    torch.manual_seed(0)
    width, lstm = GATES[func] * hidden, func is torch.lstm

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    pre, w = random(steps, batch, width), random(width, hidden) / hidden**0.5
    b_hh = random(width) if bias and _CELLS[func].own_hidden_side else None  # else they are in ``pre``
    states = [random(batch, hidden) for _ in range(1 + lstm)]
    grad_h, grad_last = random(steps, cotangents, batch, hidden), [random(cotangents, batch, hidden)] * lstm
    found = []
    for cells in (_CELLS, _LAYERS):
        outputs, saved = cells[func].forward(pre, w, b_hh, states)
        assert not any(t.requires_grad for t in outputs)
        sides, d_states = cells[func].backward(grad_h, grad_last, w, states, saved)
        found.append([*outputs, *sides, *d_states])
    for ours, other in zip(*found, strict=True):
        torch.testing.assert_close(other, ours, rtol=1e-10, atol=1e-11)


class Recurrent(nn.Module):
    """Two layers in both directions from a learned state, under a checkpoint where asked for."""

    def __init__(self, kind: str, checkpointed: bool) -> None:
        super().__init__()
        make = {"LSTM": nn.LSTM, "GRU": nn.GRU}.get(kind)
        size = {"hidden_size": 7, "num_layers": 2, "bidirectional": True, "batch_first": True}
        self.rnn = make(12, **size) if make else nn.RNN(12, nonlinearity=kind, **size)
        self.start = nn.Parameter(torch.randn(4, 1, 7))
        self.head = nn.Linear(14, 10)
        self.checkpointed = checkpointed

    def features(self, x: Tensor) -> Tensor:
        h = self.start.expand(-1, len(x), -1).contiguous()
        out: Tensor = self.rnn(x, (h, h) if isinstance(self.rnn, nn.LSTM) else h)[0]
        return out[:, -1]

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed:
            return self.head(torch.utils.checkpoint.checkpoint(self.features, x, use_reentrant=False))
        return self.head(self.features(x))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("tau", ["true_logit", "full"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "tanh", "relu"])
def test_norms_by_torchs_own_layer(kind: str, tau: str, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where that layer is cuDNN's; here it runs on the CPU."""
    asked = []

    def cell_of(func: object, x: Tensor) -> object:
        asked.append(func)
        return _LAYERS[func]

    monkeypatch.setattr(recurrent, "cell_of", cell_of)
    torch.manual_seed(0)
    model, batch = Recurrent(kind, checkpointed).double(), (sequences().double(), labels(5))
    norms = all_norms(model, batch, tau=tau)
    g2, trace = per_sample_norms_reference(model, batch, tau=tau)
    assert asked and norms.fallback == ()
    assert relative(norms.g2, g2) < 1e-10
    assert relative(norms.tau if norms.tau_full is None else norms.tau_full, trace) < 1e-10
