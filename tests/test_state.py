"""What is refused before a model runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cape.errors import ModelError
from cape.state import check_batch, trainable


def test_what_holds_no_numbers_is_refused() -> None:
    with pytest.raises(ModelError, match="'weight' is on the device 'meta'"):
        trainable(nn.Linear(2, 2, device="meta"))
    x, y = torch.zeros(3, 2), torch.zeros(3)
    for batch in ((x.to("meta"), y), (x, y.to("meta"))):
        with pytest.raises(ModelError, match="The batch is on the device 'meta'"):
            check_batch(batch)
