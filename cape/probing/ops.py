"""The native operators and their pure-torch twins, behind one set of functions.

Every operator returns squared norms as float64, for K cotangents at once: what the forward pass showed has no K
dimension, gradients have it in front. The native module is optional: without it the twins run, and a
warning says once that they are slower. ``use_backend("torch")`` forces the twins (for tests and comparisons).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cape.config import check_precision
from cape.errors import DependencyError, SpecError
from cape.native import native_module
from cape.state import as_real

# Largest number of elements of a transient that holds several samples' unfolded inputs or gradients.
MATERIALIZE_ELEMENTS = 1 << 22

BACKENDS = ("auto", "native", "torch")
_backend: ContextVar[str] = ContextVar("cape_backend", default="auto")
_precision: ContextVar[str] = ContextVar("cape_precision", default="float32")


@dataclass(frozen=True)
class ConvGeometry:
    """How a kernel slides: per spatial dimension kernel size, stride, padding and dilation; and the groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


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


@contextmanager
def use_precision(precision: str) -> Iterator[None]:
    """Choose what CUDA may round float32 products of the norms to, inside a block; a CPU never rounds.

    ``float32`` (three TF32 products, which keep float32's accuracy), ``tf32`` or ``bf16``.
    """
    check_precision(precision)
    token = _precision.set(precision)
    try:
        yield
    finally:
        _precision.reset(token)


def native(*tensors: Tensor) -> bool:
    """Whether the native operators take these tensors."""
    if _backend.get() == "torch":
        return False
    for t in tensors:
        if t.dtype not in (torch.float32, torch.float64) or not (t.is_cpu or t.is_cuda):
            return False
    module = native_module()
    return module is not None and (tensors[0].is_cpu or bool(module.build_info()["cuda"]))


def sq_norms(x: Tensor, leading: int = 1) -> Tensor:
    """Return the sum of squares over all but the ``leading`` dimensions of ``x``, float64."""
    lead = x.shape[:leading]
    rows = x.reshape(lead.numel(), x.shape[leading:].numel())
    if rows.is_complex():
        rows = as_real(rows).flatten(1)
    return (torch.ops.cape.sq_norms(rows) if native(rows) else sq_norms_torch(rows)).view(lead)


def sq_norms_torch(x: Tensor) -> Tensor:
    """Pure-torch twin of ``sq_norms``: [N, n] to [N]."""
    return x.double().square().sum(1)


def size_sums(tensors: Sequence[Tensor]) -> Tensor:
    """Return Σ|x| and Σ|x|² of each of n tensors of one device, of any shapes and strides: [n, 2] float64."""
    if not tensors:
        return torch.zeros(0, 2, dtype=torch.float64)
    alike = len({t.dtype for t in tensors}) == 1
    if alike and native(*tensors) and tensors[0].device.type == "cpu":
        return torch.ops.cape.size_sums(tensors)
    return size_sums_torch(tensors)


def size_sums_torch(tensors: Sequence[Tensor]) -> Tensor:
    """Pure-torch twin of ``size_sums``, by few launches on a GPU."""
    held = list(tensors)
    sums, roots = (torch._foreach_norm(held, order, dtype=torch.float64) for order in (1, 2))
    return torch.stack([torch.stack(sums), torch.stack(roots).square()], 1)


def affine_sq_norms(
    g: Tensor, x: Tensor, mean: Tensor | None, inverse: Tensor, *, scale: bool = True, shift: bool = True
) -> Tensor:
    """Return Σ_c (Σ_{r,s} G·x̂)² (where ``scale``) + Σ_c (Σ_{r,s} G)² (where ``shift``), [K, B] float64.

    Args:
        g: gradients of a normalization layer's output [K, B, R, C, S].
        x: its input [B, R, C, S]; x̂ = (x - mean)·inverse.
        mean: broadcasts to [B, R, C]; ``None`` is zero.
        inverse: the inverse standard deviation, in the shape of ``mean``.
    """
    if native(g, x):
        return torch.ops.cape.affine_sq_norms(g, x, mean, inverse, scale, shift)
    return affine_sq_norms_torch(g, x, mean, inverse, scale, shift)


def affine_sq_norms_torch(
    g: Tensor, x: Tensor, mean: Tensor | None, inverse: Tensor, scale: bool, shift: bool
) -> Tensor:
    """Pure-torch twin of ``affine_sq_norms``."""
    total = torch.zeros(g.shape[:2], dtype=torch.float64, device=g.device)
    if scale:
        hat = (x if mean is None else x - mean.unsqueeze(-1)) * inverse.unsqueeze(-1)
        total += (g * hat).sum((2, 4), dtype=torch.float64).square().sum(2)
    if shift:
        total += g.sum((2, 4), dtype=torch.float64).square().sum(2)
    return total


def affine_pull(
    g: Tensor,
    x: Tensor,
    mean: Tensor | None,
    inverse: Tensor,
    weight: Tensor | None,
    *,
    own: bool,
    scale: bool = True,
    shift: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return G pulled back to the layer's input, [K, B, R, C, S], and ``affine_sq_norms``: one pass on a CPU.

    Args:
        g, x, mean, inverse, scale, shift: as in ``affine_sq_norms``.
        weight: the layer's scale [C]; ``None`` is one.
        own: the statistics are those of each row over its channels (layer norm; S is 1), not given ones.
    """
    if native(g, x) and g.device.type == "cpu":
        dx, norms = torch.ops.cape.affine_pull(g, x, mean, inverse, weight, scale, shift, own)
        return dx, norms
    norms = affine_sq_norms(g, x, mean, inverse, scale=scale, shift=shift)
    return affine_back_torch(g, x, mean, inverse, weight, own), norms


def affine_back_torch(
    g: Tensor, x: Tensor, mean: Tensor | None, inverse: Tensor, weight: Tensor | None, own: bool
) -> Tensor:
    """Pure-torch twin of ``affine_pull``'s first result: dx = w·G/σ, for ``own`` rows less what the statistics add."""
    inverse = inverse.unsqueeze(-1)
    scaled = g if weight is None else g * weight.view(-1, 1)
    if own:
        hat = (x if mean is None else x - mean.unsqueeze(-1)) * inverse
        scaled = scaled - scaled.mean(3, keepdim=True) - hat * (scaled * hat).mean(3, keepdim=True)
    return scaled * inverse


def linear_sq_norms(a: Tensor, g: Tensor, *, biases: int = 0, form: str = "auto") -> Tensor:
    """Return ‖A_bᵀ G_kb‖²_F + biases·‖Σ_t G_kbt‖² for each cotangent and sample, [K, B] float64.

    Args:
        a: inputs [B, T, d], float32 or float64, any strides.
        g: output gradients [K, B, T, p], same dtype and device.
        biases: how many biases have the same output gradient.
        form: ``auto``, ``direct`` or ``gram``.
    """
    if not native(a, g):
        return linear_sq_norms_torch(a, g, biases, form)
    norms = torch.ops.cape.linear_sq_norms(a, g, biases, _precision.get(), form)
    length, cotangents = a.shape[1], g.shape[0]
    direct = length * (a.shape[2] + cotangents * g.shape[3]) > 4 * cotangents * a.shape[2] * g.shape[3]
    if a.is_cpu or form != "auto" or length == 1 or direct:  # a CPU's kernel looks for itself
        return norms
    return _direct_where_cancelled(
        norms,
        _linear_terms(a, g, biases),
        a.dtype,
        lambda some: torch.ops.cape.linear_sq_norms(a[some], g[:, some], biases, _precision.get(), "direct"),
    )


_SHARE_LEFT = {torch.float32: 0.1, torch.float64: 1e-4}  # as in csrc/cpu/cancelled.h


def _direct_where_cancelled(
    norms: Tensor, terms: Tensor, kind: torch.dtype, direct: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return norms [K, B] of a Gram form, those of samples whose terms cancelled from the direct form instead.

    The Gram form adds up terms of either sign. Where little is left of the positive ones, so are few digits.

    Args:
        terms: sum of the positive ones, [K, B].
        direct: gives the norms of some samples (bool [B]).
    """
    lost = (norms < _SHARE_LEFT[kind] * terms).any(0)
    if bool(lost.any()):
        norms[:, lost] = direct(lost)
    return norms


def _linear_terms(a: Tensor, g: Tensor, biases: int) -> Tensor:
    """Return the sum of the positive terms of the Gram form's norms, [K, B] float64; see ``linear_sq_norms``."""
    rows = torch.linalg.vector_norm(a, dim=2).square() + biases
    return (torch.linalg.vector_norm(g, dim=3).square() * rows).sum(2, dtype=torch.float64)


def linear_sq_norms_torch(a: Tensor, g: Tensor, biases: int = 0, form: str = "auto") -> Tensor:
    """Pure-torch twin of ``linear_sq_norms``: ``auto`` is the cheaper of the direct and the Gram form."""
    batch, length, d = a.shape
    cotangents, p = g.shape[0], g.shape[3]
    if length == 1:
        return (sq_norms_torch(a[:, 0]) + biases) * sq_norms_torch(g.reshape(-1, p)).view(cotangents, batch)
    if form != "direct" and length * (d + cotangents * p) < 2 * cotangents * d * p:
        size, norms = length * length * (1 + cotangents), _gram_form
    else:
        size, norms = cotangents * d * p, _direct_form
    step = max(1, MATERIALIZE_ELEMENTS // max(1, size))
    parts = [norms(a[lo : lo + step], g[:, lo : lo + step], biases) for lo in range(0, batch, step)]
    found = torch.cat(parts, 1) if parts else a.new_zeros(cotangents, 0, dtype=torch.float64)
    if form != "auto" or norms is _direct_form:
        return found
    terms = _linear_terms(a, g, biases)
    return _direct_where_cancelled(
        found, terms, a.dtype, lambda some: linear_sq_norms_torch(a[some], g[:, some], biases, "direct")
    )


def _gram_form(a: Tensor, g: Tensor, biases: int) -> Tensor:
    return (((a @ a.mT).double() + biases) * (g @ g.mT)).sum((2, 3)).clamp(min=0)


def _direct_form(a: Tensor, g: Tensor, biases: int) -> Tensor:
    total = (a.mT @ g).double().square().sum((2, 3))
    return total + biases * g.sum(2).double().square().sum(2) if biases else total


def conv_sq_norms(x: Tensor, g: Tensor, geometry: ConvGeometry, *, form: str = "auto") -> Tensor:
    """Return the squared norms of a convolution's per-sample weight gradients, [K, B] float64.

    Args:
        x: inputs [B, F, C, *S] (F images per sample, 1 to 3 spatial dimensions), unpadded.
        g: output gradients [K, B, F, O, *L].
        geometry: kernel, stride, padding, dilation and groups.
        form: ``auto``, ``direct``, ``gram``, ``shifted``, ``winograd``, ``channelwise`` or ``narrow``, where the
            convolution has it.
    """
    if not native(x, g):
        return conv_sq_norms_torch(x, g, geometry)

    def norms(x: Tensor, g: Tensor, form: str) -> Tensor:
        c = geometry
        return torch.ops.cape.conv_sq_norms(
            x, g, c.kernel, c.stride, c.padding, c.dilation, c.groups, _precision.get(), form
        )

    found = norms(x, g, form)
    if x.is_cpu or form != "auto" or g.shape[4:].numel() * g.shape[2] == 1:  # a CPU's kernel looks for itself
        return found
    return _direct_where_cancelled(
        found, _conv_terms(x, g, geometry), x.dtype, lambda some: norms(x[some], g[:, some], "direct")
    )


def _conv_terms(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the sum of the positive terms of the Gram form's norms, [K, B] float64; see ``conv_sq_norms``."""
    groups = geometry.groups
    energy = x.square().unflatten(2, (groups, -1)).sum(3)
    windows = _unfold(energy, geometry, g.shape[4:]).sum(3, dtype=torch.float64)
    return torch.stack([(_group_rows(one.square(), groups).sum(3) * windows).sum((1, 2)) for one in g])


def conv_sq_norms_torch(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Pure-torch twin of ``conv_sq_norms``: unfold a few samples at a time, then the linear form per group."""
    cotangents, batch = g.shape[:2]
    parts = []
    for lo, hi in _sample_chunks(x, g[0], geometry):
        cols = _unfold(x[lo:hi], geometry, g.shape[4:]).flatten(0, 1)
        rows = torch.stack([_group_rows(one[lo:hi], geometry.groups).flatten(0, 1) for one in g])
        parts.append(linear_sq_norms_torch(cols, rows).view(cotangents, -1, geometry.groups).sum(2))
    return torch.cat(parts, 1) if parts else x.new_zeros(cotangents, batch, dtype=torch.float64)


def conv_grads(x: Tensor, g: Tensor, geometry: ConvGeometry) -> Tensor:
    """Return the per-sample weight gradients themselves, [B, O, C/groups · prod(kernel)], for one g [B, F, O, *L]."""
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
