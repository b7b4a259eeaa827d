"""Per-sample gradient norms of chains of dense layers, of one model or of several of one architecture at once.

In a chain nothing has to be found out: samples cannot meet, and a sample's squared gradient norms follow from each
layer's input x and the gradient δ of its output: (‖x‖² + 1)·‖δ‖² for a dense layer, ‖δ ⊙ x̂‖² + ‖δ‖² for a batch norm.
So there is no scan, no interception and no graph: one forward pass, and one backward pass with the rows of all
cotangents in each product. What is not recognized for certain is left to ``per_sample``, which follows any model.

Activations are [k, B, C] for k models, gradients [k, K, B, C] for K cotangents.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cape.probing import ops
from cape.probing.wanted import Norms, Wanted
from cape.state import has_hooks, overrides

_aten = torch.ops.aten


@dataclass(frozen=True)
class Elementwise:
    """A function of single numbers, y = ``function(x)``, with ``derivative(g, y if of_output else x)`` = g·dy/dx.

    ``exact``: whether nothing is rounded.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]
    of_output: bool
    exact: bool = False

    def of(self, x: Tensor) -> Tensor:
        """Return y for many models [k, ...], to the bit what each of them has alone."""
        return self._each(self.function, x)

    def back(self, grad: Tensor, saved: Tensor) -> Tensor:
        """Return g·dy/dx, likewise."""
        return self._each(self.derivative, grad, saved)

    def _each(self, function: Callable[..., Tensor], *of: Tensor) -> Tensor:
        if self.exact or not rounds_apart(of[0]):
            return function(*of)
        return torch.stack([function(*one) for one in zip(*of, strict=True)])


def rounds_apart(x: Tensor) -> bool:
    """Whether exponentials of many models' numbers [k, ...] may have another last digit than those of each alone.

    On a CPU torch goes over ``_AT_ONCE`` numbers at a time, and rounds otherwise what is left over at the end of the
    part that a thread has.
    """

    def whole(count: int) -> bool:
        threads = min(torch.get_num_threads(), -(-count // _OF_A_THREAD)) or 1
        return count % (_AT_ONCE * threads) == 0

    return x.device.type == "cpu" and len(x) > 1 and not (whole(x[0].numel()) and whole(x.numel()))


def _gelu(module: nn.Module) -> Elementwise:
    how = str(module.approximate)
    return Elementwise(
        lambda x: F.gelu(x, approximate=how), lambda g, x: _aten.gelu_backward(g, x, approximate=how), of_output=False
    )


ELEMENTWISE: dict[type[nn.Module], Callable[[nn.Module], Elementwise]] = {
    nn.GELU: _gelu,
    nn.ReLU: lambda _: Elementwise(torch.relu, lambda g, y: _aten.threshold_backward(g, y, 0), True, True),
    nn.Tanh: lambda _: Elementwise(torch.tanh, _aten.tanh_backward, of_output=True),
    nn.Sigmoid: lambda _: Elementwise(torch.sigmoid, _aten.sigmoid_backward, of_output=True),
    nn.SiLU: lambda _: Elementwise(F.silu, _aten.silu_backward, of_output=False),
}
_AT_ONCE, _OF_A_THREAD = 32, 32_768
_FEW_MULTIPLICATIONS = 400  # torch's bmm has another kernel for fewer
# The rows that are left over go through another kernel in one product than in many (MKL on an AMD with AVX2).
_WHOLE_ROWS = 4
_ALIGNMENT = 64  # bytes, of the memory that torch gives a tensor
_IDLE = (nn.Dropout, nn.Identity)  # in eval mode
_KNOWN: tuple[type[nn.Module], ...] = (*ELEMENTWISE, *_IDLE, nn.Sequential, nn.Flatten, nn.Linear, nn.BatchNorm1d)
_FORWARDS = {kind: kind.forward for kind in _KNOWN}  # as they are when this module is imported


def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b for k models, [k, n, p], each as it is for that model alone, to the last digit on a CPU.

    Args:
        x: [k, n, d]. weight: [k, p, d]. bias: [k, p].
    """
    if apart(x, weight) or (x.device.type == "cpu" and weight.shape[1] == 1):
        biases = [None] * len(x) if bias is None else list(bias)
        return torch.stack([F.linear(aligned(a), aligned(w), b) for a, w, b in zip(x, weight, biases, strict=True)])
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias[:, None], x, weight.mT)


def dense_back(grad: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient [k, n, d] of ``dense``'s x for that of its result, [k, n, p], as exact as there."""
    if apart(grad, weight.mT):
        return torch.stack([aligned(g) @ aligned(w) for g, w in zip(grad, weight, strict=True)])
    return torch.bmm(grad, weight)


def apart(x: Tensor, weight: Tensor) -> bool:
    """Return whether x Wᵀ of k models, [k, n, d] and [k, p, d], takes one product each to have their very digits."""
    few = x[0].numel() * weight.shape[1] < _FEW_MULTIPLICATIONS
    return x.device.type == "cpu" and (few or x.shape[1] % _WHOLE_ROWS != 0 or not evenly_spaced(x, weight))


def evenly_spaced(*stacks: Tensor) -> bool:
    """Return whether every matrix of some stacks begins where one of its own would: MKL's sums depend on it."""
    return all(len(t) == 1 or t.stride(0) * t.element_size() % _ALIGNMENT == 0 for t in stacks)


def aligned(t: Tensor) -> Tensor:
    """Return a matrix of a stack where memory of its own begins."""
    return t if t.data_ptr() % _ALIGNMENT == 0 else t.clone()


def chain_of(model: nn.Module, x: object) -> list[nn.Module] | None:
    """Return the layers of a chain that starts with inputs x [B, ...], or ``None`` for anything else.

    Anything else are also hooks, layers with a ``forward`` of their own, parameters that two layers share or that are
    of another type than the inputs, dense layers over positions, and autocasting.
    """
    if type(x) is not Tensor or x.layout is not torch.strided or x.dim() < 2:
        return None
    if x.dtype not in (torch.float32, torch.float64):
        return None
    layers = list(_leaves(model))
    shape = x.shape[1:]
    for layer in layers:
        behind = _outputs(layer, shape, x)
        if behind is None:
            return None
        shape = behind
    parameters = [p for layer in layers for p in layer._parameters.values() if p is not None]
    ordinary = all(type(p) is nn.Parameter for p in parameters) and len(parameters) == len(list(model.parameters()))
    unseen = not torch.is_autocast_enabled(x.device.type) and not has_hooks(model)
    return layers if parameters and ordinary and unseen else None


def _outputs(layer: nn.Module, shape: torch.Size, x: Tensor) -> torch.Size | None:
    """Return the shape of a sample behind a layer; ``None`` where the layer is unusual or does not fit."""
    kind = type(layer)
    if not ordinary(layer):
        return None
    if kind in _IDLE or kind in ELEMENTWISE:
        return shape
    if kind is nn.Flatten:
        return torch.Size([shape.numel()]) if (layer.start_dim, layer.end_dim) == (1, -1) else None
    held = [t for t in (*layer._parameters.values(), *layer._buffers.values()) if t is not None]
    like_x = all(t.device == x.device and (t.dtype == x.dtype or not t.is_floating_point()) for t in held)
    if kind not in (nn.Linear, nn.BatchNorm1d) or layer._parameters.keys() != {"weight", "bias"} or not like_x:
        return None
    if isinstance(layer, nn.BatchNorm1d):
        return shape if layer.running_mean is not None and shape == layer.running_mean.shape else None
    weight = layer._parameters["weight"]
    return weight.shape[:1] if weight is not None and shape == weight.shape[1:] else None


def ordinary(layer: nn.Module) -> bool:
    """Whether a layer has its kind's own methods, and of a kind known here, the forward that is known."""
    known = _FORWARDS.get(type(layer))
    return not overrides(layer) and (known is None or type(layer).forward is known)


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    if type(model) is nn.Sequential and ordinary(model):
        for child in model:
            yield from _leaves(child)
    else:
        yield model


def chain_norms(
    chains: Sequence[Sequence[nn.Module]], x: Tensor, y: Tensor, wanted: Wanted, parameters: Sequence[Tensor] = ()
) -> list[Norms]:
    """Return the per-sample norms of k models that are chains, in eval mode; they are not run, and nothing changes.

    Args:
        chains: what ``chain_of`` says of each model, all of one architecture.
        x, y: their inputs and targets, [k, B, ...].
        wanted: which gradients.
        parameters: the models' parameters, each [k, ...], where they are at hand.

    Raises:
        ModelError: outputs and targets cannot belong together, or are not finite.
    """
    given = iter(parameters or [_stacked(alike) for alike in zip(*map(_parameters, chains), strict=True)])
    steps: list[_Step] = []
    with torch.no_grad():
        for modules in zip(*chains, strict=True):
            step = _step(modules, given)
            if step is not None:
                x = step.forward(x)
                steps.append(step)
        k, batch = x.shape[:2]
        losses, portions = wanted.cotangents(x.flatten(0, 1), y.flatten(0, 1))
        totals = []
        first = next(i for i, step in enumerate(steps) if step.trained)
        for v in portions:
            grad = v.view(len(v), k, *x.shape[1:]).transpose(0, 1).clone()  # the steps work in place
            total = torch.zeros(grad.shape[:3], dtype=torch.float64, device=x.device)
            for i in range(len(steps) - 1, first - 1, -1):
                grad = steps[i].backward(grad, total, needs_input=i > first)
            totals.append(total)
    each = zip(losses.view(k, batch), torch.cat(totals, 1), strict=True)
    return [wanted.norms(own, total) for own, total in each]


def _parameters(chain: Sequence[nn.Module]) -> list[Tensor]:
    return [p.detach() for layer in chain for p in layer._parameters.values() if p is not None]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0][None]


def _step(modules: Sequence[nn.Module], given: Iterator[Tensor]) -> _Step | None:
    """Return one layer of all models; ``None`` for one that does nothing in eval mode."""
    kind = type(modules[0])
    if kind in _IDLE:
        return None
    if kind is nn.Flatten:
        return _Flatten()
    if kind in ELEMENTWISE:
        return _Pointwise(ELEMENTWISE[kind](modules[0]))
    held = {name: next(given) for name, p in modules[0]._parameters.items() if p is not None}
    step: _Step = (_Dense if kind is nn.Linear else _BatchNorm)(modules, held)
    return step


class _Step(ABC):
    """One layer of k models."""

    trained = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs [k, B, ...], and keep what ``backward`` needs."""

    @abstractmethod
    def backward(self, grad: Tensor, total: Tensor, needs_input: bool) -> Tensor:
        """Add the norms of the layer's parameters to ``total`` [k, K, B], and return the gradient of its input.

        ``grad`` may be overwritten; where the input needs none, it may be what is returned.
        """


class _Weighted(_Step):
    """A layer with parameters, each [k, ...]."""

    def __init__(self, modules: Sequence[nn.Module], held: dict[str, Tensor]) -> None:
        wanted = {name for name, p in modules[0]._parameters.items() if p is not None and p.requires_grad}
        self.weight, self.bias = held.get("weight"), held.get("bias")
        self.of_weight, self.of_bias = "weight" in wanted, "bias" in wanted
        self.trained = bool(wanted)


class _Dense(_Weighted):
    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        assert self.weight is not None
        return dense(x, self.weight, self.bias)

    def backward(self, grad: Tensor, total: Tensor, needs_input: bool) -> Tensor:
        if self.of_weight:
            total += (ops.sq_norms(self.x, 2) + float(self.of_bias))[:, None] * ops.sq_norms(grad, 3)
        elif self.of_bias:
            total += ops.sq_norms(grad, 3)
        if not needs_input:
            return grad
        assert self.weight is not None
        return dense_back(grad.flatten(1, 2), self.weight).view(*grad.shape[:3], -1)


class _BatchNorm(_Weighted):
    def __init__(self, modules: Sequence[nn.Module], held: dict[str, Tensor]) -> None:
        super().__init__(modules, held)
        norms = [m for m in modules if isinstance(m, nn.BatchNorm1d)]
        self.mean = _stacked([m.running_mean for m in norms if m.running_mean is not None])
        self.inverse = _stacked([(m.running_var + m.eps).rsqrt() for m in norms if m.running_var is not None])

    def forward(self, x: Tensor) -> Tensor:
        self.x = x
        scale = self.inverse if self.weight is None else self.inverse * self.weight
        shift = -self.mean * scale if self.bias is None else torch.addcmul(self.bias, self.mean, scale, value=-1)
        return torch.addcmul(shift[:, None], x, scale[:, None])

    def backward(self, grad: Tensor, total: Tensor, needs_input: bool) -> Tensor:
        passed = []
        for i, (g, x) in enumerate(zip(grad, self.x, strict=True)):
            dx, norms = ops.affine_pull(
                g[:, :, None, :, None], x[:, None, :, None], self.mean[i, None, None], self.inverse[i, None, None],
                None if self.weight is None else self.weight[i], own=False, scale=self.of_weight, shift=self.of_bias,
            )  # fmt: skip
            total[i] += norms
            passed.append(dx.view(g.shape))
        return _stacked(passed)


class _Pointwise(_Step):
    def __init__(self, what: Elementwise) -> None:
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        y = self.what.of(x)
        self.saved = y if self.what.of_output else x
        return y

    def backward(self, grad: Tensor, total: Tensor, needs_input: bool) -> Tensor:
        slope = self.what.back(torch.ones_like(self.saved), self.saved)
        return grad.mul_(slope[:, None])


class _Flatten(_Step):
    def forward(self, x: Tensor) -> Tensor:
        self.shape = x.shape[2:]
        return x.flatten(2)

    def backward(self, grad: Tensor, total: Tensor, needs_input: bool) -> Tensor:
        return grad.view(*grad.shape[:3], *self.shape)
