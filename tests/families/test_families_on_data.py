"""Every family on the real data that it takes: shapes fit, and a few AdamW steps lower the loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cape import datasets, families
from cape.config import ModelSpec
from cape.tasks import TASK_LOSS, Loss


def parameters(spec: ModelSpec) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in families.build(spec).parameters())


PAIRS = [
    ("mlp", "mnist", "multilabel"), ("mlp", "imdb", None), ("mlp", "california_housing", None),
    ("mlp", "diabetes", None),
    ("cnn", "imdb", None), ("cnn", "digits", None),
    ("rnn", "imdb", None), ("rnn", "imdb_chars", None), ("rnn", "diabetes", None), ("rnn", "svhn", None),
    ("transformer", "imdb", None), ("transformer", "imdb_chars", None), ("transformer", "cifar100", None),
    *((name, "imdb@48", None) for name in ("dense", "convnet", "recurrent", "encoder")),
    ("recurrent", "imdb@24", "sequence"), ("encoder", "imdb_chars@24", None),
]  # fmt: skip


@pytest.mark.parametrize(("family", "name", "task"), PAIRS)
def test_families_train_on_real_data(family: str, name: str, task: str | None, data_root: Path) -> None:
    dataset = datasets.load(name, data_root)
    dataset = dataset.with_task(task) if task else dataset
    made = families.get(family)
    spec = min((made.sample(np.random.default_rng(seed), dataset) for seed in range(6)), key=parameters)
    x, y = dataset.batch(4, 0, made.layout_for(dataset))
    assert tuple(x.shape[1:]) == spec.input_shape
    model, loss = families.build(spec).train(), Loss(TASK_LOSS[dataset.task])
    for module in model.modules():  # without dropout's noise the loss of so few samples can be compared
        if isinstance(module, nn.Dropout):
            module.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    losses = []
    for _ in range(3):
        value = loss.mean(model(x), y)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
    loss.check(model(x), y)
    assert losses[-1] < losses[0]
