"""The native operators and their pure-torch twins, behind one set of functions.

Every operator returns squared norms as float64. The native module is optional: without it the twins run, and a
warning says once that they are slower. ``use_backend("torch")`` forces the twins (for tests and comparisons).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cape.errors import DependencyError, SpecError

# Largest number of elements of a transient that holds several samples' unfolded inputs or gradients.
MATERIALIZE_ELEMENTS = 1 << 22

BACKENDS = ("auto", "native", "torch")
_backend: ContextVar[str] = ContextVar("cape_backend", default="auto")


@dataclass(frozen=True)
class ConvGeometry:
    """How a kernel slides: per spatial dimension kernel size, stride, padding and dilation; and the groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@lru_cache(maxsize=1)
def native_module() -> Any | None:
    """Return the compiled extension, or ``None`` (with one warning) where it is not built."""
    try:
        module = importlib.import_module("cape._C")
    except ImportError as error:
        warnings.warn(
            f"CAPE's native extension is not available ({error}); the slower pure-torch operators run instead."
            " Build it with 'pip install --no-build-isolation .'.",
            stacklevel=2,
        )
        return None
    _register_fakes()
    return module


def _register_fakes() -> None:
    """Tell torch the shapes of the operators' results, for tracing without data."""

    def one_number_per_sample(first: Tensor, *rest: Any) -> Tensor:
        return first.new_empty(first.shape[0], dtype=torch.float64)

    def two_per_channel(g: Tensor, x: Tensor) -> Tensor:
        return g.new_empty(2, g.shape[0], g.shape[2], dtype=torch.float64)

    for name in ("sq_norms", "linear_sq_norms", "conv_sq_norms"):
        torch.library.register_fake(f"cape::{name}", one_number_per_sample)
    torch.library.register_fake("cape::pair_sums", two_per_channel)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Choose the operators inside a block: ``auto``, ``native`` (an error where not built) or ``torch``."""
    if backend not in BACKENDS:
        raise SpecError(f"Unknown backend '{backend}'. Known: {', '.join(BACKENDS)}.")
    if backend == "native" and native_module() is None:
        raise DependencyError("The native extension is not built; run 'pip install --no-build-isolation .'.")
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


def _native(*tensors: Tensor) -> bool:
    if _backend.get() == "torch" or any(t.dtype not in (torch.float32, torch.float64) for t in tensors):
        return False
    module = native_module()
    if module is None or any(t.device.type not in ("cpu", "cuda") for t in tensors):
        return False
    return tensors[0].device.type == "cpu" or bool(module.build_info()["cuda"])


def sq_norms(x: Tensor) -> Tensor:
    """Return Σ_j x[b, j]², [B] float64, for ``x`` [B, ...]."""
    x = x.reshape(x.shape[0], x.shape[1:].numel())
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj()).flatten(1)
    return torch.ops.cape.sq_norms(x) if _native(x) else sq_norms_torch(x)


def sq_norms_torch(x: Tensor) -> Tensor:
    """Pure-torch twin of ``sq_norms``."""
    x = x.abs() if x.is_complex() else x
    return x.double().square().sum(1)


def pair_sums(g: Tensor, x: Tensor) -> Tensor:
    """Return the sums over R and S of G and of G·X, [2, B, C] float64, for ``g`` and ``x`` [B, R, C, S]."""
    if g.device.type == "cpu" and _native(g, x):
        return torch.ops.cape.pair_sums(g, x)
    return pair_sums_torch(g, x)


def pair_sums_torch(g: Tensor, x: Tensor) -> Tensor:
    """Pure-torch twin of ``pair_sums``."""
    return torch.stack([g.sum((1, 3), dtype=torch.float64), (g * x).sum((1, 3), dtype=torch.float64)])


def linear_sq_norms(a: Tensor, g: Tensor) -> Tensor:
    """Return ‖A_bᵀ G_b‖²_F for each sample, [B] float64.

    Args:
        a: inputs [B, T, d], float32 or float64, any strides.
        g: output gradients [B, T, p], same dtype and device.
    """
    return torch.ops.cape.linear_sq_norms(a, g) if _native(a, g) else linear_sq_norms_torch(a, g)


def linear_sq_norms_torch(a: Tensor, g: Tensor) -> Tensor:
    """Pure-torch twin of ``linear_sq_norms``: the cheaper of the direct and the Gram form."""
    batch, length, d = a.shape
    p = g.shape[2]
    if length == 1:
        return sq_norms_torch(a[:, 0]) * sq_norms_torch(g[:, 0])
    if length * (d + p) < 2 * d * p:
        size, form = length * length, _gram_form
    else:
        size, form = d * p, _direct_form
    step = max(1, MATERIALIZE_ELEMENTS // max(1, size))
    parts = [form(a[lo : lo + step], g[lo : lo + step]) for lo in range(0, batch, step)]
    return torch.cat(parts) if parts else a.new_zeros(0, dtype=torch.float64)


def _gram_form(a: Tensor, g: Tensor) -> Tensor:
    return ((a @ a.mT).double() * (g @ g.mT)).sum((1, 2)).clamp(min=0)


def _direct_form(a: Tensor, g: Tensor) -> Tensor:
    return (a.mT @ g).double().square().sum((1, 2))


def conv_sq_norms(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the squared norms of a convolution's per-sample weight gradients, [B] float64.

    Args:
        x: inputs [B, F, C, *S] (F images per sample, 1 to 3 spatial dimensions), unpadded.
        g: output gradients [B, F, O, *L].
        geometry: kernel, stride, padding, dilation and groups.
    """
    if x.device.type != "cpu" or not _native(x, g):
        return conv_sq_norms_torch(x, g, geometry)
    c = geometry
    return torch.ops.cape.conv_sq_norms(x, g, c.kernel, c.stride, c.padding, c.dilation, c.groups)


def conv_sq_norms_torch(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Pure-torch twin of ``conv_sq_norms``: unfold a few samples at a time, then the linear form per group."""
    batch = x.shape[0]
    parts = []
    for lo, hi in _sample_chunks(x, g, geometry):
        cols, rows = _unfold(x[lo:hi], geometry, g.shape[3:]), _group_rows(g[lo:hi], geometry.groups)
        norms = linear_sq_norms(cols.flatten(0, 1), rows.flatten(0, 1))
        parts.append(norms.view(-1, geometry.groups).sum(1))
    return torch.cat(parts) if batch else x.new_zeros(0, dtype=torch.float64)


def conv_grads(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the per-sample weight gradients themselves, [B, O, C/groups · prod(kernel)] (arguments as above)."""
    parts = []
    for lo, hi in _sample_chunks(x, g, geometry):
        cols, rows = _unfold(x[lo:hi], geometry, g.shape[3:]), _group_rows(g[lo:hi], geometry.groups)
        parts.append((rows.mT @ cols).flatten(1, 2))
    return torch.cat(parts)


def _sample_chunks(x: Tensor, g: Tensor, geometry: ConvGeometry) -> list[tuple[int, int]]:
    columns = x.shape[1] * x.shape[2] * g.shape[3:].numel() * torch.Size(geometry.kernel).numel()
    step = max(1, MATERIALIZE_ELEMENTS // max(1, columns))
    return [(lo, min(lo + step, x.shape[0])) for lo in range(0, x.shape[0], step)]


def _unfold(x: Tensor, geometry: ConvGeometry, out: torch.Size) -> Tensor:
    """Return the windows under the kernel, [B, groups, F·L, C/groups·prod(kernel)], for x [B, F, C, *S]."""
    spatial = len(geometry.kernel)
    pads = [n for p in reversed(geometry.padding) for n in (p, p)]
    x = F.pad(x, pads)
    for i, (k, s, d) in enumerate(zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)):
        x = x.unfold(3 + i, (k - 1) * d + 1, s).narrow(3 + i, 0, out[i])[..., ::d]
    # [B, F, C, *L, *kernel] -> [B, groups, F, *L, C/groups, *kernel]
    x = x.unflatten(2, (geometry.groups, -1))
    order = [0, 2, 1, *range(4, 4 + spatial), 3, *range(4 + spatial, 4 + 2 * spatial)]
    x = x.permute(order)
    return x.reshape(x.shape[0], geometry.groups, x.shape[2] * out.numel(), -1)


def _group_rows(g: Tensor, groups: int) -> Tensor:
    """Return [B, groups, F·L, O/groups] for g [B, F, O, *L]."""
    g = g.flatten(3).unflatten(2, (groups, -1))  # [B, F, groups, O/groups, L]
    return g.permute(0, 2, 1, 4, 3).flatten(2, 3)
