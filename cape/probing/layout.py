"""Where the batch sits inside a tensor: the one thing that shapes cannot tell.

A model may flatten [B, T, d] to [B·T, d] or to [T·B, d]; both have the same shape. The layout is therefore
*observed*: the forward pass runs on two samples, then again with the first sample changed, and the rows that change
are the rows of that sample. The same two passes show whether samples influence each other. Where the batch is the first
dimension everywhere, the first pass is enough: the record finds the two samples' rows again in the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cape.samples import Samples
from cape.state import as_real, tensors_of


@dataclass(frozen=True)
class Layout:
    """The batch dimension of a tensor: dimension ``dim`` has size ``outer * B * inner``, in that order."""

    dim: int
    outer: int = 1
    inner: int = 1

    @property
    def leads(self) -> bool:
        """Whether the tensor is one block of rows for each sample already."""
        return self.dim == 0 and self.outer == 1

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
        if self.leads and len(shape) > features:
            batch = shape[0] // self.inner
            return tensor.reshape(*front, batch, -1 if tensor.numel() else 0, *shape[len(shape) - features :])
        first = self.batch_first(tensor, leading)
        return first.flatten(leading + 1, first.dim() - 1 - features)

    def on(self, dim: int) -> Layout:
        """Return the same split on another dimension."""
        return Layout(dim, self.outer, self.inner)


def middle_samples(batch_size: int) -> tuple[int, int]:
    """Return the two samples that a scan looks at: in order, and neither the first nor the last where that can be.

    What a model does to the batch's order, or with its first or last sample, then shows.
    """
    return (0, batch_size - 1) if batch_size < 3 else (batch_size // 3, 2 * batch_size // 3)


def two_samples(samples: Samples, kinds: str = "fib") -> tuple[Samples, Samples] | None:
    """Return a batch of two samples and the same batch with the first sample changed (``None``: nothing could change).

    Floating-point inputs become another sample plus noise; integers move within the range that the batch uses, so
    that token ids, lengths and masks stay valid; booleans become the other sample's.

    Args:
        samples: the whole batch.
        kinds: which inputs may change: ``f``loats, ``i``ntegers, ``b``ooleans.
    """
    changed_any = False
    generator = torch.Generator().manual_seed(0)
    first, last = middle_samples(len(samples))
    others = any(t.dtype != torch.bool for t in tensors_of(samples.inputs))

    def change(value: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal changed_any
        base = value.detach()[first : last + 1 : last - first].clone()
        other = base.clone()
        if value.is_floating_point() or value.is_complex():
            if "f" in kinds:
                real = as_real(base)
                scale = real.float().nan_to_num(0.0, 0.0, 0.0).std(correction=0).item() or 1.0
                noise = torch.randn(real.shape[1:], generator=generator) * scale
                other[0] = base[1] + (torch.view_as_complex(noise) if value.is_complex() else noise).to(base)
        elif value.dtype == torch.bool:
            if "b" in kinds:
                other[0] = base[1] if others else ~base[0]
        elif "i" in kinds:
            numbers = value.long()  # torch has hardly an operator for uint16, uint32 and uint64
            low, high = int(numbers.min()), int(numbers.max())
            if low < high:
                other[0] = ((base[0].long() - low + 1) % (high - low + 1) + low).to(base.dtype)
            elif low > 0 or value.device.type == "cpu":  # a wrong index on a GPU would end the process
                other[0] = (base[0].long() + (-1 if low > 0 else 1)).to(base.dtype)
        if not torch.equal(base, other):
            changed_any = True
        return base, other

    pairs = [change(t) for t in samples.tensors()]
    if not changed_any:
        return None
    bases, turned = iter([p[0] for p in pairs]), iter([p[1] for p in pairs])
    base, other = samples.map(lambda t: next(bases)), samples.map(lambda t: next(turned))
    return Samples(base, 2, samples.own), Samples(other, 2, samples.own)


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
    # equal to rounding, and NaN differs from itself.
    exact = _explain(a != b)
    return exact if exact is not None or not a.is_floating_point() else _explain(_differs(a, b))


def _explain(differs: Tensor) -> Layout | None:
    found, where = [], differs.cpu().numpy()
    for dim, size in enumerate(where.shape):
        if size % 2:
            continue
        changed = np.asarray(where.any(axis=tuple(d for d in range(where.ndim) if d != dim)))
        found += [Layout(dim, size // (2 * inner), inner) for inner in _explanations(changed)]
    return found[0] if len(found) == 1 else None


def _explanations(changed: NDArray[np.bool_]) -> list[int]:
    """Return every ``inner`` for which exactly (or at least only) sample 0's indices changed."""
    size = len(changed)
    if not changed.any() or changed.all():
        return []
    exact: list[int] = []
    partial: list[int] = []
    for inner in (n for n in range(1, size // 2 + 1) if size % (2 * n) == 0):
        pairs = changed.reshape(-1, 2, inner)  # of the two samples, block by block
        if pairs[:, 1].any():
            continue
        (exact if pairs[:, 0].all() else partial).append(inner)
    return exact or partial


def interacts(a: Tensor, b: Tensor) -> bool:
    """Whether the second sample's outputs moved when only the first sample changed. ``a``, ``b``: [2, ...]."""
    return a.shape == b.shape and moved(a[1], b[1], 0.7, varying(a))


def varying(outputs: Tensor) -> Tensor:
    """Return which numbers of an output differ from sample to sample, all if none does: bool [...] for [B, ...].

    The others were hardly computed: a mask's large constants say nothing of how exact the rest is.
    """
    differ = (outputs != outputs[:1]).any(0)
    return differ if bool(differ.any()) else torch.ones_like(differ)


def moved(a: Tensor, b: Tensor, digits: float, among: Tensor) -> bool:
    """Whether two results of the same computation differ by more than a share ``digits`` of the type's digits.

    Args:
        a, b: outputs of a sample, [...], or of several, [n, ...].
        among: numbers of an output, bool [...], whose size the digits are of.
    """
    if not (a.is_floating_point() or a.is_complex()) or a.numel() == 0:
        return False
    apart = torch.where(a == b, 0.0, (a - b).abs())  # infinities of one sign are the same
    sizes = torch.maximum(a.abs(), b.abs()) * among
    scale = torch.where(sizes.isfinite(), sizes, 0.0).amax()
    return bool((apart.amax() > torch.finfo(a.dtype).eps ** digits * scale).item())


@dataclass
class Sighting:
    """What a scan saw at one use: which call it was, and the data that met the parameter."""

    key: tuple[Any, ...]
    data: Tensor


class Verdict(NamedTuple):
    """What scans say of one use.

    Attributes:
        key: which call it is.
        layout: of the data (``None``: leave the parameter attached).
        rows: what is seen of the two samples' rows of the data: of their first ones and, where each has several, of
            their last ones.
        puzzling: the data changed, but not as the rows of one sample: samples may have met.
    """

    key: tuple[Any, ...]
    layout: Layout | None
    rows: list[Glimpse]
    puzzling: bool


def judge(first: list[Sighting], second: list[Sighting]) -> list[Verdict]:
    """Return the verdicts of two scans (the same two samples, the first one changed in the second scan)."""
    if [s.key for s in first] != [s.key for s in second]:
        return []  # control flow depends on the data: nothing can be matched
    verdicts = []
    for a, b in zip(first, second, strict=True):
        layout = observe(a.data, b.data)
        rows = [] if layout is None else rows_at_ends(a.data, layout, (0, 1))
        puzzling = layout is None and not a.data.is_nested and not torch.equal(a.data, b.data)
        verdicts.append(Verdict(a.key, layout, rows, puzzling))
    return verdicts


def judge_one(sightings: list[Sighting]) -> list[Verdict] | None:
    """Return the verdicts of a single scan, or ``None`` where it takes a second one.

    Where the two samples are the first dimension of what met every parameter, and their rows there are plainly not
    the same, no other layout is left, provided that the whole batch has its own size there and the two samples' rows
    come again where they are in the batch: the record checks both.
    """
    if not sightings or any(s.data.dim() == 0 or s.data.shape[0] != 2 for s in sightings):
        return None
    layout = Layout(0)
    rows = [_rows_at(s.data, layout, (0, 1)) for s in sightings]
    sizes = [r.numbers.shape[1] for r in rows]
    both = _side_by_side(rows, sizes)
    apart, scale = _largest(both[:1], both[1:], sizes)
    if not bool((apart > 4 * scale * np.array([digits(s.data.dtype) for s in sightings])).all()):
        return None
    return [Verdict(s.key, layout, [r], False) for s, r in zip(sightings, rows, strict=True)]


_HEAD, _SPREAD = 128, 128  # numbers of a row that are compared: its first ones, and some of all the others
_OF_NUMPY = {torch.float32, torch.float64, torch.float16, torch.int64, torch.int32}


class Glimpse(NamedTuple):
    """Some numbers of the first row of one or two samples.

    Attributes:
        numbers: [samples, n <= 256] float64: all of short rows, else the first ones and some of the others.
        length: of the rows.
    """

    numbers: Tensor
    length: int

    def of(self, samples: Sequence[int]) -> Glimpse:
        """Return those of some of the samples."""
        return self if len(samples) == len(self.numbers) else Glimpse(self.numbers[list(samples)], self.length)

    def shared(self, other: Glimpse) -> int:
        """Return how many of the numbers are of the same places of both rows, beginning with the first one."""
        if self.length == other.length:
            return self.numbers.shape[1]
        return min(n if n <= _HEAD + _SPREAD else _HEAD for n in (self.length, other.length))


def _picked(rows: Any) -> Any:
    """Return the numbers of rows [samples, n], an array or a tensor, that are looked at."""
    n = rows.shape[1]
    if n <= _HEAD + _SPREAD:
        return rows
    step = (n - _HEAD) // _SPREAD | 1  # odd: not always the same column of an image
    join = torch.cat if isinstance(rows, Tensor) else np.concatenate
    return join([rows[:, :_HEAD], rows[:, _HEAD::step][:, :_SPREAD]], 1)


def rows_at_ends(t: Tensor, layout: Layout, samples: Sequence[int]) -> list[Glimpse]:
    """Return what is seen of the first rows of one or two samples and, where each has several, of their last ones."""
    first = _rows_at(t, layout, samples)
    return [first] if layout.outer * layout.inner == 1 else [first, _rows_at(t, layout, samples, last=True)]


def _rows_at(t: Tensor, layout: Layout, samples: Sequence[int], last: bool = False) -> Glimpse:
    """Return what is seen of the first (last) rows of one or two samples, as they are now."""
    t = t.detach()
    start = t.shape[layout.dim] // layout.outer * (layout.outer - 1) + layout.inner - 1 if last else 0
    first, last_place = (start + s * layout.inner for s in (samples[0], samples[-1]))
    picked = slice(first, last_place + 1, max(1, last_place - first))
    if layout.dim == 0 and _is_array(t):  # a third of the time of torch's operators, at every use of a parameter
        rows = t.numpy()[picked].reshape(len(samples), -1)
        return Glimpse(torch.from_numpy(_picked(rows).astype(np.float64)), rows.shape[1])
    t = t[(slice(None),) * layout.dim + (picked,)]
    t = as_real(t)
    t = (t.movedim(layout.dim, 0) if layout.dim else t).reshape(len(samples), -1)
    return Glimpse(_picked(t).to(torch.float64, copy=True), t.shape[1])


def _is_array(t: Tensor) -> bool:
    """Whether a tensor without a graph is an array of numpy's, nothing needing to be copied or worked out."""
    return type(t) is Tensor and t.is_cpu and t.dtype in _OF_NUMPY and t.layout is torch.strided and not t.is_neg()


def same_rows(now: Sequence[Glimpse], then: Sequence[Glimpse], limits: Sequence[float]) -> bool:
    """Whether rows agree, as far as both go, to a share ``limits`` of their largest number each."""
    sizes = [a.shared(b) for a, b in zip(now, then, strict=True)]
    far, scale = _largest(_side_by_side(now, sizes), _side_by_side(then, sizes), sizes)
    return not bool((far > scale * np.array(limits)).any())


def _side_by_side(rows: Sequence[Glimpse], sizes: Sequence[int]) -> NDArray[np.float64]:
    """Return the first ``sizes`` numbers of rows in one array, which takes one copy from a device."""
    cut = [r.numbers if r.numbers.shape[1] == n else r.numbers[:, :n] for r, n in zip(rows, sizes, strict=True)]
    return np.asarray(torch.cat(cut, 1).cpu().numpy())


def _largest(
    now: NDArray[np.float64], then: NDArray[np.float64], sizes: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return, per sample and pair of rows, the largest difference and the largest number, [samples, pairs] each.

    NaN is larger than any number.
    """
    starts = np.cumsum([0, *sizes[:-1]])  # no row is empty
    with np.errstate(invalid="ignore"):  # infinity less infinity
        far = np.abs(now - then)
    return np.maximum.reduceat(far, starts, axis=1), np.maximum.reduceat(np.abs(then), starts, axis=1)


@functools.cache
def digits(kind: torch.dtype) -> float:
    """Return the relative difference that rounding may make between two batch sizes."""
    return float(torch.finfo(kind).eps ** 0.35) if kind.is_floating_point or kind.is_complex else 0.0
