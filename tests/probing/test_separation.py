"""How hard a batch's targets are to tell apart: against the definitions, and on batches made to show what it is for."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from cape.probing import separation as module
from cape.probing.separation import LEFT, MOST, NEAREST, RIDGE, SLOWEST, hardness, separation


def images(count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 5, 5, generator=generator) * torch.logspace(0, -2, 5)
    return x, torch.randint(4, (count,), generator=generator)


def test_every_number_is_what_its_definition_says() -> None:
    x, y = images()
    count, flat, hot = len(y), x.flatten(1).double().numpy(), np.eye(4)[y.numpy()]
    apart, differ = (np.array([[np.sum((a - b) ** 2) for b in v] for a in v]) for v in (flat, hot))
    pairs = count * (count - 1)
    apart, differ = apart / (apart.sum() / pairs), differ / (differ.sum() / pairs)
    steep = [
        math.log(max(differ[b, c] / (apart[b, c] + NEAREST) for c in range(count) if c != b)) for b in range(count)
    ]
    kernel = np.exp(-apart)
    mean = np.eye(count) - 1 / count
    kernel, labels = mean @ kernel @ mean, mean @ hot
    kernel *= (count - 1) / np.trace(kernel)
    ridge = np.trace(labels.T @ np.linalg.solve(kernel + RIDGE * np.eye(count), labels)) / np.sum(labels**2)
    found = separation(x, y)
    assert found.steepness == pytest.approx(np.mean(steep), rel=1e-6)
    assert found.hardness == pytest.approx(math.log(ridge), abs=1e-6)
    assert hardness(x, y) == pytest.approx(math.log(ridge), abs=1e-6)
    values, vectors = np.linalg.eigh(kernel + SLOWEST * mean)
    decay = vectors @ np.diag(np.exp(-values * math.exp(found.flow))) @ vectors.T
    assert np.sum((decay @ labels) ** 2) / np.sum(labels**2) == pytest.approx(LEFT, rel=1e-4)


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_hardness_alone_is_that_of_the_separation(count: int, value: float) -> None:
    """Also where nothing differs, and of numbers that are none; with more samples than are looked at."""
    x, y = images(count)
    for given in ((x, y), (x, torch.zeros_like(y)), (torch.full_like(x, value), y), (x, y.float())):
        assert hardness(*given) == pytest.approx(separation(*given).hardness, abs=1e-6)
    many = images(MOST + 3)
    assert hardness(*many) == pytest.approx(separation(*many).hardness, abs=1e-6)


def test_neither_scale_nor_order_nor_layout_counts() -> None:
    x, y = images()
    found = separation(x, y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))
    strided = torch.empty(len(y), 5, 5, 3).permute(0, 3, 1, 2).copy_(x)
    for other in (separation(7 * x + 2, y), separation(x[order], y[order]), separation(strided, 3 - y)):
        assert vars(other) == pytest.approx(vars(found), rel=1e-4)
    assert vars(separation((x, x), y)) == pytest.approx(vars(found), rel=1e-9)


def test_alike_inputs_with_other_targets_are_hard() -> None:
    x, y = images()
    dim = x + 4 * torch.randn(len(y), 1, 1, 1, generator=torch.Generator().manual_seed(2))  # in another light each
    plain, lit = separation(x, y), separation(dim, y)
    assert lit.steepness > plain.steepness + 0.5 and lit.hardness > plain.hardness + 0.5 and lit.flow > plain.flow + 0.5
    separate = x.flatten(1) + 5 * torch.nn.functional.one_hot(y, 75)
    easy = separation(separate, y)
    assert easy.steepness < plain.steepness and easy.hardness < plain.hardness and easy.flow < plain.flow
    twins = separation(torch.cat([x, x]), torch.cat([y, (y + 1) % 4]))
    assert twins.steepness == pytest.approx(math.log(2 / (2 * 0.75 * 48 / 47) / NEAREST), abs=0.2)


def test_targets_and_inputs_of_every_kind() -> None:
    x, y = images()
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(9, (24, 7), generator=generator)
    for inputs, targets in (
        (x, torch.randn(24, 1, generator=generator)),
        (x, torch.rand(24, 6, generator=generator).round()),
        (tokens, tokens.roll(-1, 1)),
        ({"a": tokens, "mask": tokens > 2, "scale": torch.ones(())}, y),
        (x.to(torch.bfloat16), y),
        (x * math.nan, y),
        (torch.zeros_like(x), y),
    ):
        assert all(math.isfinite(v) for v in vars(separation(inputs, targets)).values())
    waves = torch.complex(x, x.roll(1, 0))
    assert vars(separation(waves, y)) == pytest.approx(vars(separation(torch.cat([waves.real, waves.imag], 1), y)))
    # Of classes "how many differ" is half the squared distance of their indicators: the scale does not count.
    hot = torch.nn.functional.one_hot(y, 4).double()
    assert vars(separation(x, y)) == pytest.approx(vars(separation(x, hot)), rel=1e-6)


def test_nothing_to_tell_apart() -> None:
    x, y = images()
    alone, same = separation(x[:1], y[:1]), separation(x, torch.zeros_like(y))
    assert alone == same and alone.steepness == 0.0 and alone.hardness == -math.log1p(RIDGE)
    far = separation(torch.eye(24), torch.arange(24))  # every sample as far from every other, each its own class
    assert vars(far) == pytest.approx(vars(same), abs=1e-3)


def test_large_batches_and_inputs_are_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(MOST + 40)
    assert separation(x, y) == separation(x[:MOST], y[:MOST])
    tokens = torch.randint(9, (16, 50), generator=torch.Generator().manual_seed(4))
    whole = [separation(x[:16], y[:16]), separation(tokens, y[:16])]
    monkeypatch.setattr(module, "_PIECE", 400)
    parts = [separation(x[:16], y[:16]), separation(tokens, y[:16])]
    assert [vars(p) for p in parts] == [pytest.approx(vars(w), rel=1e-6) for w in whole]
