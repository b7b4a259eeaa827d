"""Families that tell something of one another, by name: no model is needed to know it."""

from __future__ import annotations

RELATIVES: dict[str, str] = {
    "dense": "mlp",
    "convnet": "cnn",
    "recurrent": "rnn",
    "encoder": "transformer",
    "backbone": "cnn",
}
"""Family of ordinary models -> the paper's family beside it, whose trials it learns from as from augmented ones."""


HEAD_AT_ZERO = ", head at zero"


def relative_of(family: str) -> str | None:
    """Return the family beside a family of ordinary models; None where there is none.

    Ordinary models whose head starts at zero are a family by themselves, beside the others of their kind.
    """
    return family.removesuffix(HEAD_AT_ZERO) if family.endswith(HEAD_AT_ZERO) else RELATIVES.get(family)


def related(kind: str) -> tuple[str, ...]:
    """Return the families that a model of a kind (what its layers say: one of the paper's families) may be of."""
    return (kind, *(family for family, relative in RELATIVES.items() if relative == kind))
