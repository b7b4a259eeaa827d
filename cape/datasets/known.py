"""The datasets that CAPE knows by name: classes, sizes, normalization constants.

Statistics are of the full training sets. The authors normalize CIFAR-10 with the mean of the *per-image* standard
deviations, which is smaller; that is kept as the reference constant only.
"""

from __future__ import annotations

from dataclasses import dataclass

from cape.dataset_names import source_of
from cape.datasets.images import Statistics


@dataclass(frozen=True)
class Known:
    """A dataset with a name.

    Attributes:
        kind: ``image``, ``text`` or ``table``.
        full_train_size: number N of training samples where the file does not say it.
        classes: number of labels (1 for a regression).
        gray: single-channel images.
        standard: published statistics of the pixels.
        reference: constants of the authors' code where they differ.
        torchvision: the class of ``torchvision.datasets`` that downloads it.
    """

    kind: str
    full_train_size: int
    classes: int
    gray: bool = False
    standard: Statistics | None = None
    reference: Statistics | None = None
    torchvision: str | None = None


KNOWN = {
    "mnist": Known("image", 60_000, 10, True, Statistics((0.1307,), (0.3081,)), torchvision="MNIST"),
    "fashion_mnist": Known("image", 60_000, 10, True, Statistics((0.2860,), (0.3530,)), torchvision="FashionMNIST"),
    "cifar10": Known(
        "image",
        50_000,
        10,
        standard=Statistics((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        reference=Statistics((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        torchvision="CIFAR10",
    ),
    "cifar100": Known(
        "image",
        50_000,
        100,
        standard=Statistics((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        torchvision="CIFAR100",
    ),
    "svhn": Known(
        "image",
        73_257,
        10,
        standard=Statistics((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
        torchvision="SVHN",
    ),
    "imdb": Known("text", 25_000, 2),
    "california_housing": Known("table", 20_640, 1),
}


def known(name: str) -> Known | None:
    """Return what is known of the dataset that a name is made of (its characters, another size)."""
    return KNOWN.get(source_of(name))
