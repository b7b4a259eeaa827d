"""What the GPU benchmarks do before they touch a GPU: shape tables, counts of work, arguments, the search."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision import models

from benchmarks import calibrate, roofline
from benchmarks.roofline import RESNET_50, VIT_B_16, Conv, Linear
from cape.errors import DependencyError


def test_the_tables_hold_every_weight_of_the_models() -> None:
    with torch.device("meta"):
        vit, resnet = models.vit_b_16(), models.resnet50()
    weights = sum(p.numel() for n, p in vit.encoder.layers.named_parameters() if p.dim() == 2)
    assert sum(s.d * s.p * n for s, n in VIT_B_16.items()) == weights
    convs = [m for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    assert sum(RESNET_50.values()) == len(convs)
    assert sum(s.channels * s.outputs * s.kernel**2 * n for s, n in RESNET_50.items()) == sum(
        m.weight.numel() for m in convs
    )
    known = {(m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in convs}
    assert {(s.channels, s.outputs, s.kernel, s.stride) for s in RESNET_50} == known


def test_work_is_counted_term_by_term() -> None:
    t, d, p = 3, 5, 7
    pairs = sum(1 for i in range(t) for j in range(i + 1))
    assert roofline.linear_macs(Linear(t, d, p), "gram") == pairs * (d + 2 * p)
    assert roofline.linear_macs(Linear(t, d, p), "direct") == 2 * t * d * p
    conv = Conv(3, 4, 6, 3, 1)
    pairs = sum(1 for i in range(36) for j in range(i + 1))
    assert roofline.conv_macs(conv, "gram") == pairs * (27 + 2 * 4)
    assert roofline.conv_macs(conv, "shifted") == pairs * 3 + pairs * (9 + 2 * 4)
    assert roofline.conv_macs(conv, "direct") == 2 * 36 * 9 * 3 * 4
    assert Conv(3, 64, 224, 7, 2).out == 112


def test_the_largest_products_and_peaks() -> None:
    linear, conv = roofline.largest()
    assert linear in VIT_B_16 and conv in RESNET_50 and conv.kernel > 1
    h100 = roofline.peak_of("NVIDIA H100 80GB HBM3")
    assert h100 is not None and roofline.flops_of(h100, "float32") == pytest.approx(164.9e12)
    assert roofline.peak_of("a card of tomorrow") is None


def test_arguments() -> None:
    args = roofline.parser().parse_args(["--precision", "tf32", "--batch", "8"])
    assert (args.precision, args.batch, args.json) == (["tf32"], 8, None)
    assert calibrate.parser().parse_args(["--batch", "4"]).batch == [4]


def test_the_search_lowers_the_regret_of_a_known_device() -> None:
    """A device that follows a two-term model: the searched constants must choose its fastest forms."""
    shapes = [(float(a), float(b)) for a in (1, 10, 100) for b in (2, 20, 200)]
    times = [{"direct": 3.0 * a, "gram": 0.5 * b} for a, b in shapes]

    def loss(constants: tuple[float, ...] | list[float]) -> float:
        chosen = ["direct" if constants[0] * a <= constants[1] * b else "gram" for a, b in shapes]
        return calibrate.regret(times, chosen)

    best, least = calibrate.search([1.0, 10.0], loss)
    assert loss([1.0, 10.0]) > 1.5 and least == pytest.approx(1.0) and 2.0 < best[0] / best[1] < 20.0
    assert calibrate.regret([{"direct": 1.0, "gram": 4.0}, {"direct": 2.0, "gram": 1.0}], ["gram", "gram"]) == 2.5


def test_forms_that_are_timed() -> None:
    assert calibrate.forms_of(Linear(8, 3, 4)) == ("direct", "gram")
    assert calibrate.forms_of(Conv(512, 512, 8, 3, 1)) == ("direct", "gram", "shifted")
    assert calibrate.forms_of(Conv(3, 64, 224, 7, 2)) == ("direct", "narrow")
    assert all(math.prod((s.channels, s.outputs)) > 0 for s in calibrate.CONV)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: the benchmarks would run")
@pytest.mark.parametrize("script", [roofline, calibrate])
def test_without_a_device_they_say_so(script: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark"])
    with pytest.raises(DependencyError, match="needs? a CUDA device"):
        script.main()  # type: ignore[attr-defined]
