"""What families may be called, and which tell something of one another: no model is needed to know it."""

from __future__ import annotations

import re
from typing import Any

from cape.errors import SpecError

RELATIVES: dict[str, str] = {
    "dense": "mlp",
    "convnet": "cnn",
    "recurrent": "rnn",
    "encoder": "transformer",
    "backbone": "cnn",
}
"""Family of ordinary models -> the paper's family beside it, whose trials it learns from as from augmented ones."""


HEAD_AT_ZERO = ", head at zero"
TOKENS, LANGUAGE = ", tokens", ", language"
"""What is added to the family of an ordinary model that reads tokens, and of one that tells each position's token."""
APART = (HEAD_AT_ZERO, TOKENS, LANGUAGE)


def as_read(family: str, tokens: bool, task: str | None) -> str:
    """Return what the family of a model is called: ordinary models of tokens are families by themselves."""
    if not tokens or family not in RELATIVES:
        return family
    return family + (LANGUAGE if task == "sequence" else TOKENS)


def check_family_name(name: Any) -> str:
    """Return a family's name, or raise ``SpecError`` for what cannot be in the names of files."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise SpecError(f"A family's name is made of 1 to 64 letters, digits, '-' and '_', not {name!r}.")
    return name


def relative_of(family: str) -> str | None:
    """Return the family beside a family of ordinary models; None where there is none.

    Ordinary models whose head starts at zero, that read tokens or that tell them are families by themselves, beside
    the others of their kind.
    """
    return next((family.removesuffix(end) for end in APART if family.endswith(end)), RELATIVES.get(family))


def related(kind: str, read: str = "") -> tuple[str, ...]:
    """Return the families that a model of a kind (what its layers say: one of the paper's families) may be of.

    Args:
        read: ``TOKENS`` or ``LANGUAGE`` of a model of these, which then is of none that reads anything else.
    """
    ordinary = [family for family, relative in RELATIVES.items() if relative == kind]
    return tuple(family + read for family in ordinary) if read else (kind, *ordinary)
