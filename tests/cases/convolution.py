"""Convolutions and the layers around them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import orthogonal, weight_norm

from tests.cases.base import Batch, case, images, labels, sequences


@case("convolutions")
def _conv() -> tuple[nn.Module, Batch]:
    layers = [
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, dilation=2), nn.GroupNorm(4, 16), nn.SiLU(),
        nn.Conv2d(16, 16, (3, 5), padding=(1, 2), groups=16), nn.PReLU(16),
        nn.ConvTranspose2d(16, 8, 3, stride=2, output_padding=1, groups=2), nn.InstanceNorm2d(8, affine=True),
        nn.Conv2d(8, 8, 1, bias=False), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
    ]  # fmt: skip
    return nn.Sequential(*layers), (images(), labels(5))


@case("1-D and even kernel")
def _conv1d() -> tuple[nn.Module, Batch]:
    layers = [
        nn.Conv1d(12, 8, 4, padding="same"),
        nn.Tanh(),
        nn.ConvTranspose1d(8, 6, 2),
        nn.Flatten(),
        nn.Linear(48, 10),
    ]
    return nn.Sequential(*layers), (sequences(5, 7, 12).transpose(1, 2), labels(5))


@case("3-D")
def _conv3d() -> tuple[nn.Module, Batch]:
    layers = [nn.Conv3d(2, 4, 3, padding=1), nn.Tanh(), nn.ConvTranspose3d(4, 3, 2), nn.Flatten(), nn.Linear(375, 10)]
    return nn.Sequential(*layers), (torch.randn(4, 2, 4, 4, 4), labels(4))


class _Frames(nn.Module):
    """A convolution over frames flattened into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        frames = self.norm(self.conv(x.flatten(0, 1))).relu().mean((2, 3))
        return self.head(frames.view(*x.shape[:2], 4)).mean(1)


@case("frames in the batch")
def _frames() -> tuple[nn.Module, Batch]:
    return _Frames(), (torch.randn(4, 3, 3, 8, 8), labels(4))


class _Tokens(nn.Module):
    """Batch norm, then tokens: its gradients arrive transposed."""

    def __init__(self, bilinear: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.mix = nn.Bilinear(6, 6, 8) if bilinear else nn.Linear(6, 8)
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.last(self.mix(x, x) if isinstance(self.mix, nn.Bilinear) else self.mix(x)).mean(1))


@case("tokens after batch norm")
def _tokens() -> tuple[nn.Module, Batch]:
    return _Tokens(False), (images(3, 8), labels(3))


@case("one sample, tokens after batch norm")
def _tokens_one() -> tuple[nn.Module, Batch]:
    return _Tokens(False), (images(1, 8), labels(1))


@case("tokens after batch norm, fallback", intercepted=False)
def _tokens_fallback() -> tuple[nn.Module, Batch]:
    return _Tokens(True), (images(3, 8), labels(3))


class _SharedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(self.stem(x)).relu()).mean((2, 3)))


@case("shared convolution")
def _shared_convolution() -> tuple[nn.Module, Batch]:
    return _SharedConvolution(), (images(4, 8), labels(4))


@case("convolution with weight norm")
def _conv_weight_norm() -> tuple[nn.Module, Batch]:
    layers = [weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)]
    return nn.Sequential(*layers), (images(4, 8), labels(4))


@case("dense targets")
def _dense() -> tuple[nn.Module, Batch]:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GELU(), nn.Conv2d(6, 10, 1))
    return model, (images(4, 8), torch.randint(0, 10, (4, 8, 8)))


# ---- one layer each ------------------------------------------------------------------------------------------------


def _layers(name: str, *layers: Callable[[], nn.Module], x: Callable[[], Tensor] = lambda: images(4, 8)) -> None:
    @case(name)
    def build() -> tuple[nn.Module, Batch]:
        body = nn.Sequential(*(layer() for layer in layers), nn.Flatten())
        inputs = x()
        with torch.no_grad():
            width = body.eval()(inputs[:1]).shape[1]
        return nn.Sequential(*body, nn.Linear(width, 10)), (inputs, labels(len(inputs)))


def _signals() -> Tensor:
    return sequences().mT


for _mode in ("reflect", "circular", "replicate"):
    _layers(
        f"padding {_mode}",
        lambda mode=_mode: nn.Conv2d(3, 4, (2, 3), padding="same", padding_mode=mode, dilation=2),  # type: ignore[misc]
    )
_layers("1-D, circular, grouped", lambda: nn.Conv1d(12, 6, 3, 2, 2, groups=3, padding_mode="circular"), x=_signals)
_layers("transposed, dilated, grouped", lambda: nn.ConvTranspose2d(3, 6, 3, 2, 1, 1, groups=3, bias=False, dilation=2))
_layers("transposed 1-D", lambda: nn.ConvTranspose1d(12, 6, 4, stride=3, padding=2, output_padding=1), x=_signals)
_layers(
    "3-D, uneven", lambda: nn.Conv3d(2, 4, (1, 3, 2), (1, 2, 1), (0, 1, 1), (2, 1, 1), groups=2),
    x=lambda: torch.randn(3, 2, 4, 5, 3),
)  # fmt: skip
_layers("rows that the stride leaves out", lambda: nn.Conv2d(3, 4, 2, stride=3), x=lambda: images(3, 10))
_layers("kernel as large as the image", lambda: nn.Conv2d(3, 4, 8))
_layers("depthwise with a multiplier", lambda: nn.Conv2d(3, 9, 3, padding=1, groups=3))
_layers(
    "channels last", lambda: nn.Conv2d(3, 4, 3), lambda: nn.BatchNorm2d(4), lambda: nn.Conv2d(4, 4, 3, groups=4),
    x=lambda: images(4, 8).to(memory_format=torch.channels_last),
)  # fmt: skip
_layers("inputs not contiguous", lambda: nn.Conv2d(3, 4, 3), x=lambda: torch.randn(8, 8, 3, 4).permute(3, 2, 0, 1))
_layers("pixel shuffle", lambda: nn.Conv2d(3, 8, 3), lambda: nn.PixelShuffle(2), lambda: nn.Conv2d(2, 4, 3))
_layers("unfolded", lambda: nn.Unfold(3), lambda: nn.Conv1d(27, 5, 1))
_layers("one PReLU for all", lambda: nn.Conv2d(3, 4, 3), nn.PReLU, lambda: nn.LocalResponseNorm(2))
_layers(
    "instance norms", lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), lambda: nn.Conv2d(3, 4, 3),
    nn.Flatten, lambda: nn.Unflatten(1, (6, 24)), lambda: nn.InstanceNorm1d(6, affine=True),
)  # fmt: skip
_layers("normalized vectors", lambda: nn.RMSNorm(12), lambda: nn.GroupNorm(1, 7), x=sequences)
_layers("normalized images", lambda: nn.LayerNorm([3, 8, 8]), lambda: nn.LayerNorm([8, 8], bias=False))
_layers("batch norms", lambda: nn.BatchNorm1d(7), lambda: nn.BatchNorm1d(7, affine=False, momentum=None), x=sequences)
_layers("batch of three channels", lambda: nn.Conv2d(3, 3, 3), lambda: nn.BatchNorm2d(3), x=lambda: images(3, 8))
_layers("zero images", lambda: nn.Conv2d(3, 4, 3), nn.Tanh, x=lambda: torch.zeros(4, 3, 8, 8))
_layers("one image many times", lambda: nn.Conv2d(3, 4, 3), nn.Tanh, x=lambda: images(1, 8).expand(4, 3, 8, 8))


class _FrozenHalf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Linear(4, 10)
        self.a.weight.requires_grad_(False)
        self.b.bias.requires_grad_(False)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(x)).relu().mean((2, 3)))


@case("half of the layers frozen")
def _half_frozen() -> tuple[nn.Module, Batch]:
    return _FrozenHalf(), (images(4, 8), labels(4))


class _OneWeight(nn.Module):
    """A convolution's weight that a linear map uses too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 10, 8), nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        flat = F.linear(x.flatten(1).tanh(), self.conv.weight.flatten(1), self.conv.bias)
        return self.head(self.conv(x).flatten(1) + flat)


@case("convolution and linear map of one weight")
def _one_weight() -> tuple[nn.Module, Batch]:
    return _OneWeight(), (images(4, 8), labels(4))


for _name, _wrap in (
    ("weight norm, first kind", torch.nn.utils.weight_norm),
    ("spectral norm, first kind", torch.nn.utils.spectral_norm),
    ("weight norm of columns", lambda m: weight_norm(m, dim=1)),
    ("orthogonal", orthogonal),
    ("pruned", lambda m: prune.l1_unstructured(m, "weight", 0.4)),
):

    @case(_name)
    def _wrapped(wrap: Callable[[nn.Module], nn.Module] = _wrap) -> tuple[nn.Module, Batch]:
        layers = [wrap(nn.Conv2d(3, 4, 3)), nn.Tanh(), nn.Flatten(), wrap(nn.Linear(144, 10))]
        return nn.Sequential(*layers), (images(4, 8), labels(4))
