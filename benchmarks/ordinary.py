"""What the shipped meta-regressor says of models as people write them, and what training them then takes.

    python -m benchmarks.ordinary --data DIR [--json FILE]

CAPE's families are of one make each: batch norm in every dense and convolutional block, an initialization of their own.
These models are of other makes, and some tell few classes apart (labels modulo 2 or 3, tables of scikit-learn) or read
words or characters; those that tell the next one are asked for half of their loss in the place of a tenth. A line says
what was predicted, the 90 % interval, the true T*, and whether the domain check let the model pass without a word.
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
from cape.tasks import TASK_LOSS

EPSILON, NEXT, LR = 0.1, 0.5, 1e-3


def dense(
    width: int = 128,
    depth: int = 2,
    act: type[nn.Module] = nn.ReLU,
    norm: bool = False,
    inputs: int = 784,
    outputs: int = 10,
) -> nn.Module:
    sizes, layers = [inputs, *[width] * depth], []
    for d, p in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(d, p), *([nn.BatchNorm1d(p)] if norm else []), act()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def started(how: Callable[[Tensor], Any]) -> nn.Module:
    model = dense()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            how(module.weight)
            nn.init.zeros_(module.bias)
    return model


def lenet(outputs: int = 10) -> nn.Module:
    first = [nn.Conv2d(3, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 120), nn.ReLU(), nn.Linear(120, outputs))


def mnist_example() -> nn.Module:
    """The network of ``mnist/main.py`` in pytorch/examples."""
    first = [nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
    second = [nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10)]
    return nn.Sequential(*first, *second)


def _torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(models, name)(num_classes=10)


def normed_cnn(channels: int = 3, outputs: int = 10) -> nn.Module:
    first = [nn.Conv2d(channels, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, outputs))


class Steps(nn.Module):
    """A recurrent layer over rows of pixels, read off its last step or averaged."""

    def __init__(self, kind: type[nn.RNNBase], averaged: bool, hidden: int = 128, outputs: int = 10) -> None:
        super().__init__()
        self.body = kind(28, hidden, batch_first=True)  # type: ignore[arg-type]
        self.head, self.averaged = nn.Linear(hidden, outputs), averaged

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)[0]
        return self.head(h.mean(1) if self.averaged else h[:, -1])


class Encoder(nn.Module):
    def __init__(self, outputs: int = 10) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.embed, self.body, self.head = nn.Linear(28, 64), nn.TransformerEncoder(layer, 2), nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)).mean(1))


class Vision(nn.Module):
    """torchvision's vision transformer, whose head starts at zero, for small images."""

    def __init__(self) -> None:
        super().__init__()
        self.body = models.VisionTransformer(32, 4, 4, 4, 128, 256, num_classes=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Classifier(nn.Module):
    """Texts as tutorials classify them: an embedding, a body that reads it, and a head."""

    def __init__(self, body: str, vocabulary: int = 10_000, dim: int = 64, hidden: int = 128) -> None:
        super().__init__()
        self.embed, self.kind = nn.Embedding(vocabulary, dim, padding_idx=0), body
        self.position = nn.Parameter(torch.randn(1, 512, dim) * 0.02) if body == "encoder" else None
        layer = nn.TransformerEncoderLayer(dim, 4, 2 * dim, batch_first=True)
        self.body: nn.Module = {
            "bag": lambda: nn.Sequential(nn.Linear(dim, hidden), nn.ReLU()),
            "convolutions": lambda: nn.ModuleList(nn.Conv1d(dim, 100, width) for width in (3, 4, 5)),
            "LSTM": lambda: nn.LSTM(dim, hidden, batch_first=True),
            "both ways": lambda: nn.GRU(dim, hidden, batch_first=True, bidirectional=True),
            "encoder": lambda: nn.TransformerEncoder(layer, 2),
        }[body]()
        self.head = nn.LazyLinear(2)
        self.head(self.read(torch.zeros(2, 16, dtype=torch.long)))

    def read(self, x: Tensor) -> Tensor:
        words = self.embed(x)
        if self.kind == "bag":
            return self.body(words.mean(1))
        if self.kind == "convolutions":
            return torch.cat([layer(words.mT).relu().amax(2) for layer in self.body], dim=1)  # type: ignore[union-attr]
        if self.kind == "LSTM":
            return self.body(words)[0][:, -1]
        if self.kind == "both ways":
            return self.body(words)[0].mean(1)
        assert self.position is not None
        return self.body(words + self.position[:, : x.shape[1]]).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(x))


class Next(nn.Module):
    """The next token: a recurrent network, or a small GPT (weights of 0.02, norm first)."""

    def __init__(self, vocabulary: int, gpt: bool = False, tied: bool = False, dim: int = 64) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, dim), nn.Linear(dim if gpt else 128, vocabulary)
        self.position = nn.Embedding(128, dim) if gpt else None
        if gpt:
            layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
            self.body: nn.Module = nn.TransformerEncoder(layer, 3, nn.LayerNorm(dim), enable_nested_tensor=False)
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding)):
                    nn.init.normal_(module.weight, std=0.02)
        else:
            self.body = nn.LSTM(dim, 128, 2, batch_first=True)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.position is None:
            return self.head(self.body(self.embed(x))[0])
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.body(self.embed(x) + self.position(torch.arange(length)), mask=mask, is_causal=True))


def table(features: int, classes: int, width: int = 32) -> Callable[[], nn.Module]:
    """A network for a table, as tutorials have them."""

    def build() -> nn.Module:
        first = [nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        return nn.Sequential(*first, nn.Linear(width, classes))

    return build


def _recurrent(kind: type[nn.RNNBase], averaged: bool) -> Callable[[], nn.Module]:
    return lambda: Steps(kind, averaged)


def _classifier(body: str) -> Callable[[], nn.Module]:
    return lambda: Classifier(body)


# name -> (dataset and what its labels are taken modulo, or that the next word is told; layout, batch size, build)
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
    "torchvision's vision transformer": ("cifar10", "image", 32, Vision),
    "MLP, even or odd": ("mnist % 2", "vector", 64, lambda: dense(outputs=2)),
    "MLP, three classes": ("fashion_mnist % 3", "vector", 64, lambda: dense(256, 3, outputs=3)),
    "MLP, two kinds of text": ("imdb", "vector", 64, lambda: dense(inputs=3072, outputs=2)),
    "LSTM, last step, even or odd": ("mnist % 2", "rows", 32, lambda: Steps(nn.LSTM, False, outputs=2)),
    "Transformer encoder, two classes": ("fashion_mnist % 2", "rows", 32, lambda: Encoder(2)),
    "CNN, batch norm, two classes": ("cifar10 % 2", "image", 32, lambda: normed_cnn(outputs=2)),
    "LeNet, three classes": ("cifar10 % 3", "image", 64, lambda: lenet(3)),
    "torchvision's resnet18, two classes": ("cifar10 % 2", "image", 32, lambda: models.resnet18(num_classes=2)),
    "MLP, digits of 8x8": ("digits", "vector", 64, lambda: dense(inputs=64)),
    "MLP, breast cancer": ("breast_cancer", "vector", 64, table(30, 2)),
    "MLP, wine": ("wine", "vector", 32, table(13, 3)),
    "MLP, irises": ("iris", "vector", 32, table(4, 3)),
    **{
        f"{kind} of {words} words": (f"imdb@{words}", "tokens", 32, _classifier(kind))
        for words in (64, 128)
        for kind in ("bag", "convolutions", "LSTM", "both ways", "encoder")
    },
    "LSTM, next character": ("imdb_chars", "tokens", 16, lambda: Next(97)),
    "GPT, next character": ("imdb_chars", "tokens", 16, lambda: Next(97, True)),
    "GPT, next word": ("imdb@48 next", "tokens", 16, lambda: Next(10_000, True, tied=True)),
    "LSTM, next word": ("imdb@48 next", "tokens", 16, lambda: Next(10_000)),
}  # fmt: skip


def bundled(name: str) -> Callable[[Any], datasets.Dataset]:
    """Return a loader of one of scikit-learn's tables, its columns standardized."""

    def load(_: Any) -> datasets.Dataset:
        import sklearn.datasets

        values, labels = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
        return datasets.from_arrays(name, (values - values.mean(0)) / values.std(0), labels)

    return load


def row(name: str, root: str | None) -> dict[str, Any]:
    what, layout, size, build = MODELS[name]
    dataset, _, classes = what.removesuffix(" next").partition(" % ")
    data = datasets.load(dataset, root)
    data = data.with_task("sequence") if what.endswith(" next") else data
    loss, epsilon = TASK_LOSS[data.task], NEXT if data.task == "sequence" else EPSILON
    torch.manual_seed(0)
    model, (x, y) = build(), data.batch(size, 0, layout)
    batch = (x, y % int(classes) if classes else y)
    made = cape.predict(model, batch, loss=loss, lr=LR, dataset_size=data.full_train_size, epsilon=epsilon)
    true = cape.measure(model, batch, loss=loss, lr=LR, epsilons=(epsilon,)).t_star[epsilon]
    low, high = made.interval(0.9)
    held = true is not None and low <= true <= high
    return {
        "model": name, "predicted": made.steps, "low": low, "high": high, "true": true, "held": held,
        "epsilon": epsilon, "family": made.family, "in_domain": made.in_domain, "warnings": list(made.warnings),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of Parquet datasets")
    parser.add_argument("--json")
    args = parser.parse_args()
    for table_name in ("breast_cancer", "wine", "iris"):
        datasets.register(table_name, bundled(table_name))
    result: dict[str, Any] = {"machine": machine("cpu"), "lr": LR, "rows": []}
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
