"""One class per way of using a parameter: how its per-sample gradient follows from what flowed past.

A use knows its *targets* (the tensors it consumed: parameters, views of parameters or functions of parameters), what
the forward pass showed it, and the batch layout. From the output gradient G it gives, per target, either the squared
norms of the samples' gradients (no gradient of the parameter's size is formed) or, where cross terms with other uses
matter, the gradients of a few samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cape.probing import ops
from cape.probing.layout import Layout


class Use(ABC):
    """One consumption of parameters by one operator call."""

    targets: tuple[Tensor, ...]
    layout: Layout

    def weight_of_samples(self, g: Tensor) -> Tensor:
        """Return Σ G² over each sample's part of G, [B] float64."""
        return ops.sq_norms(self.layout.batch_first(wide(g)))

    @abstractmethod
    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        """Return Σ over the wanted targets of the squared per-sample gradient norms, [B] float64."""

    @abstractmethod
    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        """Return the gradients of ``targets[target]`` for a slice of samples, [b, *target.shape]."""


def wide(t: Tensor) -> Tensor:
    """Return half-precision tensors as float32: products of 16-bit numbers lose the digits that norms need."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


@dataclass
class Part:
    """One weight of a linear use: the rows that multiply it ([.., d] in the layout of G; ``None`` for a bias)."""

    rows: Tensor | None
    transposed: bool = False  # the target is [d, p] rather than [p, d]


class LinearUse(Use):
    """y = Σ_parts A_part · W_partᵀ + biases, all with the same output gradient: linear layers, recurrent cells."""

    def __init__(self, targets: Sequence[Tensor], parts: Sequence[Part], layout: Layout) -> None:
        self.targets = tuple(targets)
        self.parts = list(parts)
        self.layout = layout

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        g3 = self.rows_of(g)
        chosen = [p for p, w in zip(self.parts, wanted, strict=True) if w]
        biases = sum(p.rows is None for p in chosen)
        total = torch.zeros(g3.shape[0], dtype=torch.float64, device=g.device)
        for part in chosen:
            if part.rows is not None:
                total += ops.linear_sq_norms(self.rows_of(part.rows), g3)
        if biases:
            total += biases * ops.sq_norms(g3.sum(1))
        return total

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        part = self.parts[target]
        g3 = self.rows_of(g)[samples]
        if part.rows is None:
            return g3.sum(1).reshape(-1, *self.targets[target].shape)
        a3 = self.rows_of(part.rows)[samples]
        return a3.mT @ g3 if part.transposed else g3.mT @ a3

    def rows_of(self, t: Tensor) -> Tensor:
        """Return [B, T, features]."""
        return self.layout.rows(wide(t), 1)


class ConvUse(Use):
    """A convolution over 1, 2 or 3 spatial dimensions, grouped, dilated or transposed. Targets: weight, bias."""

    def __init__(
        self,
        targets: Sequence[Tensor],
        kinds: Sequence[str],
        x: Tensor,
        layout: Layout,
        geometry: ops.ConvGeometry,
        transposed: bool,
    ) -> None:
        self.targets = tuple(targets)
        self.kinds = tuple(kinds)  # "weight" or "bias", in the order of targets
        self.x = x
        self.layout = layout
        self.geometry = geometry
        self.transposed = transposed

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        image, out = self._pair(g)
        total = torch.zeros(image.shape[0], dtype=torch.float64, device=g.device)
        for kind, want in zip(self.kinds, wanted, strict=True):
            if want and kind == "weight":
                total += ops.conv_sq_norms(image, out, self.geometry)
            elif want:
                total += ops.sq_norms(self._bias(g, slice(None)))
        return total

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        if self.kinds[target] == "bias":
            return self._bias(g, samples)
        image, out = self._pair(g)
        return ops.conv_grads(image[samples], out[samples], self.geometry).reshape(-1, *self.targets[target].shape)

    def _pair(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return ([B, F, C, *S] that slides under the kernel, [B, F, O, *L]); a transposed one swaps the roles."""
        spatial = len(self.geometry.kernel) + 1
        x, g = self.layout.rows(wide(self.x), spatial), self.layout.rows(wide(g), spatial)
        return (g, x) if self.transposed else (x, g)

    def _bias(self, g: Tensor, samples: slice) -> Tensor:
        g = self.layout.rows(wide(g), len(self.geometry.kernel) + 1)[samples]
        return g.flatten(3).sum((1, 3))


class BroadcastUse(Use):
    """A raw parameter that broadcasts against the data (added, multiplied, concatenated): reduce G over the rest.

    ``target`` has the shape of the parameter aligned to the operation's output, with size 1 where it broadcasts.
    """

    def __init__(self, target: Tensor, aligned: Sequence[int], layout: Layout) -> None:
        self.targets = (target,)
        self.aligned = tuple(aligned)
        self.layout = layout

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        return ops.sq_norms(reduce_to(wide(g), self.aligned, self.layout))

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        return reduce_to(wide(g), self.aligned, self.layout)[samples].reshape(-1, *self.targets[0].shape)


def reduce_to(g: Tensor, aligned: Sequence[int], layout: Layout) -> Tensor:
    """Sum G over every dimension where the parameter has size 1, except the batch: [B, *aligned without dim]."""
    first = layout.batch_first(g)  # [B, outer, inner, rest...]
    rest = [n for d, n in enumerate(aligned) if d != layout.dim]
    dims = [1, 2] + [3 + i for i, n in enumerate(rest) if n == 1 and first.shape[3 + i] != 1]
    return first.sum(dims).reshape(first.shape[0], *rest)


class AffineUse(Use):
    """Scale and shift of a normalization layer: y = x̂·weight + bias. ``normalize`` gives x̂ from x again.

    ``aligned`` is the shape of weight and bias, aligned to x, with size 1 where they broadcast.
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        kinds: Sequence[str],
        x: Tensor,
        normalize: NormalizeFn,
        aligned: Sequence[int],
        layout: Layout,
    ) -> None:
        self.targets = tuple(targets)
        self.kinds = tuple(kinds)
        self.x = x
        self.normalize = normalize
        self.aligned = tuple(aligned)
        self.layout = layout

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        shift, scale = self._sums(g)
        chosen = [kind for kind, want in zip(self.kinds, wanted, strict=True) if want]
        return torch.stack([ops.sq_norms(scale if kind == "weight" else shift) for kind in chosen]).sum(0)

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        shift, scale = self._sums(g)
        chosen = scale if self.kinds[target] == "weight" else shift
        return chosen[samples].to(wide(g).dtype).reshape(-1, *self.targets[target].shape)

    def _sums(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Return (Σ G, Σ G·x̂) per sample and channel, [B, C] float64 each."""
        first = next(d for d, n in enumerate(self.aligned) if n != 1) if max(self.aligned) > 1 else 1
        tail = len(self.aligned) - first  # dimensions from the first channel dimension on
        channels = torch.Size(self.aligned).numel()

        def shaped(t: Tensor) -> Tensor:
            rows = self.layout.rows(t, tail)
            return rows.reshape(*rows.shape[:2], channels, t.shape[first:].numel() // channels)

        g = wide(g)
        statistics = self.normalize.statistics()
        if statistics is None:
            shift, scale = ops.pair_sums(shaped(g), shaped(self.normalize(wide(self.x))))
            return shift, scale
        mean, deviation = statistics  # x̂ = (x - mean) / deviation: no need to form it
        shift, product = ops.pair_sums(shaped(g), shaped(wide(self.x)))
        return shift, (product - mean * shift) / deviation


class NormalizeFn:
    """x̂ of one normalization call, recomputed in the backward pass instead of stored."""

    def __init__(self, kind: str, **settings: object) -> None:
        self.kind = kind
        self.settings = settings

    def __call__(self, x: Tensor) -> Tensor:
        s = {k: wide(v) if isinstance(v, Tensor) else v for k, v in self.settings.items()}
        with torch.no_grad():
            return getattr(F, self.kind)(x, **s)

    def statistics(self) -> tuple[Tensor, Tensor] | None:
        """Return the running mean and standard deviation, [C] float64, where x̂ follows from them alone."""
        mean, var, eps = (self.settings.get(k) for k in ("running_mean", "running_var", "eps"))
        if not (isinstance(mean, Tensor) and isinstance(var, Tensor) and isinstance(eps, float)):
            return None
        return mean.double(), (var.double() + eps).sqrt()


class EmbeddingUse(Use):
    """Rows of a table picked by the data. G: [.., d] in the index's layout; ``scale`` weighs each pick."""

    def __init__(
        self, target: Tensor, index: Tensor, layout: Layout, padding_idx: int | None, scale: Tensor | None = None
    ) -> None:
        self.targets = (target,)
        table = target.shape[0]
        self.index = layout.batch_first(index).flatten(1) % table  # [B, T]; negative picks count from the end
        self.keep = torch.ones_like(self.index, dtype=torch.bool)
        if padding_idx is not None:
            self.keep = self.index != padding_idx % table
        self.layout = layout
        self.scale = scale

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        g3, keep = self._rows(g), self.keep
        batch, length = self.index.shape
        table = self.targets[0].shape[0]
        owner = torch.arange(batch, device=g.device).unsqueeze(1).expand(batch, length)
        picked, inverse = torch.unique((owner * table + self.index)[keep], return_inverse=True)
        sums = g3.new_zeros(len(picked), g3.shape[-1]).index_add_(0, inverse, g3[keep])
        rows = ops.sq_norms(sums)
        return rows.new_zeros(batch).index_add_(0, picked // table, rows)

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        g3, index = (self._rows(g) * self.keep.unsqueeze(-1))[samples], self.index[samples]
        table = self.targets[0].shape[0]
        out = g3.new_zeros(len(g3), table, g3.shape[-1])
        out.scatter_add_(1, index.unsqueeze(-1).expand_as(g3), g3)
        return out.reshape(-1, *self.targets[0].shape)

    def _rows(self, g: Tensor) -> Tensor:
        """Return G per pick, [B, T, d]."""
        features = self.targets[0].dim() - 1
        g3 = self.layout.rows(wide(g), features).flatten(2) if features else self.layout.rows(wide(g), 0).unsqueeze(-1)
        if self.scale is not None:
            g3 = g3 * self.scale
        return g3.expand(*self.index.shape, g3.shape[-1])


class EinsumUse(Use):
    """y = einsum(x, W) for any equation in which W has no batch index (batched matrix products included).

    Letters: ``x``, ``w``, ``y`` as in the equation, with ``layout.dim`` the batch letter's place in x.
    """

    def __init__(self, target: Tensor, x: Tensor, letters: tuple[str, str, str], layout: Layout, y_dim: int) -> None:
        self.targets = (target,)
        self.x = x
        self.letters = letters
        self.layout = layout
        self.y_dim = y_dim

    def weight_of_samples(self, g: Tensor) -> Tensor:
        return ops.sq_norms(self.layout.on(self.y_dim).batch_first(wide(g)))

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        batch = self.layout.batch_first(self.x).shape[0]
        step = max(1, ops.MATERIALIZE_ELEMENTS // max(1, self.targets[0].numel()))
        parts = [ops.sq_norms(self.grads(g, 0, slice(lo, min(lo + step, batch)))) for lo in range(0, batch, step)]
        return torch.cat(parts)

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        xs, ws, ys = self.letters
        a = self.layout.batch_first(wide(self.x))[samples]
        b = self.layout.on(self.y_dim).batch_first(wide(g))[samples]
        batch_letter = xs[self.layout.dim]
        free = [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in xs + ws + ys]
        outer, inner = free[:2]
        left = batch_letter + outer + inner + xs.replace(batch_letter, "")
        right = batch_letter + outer + inner + ys.replace(batch_letter, "")
        return torch.einsum(f"{left},{right}->{batch_letter}{ws}", a.conj(), b)
