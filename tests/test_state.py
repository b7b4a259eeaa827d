"""What is refused before a model runs, and what is put back after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cape.errors import ModelError
from cape.state import check_batch, preserved, trainable


def test_what_holds_no_numbers_is_refused() -> None:
    with pytest.raises(ModelError, match="'weight' is on the device 'meta'"):
        trainable(nn.Linear(2, 2, device="meta"))
    x, y = torch.zeros(3, 2), torch.zeros(3)
    for batch in ((x.to("meta"), y), (x, y.to("meta"))):
        with pytest.raises(ModelError, match="The batch is on the device 'meta'"):
            check_batch(batch)


class Logging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.seen: dict[str, Any] = {"activations": [], "of": [{"passes": 0}], "mean": [torch.zeros(2)]}
        self.seen["itself"] = self.seen

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        self.seen["activations"].append(h)
        self.seen["of"][0]["passes"] += 1
        self.seen["mean"][0] += h.detach().mean(0)
        return h


def test_collections_within_collections_are_put_back() -> None:
    model = Logging()
    activations, inner, mean = model.seen["activations"], model.seen["of"][0], model.seen["mean"][0]
    with preserved(model):
        model(torch.ones(3, 2))
        assert len(activations) == inner["passes"] == 1 and bool(mean.abs().sum() > 0)
    assert activations == [] and inner == {"passes": 0} and torch.equal(mean, torch.zeros(2))
    assert model.seen["activations"] is activations and model.seen["itself"] is model.seen
