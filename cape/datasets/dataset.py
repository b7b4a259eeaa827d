"""The ``Dataset``: what is known of a dataset, and how a probe batch is drawn from it."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cape.errors import CapeError, DataError, SpecError, did_you_mean, first_line

PREPROCESS = ("standard", "reference", "reference_normalized")
MOST_CLASSES = 1_000_000  # more are ids, not classes, and a head for them would fill the memory


class Source(Protocol):
    """Where the samples of a dataset come from. Pickles cheaply: caches and what a file holds stay behind.

    One of tokens has a ``vocabulary`` as well, a sequence of what each token is called.
    """

    def __len__(self) -> int: ...

    def __hash__(self) -> int: ...

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        """Return the shape of one sample in a layout."""
        ...

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the rows ``index``; ``rng`` serves whatever else is random in a sample."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A dataset, ready to draw probe batches from.

    Attributes:
        name: as it was loaded.
        task: ``classification``, ``regression``, ``sequence`` or ``multilabel``.
        outputs: units of the head: classes, labels, vocabulary, or 1.
        full_train_size: number N of samples of the *full* training set (there may be fewer rows here).
        layouts: the layouts in which a batch can be had.
        gray: single-channel images.
        class_names: one name for each output (none for a regression).
        fingerprint: 16 hex digits that name the content.
        source: where the samples come from.
    """

    name: str
    task: str
    outputs: int
    full_train_size: int
    layouts: tuple[str, ...]
    gray: bool
    class_names: tuple[str, ...]
    fingerprint: str
    source: Source = field(repr=False, compare=False)

    def __len__(self) -> int:
        """Return the number of rows that batches are drawn from."""
        return len(self.source)

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that :meth:`with_task` can give, the dataset's own first."""
        others: tuple[str, ...] = ()
        if self.task == "classification":
            others = ("multilabel", "sequence") if hasattr(self.source, "as_sequence") else ("multilabel",)
        return (self.task, *others)

    def with_task(self, task: str) -> Dataset:
        """Return the same data for another task.

        Labels become multi-label targets (one-hot, float [B, L]); texts become sequences of characters (tokens
        [B, 64] with the next character of each as target), those of ``NAME@SIZE`` sequences of words.

        Raises:
            SpecError: the data cannot serve that task.
        """
        if task == self.task:
            return self
        if task not in self.tasks:
            raise SpecError(
                f"The dataset '{self.name}' serves the tasks {', '.join(self.tasks)}, not '{task}'."
                f"{did_you_mean(task, self.tasks)}"
            )
        if task == "multilabel":
            return dataclasses.replace(self, task=task)
        source = self.source.as_sequence()  # type: ignore[attr-defined]  # `tasks` has checked that it is there
        names = source.vocabulary
        return dataclasses.replace(
            self, task="sequence", outputs=len(names), layouts=("tokens",), class_names=names, source=source
        )

    @property
    def vocabulary(self) -> int:
        """How many tokens there are, numbered from 0; 0 where samples are not made of any."""
        return len(getattr(self.source, "vocabulary", ()))

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        """Return the shape of one sample in a layout; raises ``SpecError`` where the dataset does not have it."""
        return self.source.sample_shape(self._check_layout(layout))

    def batch(
        self, size: int, seed: int, layout: str, task: str | None = None, preprocess: str = "standard"
    ) -> tuple[Tensor, Tensor]:
        """Draw a batch without replacement; the same arguments give the same batch, bit for bit.

        Args:
            size: number B of samples.
            seed: a whole number, zero or more.
            layout: ``vector`` [B, d], ``rows`` [B, T, d], ``image`` [B, 3, 32, 32] (of ``NAME@SIZE``, as many
                channels as are stored and that side; float32) or ``tokens`` [B, T] (int64).
            task: another task than the dataset's own (see :meth:`with_task`).
            preprocess: ``standard``: images normalized per channel; ``reference``: as the authors' generators
                (the constants they use, and images of the layout ``image``, which they give to CNNs, only scaled
                to 0..1); ``reference_normalized``: their constants in every layout, as they do for transformers.

        Returns:
            Inputs, and targets: [B] int64 (classification), [B] float32 (regression), [B, L] float32
            (multi-label) or [B, T] int64 (sequence). Both on the CPU.

        Raises:
            DataError: fewer rows than ``size``, or a row that cannot be read.
            SpecError: a layout, task or preprocessing that there is not, a size below 1, a negative seed.
        """
        if task is not None and task != self.task:
            return self.with_task(task).batch(size, seed, layout, preprocess=preprocess)
        self._check_layout(layout)
        if preprocess not in PREPROCESS:
            raise SpecError(f"Unknown preprocess '{preprocess}'.{did_you_mean(preprocess, PREPROCESS)}")
        if size < 1:
            raise SpecError(f"A batch has at least 1 sample, not {size!r}.")
        if seed < 0:
            raise SpecError(f"The seed of a batch is zero or more, not {seed!r}.")
        if size > len(self.source):
            raise DataError(
                f"A batch of {size} cannot be drawn without replacement from the {len(self.source)} rows of"
                f" '{self.name}'; choose a smaller batch or a larger file."
            )
        rng = np.random.default_rng(seed)
        index = rng.choice(len(self.source), size, replace=False)
        try:
            x, y = self.source.fetch(index, layout, preprocess, rng)
        except CapeError:
            raise
        except Exception as error:  # a source of the user's own may raise anything
            raise DataError(
                f"The dataset '{self.name}' gave no batch: {type(error).__name__}: {first_line(error)}."
            ) from error
        if self.task == "multilabel" and y.dim() == 1:
            y = F.one_hot(y, self.outputs).to(torch.float32)
        return x, y

    def _check_layout(self, layout: str) -> str:
        if layout not in self.layouts:
            raise SpecError(
                f"The dataset '{self.name}' (task {self.task}) comes as {', '.join(self.layouts)}, not as '{layout}'."
            )
        return layout


def fingerprint_file(path: Path) -> str:
    """Return 16 hex digits of the BLAKE2b hash of a file."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint_arrays(*arrays: np.ndarray) -> str:
    """Return 16 hex digits of the BLAKE2b hash of arrays: their types, shapes and content."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def check_labels(labels: np.ndarray, classes: int, where: str) -> None:
    """Raise ``DataError`` where labels do not lie in 0..classes-1, or classes are more than ``MOST_CLASSES``."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 and high < classes:  # declared or counted
        raise DataError(f"The labels of {where} run from {low} to {high}; number them from 0.")
    if high >= classes:
        raise DataError(
            f"The labels of {where} run from {low} to {high}, but {classes} classes are declared; they must lie in"
            f" 0..{classes - 1}."
        )
    if classes > MOST_CLASSES:
        raise DataError(
            f"{where} has {classes} classes (labels up to {high}), more than {MOST_CLASSES}; number those that occur"
            " from 0."
        )
