"""What few models have: buffers without numbers, inputs without places, modes that cannot be changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cape
from cape.errors import ModelError

BATCH = torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3


class _Buffered(nn.Module):
    def __init__(self, buffer: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 3)
        self.register_buffer("kept", buffer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + (self.kept.dequantize() if self.kept.is_quantized else 0.0)


class _Shared(nn.Module):
    """Adds what a second input is on average, whatever the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(10, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.layer(x) + table.mean(0)


@pytest.mark.parametrize("kind", ["quantized", "meta"])
def test_a_buffer_of_another_kind_stays(kind: str) -> None:
    torch.manual_seed(0)
    quantized = torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8)
    model = _Buffered(quantized if kind == "quantized" else torch.empty(3, device="meta"))
    plain = copy.deepcopy(model.layer)
    offset = quantized.dequantize() if kind == "quantized" else torch.zeros(3)
    with torch.no_grad():
        plain.bias += offset
    found, expected = (cape.probe(m, BATCH, lr=1e-3, dataset_size=100).log_g2 for m in (model, plain))
    assert found == pytest.approx(expected, rel=1e-5)
    assert cape.measure(model, BATCH, lr=1e-2).t_star[0.1] == cape.measure(plain, BATCH, lr=1e-2).t_star[0.1]
    assert model.kept.is_meta if kind == "meta" else torch.equal(model.kept, quantized)


def test_samples_in_a_sparse_or_nested_tensor_are_refused() -> None:
    nested = torch.nested.nested_tensor([torch.randn(k, 10) for k in range(2, 10)], layout=torch.jagged)
    for x in (BATCH[0].to_sparse(), nested):
        for call in (
            lambda x=x: cape.probe(nn.Linear(10, 3), (x, BATCH[1]), lr=1e-3, dataset_size=100),
            lambda x=x: cape.per_sample_norms(nn.Linear(10, 3), (x, BATCH[1])),
        ):
            with pytest.raises(ModelError, match="give a dense one"):
                call()


def test_an_input_for_all_samples_may_not_have_as_many_rows_as_there_are_samples() -> None:
    torch.manual_seed(0)
    model = _Shared()
    with pytest.raises(ModelError, match="use another batch size"):
        cape.per_sample_norms(model, ((BATCH[0], torch.randn(8, 3)), BATCH[1]))
    table = torch.randn(5, 3)
    plain = copy.deepcopy(model.layer)
    with torch.no_grad():
        plain.bias += table.mean(0)
    torch.testing.assert_close(
        cape.per_sample_norms(model, ((BATCH[0], table), BATCH[1])), cape.per_sample_norms(plain, BATCH)
    )


def test_a_model_whose_mode_cannot_be_changed_is_refused_in_one_sentence() -> None:
    exported: Any = torch.export.export(nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3)), (BATCH[0],))
    for call in (
        lambda: cape.probe(exported.module(), BATCH, lr=1e-3, dataset_size=100),
        lambda: cape.measure(exported.module(), BATCH),
    ):
        with pytest.raises(ModelError, match="cannot run on this batch in train mode"):
            call()
