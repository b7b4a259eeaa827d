"""Layers of many models of one architecture at once, with their backward passes written out.

Activations are [k, B, ...]: k trials, B samples. There is no autograd graph: a layer keeps what its backward pass
needs, writes the gradients of its parameters into buffers that live as long as the stack, and the optimizer goes over
them at once, while they are in the cache. Products, normalizations and reductions are made per trial by the kernels
that the plain engine uses, so that on a CPU a trial's losses are those of ``measure``, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cape.convergence.draws import Draws
from cape.native import native_module
from cape.probing.chain import Elementwise, aligned, apart, dense, dense_back, evenly_spaced

# Products of fewer rows go through another kernel for one matrix than for many (seen with MKL): one at a time.
_FEW_ROWS = 16

_VECTOR = 16  # float32 numbers of the widest vector register


class StackedParameter:
    """One parameter of all trials of a stack, with its gradient and AdamW's moments, each [capacity, ...]."""

    def __init__(self, like: Tensor, capacity: int) -> None:
        def buffer() -> Tensor:  # pages that no trial ever uses are never touched
            return torch.empty(capacity, *like.shape, dtype=like.dtype, device=like.device)

        self.value, self.grad, self.exp_avg, self.exp_avg_sq = buffer(), buffer(), buffer(), buffer()

    def load(self, slot: int, value: Tensor) -> None:
        """Begin a trial in a slot with its initial value."""
        self.value[slot].copy_(value)
        self.exp_avg[slot].zero_()
        self.exp_avg_sq[slot].zero_()

    def move(self, source: int, target: int) -> None:
        """Let the trial of one slot go on in another (gradients do not outlive a step)."""
        for tensor in (self.value, self.exp_avg, self.exp_avg_sq):
            tensor[target].copy_(tensor[source])


class Layer(ABC):
    """A layer of all trials of a stack.

    Attributes:
        parameters: in the order of the module's own.
        saved: what ``forward`` keeps for ``backward``, each [k, ...].
    """

    def __init__(self) -> None:
        self.parameters: list[StackedParameter] = []
        self.saved: list[Tensor] = []

    @abstractmethod
    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        """Return the outputs [k, B, ...] for inputs [k, B, ...]."""

    @abstractmethod
    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        """Fill the parameters' gradients, rows 0..k-1, and return the gradient of the inputs if it is needed."""

    def move(self, source: int, target: int) -> None:
        """Let the trial of one slot go on in another, between ``forward`` and ``backward`` or before ``forward``."""
        for parameter in self.parameters:
            parameter.move(source, target)
        for tensor in self.saved:
            if len(tensor) > source:
                tensor[target].copy_(tensor[source])

    def narrow(self, width: int) -> None:
        """Forget the slots from ``width`` on, between ``forward`` and ``backward``."""
        self.saved = [tensor[:width] for tensor in self.saved]


class Linear(Layer):
    """y = x Wᵀ + b."""

    def __init__(self, module: nn.Linear, capacity: int) -> None:
        super().__init__()
        self.parameters = [StackedParameter(p.detach(), capacity) for p in module.parameters()]
        self._bias = module.bias is not None

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        shape = x.shape
        x = x.flatten(1, -2)
        self.saved = [x]
        bias = self.parameters[1].value[: len(x)] if self._bias else None
        y = dense(x, self.parameters[0].value[: len(x)], bias)
        return y.view(*shape[:-1], -1)

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        (x,) = self.saved
        width, shape = len(x), grad.shape
        grad = grad.flatten(1, -2)
        product_of_transposed(grad, x, self.parameters[0].grad[:width])
        if self._bias:
            torch.sum(grad, 1, out=self.parameters[1].grad[:width])
        if not needs_input:
            return None
        return dense_back(grad, self.parameters[0].value[:width]).view(*shape[:-1], -1)


def product_of_transposed(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write aᵀ b into ``out`` [k, p, d], for a [k, n, p] and b [k, n, d]."""
    even = evenly_spaced(a, b, out)
    if a.device.type != "cpu" or not (a.shape[2] <= _FEW_ROWS or apart(a.mT, b.mT) or not even):
        return torch.bmm(a.mT, b, out=out)
    for one, other, to in zip(a, b, out, strict=True):
        if even:
            torch.mm(one.t(), other, out=to)
        else:
            to.copy_(aligned(one).t() @ aligned(other))
    return out


class BatchNorm(Layer):
    """Batch norm of vectors in train mode: each trial has the statistics of its own batch.

    Running statistics are not kept: nothing in a trajectory reads them.
    """

    def __init__(self, module: nn.BatchNorm1d, capacity: int) -> None:
        super().__init__()
        self.parameters = [StackedParameter(p.detach(), capacity) for p in module.parameters()]
        self._eps = module.eps

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        width, batch, channels = x.shape
        weight, bias = self._affine(width)
        if _native_norm(x):
            given = (weight, bias) if self.parameters else (None, None)
            y, mean, inverse = torch.ops.cape.stacked_batch_norm(x, *given, self._eps)
            self.saved = [x, mean, inverse]
            return y
        y = torch.empty_like(x)
        mean, inverse = x.new_empty(width, channels), x.new_empty(width, channels)
        if x.device.type == "cpu":  # one call for all trials is up to 7 times slower there (B = 128)
            for one, w, b, *out in zip(x, weight, bias, y, mean, inverse, strict=True):
                torch.native_batch_norm(one, w, b, None, None, True, 0.0, self._eps, out=tuple(out))
        else:
            flat, m, s = torch.native_batch_norm(
                _as_channels(x), _flat(weight), _flat(bias), None, None, True, 0.0, self._eps
            )
            y.copy_(flat.view(batch, width, channels).transpose(0, 1))
            mean, inverse = m.view(width, channels), s.view(width, channels)
        self.saved = [x, mean, inverse]
        return y

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        x, mean, inverse = self.saved
        width, batch, channels = x.shape
        weight, _ = self._affine(width)
        derivative = torch.ops.aten.native_batch_norm_backward
        wanted = [True, bool(self.parameters), bool(self.parameters)]
        if _native_norm(x):
            given = weight if self.parameters else None
            passed, *affine = torch.ops.cape.stacked_batch_norm_backward(grad, x, given, mean, inverse)
            for parameter, value in zip(self.parameters, affine, strict=False):
                parameter.grad[:width].copy_(value)
            return passed
        if x.device.type == "cpu":
            result = torch.empty_like(x)
            for i, (g, one, w, m, s) in enumerate(zip(grad, x, weight, mean, inverse, strict=True)):
                result[i], *affine = derivative(g, one, w, None, None, m, s, True, self._eps, wanted)
                for parameter, value in zip(self.parameters, affine, strict=False):
                    parameter.grad[i] = value
            return result
        flat, *affine = derivative(
            _as_channels(grad), _as_channels(x), _flat(weight), None, None, mean.reshape(-1), inverse.reshape(-1),
            True, self._eps, wanted,
        )  # fmt: skip
        for parameter, value in zip(self.parameters, affine, strict=False):
            parameter.grad[:width] = value.view(width, channels)
        return flat.view(batch, width, channels).transpose(0, 1).contiguous()

    def _affine(self, width: int) -> tuple[Any, Any]:
        if not self.parameters:
            return [None] * width, [None] * width
        return self.parameters[0].value[:width], self.parameters[1].value[:width]


def _native_norm(x: Tensor) -> bool:
    """Return whether the native batch norm serves activations [k, B, C]: where it rounds as torch's does.

    torch takes other kernels for a batch no larger than its threads, and for what is left over of a vector register.
    """
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous()
    threads = torch.get_num_threads()
    return fits and x.shape[2] % _VECTOR == 0 and x.shape[1] > threads and _norms_agree(threads)


@lru_cache(maxsize=8)
def _norms_agree(threads: int) -> bool:
    """Return whether the native batch norm is torch's, bit for bit, for so many threads; False where it is not built.

    The order of a sum follows from the number of torch's threads, and a fused multiplication from how torch was built.
    """
    if native_module() is None:
        return False
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 2 * threads + 3, 2 * _VECTOR, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(2, 2 * _VECTOR, generator=generator) for _ in range(2))
    y, mean, inverse = torch.ops.cape.stacked_batch_norm(x, weight, bias, 1e-5)
    ours = [y, mean, inverse, *torch.ops.cape.stacked_batch_norm_backward(grad, x, weight, mean, inverse)]
    for i in range(2):
        forward = torch.native_batch_norm(x[i], weight[i], bias[i], None, None, True, 0.0, 1e-5)
        backward = torch.ops.aten.native_batch_norm_backward(
            grad[i], x[i], weight[i], None, None, *forward[1:], True, 1e-5, [True, True, True]
        )
        if not all(torch.equal(a[i], b) for a, b in zip(ours, [*forward, *backward], strict=True)):
            return False
    return True


def _as_channels(x: Tensor) -> Tensor:
    """[k, B, C] -> [B, k * C]: the trials as channels of one batch."""
    return x.transpose(0, 1).flatten(1)


def _flat(values: Any) -> Tensor | None:
    return values.reshape(-1) if isinstance(values, Tensor) else None


class Activation(Layer):
    """An elementwise function of which aten has the derivative."""

    def __init__(self, what: Elementwise) -> None:
        super().__init__()
        self._what = what

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        y = self._what.of(x)
        self.saved = [y if self._what.of_output else x]
        return y

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        return self._what.back(grad, self.saved[0])


class Dropout(Layer):
    """Zeros with probability p, the rest scaled by 1/(1 - p), as ``nn.Dropout`` on a CPU makes it."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self._p = p

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        mask = scaled_mask(draws, torch.empty_like(x), self._p)
        self.saved = [mask]
        return x * mask

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        return grad * self.saved[0]


def scaled_mask(draws: Draws, out: Tensor, p: float) -> Tensor:
    """Fill ``out`` [k, ...] with zeros with probability p, else 1/(1 - p). Nothing is drawn where nothing is kept."""
    return out.zero_() if p >= 1.0 else draws.keep(out, 1.0 - p).div_(1.0 - p)


class Flatten(Layer):
    """Samples as vectors."""

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        self._shape = x.shape[1:]
        return x.flatten(2)

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        return grad.view(len(grad), *self._shape)
