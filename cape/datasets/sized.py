"""Datasets at another size: images of another side, texts of so many words or characters, ``NAME@SIZE``.

The paper's convolutional networks and transformers take 3x32x32 whatever the images are; ``mnist@28`` is gray images
[1, 28, 28] as they are stored, ``cifar10@224`` colour ones [3, 224, 224]. A user's ``FILE.parquet@224`` is
decoded at that side, where ``FILE.parquet`` is 32x32. ``imdb@64`` is the first 64 words of each text as tokens, where
``imdb`` is 3,072 hashed features; ``imdb_chars@128`` windows of 128 characters.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cape.dataset_names import split_side
from cape.datasets.images import Images, resized
from cape.datasets.text import Characters, HashedText
from cape.errors import SpecError

if TYPE_CHECKING:
    from cape.datasets.dataset import Dataset

LARGEST = 1024


def sized(dataset: Dataset, size: int) -> Dataset:
    """Return a dataset at another size.

    Images become ``image`` [B, C, size, size], with the channels that they are stored with; texts ``tokens`` [B, size]
    with the label of each (``cape.datasets.text.Words``); sequences of characters windows of that size.

    Raises:
        SpecError: it is none of these, it has a size already, or the size is not 1 to 1,024.
        DataError: no text is that long, of sequences.
    """
    name, source = f"{dataset.name}@{size}", dataset.source
    if split_side(dataset.name)[1] is not None:
        raise SpecError(f"'{name}' names two sizes; name one.")
    if not isinstance(source, (Images, HashedText, Characters)):
        raise SpecError(f"'{dataset.name}' has neither images nor texts, and so no size; name it without '@{size}'.")
    if not 1 <= size <= LARGEST:
        raise SpecError(f"The size of '{name}' must be 1 to {LARGEST:,} pixels, words or characters.")
    if isinstance(source, Images):
        return dataclasses.replace(dataset, name=name, layouts=("image",), source=_Sized(source, size))
    return dataclasses.replace(dataset, name=name, layouts=("tokens",), source=source.resized(size))


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
