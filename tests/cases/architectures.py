"""Torchvision's models, on images as small as they accept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.cases.base import Batch, Case, labels


def _vision(name: str, size: int, **options: Any) -> tuple[nn.Module, Batch]:
    models = __import__("torchvision.models").models
    return getattr(models, name)(num_classes=10, **options), (torch.randn(2, 3, size, size), labels(2))


class _Dense(nn.Module):
    """A segmentation model returns a mapping; its logits are one entry."""

    def __init__(self) -> None:
        super().__init__()
        models = __import__("torchvision.models.segmentation").models.segmentation
        self.model = models.lraspp_mobilenet_v3_large(weights_backbone=None, num_classes=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


def _segmentation() -> tuple[nn.Module, Batch]:
    return _Dense(), (torch.randn(2, 3, 32, 32), torch.randint(0, 4, (2, 32, 32)))


def _case(name: str, build: Callable[[], tuple[nn.Module, Batch]]) -> Case:
    return Case(name, build, intercepted=name != "swin_v2_t", randomized=False)


ARCHITECTURES = [
    *(
        _case(name, functools.partial(_vision, name, size, **options))
        for name, size, options in (
            ("resnet18", 32, {}), ("densenet121", 32, {}), ("mobilenet_v2", 32, {}), ("mobilenet_v3_small", 32, {}),
            ("efficientnet_b0", 32, {}), ("convnext_tiny", 32, {}), ("swin_t", 32, {}), ("swin_v2_t", 32, {}),
            ("regnet_x_400mf", 32, {}), ("regnet_y_400mf", 32, {}), ("shufflenet_v2_x0_5", 32, {}),
            ("squeezenet1_1", 32, {}), ("mnasnet0_5", 32, {}), ("vit_b_16", 32, {"image_size": 32}),
            ("googlenet", 32, {"aux_logits": False, "init_weights": False}),
        )
    ),
    _case("lraspp_mobilenet_v3_large", _segmentation),
]  # fmt: skip
