"""One class per way of using a parameter: how its per-sample gradient follows from what flowed past.

A use knows its *targets* (the tensors it consumed: parameters, views of parameters or functions of parameters), what
the forward pass showed it, and the batch layout. From the output gradient G it gives, per target, either the squared
norms of the samples' gradients (no gradient of the parameter's size is formed) or, where cross terms with other uses
matter, the gradients of a few samples.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cape.probing import ops
from cape.probing.layout import Layout


class Use(ABC):
    """One consumption of parameters by one operator call.

    Gradients arrive as [K, *shape], one for each cotangent; gradients of single samples are formed for one of them.
    """

    targets: tuple[Tensor, ...]
    layout: Layout

    def weight_of_samples(self, g: Tensor) -> Tensor:
        """Return Σ G² over each sample's part of G, [K, B] float64."""
        return ops.sq_norms(self.layout.batch_first(wide(g), 1), 2)

    @abstractmethod
    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        """Return Σ over the wanted targets of the squared per-sample gradient norms, [K, B] float64."""

    def pull(self, g: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor] | None:
        """Return G pulled back to the operator's data, [K, *data shape], and ``norms``, where one pass gives both."""
        return None

    @abstractmethod
    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        """Return, for one gradient G, that of ``targets[target]`` for a slice of samples, [b, *target.shape]."""


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
        g4 = self.layout.rows(wide(g), 1, 1)
        chosen = [p.rows for p, w in zip(self.parts, wanted, strict=True) if w]
        inputs = [self.rows_of(rows) for rows in chosen if rows is not None]
        biases = len(chosen) - len(inputs)
        if not inputs:
            return biases * ops.sq_norms(g4.sum(2), 2)
        # Σ_parts ‖A_partᵀG‖² is the norm for the parts side by side.
        return ops.linear_sq_norms(inputs[0] if len(inputs) == 1 else torch.cat(inputs, 2), g4, biases=biases)

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
        spatial = len(self.geometry.kernel) + 1
        x, grad = self.layout.rows(wide(self.x), spatial), self.layout.rows(wide(g), spatial, 1)
        total = torch.zeros(grad.shape[:2], dtype=torch.float64, device=g.device)
        for kind, want in zip(self.kinds, wanted, strict=True):
            if want and kind == "bias":
                total += ops.sq_norms(grad.flatten(4).sum((2, 4)), 2)
            elif want and self.transposed:  # the gradient slides under the kernel, the input is what comes out
                total += torch.cat([ops.conv_sq_norms(one, x.unsqueeze(0), self.geometry) for one in grad])
            elif want:
                total += ops.conv_sq_norms(x, grad, self.geometry)
        return total

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        spatial = len(self.geometry.kernel) + 1
        x, grad = self.layout.rows(wide(self.x), spatial)[samples], self.layout.rows(wide(g), spatial)[samples]
        if self.kinds[target] == "bias":
            return grad.flatten(3).sum((1, 3))
        image, out = (grad, x) if self.transposed else (x, grad)
        return ops.conv_grads(image, out, self.geometry).reshape(-1, *self.targets[target].shape)


class BroadcastUse(Use):
    """A raw parameter that broadcasts against the data (added, multiplied, concatenated): reduce G over the rest.

    ``target`` has the shape of the parameter aligned to the operation's output, with size 1 where it broadcasts.
    """

    def __init__(self, target: Tensor, aligned: Sequence[int], layout: Layout) -> None:
        self.targets = (target,)
        self.aligned = tuple(aligned)
        self.layout = layout

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        return ops.sq_norms(reduce_to(wide(g), self.aligned, self.layout, 1), 2)

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        return reduce_to(wide(g), self.aligned, self.layout)[samples].reshape(-1, *self.targets[0].shape)


def reduce_to(g: Tensor, aligned: Sequence[int], layout: Layout, leading: int = 0) -> Tensor:
    """Sum G over every dimension where the parameter has size 1, except the batch: [B, *aligned without dim]."""
    first = layout.batch_first(g, leading)  # [B, outer, inner, rest...]
    rest = [n for d, n in enumerate(aligned) if d != layout.dim]
    at = leading + 3
    dims = [leading + 1, leading + 2] + [at + i for i, n in enumerate(rest) if n == 1 and first.shape[at + i] != 1]
    return first.sum(dims).reshape(*first.shape[: leading + 1], *rest)


class AffineUse(Use):
    """Scale and shift of a normalization layer: y = x̂·weight + bias with x̂ = (x - mean)·inverse.

    ``aligned`` is the shape of weight and bias, aligned to x, with size 1 where they broadcast; ``statistics`` gives
    mean (or ``None``) and inverse deviation, both of the rank of x, with size 1 where they do not vary. ``own`` says
    whether they are those of x's rows over the channels, or given ones; ``None``: neither, there is no ``pull``.
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        kinds: Sequence[str],
        x: Tensor,
        statistics: Callable[[], tuple[Tensor | None, Tensor]],
        aligned: Sequence[int],
        layout: Layout,
        weight: Tensor | None = None,
        own: bool | None = None,
    ) -> None:
        self.targets = tuple(targets)
        self.kinds = tuple(kinds)
        self.x = x
        self.weight = weight
        self.own = own
        self.statistics = statistics
        self.aligned = tuple(aligned)
        self.layout = layout
        self.first = channel_dim(aligned)
        self.channels = torch.Size(self.aligned).numel()

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        chosen = [kind for kind, want in zip(self.kinds, wanted, strict=True) if want]
        x, mean, inverse = self._parts()
        return ops.affine_sq_norms(
            self._shaped(wide(g), 1), x, mean, inverse, scale="weight" in chosen, shift="bias" in chosen
        )

    def pull(self, g: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor] | None:
        plain = self.layout.leads and g.dtype in (torch.float32, torch.float64)
        if self.own is None or not plain or g.device.type != "cpu":
            return None
        chosen = [kind for kind, want in zip(self.kinds, wanted, strict=True) if want]
        x, mean, inverse = self._parts()
        if self.own and x.shape[3] != 1:
            return None
        dx, norms = ops.affine_pull(
            self._shaped(g, 1), x, mean, inverse, None if self.weight is None else self.weight.reshape(-1),
            own=self.own, scale="weight" in chosen, shift="bias" in chosen,
        )  # fmt: skip
        return dx.view(g.shape), norms

    def grads(self, g: Tensor, target: int, samples: slice) -> Tensor:
        grad = self._shaped(wide(g))[samples]
        if self.kinds[target] == "weight":
            x, mean, inverse = self._parts()
            hat = (x if mean is None else x - mean.unsqueeze(-1)) * inverse.unsqueeze(-1)
            grad = grad * hat[samples]
        return grad.sum((1, 3)).reshape(-1, *self.targets[target].shape)

    def _parts(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return x [B, R, C, S], and mean and inverse deviation so that they broadcast to [B, R, C]."""
        mean, inverse = self.statistics()
        return self._shaped(wide(self.x)), None if mean is None else self._small(wide(mean)), self._small(wide(inverse))

    def _shaped(self, t: Tensor, leading: int = 0) -> Tensor:
        """Return [B, R, C, S] of a tensor in the shape of x."""
        front, shape, inner = t.shape[:leading], t.shape[leading:], self.layout.inner
        channels = (self.channels, shape[self.first :].numel() // self.channels)
        if self.layout.leads:  # in one step
            return t.reshape(*front, shape[0] // inner, inner * shape[1 : self.first].numel(), *channels)
        rows = self.layout.rows(t, len(self.aligned) - self.first, leading)
        return rows.reshape(*rows.shape[: leading + 2], *channels)

    def _small(self, statistic: Tensor) -> Tensor:
        """Return a statistic as [B or 1, R or 1, C or 1]."""
        first, channels = self.first, self.channels
        if statistic.shape[:first].numel() == 1:  # the same for every sample and row: one number per channel
            return statistic.reshape(1, 1, -1)
        if statistic.shape[first:].numel() == 1:  # one number per row
            shape = (*self.x.shape[:first], 1)
            return self.layout.rows(statistic.reshape(*statistic.shape[:first], 1).expand(shape), 1)
        if statistic.shape[first:].numel() == channels:
            return self._shaped(statistic)[..., 0]
        return self._shaped(statistic.expand(self.x.shape))[..., 0]


def channel_dim(aligned: Sequence[int]) -> int:
    """Return the first channel dimension of a weight's aligned shape: the last one where there is a single channel."""
    return next((d for d, n in enumerate(aligned) if n != 1), len(aligned) - 1)


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
        batch, length = self.index.shape
        table = self.targets[0].shape[0]
        owner = torch.arange(batch, device=g.device).unsqueeze(1).expand(batch, length)
        picked, inverse = torch.unique((owner * table + self.index)[self.keep], return_inverse=True)
        norms = []
        for one in g:
            g3 = self._rows(one)
            sums = g3.new_zeros(len(picked), g3.shape[-1]).index_add_(0, inverse, g3[self.keep])
            rows = ops.sq_norms(sums)
            norms.append(rows.new_zeros(batch).index_add_(0, picked // table, rows))
        return torch.stack(norms)

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
        return ops.sq_norms(self.layout.on(self.y_dim).batch_first(wide(g), 1), 2)

    def norms(self, g: Tensor, wanted: Sequence[bool]) -> Tensor:
        batch = self.layout.batch_first(self.x).shape[0]
        step = max(1, ops.MATERIALIZE_ELEMENTS // max(1, self.targets[0].numel()))
        pieces = [slice(lo, min(lo + step, batch)) for lo in range(0, batch, step)]
        return torch.stack([torch.cat([ops.sq_norms(self.grads(one, 0, piece)) for piece in pieces]) for one in g])

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
