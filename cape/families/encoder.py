"""Transformers as people write them: ``nn.TransformerEncoder`` over rows, patches or tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cape.config import ModelSpec
from cape.errors import SpecError
from cape.families.lookup import Lookup, LookupOptions, entry
from cape.families.makes import Ordinary, OrdinaryOptions, TokenOptions, check_make, initialized
from cape.families.registry import DatasetInfo, check_options, made_of, pick

PATCHES = (4, 8)


@dataclass(frozen=True)
class TorchEncoderOptions(TokenOptions):
    """Options of a transformer made of ``nn.TransformerEncoder``, over rows, patches of an image, or tokens.

    Attributes:
        dim, depth, heads, ratio: size of a token, layers, attention heads, hidden units of a layer over ``dim``.
        norm_first, activation (``relu`` or ``gelu``), dropout: of ``nn.TransformerEncoderLayer``.
        position: ``none``, ``learned`` or ``sinusoidal``. readout: the ``mean`` token, the ``last``, one of the
            ``class``, or ``each`` (sequences, in which no token sees those after it).
        init, head: as in ``DenseOptions``. patch: side of a patch in pixels, of images.
        lookup: the embedding of a model of tokens. tied: of sequences: the head's weight is the embedding's.
    """

    LATER: ClassVar[tuple[str, ...]] = (*TokenOptions.LATER, "tied")

    dim: int
    depth: int
    heads: int
    ratio: int
    norm_first: bool
    activation: str
    position: str
    readout: str
    init: str
    dropout: float = 0.0
    patch: int = 4
    head: str = "init"
    lookup: LookupOptions | None = None
    tied: bool = False

    def __post_init__(self) -> None:
        check_make("an encoder", self.activation, self.init, self.head, self.dropout)
        check_options(
            "an encoder",
            dim=(self.dim, self.dim >= 2 and self.dim % 2 == 0),
            depth=(self.depth, self.depth >= 1),
            heads=(self.heads, self.heads >= 1 and self.dim % self.heads == 0),
            ratio=(self.ratio, self.ratio >= 1),
            activation=(self.activation, self.activation in ("relu", "gelu")),
            position=(self.position, self.position in ("none", "learned", "sinusoidal")),
            readout=(self.readout, self.readout in ("mean", "last", "class", "each")),
            lookup=(self.lookup, self.lookup is None or (self.lookup.pooled, self.lookup.dim) == ("none", self.dim)),
            tied=(self.tied, not self.tied or (self.lookup is not None and self.readout == "each")),
            patch=(self.patch, self.patch >= 1),
        )

    @classmethod
    def draw(cls, rng: np.random.Generator) -> TorchEncoderOptions:
        """Return one to four layers of 32 to 128 units, of two or four heads."""
        return cls(
            pick(rng, (32, 64, 96, 128)),
            pick(rng, (1, 1, 2, 2, 3, 4)),
            pick(rng, (2, 4)),
            pick(rng, (1, 2, 4)),
            pick(rng, (False, True)),
            pick(rng, ("relu", "gelu")),
            pick(rng, ("learned", "sinusoidal", "none")),
            pick(rng, ("mean", "last", "class")),
            pick(rng, ("torch", "torch", "xavier_uniform")),
            pick(rng, (0.0, 0.1, 0.1)),
            pick(rng, PATCHES),
        )

    def started(self, rng: np.random.Generator) -> TorchEncoderOptions:
        """Draw how the head starts, and in one of six draws small weights everywhere."""
        made = super().started(rng)
        return made.replace(init=pick(rng, (made.init,) * 5 + ("small",)))

    def reading(self, rng: np.random.Generator, dataset: DatasetInfo) -> TorchEncoderOptions:
        """Draw an embedding; of sequences, one in three shares it with the head, and then starts small (GPT-2)."""
        lookup = LookupOptions.draw(rng, dataset, (self.dim,))
        if dataset.task != "sequence":
            return self.replace(head="init", lookup=lookup)
        tied = pick(rng, (False, False, True))
        lookup = lookup.replace(std=0.02) if tied else lookup
        return self.replace(head="init", lookup=lookup, readout="each", tied=tied)

    def model(self, spec: ModelSpec) -> nn.Module:
        """Return a ``TorchEncoder``."""
        check_options("an encoder", readout=(self.readout, (self.readout == "each") == (spec.task == "sequence")))
        model = initialized(TorchEncoder(spec, self), self.init, self.head)
        if self.tied:
            assert isinstance(model.embed, Lookup) and isinstance(model.head, nn.Linear)
            model.head.weight = model.embed.table.weight
        return model


class TorchEncoder(nn.Module):
    """Rows [B, T, d], images [B, C, H, W] or tokens [B, T] -> [B, outputs], through ``nn.TransformerEncoder``.

    Of sequences -> [B, T, outputs].
    """

    def __init__(self, spec: ModelSpec, options: TorchEncoderOptions) -> None:
        super().__init__()
        dim, patch = options.dim, options.patch
        first = entry(options.lookup, spec.layout)
        if first is not None:
            self.embed: nn.Module = first
            tokens = spec.input_shape[0]
        elif spec.layout == "image":
            channels, height, width = spec.input_shape
            check_options("an encoder", patch=(patch, made_of(patch, spec.input_shape)))
            self.embed = nn.Conv2d(channels, dim, patch, patch)
            tokens = (height // patch) * (width // patch)
        else:
            self.embed = nn.Linear(spec.input_shape[1], dim)
            tokens = spec.input_shape[0]
        self.token = nn.Parameter(torch.randn(1, 1, dim) * 0.02) if options.readout == "class" else None
        tokens += self.token is not None
        self.position: Tensor | None
        if options.position == "learned":
            self.position = nn.Parameter(torch.randn(1, tokens, dim) * 0.02)
        else:
            fixed = _sinusoids(tokens, dim) if options.position == "sinusoidal" else None
            self.register_buffer("position", fixed, persistent=False)
        layer = nn.TransformerEncoderLayer(
            dim,
            options.heads,
            options.ratio * dim,
            options.dropout,
            options.activation,
            batch_first=True,
            norm_first=options.norm_first,
        )
        norm = nn.LayerNorm(dim) if options.norm_first else None
        self.body = nn.TransformerEncoder(layer, options.depth, norm, enable_nested_tensor=False)
        self.readout = options.readout
        future = nn.Transformer.generate_square_subsequent_mask(tokens) if self.readout == "each" else None
        self.mask: Tensor | None
        self.register_buffer("mask", future, persistent=False)
        self.head = nn.Linear(dim, spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        if self.position is not None:
            x = x + self.position
        if self.mask is not None:
            return self.head(self.body(x, mask=self.mask, is_causal=True))
        x = self.body(x)
        return self.head(x.mean(1) if self.readout == "mean" else x[:, 0 if self.readout == "class" else -1])


def _sinusoids(tokens: int, dim: int) -> Tensor:
    """Return the positions of Vaswani et al. 2017, section 3.5: [1, tokens, dim]."""
    angles = torch.arange(tokens)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None]


class Encoder(Ordinary):
    """Transformers made of ``nn.TransformerEncoder``, over rows, patches or tokens (``TorchEncoderOptions``)."""

    name: ClassVar[str] = "encoder"
    layouts: ClassVar[tuple[str, ...]] = ("rows", "image", "tokens")
    architectures: ClassVar[tuple[str, ...]] = ("encoder",)
    drawn: ClassVar[type[OrdinaryOptions]] = TorchEncoderOptions

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        spec = super().sample(rng, dataset, reference=reference)
        if spec.layout != "image":
            return spec
        # Only now is the layout known; a patch that fits stays as it was drawn.
        for patch in (spec.options["patch"], *PATCHES):
            if made_of(patch, spec.input_shape):
                return spec.replace(options={**spec.options, "patch": patch})
        raise SpecError(
            f"The family '{self.name}' cuts images into patches of {' or '.join(map(str, PATCHES))} pixels, which do"
            f" not make up those of '{dataset.name}', {spec.input_shape[1]}x{spec.input_shape[2]}; choose another size."
        )
