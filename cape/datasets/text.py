"""Texts: 3,072 hashed word features, or the first words, for classifiers; characters or words for sequence models."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cape.errors import DataError, DependencyError

FEATURES = 3072
LAYOUTS = ("vector", "rows", "image")
CONTEXT = 64
MOST_WORDS = 10_000
PADDING, OTHER = "<padding>", "<other>"
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_PRINTABLE = [chr(c) for c in range(32, 127)] + ["\n"]
VOCABULARY = (OTHER, *_PRINTABLE)
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
        self._words: tuple[tuple[str, ...], list[np.ndarray]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_texts": None, "_hashed": {}, "_words": None}

    def __len__(self) -> int:
        return len(self.labels)

    def text(self, row: int) -> str:
        """Return one text."""
        if self._texts is None:
            self._texts = self._read()
        return str(self._texts[row])

    def words(self) -> tuple[tuple[str, ...], list[np.ndarray]]:
        """Return the vocabulary of all texts, and each text as numbers of its words there, int64.

        Words are letters and digits, in lower case; number 0 is padding, 1 any word but the 9,998 most frequent.
        """
        if self._words is None:
            read = [_WORD.findall(self.text(row).lower()) for row in range(len(self))]
            counted = Counter(word for words in read for word in words)
            kept = sorted(counted, key=lambda word: (-counted[word], word))[: MOST_WORDS - 2]
            vocabulary = (PADDING, OTHER, *kept)
            number = {word: i for i, word in enumerate(vocabulary)}
            self._words = vocabulary, [np.array([number.get(w, 1) for w in words], dtype=np.int64) for words in read]
        return self._words

    def as_sequence(self) -> Characters:
        """Return the same texts as sequences of characters."""
        return Characters(self)

    def resized(self, length: int) -> Words:
        """Return the same texts as their first words."""
        return Words(self, length)

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


class Words:
    """The first words of each text, padded at the end: ``tokens`` [length], of the vocabulary of all texts."""

    def __init__(self, texts: HashedText, length: int) -> None:
        self.texts, self.length, self.labels = texts, length, texts.labels

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """What each token stands for."""
        return self.texts.words()[0]

    def as_sequence(self) -> NextWords:
        """Return windows of the same texts with the next word of each word as target."""
        return NextWords(self.texts, self.length)

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        return (self.length,)

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        read = self.texts.words()[1]
        tokens = np.zeros((len(index), self.length), dtype=np.int64)
        for i, row in enumerate(index.tolist()):
            first = read[row][: self.length]
            tokens[i, : len(first)] = first
        return torch.from_numpy(tokens), torch.from_numpy(self.labels[index])


class _Windows(ABC):
    """A window of so many tokens at a random place of each text, and the next token of each as target.

    Texts of no more tokens than that are left out.
    """

    what: str

    def __init__(self, texts: HashedText, lengths: np.ndarray, context: int) -> None:
        self.texts, self.context = texts, context
        self.rows = np.flatnonzero(lengths > context)
        if not len(self.rows):
            raise DataError(f"No text of {texts.where} is longer than {context} {self.what}.")

    def __len__(self) -> int:
        return len(self.rows)

    def sample_shape(self, layout: str) -> tuple[int, ...]:
        return (self.context,)

    @abstractmethod
    def read(self, row: int, rng: np.random.Generator) -> np.ndarray:
        """Return a window of one token more than the context, int64."""

    def fetch(self, index: np.ndarray, layout: str, preprocess: str, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        windows = np.stack([self.read(row, rng) for row in self.rows[index].tolist()])
        tokens = torch.from_numpy(windows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _start(self, length: int, rng: np.random.Generator) -> int:
        return int(rng.integers(length - self.context))


class Characters(_Windows):
    """Windows of 64 characters (of ``NAME@SIZE``: of that many) with the next character of each as target.

    Tokens are the 95 printable ASCII characters and the newline; anything else is token 0.
    """

    what = "characters"
    vocabulary = VOCABULARY

    def __init__(self, texts: HashedText, context: int = CONTEXT) -> None:
        super().__init__(texts, texts.lengths, context)

    def resized(self, length: int) -> Characters:
        """Return windows of another size."""
        return Characters(self.texts, length)

    def read(self, row: int, rng: np.random.Generator) -> np.ndarray:
        text = self.texts.text(row)
        start = self._start(len(text), rng)
        window = text[start : start + self.context + 1].encode("utf-32-le", "surrogatepass")
        return _CODES[np.frombuffer(window, dtype=np.uint32).clip(max=len(_CODES) - 1)]


class NextWords(_Windows):
    """Windows of words with the next word of each as target; tokens are those of ``HashedText.words``."""

    what = "words"

    def __init__(self, texts: HashedText, context: int) -> None:
        super().__init__(texts, np.array([len(words) for words in texts.words()[1]]), context)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        return self.texts.words()[0]

    def read(self, row: int, rng: np.random.Generator) -> np.ndarray:
        words = self.texts.words()[1][row]
        start = self._start(len(words), rng)
        return words[start : start + self.context + 1]
