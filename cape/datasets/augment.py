"""Augmented datasets: other tasks made of the same data, so that four datasets are many (design, augmented trials).

An augmented dataset is a dataset like any other: fewer classes, other sizes, harder or simpler inputs. It is drawn
from, probed and trained as a plain one is; nothing after this module knows the difference.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cape.config import Augmentation
from cape.datasets.dataset import Dataset, Source
from cape.datasets.images import Images, arrange, arranged_shape
from cape.errors import SpecError
from cape.jsonconfig import derive_seed

_FINEST = 200  # classes that a dataset is cut into, at most


def augmented(dataset: Dataset, augmentation: Augmentation, at_least: int = 1) -> Dataset:
    """Return the dataset that an augmentation makes of another one; nothing is read or computed yet.

    In the order in which they are applied:

    * ``classes`` keeps that many classes, drawn by the augmentation's seed and numbered from 0 in the order of the
      draw, and further ones until ``at_least`` rows are left. Regressions and multi-label data keep all rows.
    * ``split`` cuts each of them into several, of samples drawn at random once and for all: as many small classes.
    * ``gray`` and ``pooled`` make smaller images, before they are arranged (``image`` is then resized to 3x32x32, as
      it is for any image of another size). Data that are not images, hashed texts and tables, stay as they are.
    * ``columns`` are sums of the inputs with weights drawn by the augmentation's seed: a table, which has no other
      layout than ``vector``.
    * ``noise`` is added, in units of the standard deviation of the batch's inputs; then ``zeroed`` of all inputs become
      zero; then all are multiplied by e^``log_scale``. Of tokens as many become token 0, and nothing else is done.
    * ``random_labels``: a label is drawn from all classes that there are then. Targets that are no classes are
      exchanged among the samples that were drawn.

    Which samples are noisy, zeroed or labelled at random follows from the seed of the batch.

    Args:
        at_least: rows that must be left, a batch size.

    Raises:
        SpecError: a sequence, whose targets are its inputs; tokens of which sums (``columns``) are asked for.
    """
    if dataset.task == "sequence":
        raise SpecError(f"'{dataset.name}' is a sequence, whose targets are its inputs; it cannot be augmented.")
    if augmentation.columns is not None and dataset.vocabulary:
        raise SpecError(f"'{dataset.name}' is made of tokens, and so has no sums; leave out 'narrow'.")
    labels: np.ndarray = dataset.source.labels  # type: ignore[attr-defined]  # every source but sequences has them
    kept: tuple[int, ...] = ()
    parts = 1
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer) and dataset.outputs > 1:
        kept = _classes(dataset, augmentation, at_least)
        parts = max(1, round((_FINEST / dataset.outputs) ** augmentation.split))
    source = _Augmented(dataset.source, augmentation, dataset.outputs, kept, parts)
    names = tuple(dataset.class_names[c] for c in kept) if kept and dataset.class_names else dataset.class_names
    return dataclasses.replace(
        dataset,
        outputs=(len(kept) or dataset.outputs) * parts,
        layouts=dataset.layouts if augmentation.columns is None else ("vector",),
        full_train_size=augmentation.samples or dataset.full_train_size,
        class_names=tuple(f"{name} {k + 1}" for name in names for k in range(parts)) if parts > 1 else names,
        source=source,
    )


def _classes(dataset: Dataset, augmentation: Augmentation, at_least: int) -> tuple[int, ...]:
    """Return the classes that are kept, in their new order; none where all are."""
    count = round(2 * (dataset.outputs / 2) ** augmentation.classes)
    order = np.random.default_rng(derive_seed(augmentation.seed, "classes")).permutation(dataset.outputs)
    starts = _by_class(dataset.source, dataset.outputs)[1]
    rows = np.cumsum(np.diff(starts, append=len(dataset.source))[order])
    count = max(count, int(np.searchsorted(rows, at_least)) + 1)
    return tuple(order[:count].tolist()) if count < dataset.outputs else ()


@lru_cache(maxsize=32)
def _by_class(source: Source, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a source ordered by class, and where each class, one without rows too, begins among them."""
    labels: np.ndarray = source.labels  # type: ignore[attr-defined]
    order = np.argsort(labels, kind="stable")
    return order, np.searchsorted(labels[order], np.arange(classes))


@lru_cache(maxsize=32)
def _dealt(seed: int, parts: int, count: int) -> np.ndarray:
    """Return which part of its class each of ``count`` rows belongs to."""
    return np.random.default_rng(derive_seed(seed, "split")).integers(parts, size=count)


def _weights(seed: int, inputs: int, columns: int) -> np.ndarray:
    """Return float32 [inputs, columns]: a column is as large as the inputs are."""
    rng = np.random.default_rng(derive_seed(seed, "columns"))
    return rng.standard_normal((inputs, columns), dtype=np.float32) / np.float32(np.sqrt(inputs))


@dataclass(frozen=True, eq=False)
class _Augmented:
    """The samples of another source that are left, and changed (see :func:`augmented`).

    Attributes:
        classes: that the base has.
        kept: those that are left, in their new order; all where there is none.
        parts: what each of them is cut into.
    """

    base: Source
    augmentation: Augmentation
    classes: int
    kept: tuple[int, ...]
    parts: int = 1

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return getattr(self.base, "vocabulary", ())

    def __len__(self) -> int:
        return sum(map(len, self._groups())) if self.kept else len(self.base)

    def _groups(self) -> list[np.ndarray]:
        """Return the rows of each class that is kept."""
        order, starts = _by_class(self.base, self.classes)
        ends = np.append(starts[1:], len(order))
        return [order[starts[c] : ends[c]] for c in self.kept]

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        if self.augmentation.columns is not None:
            return (self.augmentation.columns,)
        if not isinstance(self.base, Images):
            return self.base.sample_shape(layout)
        channels, height, width = self.base.shape
        if self.augmentation.pooled:
            height, width = height // 2, width // 2
        return arranged_shape((1 if self.augmentation.gray else channels, height, width), layout)

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = np.concatenate(self._groups())[index] if self.kept else index
        changes = self.augmentation
        if isinstance(self.base, Images):
            y = torch.from_numpy(self.base.labels[rows])
            x = arrange(_smaller(self.base.normalized(rows, layout, preprocess), changes), layout)
        else:
            inputs, y = self.base.fetch(rows, layout, preprocess, rng)
            x = inputs.numpy()
        if changes.columns is not None:
            x = x @ _weights(changes.seed, x.shape[1], changes.columns)
        if self.kept:
            renumbered = np.zeros(max(self.kept) + 1, dtype=np.int64)
            renumbered[list(self.kept)] = np.arange(len(self.kept))
            y = torch.from_numpy(renumbered[y.numpy()])
        if self.parts > 1:
            y = y * self.parts + torch.from_numpy(_dealt(changes.seed, self.parts, len(self.base))[rows])
        return torch.from_numpy(_changed(x, changes, rng)), self._labels(y, rng)

    def _labels(self, y: Tensor, rng: np.random.Generator) -> Tensor:
        chosen = np.flatnonzero(rng.random(len(y)) < self.augmentation.random_labels)
        if not len(chosen):
            return y
        y = y.clone()
        if y.dim() == 1 and not y.is_floating_point():
            classes = (len(self.kept) or self.classes) * self.parts
            y[chosen] = torch.from_numpy(rng.integers(classes, size=len(chosen)))
        else:
            y[chosen] = y[rng.permutation(chosen)]
        return y


def _smaller(x: np.ndarray, changes: Augmentation) -> np.ndarray:
    """Return images [B, C, H, W] gray, of half the size, or both."""
    if changes.gray:
        x = x.mean(axis=1, keepdims=True)
    if changes.pooled:
        height, width = x.shape[2] // 2, x.shape[3] // 2
        x = x[:, :, : 2 * height, : 2 * width].reshape(*x.shape[:2], height, 2, width, 2).mean(axis=(3, 5))
    return x


def _changed(x: np.ndarray, changes: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """Return inputs with noise, zeros and another scale, float32, C-contiguous; tokens (int64) with zeros alone."""
    if np.issubdtype(x.dtype, np.integer):
        return np.where(rng.random(x.shape, dtype=np.float32) < changes.zeroed, 0, x)
    if changes.noise:
        x = x + np.float32(changes.noise * x.std()) * rng.standard_normal(x.shape, dtype=np.float32)
    if changes.zeroed:
        x = np.where(rng.random(x.shape, dtype=np.float32) < changes.zeroed, np.float32(0), x)
    return np.ascontiguousarray(x * np.float32(np.exp(changes.log_scale)))
