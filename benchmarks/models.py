"""The models that the benchmarks run, built by CAPE's own families where it has them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cape import families
from cape.config import ModelSpec

IMAGE = (3, 32, 32)


def _image(family: str, architecture: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: families.build(ModelSpec(family, architecture, "image", IMAGE, 10, options=options))


class Recurrent(nn.Module):
    """A recurrent body over rows and a head on the last step."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.body = kind(96, 256, batch_first=True, **options)  # type: ignore[arg-type]
        self.head = nn.Linear(512 if options.get("bidirectional") else 256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def _mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for d, p in ((784, 512), (512, 512), (512, 512)):
        layers += [nn.Linear(d, p), nn.BatchNorm1d(p), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _vision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        return getattr(models, name)()

    return build


# name -> (build, shape of one sample)
SMALL: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-512x3-10": (_mlp, (784,)),
    "VGG-64 [2,1,1]": (_image("cnn", "vgg", channels=[64, 128, 256], repeats=[2, 1, 1], pool=False), IMAGE),
    "ResNet-64 [1,1,1]": (_image("cnn", "resnet", base=64, repeats=[1, 1, 1]), IMAGE),
    "MobileNetV2-mini": (_image("cnn", "mobilenetv2", width=0.5, stem=32, repeats=[2, 3, 2]), IMAGE),
    "LSTM 2x256": (lambda: Recurrent(nn.LSTM, num_layers=2), (32, 96)),
    "GRU 256 bidirectional": (lambda: Recurrent(nn.GRU, bidirectional=True), (32, 96)),
    "ViT 192/6": (_image("transformer", "vit", dim=192, depth=6, heads=3), IMAGE),
    "CCT": (_image("transformer", "cct", dim=128, depth=4, heads=4), IMAGE),
}
LARGE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-50": (_vision("resnet50"), (3, 224, 224)),
    "ViT-B/16": (_vision("vit_b_16"), (3, 224, 224)),
}


def batch(shape: tuple[int, ...], size: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, *shape, generator=generator)
    y = torch.randint(0, 10, (size,), generator=generator)
    return x.to(device), y.to(device)
