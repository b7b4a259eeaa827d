"""Models as people write them: four families of many makes, each beside one of the paper's (its ``relative``).

The paper's families are of one make each: batch norm in every dense and convolutional block, one initialization, one
way to read the output. Here norm, initialization, activation, sizes and readout are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cape.config import ModelSpec
from cape.families.registry import DatasetInfo, Family, check_options, pick
from cape.jsonconfig import JsonConfig

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky_relu": lambda: nn.LeakyReLU(0.1),
    "elu": nn.ELU,
}
INITS: dict[str, Callable[[Tensor], object] | None] = {
    "torch": None,
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}
CELLS: dict[str, type[nn.RNNBase]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
_DROPOUTS = (0.0, 0.0, 0.0, 0.1, 0.2, 0.5)


def initialized(model: nn.Module, how: str) -> nn.Module:
    """Initialize every matrix and kernel of dense, convolutional, recurrent and attention layers, with zero biases.

    ``torch`` leaves what the layers have by themselves. Norms and positions stay in any case.
    """
    rule = INITS[how]
    if rule is not None:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.RNNBase, nn.MultiheadAttention)):
                for name, p in module.named_parameters(recurse=False):
                    if p.dim() >= 2:
                        rule(p)
                    elif "bias" in name:
                        nn.init.zeros_(p)
    return model


def _check_shared(what: str, activation: str, init: str, dropout: float) -> None:
    check_options(
        what,
        activation=(activation, activation in ACTIVATIONS),
        init=(init, init in INITS),
        dropout=(dropout, 0.0 <= dropout < 1.0),
    )


@dataclass(frozen=True)
class DenseOptions(JsonConfig):
    """Options of a dense network.

    Attributes:
        widths: units of the hidden layers. norm: ``none``, ``batch`` or ``layer``, before the activation.
        activation, init: names of ``ACTIVATIONS`` and ``INITS``. dropout: after each activation.
    """

    widths: tuple[int, ...]
    norm: str
    activation: str
    init: str
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_shared("a dense network", self.activation, self.init, self.dropout)
        check_options(
            "a dense network",
            widths=(list(self.widths), len(self.widths) >= 1 and min(self.widths) >= 1),
            norm=(self.norm, self.norm in ("none", "batch", "layer")),
        )

    @classmethod
    def draw(cls, rng: np.random.Generator) -> DenseOptions:
        """Return one to four layers of 32 to 512 units, half as many from layer to layer in one of three."""
        depth, width, tapered = pick(rng, (1, 2, 2, 3, 3, 4)), pick(rng, (32, 64, 128, 256, 512)), rng.random() < 1 / 3
        return cls(
            tuple(max(16, width >> i) if tapered else width for i in range(depth)),
            pick(rng, ("none", "none", "none", "batch", "layer")),
            *_draw_make(rng),
        )


def _draw_make(rng: np.random.Generator) -> tuple[str, str, float]:
    """Return an activation, an initialization (torch's own in half of all draws) and a dropout."""
    activation = pick(rng, ("relu", "relu", "relu", *ACTIVATIONS))
    return activation, pick(rng, ("torch",) * (len(INITS) - 1) + tuple(INITS)[1:]), pick(rng, _DROPOUTS)


def dense(spec: ModelSpec, options: DenseOptions) -> nn.Module:
    """Return a dense network, [B, d] -> [B, outputs]."""
    norms = {"none": None, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
    layers, units = [], spec.input_shape[0]
    for width in options.widths:
        norm = norms[options.norm]
        layers += [nn.Linear(units, width), *([norm(width)] if norm else []), ACTIVATIONS[options.activation]()]
        layers += [nn.Dropout(options.dropout)] if options.dropout else []
        units = width
    return initialized(nn.Sequential(*layers, nn.Linear(units, spec.outputs)), options.init)


@dataclass(frozen=True)
class ConvNetOptions(JsonConfig):
    """Options of a plain convolutional network.

    Attributes:
        channels: of the blocks: a convolution, norm, activation, and half the height and width.
        kernel: 3 or 5. pool: what halves them: ``max``, ``avg``, or the ``stride`` of the convolution.
        hidden: units of a dense layer over the flattened maps; 0 for none, where the head sees the maps' means.
        norm: ``none``, ``batch`` or ``group``. activation, init: as in ``DenseOptions``. dropout: before the head.
    """

    channels: tuple[int, ...]
    kernel: int
    pool: str
    hidden: int
    norm: str
    activation: str
    init: str
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_shared("a plain convolutional network", self.activation, self.init, self.dropout)
        check_options(
            "a plain convolutional network",
            channels=(list(self.channels), len(self.channels) >= 1 and min(self.channels) >= 1),
            kernel=(self.kernel, self.kernel in (3, 5)),
            pool=(self.pool, self.pool in ("max", "avg", "stride")),
            hidden=(self.hidden, self.hidden >= 0),
            norm=(self.norm, self.norm in ("none", "batch", "group")),
        )

    @classmethod
    def draw(cls, rng: np.random.Generator) -> ConvNetOptions:
        """Return two to four blocks, of 16 or 32 channels and twice as many from block to block (128 at most)."""
        first, blocks = pick(rng, (8, 16, 32)), pick(rng, (2, 2, 3, 3, 4))
        return cls(
            tuple(min(128, first << i) for i in range(blocks)),
            pick(rng, (3, 3, 5)),
            pick(rng, ("max", "max", "avg", "stride")),
            pick(rng, (0, 64, 128, 256)),
            pick(rng, ("none", "none", "batch", "batch", "group")),
            *_draw_make(rng),
        )


def convnet(spec: ModelSpec, options: ConvNetOptions) -> nn.Module:
    """Return a plain convolutional network, [B, C, H, W] -> [B, outputs]."""
    norms: dict[str, Callable[[int], nn.Module] | None] = {
        "none": None,
        "batch": nn.BatchNorm2d,
        "group": lambda channels: nn.GroupNorm(math.gcd(8, channels), channels),
    }
    pools = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
    channels, height, width = spec.input_shape
    layers: list[nn.Module] = []
    for outputs in options.channels:
        strided, norm = options.pool == "stride" and min(height, width) > 1, norms[options.norm]
        padding = options.kernel // 2
        layers += [nn.Conv2d(channels, outputs, options.kernel, 2 if strided else 1, padding)]
        layers += [*([norm(outputs)] if norm else []), ACTIVATIONS[options.activation]()]
        if strided:
            height, width = -(-height // 2), -(-width // 2)
        elif min(height, width) > 1:
            layers, height, width = [*layers, pools[options.pool](2)], height // 2, width // 2
        channels = outputs
    if options.hidden:
        layers += [nn.Flatten(), nn.Linear(channels * height * width, options.hidden)]
        layers += [ACTIVATIONS[options.activation]()]
        channels = options.hidden
    else:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Dropout(options.dropout)] if options.dropout else []
    return initialized(nn.Sequential(*layers, nn.Linear(channels, spec.outputs)), options.init)


@dataclass(frozen=True)
class RecurrentOptions(JsonConfig):
    """Options of a recurrent network over rows.

    Attributes:
        cell: ``lstm``, ``gru`` or ``rnn`` (tanh). layers, hidden, bidirectional: torch's.
        readout: what the head sees: the ``last`` row's output, the ``mean`` or ``max`` over all rows, or the final
            ``state`` of each direction.
        init: as in ``DenseOptions``. dropout: between layers and before the head.
    """

    cell: str
    layers: int
    hidden: int
    bidirectional: bool
    readout: str
    init: str
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _check_shared("a recurrent network", "tanh", self.init, self.dropout)
        check_options(
            "a recurrent network",
            cell=(self.cell, self.cell in CELLS),
            layers=(self.layers, self.layers >= 1),
            hidden=(self.hidden, self.hidden >= 1),
            readout=(self.readout, self.readout in ("last", "mean", "max", "state")),
        )

    @classmethod
    def draw(cls, rng: np.random.Generator) -> RecurrentOptions:
        """Return one to three layers of 32 to 256 units."""
        return cls(
            pick(rng, ("lstm", "lstm", "gru", "gru", "rnn")),
            pick(rng, (1, 1, 1, 2, 2, 3)),
            pick(rng, (32, 64, 128, 256)),
            pick(rng, (False, True)),
            pick(rng, ("last", "mean", "max", "state")),
            pick(rng, ("torch", "torch", "torch", "xavier_uniform", "orthogonal")),
            pick(rng, _DROPOUTS),
        )


class RecurrentReader(nn.Module):
    """A recurrent network over rows, [B, T, d] -> [B, outputs]."""

    def __init__(self, spec: ModelSpec, options: RecurrentOptions) -> None:
        super().__init__()
        self.rnn = CELLS[options.cell](
            spec.input_shape[1],  # type: ignore[arg-type]  # torch's base class names its mode first
            options.hidden,
            options.layers,
            batch_first=True,
            bidirectional=options.bidirectional,
            dropout=options.dropout if options.layers > 1 else 0.0,
        )
        self.directions, self.readout = 1 + options.bidirectional, options.readout
        self.dropout = nn.Dropout(options.dropout)
        self.head = nn.Linear(self.directions * options.hidden, spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.rnn(x)
        if self.readout == "state":
            final = state[0] if isinstance(state, tuple) else state
            seen = final[-self.directions :].transpose(0, 1).flatten(1)
        else:
            seen = {"last": lambda: outputs[:, -1], "mean": lambda: outputs.mean(1), "max": lambda: outputs.amax(1)}[
                self.readout
            ]()
        return self.head(self.dropout(seen))


def recurrent(spec: ModelSpec, options: RecurrentOptions) -> nn.Module:
    """Return a ``RecurrentReader``."""
    return initialized(RecurrentReader(spec, options), options.init)


@dataclass(frozen=True)
class TorchEncoderOptions(JsonConfig):
    """Options of a transformer made of ``nn.TransformerEncoder``, over rows or over patches of an image.

    Attributes:
        dim, depth, heads, ratio: size of a token, layers, attention heads, hidden units of a layer over ``dim``.
        norm_first, activation (``relu`` or ``gelu``), dropout: of ``nn.TransformerEncoderLayer``.
        position: ``none``, ``learned`` or ``sinusoidal``. readout: the ``mean`` token, the ``last``, or one of the
            ``class``.
        init: as in ``DenseOptions``. patch: side of a patch in pixels, of images.
    """

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

    def __post_init__(self) -> None:
        _check_shared("an encoder", self.activation, self.init, self.dropout)
        check_options(
            "an encoder",
            dim=(self.dim, self.dim >= 2 and self.dim % 2 == 0),
            depth=(self.depth, self.depth >= 1),
            heads=(self.heads, self.heads >= 1 and self.dim % self.heads == 0),
            ratio=(self.ratio, self.ratio >= 1),
            activation=(self.activation, self.activation in ("relu", "gelu")),
            position=(self.position, self.position in ("none", "learned", "sinusoidal")),
            readout=(self.readout, self.readout in ("mean", "last", "class")),
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
            pick(rng, (4, 8)),
        )


class TorchEncoder(nn.Module):
    """Rows [B, T, d] or images [B, C, H, W] -> [B, outputs], through ``nn.TransformerEncoder``."""

    def __init__(self, spec: ModelSpec, options: TorchEncoderOptions) -> None:
        super().__init__()
        dim, patch = options.dim, options.patch
        if spec.layout == "image":
            channels, height, width = spec.input_shape
            check_options("an encoder", patch=(patch, height % patch == 0 and width % patch == 0))
            self.embed: nn.Module = nn.Conv2d(channels, dim, patch, patch)
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
        self.head = nn.Linear(dim, spec.outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        if self.position is not None:
            x = x + self.position
        x = self.body(x)
        return self.head(x.mean(1) if self.readout == "mean" else x[:, 0 if self.readout == "class" else -1])


def encoder(spec: ModelSpec, options: TorchEncoderOptions) -> nn.Module:
    """Return a ``TorchEncoder``."""
    return initialized(TorchEncoder(spec, options), options.init)


def _sinusoids(tokens: int, dim: int) -> Tensor:
    """Return the positions of Vaswani et al. 2017, section 3.5: [1, tokens, dim]."""
    angles = torch.arange(tokens)[:, None] * torch.exp(torch.arange(0, dim, 2) * (-math.log(10_000.0) / dim))
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)[None]


class Dense(Family):
    """Dense networks of many makes (``DenseOptions``)."""

    name: ClassVar[str] = "dense"
    layouts: ClassVar[tuple[str, ...]] = ("vector",)
    architectures: ClassVar[tuple[str, ...]] = ("dense",)
    relative: ClassVar[str | None] = "mlp"

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        return self.spec("dense", dataset, DenseOptions.draw(rng))

    def build(self, spec: ModelSpec) -> nn.Module:
        return dense(spec, self.options(spec, {"dense": DenseOptions}))


class ConvNet(Family):
    """Plain convolutional networks of many makes (``ConvNetOptions``)."""

    name: ClassVar[str] = "convnet"
    layouts: ClassVar[tuple[str, ...]] = ("image",)
    architectures: ClassVar[tuple[str, ...]] = ("convnet",)
    relative: ClassVar[str | None] = "cnn"

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        return self.spec("convnet", dataset, ConvNetOptions.draw(rng))

    def build(self, spec: ModelSpec) -> nn.Module:
        return convnet(spec, self.options(spec, {"convnet": ConvNetOptions}))


class Recurrent(Family):
    """Recurrent networks over rows, of many makes (``RecurrentOptions``)."""

    name: ClassVar[str] = "recurrent"
    layouts: ClassVar[tuple[str, ...]] = ("rows",)
    architectures: ClassVar[tuple[str, ...]] = ("recurrent",)
    relative: ClassVar[str | None] = "rnn"

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        return self.spec("recurrent", dataset, RecurrentOptions.draw(rng))

    def build(self, spec: ModelSpec) -> nn.Module:
        return recurrent(spec, self.options(spec, {"recurrent": RecurrentOptions}))


class Encoder(Family):
    """Transformers made of ``nn.TransformerEncoder``, over rows or patches (``TorchEncoderOptions``)."""

    name: ClassVar[str] = "encoder"
    layouts: ClassVar[tuple[str, ...]] = ("rows", "image")
    architectures: ClassVar[tuple[str, ...]] = ("encoder",)
    relative: ClassVar[str | None] = "transformer"

    def sample(self, rng: np.random.Generator, dataset: DatasetInfo, *, reference: bool = False) -> ModelSpec:
        spec = self.spec("encoder", dataset, TorchEncoderOptions.draw(rng))
        layout = pick(rng, [layout for layout in self.layouts if layout in dataset.layouts])
        return spec.replace(layout=layout, input_shape=tuple(dataset.sample_shape(layout)))

    def build(self, spec: ModelSpec) -> nn.Module:
        return encoder(spec, self.options(spec, {"encoder": TorchEncoderOptions}))
