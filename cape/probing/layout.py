"""Where the batch sits inside a tensor: the one thing that shapes cannot tell.

A model may flatten [B, T, d] to [B·T, d] or to [T·B, d]; both have the same shape. The layout is therefore
*observed*: the forward pass runs on two samples, then again with the first sample changed, and the rows that change
are the rows of that sample. The same two passes show whether samples influence each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cape.state import Inputs


@dataclass(frozen=True)
class Layout:
    """The batch dimension of a tensor: dimension ``dim`` has size ``outer * B * inner``, in that order."""

    dim: int
    outer: int = 1
    inner: int = 1

    def fits(self, tensor: Tensor, batch_size: int) -> bool:
        """Whether a tensor can have this layout for ``batch_size`` samples."""
        return tensor.dim() > self.dim and tensor.shape[self.dim] == self.outer * batch_size * self.inner

    def batch_first(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Return the tensor as [B, outer, inner, every other dimension in order] (a view where possible).

        ``leading`` dimensions in front, which the layout does not count, stay in front.
        """
        dim = self.dim + leading
        batch = tensor.shape[dim] // (self.outer * self.inner)
        split = tensor.unflatten(dim, (self.outer, batch, self.inner))
        return split.movedim((dim + 1, dim, dim + 2), (leading, leading + 1, leading + 2))

    def rows(self, tensor: Tensor, features: int = 1, leading: int = 0) -> Tensor:
        """Return the tensor as [B, T, *features]: every dimension but the last ``features`` counts as T."""
        front, shape = tensor.shape[:leading], tensor.shape[leading:]
        if self.dim == 0 and self.outer == 1 and len(shape) > features:  # already one block of rows for each sample
            batch = shape[0] // self.inner
            return tensor.reshape(*front, batch, -1 if tensor.numel() else 0, *shape[len(shape) - features :])
        first = self.batch_first(tensor, leading)
        return first.flatten(leading + 1, first.dim() - 1 - features)

    def on(self, dim: int) -> Layout:
        """Return the same split on another dimension."""
        return Layout(dim, self.outer, self.inner)


def two_samples(x: Inputs, batch_size: int) -> tuple[Inputs, Inputs] | None:
    """Return a batch of two samples and the same batch with the first sample changed (``None``: nothing could change).

    Floating-point inputs become another sample plus noise; integers move within the range that the batch uses, so
    that token ids, lengths and masks stay valid; booleans flip.
    """
    changed_any = False
    generator = torch.Generator().manual_seed(0)

    def pair(value: Any) -> tuple[Any, Any]:
        nonlocal changed_any
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] != batch_size:
            return value, value
        base = value.detach()[[0, batch_size - 1]].clone()
        other = base.clone()
        if value.is_floating_point():
            scale = base.float().nan_to_num(0.0, 0.0, 0.0).std(correction=0).item() or 1.0
            noise = torch.randn(base.shape[1:], generator=generator) * scale
            other[0] = base[1] + noise.to(base)
        elif value.dtype == torch.bool:
            other[0] = ~base[0]
        elif not value.is_complex():
            low, high = int(value.min()), int(value.max())
            other[0] = (base[0] - low + 1) % (high - low + 1) + low
        if not torch.equal(base, other):
            changed_any = True
        return base, other

    if isinstance(x, Mapping):
        pairs = {k: pair(v) for k, v in x.items()}
        result: tuple[Inputs, Inputs] = ({k: p[0] for k, p in pairs.items()}, {k: p[1] for k, p in pairs.items()})
    elif isinstance(x, (tuple, list)):
        parts = [pair(v) for v in x]
        result = (tuple(p[0] for p in parts), tuple(p[1] for p in parts))
    else:
        result = pair(x)
    return result if changed_any else None


def _differs(a: Tensor, b: Tensor) -> Tensor:
    """Return a boolean tensor of the elements that differ by more than rounding."""
    scale = torch.maximum(a.abs().amax(), b.abs().amax()) if a.numel() else a.new_zeros(())
    same = ((a - b).abs() <= 1e-6 * scale) | (a == b) | (a.isnan() & b.isnan())
    return ~same


def observe(a: Tensor, b: Tensor) -> Layout | None:
    """Return the layout of a tensor seen with two samples (``a``) and with the first sample changed (``b``).

    ``None`` where no dimension, or more than one, explains the change.
    """
    if a.shape != b.shape or a.dim() == 0 or a.numel() == 0:
        return None
    # Rows of equal inputs are mostly equal to the bit; where a kernel's rounding depends on its neighbours, they are
    # equal to rounding.
    exact = _explain((a != b) & ~(a.isnan() & b.isnan()))
    return exact if exact is not None or not a.is_floating_point() else _explain(_differs(a, b))


def _explain(differs: Tensor) -> Layout | None:
    found = []
    for dim in range(differs.dim()):
        size = differs.shape[dim]
        if size % 2:
            continue
        changed = differs.movedim(dim, 0).reshape(size, -1).any(1).tolist()
        found += [Layout(dim, size // (2 * inner), inner) for inner in _explanations(changed)]
    return found[0] if len(found) == 1 else None


def _explanations(changed: list[bool]) -> list[int]:
    """Return every ``inner`` for which exactly (or at least only) sample 0's indices changed."""
    size = len(changed)
    if not any(changed) or all(changed):
        return []
    exact, partial = [], []
    for inner in (n for n in range(1, size // 2 + 1) if size % (2 * n) == 0):
        own = [(i // inner) % 2 == 0 for i in range(size)]
        if changed == own:
            exact.append(inner)
        elif all(o for c, o in zip(changed, own, strict=True) if c):
            partial.append(inner)
    return exact or partial


def interacts(a: Tensor, b: Tensor) -> bool:
    """Whether the second sample's outputs moved when only the first sample changed. ``a``, ``b``: [2, ...]."""
    if a.shape != b.shape:
        return False
    scale = a.abs().amax()
    return bool(((a[1] - b[1]).abs().amax() > 1e-4 * scale).item()) if a.is_floating_point() else False
