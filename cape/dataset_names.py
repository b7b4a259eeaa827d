"""What the names of datasets say: no data, and no torch, is needed to know it."""

from __future__ import annotations

CHARACTERS: dict[str, str] = {"imdb_chars": "imdb"}
"""Dataset of characters in sequence -> the texts that they are read from."""


def split_side(name: str) -> tuple[str, int | None]:
    """Return the dataset and the size that ``NAME@SIZE`` names; the name and None where it names none."""
    base, _, side = name.rpartition("@")
    number = side.isascii() and side.isdecimal() and len(side) < 10
    return (base, int(side)) if base and number else (name, None)


def source_of(name: str) -> str:
    """Return the data that a dataset is made of: one for ``mnist`` and ``mnist@28``, one for texts and characters."""
    base = split_side(name)[0]
    return CHARACTERS.get(base, base)
