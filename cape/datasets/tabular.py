"""Feature vectors: tables with a numeric target, and arrays held in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cape.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

LAYOUTS = ("vector", "rows")
MOST_CATEGORIES = 1_000  # a column of more different texts holds ids or dates, not categories


class Vectors:
    """Feature vectors held in memory, float32 [n, T, d]: vectors of T·d, or T rows of d.

    Args:
        values: float32 [n, T, d].
        labels: [n] float32 (regression), [n] int64 (classification) or [n, L] float32 (multi-label).
    """

    def __init__(self, values: np.ndarray, labels: np.ndarray) -> None:
        self.values = values
        self.labels = labels

    def __len__(self) -> int:
        return len(self.values)

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        _, rows, size = self.values.shape
        return (rows * size,) if layout == "vector" else (rows, size)

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(self.values[index])
        return x.flatten(1) if layout == "vector" else x, torch.from_numpy(self.labels[index])


def standardize(values: np.ndarray) -> np.ndarray:
    """Return columns of zero mean and unit variance (a constant column becomes zero), float32."""
    values = values.astype(np.float64)
    # By a power of two, which rounds nothing: the squares of huge numbers would be infinite, of tiny ones zero.
    values = np.ldexp(values, -np.frexp(np.abs(values).max(0))[1])
    # Where a constant column's mean is rounded, its deviation is not zero but rounding noise; its range is zero.
    varies = values.max(0) > values.min(0)
    return ((values - values.mean(0)) / np.where(varies, values.std(0), np.inf)).astype(np.float32)


def from_table(table: pa.Table, target: str, where: str) -> Vectors:
    """Turn a table into standardized features and a standardized target.

    Numbers are standardized, missing ones take the column's median first; texts become one column for each value
    (0 or 1, in alphabetical order; at most ``MOST_CATEGORIES``). Features keep the order of the columns, numbers first.

    Raises:
        DataError: no such target, a missing or infinite value where there must be none, or a column that is
            neither numbers nor text, or too many different texts.
    """
    if target not in table.column_names:
        raise DataError(f"{where} has no target column '{target}'; its columns are {', '.join(table.column_names)}.")
    numbers: list[np.ndarray] = []
    categories: list[np.ndarray] = []
    for name in table.column_names:
        if name == target:
            continue
        values = _numbers(table, name, where)
        if values is not None:
            present = ~np.isnan(values)
            if not present.any():
                raise DataError(f"The column '{name}' of {where} is empty; leave it out.")
            numbers.append(np.where(present, values, np.median(values[present])))
            continue
        words = ["" if v is None else v for v in table.column(name).to_pylist()]
        found = sorted(set(words))
        if len(found) > MOST_CATEGORIES:
            raise DataError(
                f"The column '{name}' of {where} holds {len(found)} different texts, more than {MOST_CATEGORIES}; leave"
                " it out or make it a number."
            )
        texts = np.array(words)
        categories += [(texts == category).astype(np.float32) for category in found]
    if not numbers and not categories:
        raise DataError(f"{where} has no column beside its target '{target}'.")
    goal = _numbers(table, target, where)
    if goal is None or np.isnan(goal).any():
        raise DataError(f"The target '{target}' of {where} must be a number in every row.")
    parts = [standardize(np.stack(numbers, 1))] if numbers else []
    parts += [np.stack(categories, 1)] if categories else []
    return Vectors(np.concatenate(parts, 1)[:, :, None], standardize(goal[:, None])[:, 0])


def _numbers(table: pa.Table, name: str, where: str) -> np.ndarray | None:
    """Return a column as float64 with NaN where a value is missing, or ``None`` for a column of texts."""
    import pyarrow as pa

    kind = table.schema.field(name).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return None
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"The column '{name}' of {where} holds {kind}, neither numbers nor text; leave it out.")
    column = table.column(name).cast(pa.int8()) if pa.types.is_boolean(kind) else table.column(name)
    array = column.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)  # a missing value becomes NaN
    if np.isinf(array).any():
        raise DataError(f"The column '{name}' of {where} holds an infinite value.")
    return array
