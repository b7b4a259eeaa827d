"""torchvision's convolutional classifiers, untrained, as people take them for their own images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from cape.config import ModelSpec
from cape.families.makes import Ordinary, OrdinaryOptions
from cape.families.registry import DatasetInfo, check_options, pick

NETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnext50_32x4d",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "densenet121",
    "shufflenet_v2_x1_0",
    "squeezenet1_1",
    "mnasnet1_0",
    "convnext_tiny",
)
_SMALLEST = {"densenet121": 29, "convnext_tiny": 32}
"""Side of the smallest images whose maps do not vanish on the way, of nets for which 28 pixels are too few."""


@dataclass(frozen=True)
class BackboneOptions(OrdinaryOptions):
    """Options of a backbone.

    Attributes:
        net: one of ``NETS``, a function of ``torchvision.models``.
        fine: for small images: the first convolution has half its stride (and 3x3 for 7x7), the first max-pool is left
            out, as in ResNets for CIFAR (He et al. 2016, section 4.2).
    """

    net: str
    fine: bool

    def __post_init__(self) -> None:
        check_options("a backbone", net=(self.net, self.net in NETS))

    @classmethod
    def draw(cls, rng: np.random.Generator, side: int = 32) -> BackboneOptions:
        """Return a net that takes images of a side; of 64 pixels and fewer, one in four is made fine."""
        fine = rng.random() < 0.25 and side <= 64
        return cls(pick(rng, [net for net in NETS if _SMALLEST.get(net, 1) <= side]), fine)

    def model(self, spec: ModelSpec) -> nn.Module:
        """Return torchvision's model, [B, C, H, W] -> [B, outputs]."""
        from torchvision import models  # a second, which sweeps of other families need not pay

        model: nn.Module = getattr(models, self.net)(num_classes=spec.outputs)
        named = dict(model.named_modules())
        first, conv = next((name, m) for name, m in named.items() if isinstance(m, nn.Conv2d))
        if self.fine or conv.in_channels != spec.input_shape[0]:
            model.set_submodule(first, _stem(conv, spec.input_shape[0], self.fine))
        pools = [name for name, m in named.items() if isinstance(m, nn.MaxPool2d)]
        if self.fine and pools:
            model.set_submodule(pools[0], nn.Identity())
        return model


def _stem(conv: nn.Conv2d, channels: int, fine: bool) -> nn.Conv2d:
    kernel, stride, padding = (int(size[0]) for size in (conv.kernel_size, conv.stride, conv.padding))
    if fine:
        stride = max(1, stride // 2)
        kernel, padding = (3, 1) if kernel == 7 else (kernel, padding)
    return nn.Conv2d(channels, conv.out_channels, kernel, stride, padding, bias=conv.bias is not None)


class Backbone(Ordinary):
    """torchvision's convolutional classifiers (``BackboneOptions``)."""

    name: ClassVar[str] = "backbone"
    layouts: ClassVar[tuple[str, ...]] = ("image",)
    architectures: ClassVar[tuple[str, ...]] = ("backbone",)
    drawn: ClassVar[type[OrdinaryOptions]] = BackboneOptions

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        side = min(dataset.sample_shape(self.layout_for(dataset))[1:])
        return self.spec(self.name, dataset, BackboneOptions.draw(rng, side))
