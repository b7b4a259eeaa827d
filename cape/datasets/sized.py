"""Datasets of images at another size, as models for larger or smaller images take them: ``NAME@SIDE``.

The paper's convolutional networks and transformers take 3x32x32 whatever the images are; ``mnist@28`` is gray images
[1, 28, 28] as they are stored, ``cifar10@224`` colour ones [3, 224, 224]. A user's ``FILE.parquet@224`` is
decoded at that side, where ``FILE.parquet`` is 32x32.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cape.datasets.images import Images, resized
from cape.errors import SpecError

if TYPE_CHECKING:
    from cape.datasets.dataset import Dataset

LARGEST = 1024


def sized(dataset: Dataset, side: int) -> Dataset:
    """Return a dataset of images as ``image`` [B, C, side, side], with the channels that they are stored with.

    Raises:
        SpecError: it is not one of images, it has a side already, or the side is not 1 to 1,024.
    """
    if isinstance(dataset.source, _Sized):
        raise SpecError(f"'{dataset.name}@{side}' names two sides; name one.")
    if not isinstance(dataset.source, Images):
        raise SpecError(f"'{dataset.name}' has no images, and so no side of them; name it without '@{side}'.")
    if not 1 <= side <= LARGEST:
        raise SpecError(f"The side of '{dataset.name}@{side}' must be 1 to {LARGEST:,} pixels.")
    return dataclasses.replace(
        dataset, name=f"{dataset.name}@{side}", layouts=("image",), source=_Sized(dataset.source, side)
    )


@dataclass(frozen=True)
class _Sized:
    base: Images
    side: int

    def __len__(self) -> int:
        return len(self.base)

    @property
    def labels(self) -> np.ndarray:
        return self.base.labels

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        return (self.base.shape[0], self.side, self.side)

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        x = resized(self.base.normalized(index, layout, preprocess, self.side), self.side)
        return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(self.base.labels[index])
