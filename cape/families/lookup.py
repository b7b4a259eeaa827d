"""Tokens as vectors: the embedding that an ordinary model of words or characters begins with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from cape.errors import SpecError
from cape.families.registry import DatasetInfo, check_options, pick
from cape.jsonconfig import JsonConfig

POOLED = ("none", "mean", "max", "flat")
DIMS = (32, 64, 128, 256)
OTHER = 1
"""Token that a model with a smaller vocabulary reads in the place of those beyond it (the dataset's own such token)."""


@dataclass(frozen=True)
class LookupOptions(JsonConfig):
    """Options of an embedding.

    Attributes:
        vocabulary: rows of the table. dim: size of a row. std: standard deviation of its normal initialization.
        pooled: what becomes of a sample's rows: ``none`` [B, T, dim], their ``mean`` or ``max`` [B, dim], or one after
            the other (``flat``, [B, T * dim]).
    """

    vocabulary: int
    dim: int
    std: float = 1.0
    pooled: str = "none"

    def __post_init__(self) -> None:
        check_options(
            "an embedding",
            vocabulary=(self.vocabulary, self.vocabulary > OTHER),
            dim=(self.dim, self.dim >= 1),
            std=(self.std, self.std > 0),
            pooled=(self.pooled, self.pooled in POOLED),
        )

    @classmethod
    def draw(cls, rng: np.random.Generator, dataset: DatasetInfo, dims: tuple[int, ...] = DIMS) -> LookupOptions:
        """Return torch's initialization or a smaller one; as many rows as a sequence has tokens.

        Of labelled texts a tenth of the rows to four times as many as there are tokens: people keep the words that
        they find frequent, or a tokenizer's whole vocabulary.

        Raises:
            SpecError: the dataset does not say how many tokens there are.
        """
        if dataset.vocabulary <= OTHER:
            raise SpecError(
                f"The dataset '{dataset.name}' does not say what its tokens are; give its source a `vocabulary`, a"
                " sequence of their names."
            )
        shares = (1.0,) if dataset.task == "sequence" else (0.1, 0.5, 1.0, 1.0, 2.0, 4.0)
        vocabulary = round(pick(rng, shares) * dataset.vocabulary)
        return cls(vocabulary, pick(rng, dims), pick(rng, (1.0, 1.0, 1.0, 0.1, 0.02)))


class Lookup(nn.Module):
    """Tokens [B, T] int64 -> rows of a table, pooled as ``LookupOptions`` say."""

    def __init__(self, options: LookupOptions) -> None:
        super().__init__()
        self.table = nn.Embedding(options.vocabulary, options.dim)
        nn.init.normal_(self.table.weight, std=options.std)
        self.pooled = options.pooled

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.table(x.where(x < self.table.num_embeddings, OTHER))
        if self.pooled == "none":
            return found
        if self.pooled == "flat":
            return found.flatten(1)
        return found.mean(1) if self.pooled == "mean" else found.amax(1)


def entry(lookup: LookupOptions | None, layout: str) -> nn.Module | None:
    """Return the embedding of a model of tokens; None of any other layout. Raises ``SpecError`` where one has none."""
    check_options("a model", lookup=(lookup, (lookup is not None) == (layout == "tokens")))
    return None if lookup is None else Lookup(lookup)
