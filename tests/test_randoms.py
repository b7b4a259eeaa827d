"""The native random numbers are torch's, bit for bit, and torch's own where they are not to be had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cape import families, randoms
from cape.config import ModelSpec
from cape.convergence.draws import GeneratorDraws, NativeDraws, draws_for
from cape.randoms import OnesDraws, normal_, ones_agree

needs_native = pytest.mark.skipif(not ones_agree(), reason="torch draws otherwise here, or the extension is not built")


@needs_native
@pytest.mark.parametrize("probability", [0.8, 0.9, 0.5, 1e-3])
def test_masks_are_those_of_a_generator_for_each_row(probability: float) -> None:
    seeds = (0, 5, 2**40 + 3, 2**63 - 1, 2**64 - 1)
    draws, generators = OnesDraws(len(seeds)), [torch.Generator() for _ in seeds]
    for i, seed in enumerate(seeds):
        draws.seed(i, seed)
        generators[i].manual_seed(seed)
    for size in (1, 311, 312, 313, 2000):  # a block of the twister serves 312 of them
        expected = [torch.empty(size).bernoulli_(probability, generator=g) for g in generators]
        assert torch.equal(draws.fill(torch.empty(len(seeds), size), probability), torch.stack(expected))


@needs_native
def test_a_trials_masks_move_with_it() -> None:
    draws, plain = NativeDraws(3), GeneratorDraws(3)
    assert isinstance(draws_for(torch.device("cpu"), 3), NativeDraws)
    for each in (draws, plain):
        for slot in range(3):
            each.seed(slot, 10 + slot)
    for width in (3, 2, 1):
        out = (torch.empty(width, 4, 100) for _ in range(2))
        first, second = (each.keep(into, 0.8) for each, into in zip((draws, plain), out, strict=True))
        assert torch.equal(first, second)
        for each in (draws, plain):
            each.move(width - 1, 0)


@pytest.mark.parametrize("shape", [(3,), (16,), (17,), (100, 33), (1000, 17)])
def test_normal_numbers_are_torchs_and_leave_its_generator_where_torch_would(shape: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    torch.rand(13)
    expected, after = torch.empty(shape).normal_(0.0, 0.37), torch.rand(5)
    torch.manual_seed(3)
    torch.rand(13)
    assert torch.equal(normal_(torch.empty(shape), 0.37), expected)
    assert torch.equal(torch.rand(5), after)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_mlps_begin_as_torchs_initializations_have_them(
    activation: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(randoms, "_normals_agree", lambda: False)
    options = {"depth": 1, "width": 32, "activation": activation}
    torch.manual_seed(0)
    weight = next(families.build(ModelSpec("mlp", "mlp", "vector", (64,), 10, options=options)).parameters())
    torch.manual_seed(0)
    expected = torch.empty(32, 64)
    if activation == "gelu":
        nn.init.xavier_normal_(expected)
    else:
        nn.init.kaiming_normal_(expected, nonlinearity="relu")
    assert torch.equal(weight, expected)


@needs_native
def test_a_default_device_does_not_decide_who_draws() -> None:
    known = randoms._normals_agree()
    for found in (randoms._normals_agree, randoms.ones_agree):
        found.cache_clear()
    with torch.device("meta"):
        assert (randoms._normals_agree(), randoms.ones_agree()) == (known, True)
