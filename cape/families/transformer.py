"""Transformers: ViT, CCT and PiT for 3x32x32 images, a causal one for tokens. All are pre-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cape.config import ModelSpec
from cape.errors import SpecError
from cape.families.registry import DatasetInfo, Family, check_options, made_of, pick
from cape.jsonconfig import JsonConfig


@dataclass(frozen=True)
class EncoderOptions(JsonConfig):
    """Options that every single-stage transformer shares.

    Attributes:
        dim: size of a token.
        depth: number of blocks.
        heads: attention heads; ``dim`` must be a multiple.
        mlp_ratio: hidden units of a block's MLP as a multiple of ``dim``.
        dropout: after attention and within the MLP.
    """

    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 2.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_options(
            "a transformer",
            dim=(self.dim, self.dim >= 1),
            depth=(self.depth, self.depth >= 1),
            heads=(self.heads, self.heads >= 1 and self.dim % self.heads == 0),
            mlp_ratio=(self.mlp_ratio, self.mlp_ratio * self.dim >= 1),
            dropout=(self.dropout, 0.0 <= self.dropout < 1.0),
        )


@dataclass(frozen=True)
class ViTOptions(EncoderOptions):
    """Options of a ViT; ``patch`` is the side of a square patch in pixels."""

    patch: int = 4


@dataclass(frozen=True)
class CCTOptions(EncoderOptions):
    """Options of a CCT; ``strides`` of the tokenizer's two 3x3 convolutions, ``stem`` channels of the first."""

    stem: int = 64
    strides: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(
            "a cct",
            stem=(self.stem, self.stem >= 1),
            strides=(list(self.strides), len(self.strides) == 2 and min(self.strides) >= 1),
        )


@dataclass(frozen=True)
class PiTOptions(JsonConfig):
    """Options of a PiT: size of a token, blocks and heads of each of the two stages; see ``EncoderOptions``."""

    dims: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    patch: int = 4

    def __post_init__(self) -> None:
        for name in ("dims", "depths", "heads"):
            check_options("a pit", **{name: (list(getattr(self, name)), len(getattr(self, name)) == 2)})
        self.stage(0)
        self.stage(1)

    def stage(self, index: int) -> EncoderOptions:
        """Return the options of one stage (and so check them)."""
        return EncoderOptions(self.dims[index], self.depths[index], self.heads[index], self.mlp_ratio, self.dropout)


PRESETS: dict[str, JsonConfig] = {
    "vit": ViTOptions(dim=192, depth=6, heads=3, patch=4),
    "cct": CCTOptions(dim=128, depth=4, heads=4),
    "pit": PiTOptions(dims=(96, 192), depths=(2, 2), heads=(2, 3)),
}


def _position(tokens: int, dim: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, dim), std=0.02))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals, [B, T, dim] -> [B, T, dim]; causal where ``mask`` [T, T] says so."""

    def __init__(self, options: EncoderOptions) -> None:
        super().__init__()
        dim, hidden = options.dim, int(options.dim * options.mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, options.heads, batch_first=True)
        self.dropout = nn.Dropout(options.dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            _linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(options.dropout),
            _linear(hidden, dim),
            nn.Dropout(options.dropout),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        y, _ = self.attention(y, y, y, attn_mask=mask, is_causal=mask is not None, need_weights=False)
        x = x + self.dropout(y)
        return x + self.mlp(self.norm2(x))


def _blocks(options: EncoderOptions) -> list[Block]:
    return [Block(options) for _ in range(options.depth)]


class Patches(nn.Module):
    """Cut images [B, C, H, W] into square patches and embed them: [B, dim, H / patch, W / patch]."""

    def __init__(self, shape: tuple[int, ...], dim: int, patch: int) -> None:
        super().__init__()
        channels, height, width = shape
        check_options("a transformer", patch=(patch, made_of(patch, shape)))
        self.grid = (height // patch, width // patch)
        self.projection = nn.Conv2d(channels, dim, patch, patch)
        nn.init.kaiming_normal_(self.projection.weight, nonlinearity="relu")
        nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]  # a bias is there by default

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x)


def _tokens(maps: Tensor) -> Tensor:
    """[B, dim, H, W] -> [B, H * W, dim]."""
    return maps.flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """Vision transformer with a class token, [B, C, H, W] -> [B, outputs]."""

    def __init__(self, spec: ModelSpec, options: ViTOptions) -> None:
        super().__init__()
        self.patches = Patches(spec.input_shape, options.dim, options.patch)
        self.class_token = _position(1, options.dim)
        self.position = _position(1 + self.patches.grid[0] * self.patches.grid[1], options.dim)
        self.blocks = nn.Sequential(*_blocks(options))
        self.norm = nn.LayerNorm(options.dim)
        self.head = _linear(options.dim, spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = _tokens(self.patches(x))
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class CCT(nn.Module):
    """Compact convolutional transformer: a convolutional tokenizer, then the mean token; [B, outputs]."""

    def __init__(self, spec: ModelSpec, options: CCTOptions) -> None:
        super().__init__()
        channels, height, width = spec.input_shape
        layers: list[nn.Module] = []
        for outputs, stride in zip((options.stem, options.dim), options.strides, strict=True):
            conv = nn.Conv2d(channels, outputs, 3, stride, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            layers += [conv, nn.BatchNorm2d(outputs), nn.GELU()]
            channels, height, width = outputs, -(-height // stride), -(-width // stride)
        self.tokenizer = nn.Sequential(*layers)
        self.position = _position(height * width, options.dim)
        self.blocks = nn.Sequential(*_blocks(options))
        self.norm = nn.LayerNorm(options.dim)
        self.head = _linear(options.dim, spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(_tokens(self.tokenizer(x)) + self.position)
        return self.head(self.norm(x).mean(1))


class PiT(nn.Module):
    """Pooling-based vision transformer: two stages, 2x2 average pooling of the tokens between; [B, outputs]."""

    def __init__(self, spec: ModelSpec, options: PiTOptions) -> None:
        super().__init__()
        first, second = options.dims
        self.patches = Patches(spec.input_shape, first, options.patch)
        height, width = self.patches.grid
        check_options("a pit", patch=(options.patch, height >= 2 and width >= 2))
        self.position1 = _position(height * width, first)
        self.stage1 = nn.Sequential(*_blocks(options.stage(0)))
        self.pool = nn.AvgPool2d(2)
        self.widen = _linear(first, second)
        self.position2 = _position((height // 2) * (width // 2), second)
        self.stage2 = nn.Sequential(*_blocks(options.stage(1)))
        self.norm = nn.LayerNorm(second)
        self.head = _linear(second, spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage1(_tokens(self.patches(x)) + self.position1)
        maps = x.transpose(1, 2).unflatten(2, self.patches.grid)
        x = self.stage2(self.widen(_tokens(self.pool(maps))) + self.position2)
        return self.head(self.norm(x).mean(1))


class CausalTransformer(nn.Module):
    """Language model: tokens [B, T] int64 (T up to the spec's) -> logits of the next token, [B, T, outputs]."""

    def __init__(self, spec: ModelSpec, options: EncoderOptions) -> None:
        super().__init__()
        length = spec.input_shape[0]
        self.embedding = nn.Embedding(spec.outputs, options.dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.position = _position(length, options.dim)
        self.blocks = nn.ModuleList(_blocks(options))
        self.norm = nn.LayerNorm(options.dim)
        self.head = _linear(options.dim, spec.outputs)
        self.mask: Tensor  # True where a position must not look
        self.register_buffer("mask", torch.ones(length, length).triu(1).bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = self.mask[:length, :length]
        x = self.embedding(x) + self.position[:, :length]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Transformer(Family):
    """ViT, CCT or PiT: one of the three presets, or (one draw in four) a randomized one of the three.

    The authors' generator draws the presets only (``reference=True``). Images that no patches make up get a CCT,
    sequences a randomized causal one.
    """

    name: ClassVar[str] = "transformer"
    layouts: ClassVar[tuple[str, ...]] = ("image", "tokens")
    architectures: ClassVar[tuple[str, ...]] = ("vit", "cct", "pit", "causal")
    token_tasks: ClassVar[tuple[str, ...]] = ("sequence",)

    def preprocess_for(self, preprocess: str) -> str:
        """The authors normalize a transformer's images, but not those of a CNN."""
        return "reference_normalized" if preprocess == "reference" else preprocess

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        if self.layout_for(dataset) == "tokens":
            return self.spec("causal", dataset, _random_encoder(rng, depths=(2, 3, 4)))
        shape = dataset.sample_shape("image")
        architecture = pick(rng, tuple(name if _fits(PRESETS[name], shape) else "cct" for name in PRESETS))
        randomized = rng.random() < 0.25 and not reference
        options = _randomized(rng, architecture, shape) if randomized else PRESETS[architecture]
        return self.spec(architecture, dataset, options)

    def build(self, spec: ModelSpec) -> nn.Module:
        options = self.options(spec, _OPTIONS)
        if (spec.architecture == "causal") != (spec.layout == "tokens"):
            raise SpecError(f"The architecture '{spec.architecture}' does not take the layout '{spec.layout}'.")
        if isinstance(options, ViTOptions):
            return ViT(spec, options)
        if isinstance(options, CCTOptions):
            return CCT(spec, options)
        if isinstance(options, PiTOptions):
            return PiT(spec, options)
        assert isinstance(options, EncoderOptions)
        return CausalTransformer(spec, options)


_OPTIONS: dict[str, type[JsonConfig]] = {
    "vit": ViTOptions,
    "cct": CCTOptions,
    "pit": PiTOptions,
    "causal": EncoderOptions,
}
_DIMS = (64, 96, 128, 192)


def _heads(rng: np.random.Generator, dim: int) -> int:
    return pick(rng, [h for h in (2, 3, 4, 6) if dim % h == 0 and dim // h >= 16])


def _random_encoder(rng: np.random.Generator, depths: tuple[int, ...]) -> EncoderOptions:
    dim = pick(rng, _DIMS)
    return EncoderOptions(
        dim, pick(rng, depths), _heads(rng, dim), pick(rng, (1.0, 2.0, 4.0)), dropout=pick(rng, (0.0, 0.1))
    )


def _fits(options: JsonConfig, shape: tuple[int, ...]) -> bool:
    """Return whether images of a shape can be cut into patches (of which a PiT pools two by two)."""
    patch, pooled = getattr(options, "patch", 1), 2 if isinstance(options, PiTOptions) else 1
    return made_of(patch, shape) and min(shape[1:]) >= pooled * patch


def _randomized(rng: np.random.Generator, architecture: str, shape: tuple[int, ...]) -> JsonConfig:
    """Draw options between half of a preset and somewhat beyond it (at most 2.8 million parameters)."""
    if architecture == "pit":
        first, second = pick(rng, ((48, 96), (64, 128), (96, 192)))
        heads = pick(rng, ((2, 2), (2, 4), (3, 6) if first % 3 == 0 else (4, 4)))
        depths = (pick(rng, (1, 2, 3)), pick(rng, (1, 2, 3)))
        return PiTOptions((first, second), depths, heads, pick(rng, (1.0, 2.0, 4.0)), pick(rng, (0.0, 0.1)))
    shared = _random_encoder(rng, (2, 3, 4, 5, 6) if architecture == "vit" else (2, 3, 4, 5)).to_dict()
    if architecture == "vit":
        return ViTOptions(**shared, patch=pick(rng, (4, 8 if made_of(8, shape) else 4)))
    return CCTOptions(**shared, stem=pick(rng, (32, 64)), strides=pick(rng, ((1, 2), (2, 2))))
