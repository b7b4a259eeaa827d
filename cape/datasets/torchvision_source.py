"""The full training sets that torchvision downloads, kept in ``~/.cache/cape``."""

from __future__ import annotations

import fcntl
import http.client
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cape.datasets import images
from cape.datasets.dataset import Dataset, check_labels, fingerprint_arrays
from cape.datasets.images import Images
from cape.datasets.known import Known
from cape.errors import DataError, DependencyError

CACHE = Path("~/.cache/cape")


class TorchvisionImages(Images):
    """A downloaded training set in memory; pickling leaves the pixels behind and reads them again."""

    def __init__(self, name: str, known: Known, cache: Path) -> None:
        self._name, self._known, self._cache = name, known, cache
        pixels, labels = _read(name, known, cache)
        _, channels, height, width = pixels.shape
        super().__init__(labels, (channels, height, width), known.standard, known.reference)
        self._pixels: np.ndarray | None = pixels
        self.fingerprint = fingerprint_arrays(pixels, labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pixels": None}

    def pixels(self, index: np.ndarray) -> np.ndarray:
        if self._pixels is None:
            self._pixels, _ = _read(self._name, self._known, self._cache)
        return self._pixels[index]


def load(name: str, known: Known, cache: Path | None = None) -> Dataset:
    """Return a training set, downloaded on first use.

    Raises:
        DataError: torchvision does not offer it, or the download failed.
        DependencyError: torchvision is missing.
    """
    if known.torchvision is None:
        raise DataError(
            f"torchvision offers no '{name}'; put {name}.parquet into a folder and name it with --data or CAPE_DATA."
        )
    source = TorchvisionImages(name, known, (cache or CACHE).expanduser())
    check_labels(source.labels, known.classes, name)
    return Dataset(
        name=name,
        task="classification",
        outputs=known.classes,
        full_train_size=len(source),
        layouts=images.LAYOUTS,
        gray=known.gray,
        class_names=tuple(str(i) for i in range(known.classes)),
        fingerprint=source.fingerprint,
        source=source,
    )


def _read(name: str, known: Known, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels, uint8 [n, C, H, W], and labels, [n] int64."""
    try:
        from torchvision import datasets as torchvision_datasets
    except ImportError as error:
        raise DependencyError(
            f"'{name}' is downloaded with torchvision, which is missing: pip install torchvision, or name a folder of"
            " Parquet files with --data."
        ) from error
    assert known.torchvision is not None
    make = getattr(torchvision_datasets, known.torchvision)
    part: dict[str, Any] = {"split": "train"} if name == "svhn" else {"train": True}
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache):
            found = make(root=str(cache), download=True, **part)
    except (OSError, RuntimeError, EOFError, http.client.HTTPException) as error:
        raise DataError(
            f"'{name}' could not be downloaded into {cache} ({error}); name a folder that holds {name}.parquet with"
            " --data or CAPE_DATA, or use the dataset 'digits', which needs no download."
        ) from error
    pixels = np.asarray(found.data)
    labels = np.asarray(found.labels if name == "svhn" else found.targets, dtype=np.int64)
    if known.gray:
        pixels = pixels[:, None]
    elif name != "svhn":  # CIFAR comes with the channels last
        pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    return pixels, labels


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """Let one process at a time download into a cache: torchvision writes its files in place."""
    try:
        handle = os.open(cache / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # a cache that cannot be written to is one that nothing is downloaded into
        handle = None
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if handle is not None:
            os.close(handle)
