"""Images as batches: normalization and the three layouts that an image comes in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SIDE = 32
LAYOUTS = ("vector", "rows", "image")


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel, of pixels between 0 and 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Images(ABC):
    """Labelled images of one size, gray [1, H, W] or colour [3, H, W].

    Args:
        labels: [n] int64, or [n, L] float32 (multi-label).
        shape: (channels, height, width) of :meth:`pixels`.
        standard: the published statistics; ``None`` computes them from up to 1,000 rows when first needed.
        reference: the constants of the authors' code where they differ.
        scale: the pixel value that stands for 1.
    """

    def __init__(
        self,
        labels: np.ndarray,
        shape: tuple[int, int, int],
        standard: Statistics | None = None,
        reference: Statistics | None = None,
        scale: float = 255.0,
    ) -> None:
        self.labels = labels
        self.shape = shape
        self.scale = scale
        self._standard = standard
        self._reference = reference

    @abstractmethod
    def pixels(self, index: np.ndarray) -> np.ndarray:
        """Return rows of raw pixels, uint8 [k, C, H, W]; raises ``DataError`` for one that cannot be read."""

    def pixels_for(self, index: np.ndarray, side: int) -> np.ndarray:
        """Return what images of another side are best made of: raw pixels, of :meth:`pixels`' shape or that side."""
        return self.pixels(index)

    def __len__(self) -> int:
        return len(self.labels)

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        return arranged_shape(self.shape, layout)

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        x = arrange(self.normalized(index, layout, preprocess), layout)
        return torch.from_numpy(x), torch.from_numpy(self.labels[index])

    def normalized(self, index: np.ndarray, layout: str, preprocess: str, side: int | None = None) -> np.ndarray:
        """Return rows of pixels as they are normalized for a layout, but in their own shape: float32 [k, C, H, W].

        Args:
            side: that the images are made for (:meth:`pixels_for`).
        """
        raw = self.pixels(index) if side is None else self.pixels_for(index, side)
        # NumPy, not torch: arrays this small cost more to spread over threads than to compute.
        x = raw.astype(np.float32) / np.float32(self.scale)
        statistics = self._statistics(layout, preprocess)
        if statistics is not None:
            mean, std = np.array([statistics.mean, statistics.std], dtype=np.float32)[:, :, None, None]
            x = (x - mean) / std
        return x

    def _statistics(self, layout: str, preprocess: str) -> Statistics | None:
        if preprocess == "reference" and layout == "image":
            return None
        if preprocess != "standard" and self._reference is not None:
            return self._reference
        if self._standard is None:
            index = np.linspace(0, len(self) - 1, min(len(self), 1000)).astype(np.int64)
            values = self.pixels(index) / self.scale
            mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3))
            # A constant channel becomes zero, not NaN; its deviation may be rounding noise.
            std[values.max((0, 2, 3)) == values.min((0, 2, 3))] = 1.0
            self._standard = Statistics(tuple(mean.tolist()), tuple(std.tolist()))
        return self._standard


def arranged_shape(shape: tuple[int, int, int], layout: str) -> tuple[int, ...]:
    """Return the shape of one image (channels, height, width) in a layout."""
    channels, height, width = shape
    return {
        "vector": (channels * height * width,),
        "rows": (height, channels * width),
        "image": (3, SIDE, SIDE),
    }[layout]


def arrange(x: np.ndarray, layout: str) -> np.ndarray:
    """Return images [B, C, H, W] in a layout, C-contiguous."""
    batch, channels, height, width = x.shape
    if layout == "vector":
        return x.reshape(batch, -1)
    if layout == "rows":  # a row of a colour image is its red, then its green, then its blue pixels
        return x.transpose(0, 2, 1, 3).reshape(batch, height, channels * width)
    x = resized(x, SIDE)
    return np.repeat(x, 3, axis=1) if channels == 1 else x


def resized(x: np.ndarray, side: int) -> np.ndarray:
    """Return images [B, C, H, W] as [B, C, side, side], bilinearly (pixel centres at halves, edges repeated)."""
    height, width = x.shape[2:]
    if height != side:
        x = _bilinear(side, height) @ x
    return x if width == side else x @ _bilinear(side, width).T


@lru_cache(maxsize=16)
def _bilinear(side: int, size: int) -> np.ndarray:
    """Return the matrix [side, size] that resizes one dimension, float32."""
    at = np.clip((np.arange(side) + 0.5) * size / side - 0.5, 0, size - 1)
    left = np.minimum(at.astype(np.int64), size - 1)
    right, share = np.minimum(left + 1, size - 1), at - left
    matrix = np.zeros((side, size), dtype=np.float32)
    np.add.at(matrix, (np.arange(side), left), 1 - share)
    np.add.at(matrix, (np.arange(side), right), share)
    return matrix


class ArrayImages(Images):
    """Images held in memory, uint8 [n, C, H, W]; see :class:`Images`."""

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        standard: Statistics | None = None,
        reference: Statistics | None = None,
        scale: float = 255.0,
    ) -> None:
        _, channels, height, width = pixels.shape
        super().__init__(labels, (channels, height, width), standard, reference, scale)
        self._pixels = pixels

    def pixels(self, index: np.ndarray) -> np.ndarray:
        return self._pixels[index]
