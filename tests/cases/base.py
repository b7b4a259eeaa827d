"""What a case is, and the inputs that cases share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Case:
    """A small model and a batch, built from a seed.

    Attributes:
        name: what is special about it.
        build: returns (model, (inputs, targets)).
        loss: as ``per_sample_norms`` takes it.
        intercepted: no parameter may need the fallback: the price, not only the number, is part of the promise.
        fallback: the parameters that must take the fallback, and no others (``None``: not said).
        randomized: give normalization layers statistics and weights that are not 0 and 1.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Batch]]
    loss: Any = "cross_entropy"
    intercepted: bool = True
    randomized: bool = True
    fallback: tuple[str, ...] | None = None

    def make(self, seed: int = 0) -> tuple[nn.Module, Batch]:
        torch.manual_seed(seed)
        model, batch = self.build()
        if self.randomized:
            randomize_statistics(model)
        return model, batch


def randomize_statistics(model: nn.Module) -> None:
    """Give batch norms statistics and affine parameters that are not 0 and 1, so that mistakes show."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
        normalizes = isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm))
        if normalizes and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)


CASES: list[Case] = []


def case(
    name: str, loss: Any = "cross_entropy", intercepted: bool = True, fallback: Sequence[str] | None = None
) -> Callable[..., Any]:
    """Add a case; one with a ``fallback`` is not wholly intercepted."""

    def add(build: Callable[[], tuple[nn.Module, Batch]]) -> Callable[[], tuple[nn.Module, Batch]]:
        known = None if fallback is None else tuple(sorted(fallback))
        CASES.append(Case(name, build, loss, intercepted and not known, fallback=known))
        return build

    return add


class Functional(nn.Module):
    """A model written as a function of (its parts, the input): for cases where only one line matters."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(self, *inputs)


def functional(
    name: str,
    parts: Callable[[], dict[str, Any]],
    forward: Callable[..., Tensor],
    inputs: Callable[[], Any],
    fallback: Sequence[str] | None = None,
    intercepted: bool = True,
) -> None:
    """Add a classification case that a function defines."""

    @case(name, fallback=fallback, intercepted=intercepted)
    def build() -> tuple[nn.Module, Batch]:
        x = inputs()
        return Functional(forward, **parts()), (x, labels(len(x[0] if isinstance(x, tuple) else x)))


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype) * 0.3)


def labels(batch: int, classes: int = 10) -> Tensor:
    return (torch.arange(batch) * 7) % classes


def vectors(batch: int = 6, width: int = 20) -> Tensor:
    return torch.randn(batch, width)


def sequences(batch: int = 5, length: int = 7, width: int = 12) -> Tensor:
    return torch.randn(batch, length, width)


def images(batch: int = 5, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size)


def tokens(batch: int = 5, length: int = 9) -> Tensor:
    return torch.randint(1, 30, (batch, length))
