"""Texts: 3,072 hashed word features for classifiers, characters for sequence models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cape.errors import DataError, DependencyError

FEATURES = 3072
LAYOUTS = ("vector", "rows", "image")
CONTEXT = 64
_PRINTABLE = [chr(c) for c in range(32, 127)] + ["\n"]
VOCABULARY = ("<other>", *_PRINTABLE)
_CODES = np.zeros(128, dtype=np.int64)  # the last one, DEL, stands for every character beyond
_CODES[[ord(c) for c in _PRINTABLE]] = np.arange(1, len(VOCABULARY))


class HashedText:
    """Texts as hashed word counts of unit length (scikit-learn's ``HashingVectorizer`` with its defaults).

    ``vector`` is [3072], ``rows`` 32 rows of 96, ``image`` [3, 32, 32]: the same numbers in the same order.

    Args:
        read: gives all texts; called when the first batch is drawn, and again after unpickling.
        labels: [n] int64.
        lengths: [n] number of characters of each text.
        where: names the file in errors.
    """

    def __init__(self, read: Callable[[], Sequence[Any]], labels: np.ndarray, lengths: np.ndarray, where: str) -> None:
        self.labels = labels
        self.lengths = lengths
        self.where = where
        self._read = read
        self._texts: Sequence[Any] | None = None
        self._hashed: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_texts": None, "_hashed": {}}

    def __len__(self) -> int:
        return len(self.labels)

    def text(self, row: int) -> str:
        """Return one text."""
        if self._texts is None:
            self._texts = self._read()
        return str(self._texts[row])

    def as_sequence(self) -> Characters:
        """Return the same texts as sequences of characters."""
        return Characters(self)

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        return {"vector": (FEATURES,), "rows": (32, FEATURES // 32), "image": (3, 32, 32)}[layout]

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        rows = index.tolist()
        self._hash([row for row in rows if row not in self._hashed])
        x = np.zeros((len(rows), FEATURES), dtype=np.float32)
        for i, row in enumerate(rows):
            columns, values = self._hashed[row]
            x[i, columns] = values
        return torch.from_numpy(x).view(len(rows), *self.sample_shape(layout)), torch.from_numpy(self.labels[index])

    def _hash(self, rows: list[int]) -> None:
        if not rows:
            return
        try:
            from sklearn.feature_extraction.text import HashingVectorizer
        except ImportError as error:
            raise DependencyError("Hashing texts needs scikit-learn: pip install scikit-learn.") from error
        matrix = HashingVectorizer(n_features=FEATURES).transform([self.text(row) for row in rows])
        for i, row in enumerate(rows):
            part = slice(matrix.indptr[i], matrix.indptr[i + 1])
            self._hashed[row] = (matrix.indices[part].copy(), matrix.data[part].astype(np.float32))


class Characters:
    """A window of 64 characters at a random place of each text, and the next character of each as target.

    Tokens are the 95 printable ASCII characters and the newline; anything else is token 0. Texts of 64 characters
    or fewer are left out.
    """

    def __init__(self, texts: HashedText) -> None:
        self.texts = texts
        self.rows = np.flatnonzero(texts.lengths > CONTEXT)
        if not len(self.rows):
            raise DataError(f"No text of {texts.where} is longer than {CONTEXT} characters.")

    def __len__(self) -> int:
        return len(self.rows)

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        return (CONTEXT,)

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        windows = np.empty((len(index), CONTEXT + 1), dtype=np.int64)
        for i, row in enumerate(self.rows[index].tolist()):
            text = self.texts.text(row)
            start = int(rng.integers(len(text) - CONTEXT))
            window = text[start : start + CONTEXT + 1].encode("utf-32-le", "surrogatepass")
            windows[i] = _CODES[np.frombuffer(window, dtype=np.uint32).clip(max=len(_CODES) - 1)]
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
