"""What a caller has set, or does in another thread, is no part of any number."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from torch import nn

import cape
from cape.config import StoppingRule
from cape.surroundings import fixed_precision, undisturbed

BATCH = (torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4)
TOLD = {"lr": 1e-3, "dataset_size": 2000}


def model(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 4))


def smooth(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


@pytest.mark.parametrize("loss", ["cross_entropy", nn.CrossEntropyLoss(), smooth])
def test_the_callers_autocast_is_no_part_of_a_prediction(loss: object) -> None:
    plain = cape.predict(model(), BATCH, loss=loss, **TOLD)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        within = cape.predict(model(), BATCH, loss=loss, **TOLD)  # type: ignore[arg-type]
        norms = cape.per_sample_norms(model(), BATCH)
        assert torch.is_autocast_enabled("cpu")
    assert within.to_dict() == plain.to_dict()
    assert torch.equal(norms[0], cape.per_sample_norms(model(), BATCH)[0])


def test_what_float32_products_may_do_is_fixed_inside_and_the_callers_again_outside() -> None:
    mkldnn = torch.backends.mkldnn
    inside = []
    torch.set_float32_matmul_precision("medium")
    try:
        for block in (undisturbed(), fixed_precision("float32", torch.device("cpu"))):
            with block:
                inside.append(mkldnn.matmul.fp32_precision)
            assert torch.get_float32_matmul_precision() == "medium"
        assert inside == ["ieee", "ieee"] and mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_threads_take_turns() -> None:
    rule = StoppingRule(max_steps=60)

    def losses(seed: int) -> np.ndarray:
        return cape.measure(model, BATCH, seed=seed, epsilons=(1e-6,), stopping=rule).losses

    model = nn.Sequential(nn.Linear(8, 12), nn.Dropout(0.3), nn.Linear(12, 4))  # one for all of them
    alone = {seed: losses(seed) for seed in range(3)}
    found: dict[int, np.ndarray] = {}
    before = torch.get_rng_state()
    threads = [threading.Thread(target=lambda s=seed: found.update({s: losses(s)})) for seed in alone]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], alone[seed]) for seed in alone)
    assert torch.equal(torch.get_rng_state(), before)
