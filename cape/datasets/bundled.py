"""Datasets that scikit-learn carries, so that nothing has to be downloaded; and datasets made of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from cape.config import check_count
from cape.datasets import images, tabular
from cape.datasets.dataset import Dataset, Source, check_labels, fingerprint_arrays
from cape.datasets.images import ArrayImages
from cape.datasets.tabular import Vectors, standardize
from cape.errors import DataError, DependencyError, SpecError, did_you_mean, first_line


def digits() -> Dataset:
    """Return scikit-learn's 1,797 handwritten digits: gray, 8x8, 16 levels (``image``: bilinear to 32x32)."""
    bunch = _sklearn("load_digits")
    pixels = bunch.images.astype(np.uint8)[:, None]
    source = ArrayImages(pixels, bunch.target.astype(np.int64), scale=16.0)
    return _finish("digits", "classification", 10, images.LAYOUTS, True, source, (pixels, source.labels))


def diabetes() -> Dataset:
    """Return scikit-learn's 442 diabetes patients: 10 standardized features, a standardized target."""
    bunch = _sklearn("load_diabetes")
    values, target = standardize(bunch.data)[:, :, None], standardize(bunch.target[:, None])[:, 0]
    return _finish("diabetes", "regression", 1, tabular.LAYOUTS, False, Vectors(values, target), (values, target))


def _sklearn(loader: str) -> Any:
    try:
        from sklearn import datasets as sklearn_datasets
    except ImportError as error:
        raise DependencyError("The bundled datasets need scikit-learn: pip install scikit-learn.") from error
    return getattr(sklearn_datasets, loader)()


def from_arrays(
    name: str,
    inputs: Any,
    targets: Any,
    *,
    task: str = "classification",
    outputs: int | None = None,
    full_train_size: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Make a dataset of arrays, for :func:`cape.datasets.register`.

    Args:
        name: the dataset's name.
        inputs: images, uint8 [n, H, W] (gray) or [n, C, H, W] with 1 or 3 channels; or features, float [n, d] or
            [n, T, d], which are taken as they are.
        targets: [n] whole numbers (classification), [n] numbers (regression) or [n, L] zeros and ones (multilabel).
        task: ``classification``, ``regression`` or ``multilabel``.
        outputs: number of classes or labels; the largest label plus one where it is not given.
        full_train_size: size N of the full training set; the number of rows where it is not given.
        class_names: one name for each class.

    Raises:
        DataError: arrays that are empty, do not belong together, or hold values that the task does not allow.
        SpecError: an unknown task.
    """
    try:
        x, y = np.asarray(inputs), np.asarray(targets)
    except (ValueError, TypeError, RuntimeError) as error:  # lists of different lengths, a tensor that needs gradients
        raise DataError(f"The inputs and targets of '{name}' are no arrays: {first_line(error)}.") from error
    if x.ndim == 0 or y.ndim == 0 or len(x) == 0 or len(x) != len(y):
        have = [len(a) if a.ndim else "no" for a in (x, y)]
        raise DataError(f"The dataset '{name}' has {have[0]} inputs and {have[1]} targets; give as many of each.")
    if x.size == 0:
        raise DataError(f"The inputs of '{name}' are empty, {x.shape}; give at least one number of each.")
    for what, count in (("outputs", outputs), ("full_train_size", full_train_size)):
        if count is not None:
            check_count(count, what)
    y, found = _targets(name, y, task, outputs)
    source: Source
    layouts: tuple[str, ...]
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        pixels = x[:, None] if x.ndim == 3 else x
        if pixels.shape[1] not in (1, 3):
            raise DataError(f"Images of '{name}' must have 1 or 3 channels, [n, C, H, W], not {x.shape}.")
        source, layouts, gray = ArrayImages(pixels, y), images.LAYOUTS, pixels.shape[1] == 1
    elif np.issubdtype(x.dtype, np.floating) and x.ndim in (2, 3):
        with np.errstate(over="ignore"):  # said below
            values = (x[:, :, None] if x.ndim == 2 else x).astype(np.float32)
        if not np.isfinite(values).all():
            raise DataError(f"The inputs of '{name}' hold NaN, or values that are infinite in float32.")
        source, layouts, gray = Vectors(values, y), tabular.LAYOUTS, False
    else:
        raise DataError(
            f"The inputs of '{name}' are {x.dtype} {x.shape}; give images (uint8 [n, H, W] or [n, C, H, W]) or"
            " features (float [n, d] or [n, T, d])."
        )
    made = _finish(name, task, found, layouts, gray, source, (x, y), full_train_size)
    if class_names is not None:
        if len(class_names) != made.outputs:
            raise DataError(f"'{name}' has {made.outputs} outputs, but {len(class_names)} class names were given.")
        made = dataclasses.replace(made, class_names=tuple(class_names))
    return made


def _targets(name: str, y: np.ndarray, task: str, outputs: int | None) -> tuple[np.ndarray, int]:
    """Return checked targets in the type of the task, and the number of outputs."""
    tasks = ("classification", "regression", "multilabel")
    if task not in tasks:
        raise SpecError(f"A dataset of arrays cannot have the task '{task}'.{did_you_mean(task, tasks)}")
    if task == "classification":
        if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
            raise DataError(f"The labels of '{name}' must be whole numbers [n], not {y.dtype} {y.shape}.")
        classes = outputs or max(int(y.max()) + 1, 1)
        check_labels(y, classes, f"'{name}'")
        return y.astype(np.int64), classes
    try:
        with np.errstate(over="ignore"):  # said below
            y = y.astype(np.float32)
    except (ValueError, TypeError) as error:
        raise DataError(f"The targets of '{name}' must be numbers, not {y.dtype}.") from error
    if not np.isfinite(y).all():
        raise DataError(f"The targets of '{name}' hold NaN, or values that are infinite in float32.")
    if task == "regression":
        if y.ndim != 1:
            raise DataError(f"The targets of '{name}' must be numbers [n], not {y.shape}.")
        return y, 1
    if y.ndim != 2 or not np.isin(y, (0.0, 1.0)).all():
        raise DataError(f"The targets of '{name}' must be zeros and ones [n, L], not {y.shape}.")
    return y, y.shape[1]


def _finish(
    name: str,
    task: str,
    outputs: int,
    layouts: tuple[str, ...],
    gray: bool,
    source: Source,
    arrays: tuple[np.ndarray, ...],
    full_train_size: int | None = None,
) -> Dataset:
    return Dataset(
        name=name,
        task=task,
        outputs=outputs,
        full_train_size=full_train_size or len(source),
        layouts=layouts,
        gray=gray,
        class_names=() if task == "regression" else tuple(str(i) for i in range(outputs)),
        fingerprint=fingerprint_arrays(*arrays),
        source=source,
    )
