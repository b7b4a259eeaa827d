"""The inputs of a batch: its samples, and what all of these share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cape.state import Inputs, map_tensors, tensors_of


@dataclass(frozen=True)
class Samples:
    """Inputs as a model takes them, and which of their tensors have a row for each sample.

    That is told once, by the size of the whole batch: a piece of it may be as long as a table that all samples share.

    Attributes:
        inputs: a tensor, or several, however nested. count: number of samples.
        own: of every tensor (in the order of ``tensors_of``) whether its first dimension is the batch.
    """

    inputs: Inputs
    count: int
    own: tuple[bool, ...]

    @classmethod
    def of(cls, inputs: Inputs, count: int) -> Samples:
        """Take every tensor whose first dimension has the size of the batch for one of samples."""
        return cls(inputs, count, tuple(t.dim() > 0 and len(t) == count for t in tensors_of(inputs)))

    def __len__(self) -> int:
        return self.count

    def tensors(self) -> list[Tensor]:
        """Return the tensors of samples, in order."""
        return [t for t, own in zip(tensors_of(self.inputs), self.own, strict=True) if own]

    def map(self, function: Callable[[Tensor], Any]) -> Inputs:
        """Return the inputs with a function of every tensor of samples in its place."""
        own = iter(self.own)
        return map_tensors(lambda t: function(t) if next(own) else t, self.inputs)

    def take(self, index: slice | Tensor) -> Samples:
        """Return some of the samples."""
        count = len(range(self.count)[index]) if isinstance(index, slice) else len(index)
        return Samples(self.map(lambda t: t[index]), count, self.own)
