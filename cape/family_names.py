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


def related(kind: str) -> tuple[str, ...]:
    """Return the families that a model of a kind (what its layers say: one of the paper's families) may be of."""
    return (kind, *(family for family, relative in RELATIVES.items() if relative == kind))
