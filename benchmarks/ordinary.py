"""What the shipped meta-regressor says of models as people write them, and what training them then takes.

    python -m benchmarks.ordinary --data DIR [--json FILE]

CAPE's families are of one make each: batch norm in every dense and convolutional block, an initialization of their own.
These models are of other makes. A line says what was predicted, the 90 % interval, the true T*, and whether the domain
check let the model pass without a word.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

import cape
from benchmarks.timing import machine, write_json
from cape import datasets

EPSILON, LR = 0.1, 1e-3


def dense(width: int = 128, depth: int = 2, act: type[nn.Module] = nn.ReLU, norm: bool = False) -> nn.Module:
    sizes, layers = [784, *[width] * depth], []
    for d, p in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(d, p), *([nn.BatchNorm1d(p)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def started(how: Callable[[Tensor], Any]) -> nn.Module:
    model = dense()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            how(module.weight)
            nn.init.zeros_(module.bias)
    return model


def lenet() -> nn.Module:
    first = [nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 120), nn.ReLU(), nn.Linear(120, 10))


def mnist_example() -> nn.Module:
    """The network of ``mnist/main.py`` in pytorch/examples."""
    first = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    second = [nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    return nn.Sequential(*first, *second)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(models, name)(num_classes=10)


def normed_cnn(channels: int = 3) -> nn.Module:
    first = [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 10))


class Steps(nn.Module):
    """A recurrent layer over rows of pixels, read off its last step or averaged."""

    def __init__(self, kind: type[nn.RNNBase], averaged: bool, hidden: int = 128, inputs: int = 28) -> None:
        super().__init__()
        self.body, self.head, self.averaged = kind(inputs, hidden, batch_first=True), nn.Linear(hidden, 10), averaged  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)[0]
        return self.head(h.mean(1) if self.averaged else h[:, -1])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.embed, self.body, self.head = nn.Linear(28, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


def _recurrent(kind: type[nn.RNNBase], averaged: bool) -> Callable[[], nn.Module]:
    return lambda: Steps(kind, averaged)


# name -> (dataset, layout, batch size, build)
MODELS: dict[str, tuple[str, str, int, Callable[[], nn.Module]]] = {
    "MLP, torch's initialization": ("mnist", "vector", 64, dense),
    "MLP of three, 256 wide": ("mnist", "vector", 64, lambda: dense(256, 3)),
    "MLP, tanh": ("mnist", "vector", 64, lambda: dense(act=nn.Tanh)),
    "MLP, GELU": ("mnist", "vector", 64, lambda: dense(act=nn.GELU)),
    "MLP, Kaiming": ("mnist", "vector", 64, lambda: started(nn.init.kaiming_normal_)),
    "MLP, Xavier": ("mnist", "vector", 64, lambda: started(nn.init.xavier_uniform_)),
    "MLP, batch norm": ("mnist", "vector", 64, lambda: dense(norm=True)),
    "LeNet": ("cifar10", "image", 64, lenet),
    "CNN, batch norm": ("cifar10", "image", 32, normed_cnn),
    **{
        f"{kind.__name__}, {'averaged' if averaged else 'last step'}, {name}": (
            name, "rows", 32, _recurrent(kind, averaged)
        )
        for name in ("mnist", "fashion_mnist")
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
        for averaged in (False, True)
    },
    "Transformer encoder": ("mnist", "rows", 32, Encoder),
    "PyTorch's MNIST example": ("mnist@28", "image", 64, mnist_example),
    "CNN, 1x28x28, batch norm": ("fashion_mnist@28", "image", 32, lambda: normed_cnn(1)),
    "CNN, 3x64x64, batch norm": ("cifar10@64", "image", 32, normed_cnn),
    **{
        f"torchvision's {name}{', 64 pixels' if '@' in data else ''}": (data, "image", 32, _torchvision(name))
        for name, data in (
            ("resnet18", "cifar10"),
            ("resnet50", "cifar10"),
            ("mobilenet_v3_small", "cifar10"),
            ("mobilenet_v3_large", "cifar10"),  # these four are none of the family's
            ("regnet_y_400mf", "cifar10"),
            ("efficientnet_b1", "cifar10"),
            ("shufflenet_v2_x0_5", "cifar10"),
            ("resnet18", "cifar10@64"),
        )
    },
}  # fmt: skip


def row(name: str, root: str | None) -> dict[str, Any]:
    dataset, layout, size, build = MODELS[name]
    data = datasets.load(dataset, root)
    torch.manual_seed(0)
    model, batch = build(), data.batch(size, 0, layout)
    made = cape.predict(model, batch, lr=LR, dataset_size=data.full_train_size, epsilon=EPSILON)
    true = cape.measure(model, batch, lr=LR, epsilons=(EPSILON,)).t_star[EPSILON]
    low, high = made.interval(0.9)
    held = true is not None and low <= true <= high
    return {
        "model": name, "predicted": made.steps, "low": low, "high": high, "true": true, "held": held,
        "in_domain": made.in_domain, "warnings": list(made.warnings),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Parquet datasets")
    parser.add_argument("--json")
    args = parser.parse_args()
    result: dict[str, Any] = {"machine": machine("cpu"), "epsilon": EPSILON, "lr": LR, "rows": []}
    for name in MODELS:
        made = row(name, args.data)
        result["rows"].append(made)
        write_json(args.json, result)
        print(
            f"{name:36s} {made['predicted']:5.0f} ({made['low']:.1f} to {made['high']:.1f}), true {made['true']},"
            f" {'held' if made['held'] else 'missed'}, {'in' if made['in_domain'] else 'out of'} domain"
        )
    for inside in (True, False):
        rows = [r for r in result["rows"] if r["in_domain"] is inside]
        print(f"{'in' if inside else 'out of'} domain: held {sum(r['held'] for r in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
