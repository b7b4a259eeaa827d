"""φ of several models of one dense architecture at once: the numbers of ``probe``, to rounding.

Of a small model the probe costs Python and launches, not arithmetic; and of a chain of dense layers nothing has to be
found out, since the squared gradient norms of a sample follow from each layer's input and the gradient of its output:
(‖x‖² + 1)·‖δ‖² for a dense layer, ‖δ ⊙ x̂‖² + ‖δ‖² for a batch norm (docs/probe.md). Measured on two cores, B = 32,
milliseconds for one model alone and among eight: see docs/truth.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cape.convergence.convert import Unstackable, layers_of
from cape.convergence.draws import Draws
from cape.convergence.layers import Activation, BatchNorm, Dropout, Flatten, Layer, Linear, StackedParameter
from cape.convergence.stack import Subject, backwards, loss_gradients, stacked_losses
from cape.errors import ModelError
from cape.probing.features import LINE, Features, FirstStep, features_of, gradient_signals, step_of
from cape.probing.per_sample import Norms
from cape.tasks import Loss

_WIDEST = 8
_BYTES = 64 * 2**20  # of parameters: beyond, a model's share became no cheaper


def probed_together(model: nn.Module, batch: tuple[Tensor, Tensor], loss: str) -> int:
    """Return how many models like this one ``probe_many`` should be given at once; 0 where it takes none."""
    x, y = batch
    try:
        layers = layers_of(model, 0)
    except Unstackable:
        return 0
    fits = isinstance(x, Tensor) and y.device.type == "cpu" and len(y) > 1 and Loss(loss).is_named
    known = all(isinstance(layer, (Linear, BatchNorm, Activation, Dropout, Flatten)) for layer in layers)
    plain = all(p.dtype == torch.float32 for p in model.parameters())
    steady = all(m.running_mean is not None for m in _batch_norms(model))
    if not (fits and known and plain and steady):
        return 0
    return max(1, min(_WIDEST, _BYTES // sum(p.nbytes for p in model.parameters())))


def probe_many(subjects: Sequence[Subject], sizes: Sequence[int], loss: str) -> list[Features]:
    """Return what ``probe`` would say of each subject (``probed_together`` says of which kind).

    The features of the first step are the same bit for bit; those of the per-sample norms agree to float32 rounding.
    None depends on the models beside it. No model is changed, and no global RNG is used.

    Args:
        subjects: of one architecture and batch shape, on the CPU.
        sizes: number of samples in each one's *full* training set.
        loss: a named loss.

    Raises:
        ModelError, Unstackable, RuntimeError: something is wrong with one of them; ``probe`` says with which and what.
    """
    stack = _ProbeStack(subjects, Loss(loss))
    with torch.inference_mode(False), torch.no_grad():
        norms = stack.norms()
        lines = stack.first_steps()
    return [
        features_of(subject.model, one, line, subject.lr, size)
        for subject, one, line, size in zip(subjects, norms, lines, sizes, strict=True)
    ]


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm1d]:
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d)]


class _FixedMasks(Draws):
    """The dropout masks of seed 0: the same for every trial and, after ``again``, for every pass."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._masks: list[Tensor] = []
        self.again()

    def again(self) -> None:
        self._next = 0

    def seed(self, slot: int, seed: int) -> None:
        """Nothing to do: the first step is looked at with one mask, whatever the trial's own."""

    def move(self, source: int, target: int) -> None:
        """Nothing to do: all slots have the same masks."""

    def keep(self, out: Tensor, probability: float) -> Tensor:
        if self._next == len(self._masks):
            self._masks.append(torch.empty_like(out[0]).bernoulli_(probability, generator=self._generator))
        self._next += 1
        return out.copy_(self._masks[self._next - 1])


class _ProbeStack:
    """Several models, their batches and the layers that run them."""

    def __init__(self, subjects: Sequence[Subject], criterion: Loss) -> None:
        models = [s.model for s in subjects]
        self._criterion = criterion
        self._layers = layers_of(models[0], len(models))
        self._parameters: list[StackedParameter] = [p for layer in self._layers for p in layer.parameters]
        self._lrs = [s.lr for s in subjects]
        self._x = torch.stack([s.batch[0].detach() for s in subjects])
        self._y = torch.stack([s.batch[1] for s in subjects])
        for slot, model in enumerate(models):
            for stacked, p in zip(self._parameters, model.parameters(), strict=True):
                stacked.value[slot].copy_(p.detach())
        # (mean, 1 / deviation) of each batch norm, each [k, 1, C]
        self._statistics = [
            (
                torch.stack([m.running_mean for m in alike])[:, None],
                torch.stack([(m.running_var + m.eps).rsqrt() for m in alike])[:, None],
            )
            for alike in zip(*(_batch_norms(model) for model in models), strict=True)
        ]

    def norms(self) -> list[Norms]:
        """Return the per-sample norms of each model (batch norm in eval mode, dropout off)."""
        masks, inputs, x = _FixedMasks(), [], self._x
        statistics = iter(self._statistics)
        for layer in self._layers:
            inputs.append(x)
            if isinstance(layer, BatchNorm):
                mean, inverse = next(statistics)
                inputs[-1] = x = (x - mean) * inverse
                weight, bias = _affine(layer)
                x = x if weight is None else torch.addcmul(bias, x, weight)
            elif not isinstance(layer, Dropout):
                if isinstance(layer, Linear) and x.dim() != 3:
                    raise Unstackable("a dense layer runs over positions")
                x = layer.forward(x, masks)
        outputs, targets = x.flatten(0, 1), self._y.flatten(0, 1)
        self._criterion.check(outputs, targets)
        outputs.requires_grad_()
        with torch.enable_grad():
            losses = self._criterion.per_sample(outputs, targets)
            logits = self._criterion.target_logit(outputs, targets)
            cotangents = [torch.autograd.grad(values.sum(), outputs)[0].view_as(x) for values in (losses, logits)]
        g2, tau = (self._squares(inputs, cotangent) for cotangent in cotangents)
        for layer in self._layers:
            layer.saved = []
        each = zip(g2, tau, losses.detach().view(len(x), -1), strict=True)
        return [Norms(a, b, None, values, ()) for a, b, values in each]

    def _squares(self, inputs: list[Tensor], grad: Tensor) -> Tensor:
        """Return ‖∇θ‖² of each sample, [k, B] float64, for the gradient of the outputs [k, B, C]."""
        total = torch.zeros(grad.shape[:2], dtype=torch.float64)
        statistics = iter(reversed(self._statistics))
        first = next(i for i, layer in enumerate(self._layers) if layer.parameters)
        for i in range(len(self._layers) - 1, first - 1, -1):
            layer, x = self._layers[i], inputs[i]
            passed: Tensor | None = grad
            if isinstance(layer, Linear):
                sizes = _sum_of_squares(x) + (1.0 if len(layer.parameters) > 1 else 0.0)
                total += sizes * _sum_of_squares(grad)
                passed = torch.bmm(grad, layer.parameters[0].value) if i > first else None
            elif isinstance(layer, BatchNorm):
                _, inverse = next(statistics)
                weight, _ = _affine(layer)
                if weight is not None:
                    total += _sum_of_squares(grad * x) + _sum_of_squares(grad)
                passed = grad * (inverse if weight is None else inverse * weight)
            elif not isinstance(layer, Dropout):
                passed = layer.backward(grad, needs_input=True)
            if passed is not None:
                grad = passed
        return total

    def first_steps(self) -> list[FirstStep]:
        """Return what AdamW's first update is about to do to each model; its parameters here are then spoilt."""
        masks, slots = _FixedMasks(), range(len(self._lrs))
        outputs = self._forward(masks)
        losses, grad = loss_gradients(self._criterion, outputs, self._y)
        if not all(math.isfinite(l0) and l0 > 0.0 for l0 in losses.tolist()):
            raise ModelError("A loss at initialization is not positive and finite.")
        for _ in backwards(self._layers, grad):
            pass
        gradients = [
            gradient_signals(
                [p.value[slot] for p in self._parameters], [p.grad[slot] for p in self._parameters], self._lrs[slot]
            )
            for slot in slots
        ]
        for p in self._parameters:
            p.grad.sign_()
        moved, after, done = [], [], 0
        for k in LINE:
            scale = torch.tensor([-lr * (k - done) for lr in self._lrs])
            for p in self._parameters:
                p.value.addcmul_(p.grad, scale.view(-1, *[1] * (p.grad.dim() - 1)))
            done = k
            moved.append(self._forward(masks))
            after.append(stacked_losses(self._criterion, moved[-1], self._y).tolist())
        return [
            step_of(
                self._criterion, outputs[slot], self._y[slot], losses[slot].item(), gradients[slot],
                [there[slot] for there in moved], [values[slot] for values in after],
            )
            for slot in slots
        ]  # fmt: skip

    def _forward(self, masks: _FixedMasks) -> Tensor:
        masks.again()
        x = self._x
        for layer in self._layers:
            x = layer.forward(x, masks)
        return x


def _affine(layer: Layer) -> tuple[Tensor | None, Tensor]:
    """Return (weight, bias) of a batch norm, each [k, 1, C]; the weight is None where it has none."""
    if not layer.parameters:
        return None, torch.empty(0)
    weight, bias = layer.parameters
    return weight.value[:, None], bias.value[:, None]


def _sum_of_squares(x: Tensor) -> Tensor:
    """Return Σ x² over the last dimension, [k, B] float64."""
    return x.square().sum(-1, dtype=torch.float64)
