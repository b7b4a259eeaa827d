"""φ of several models of one dense architecture at once: the numbers of ``probe``, to rounding.

Of a small model the probe costs Python and launches, not arithmetic. The norms are those of ``probing.chain``; the
first step is made here, by the stack's own passes. Measured on two cores, B = 32, milliseconds for one model alone and
among eight: see docs/truth.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cape.convergence.convert import Unstackable, layers_of
from cape.convergence.draws import Draws
from cape.convergence.layers import Layer, Linear, StackedParameter
from cape.convergence.stack import Subject, backwards, loss_gradients, stacked_losses
from cape.errors import ModelError
from cape.probing.chain import chain_norms, chain_of
from cape.probing.ends import end_signals
from cape.probing.features import LINE, Features, FirstStep, features_of, gradient_signals, step_of
from cape.probing.signals import draw_noise
from cape.probing.wanted import Norms, Wanted
from cape.surroundings import undisturbed
from cape.tasks import Loss

_WIDEST = 8
_BYTES = 64 * 2**20  # of parameters: beyond, a model's share became no cheaper


def probed_together(model: nn.Module, batch: tuple[Tensor, Tensor], loss: str) -> int:
    """Return how many models like this one ``probe_many`` should be given at once; 0 where it takes none."""
    x, y = batch
    try:
        layers_of(model, 0)
    except Unstackable:
        return 0
    fits = y.device.type == "cpu" and len(y) > 1 and Loss(loss).is_named
    if not fits or x.dtype != torch.float32 or _chain_of(model, x) is None:
        return 0
    return max(1, min(_WIDEST, _BYTES // sum(p.nbytes for p in model.parameters())))


@undisturbed()
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
        features_of(subject.model, subject.batch, one, line, subject.lr, size)
        for subject, one, line, size in zip(subjects, norms, lines, sizes, strict=True)
    ]


def _chain_of(model: nn.Module, x: Tensor) -> list[nn.Module] | None:
    """Return the layers of a chain that has a hidden one, or ``None``."""
    chain = chain_of(model, x)
    return None if chain is None or sum(isinstance(layer, nn.Linear) for layer in chain) < 2 else chain


class _FixedMasks(Draws):
    """The dropout masks of one seed: the same for every trial and, after ``again``, for every pass."""

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._masks: list[Tensor] = []
        self.again()

    def again(self) -> None:
        self._next = 0

    @property
    def drawn(self) -> bool:
        """Whether a pass asked for a mask."""
        return bool(self._masks)

    def seed(self, slot: int, seed: int) -> None:
        """Nothing to do: the first step is looked at with one mask, whatever the trial's own."""

    def move(self, source: int, target: int) -> None:
        """Nothing to do: all slots have the same masks."""

    def keep(self, out: Tensor, probability: float) -> Tensor:
        if self._next == len(self._masks):
            self._masks.append(torch.empty_like(out[0]).bernoulli_(probability, generator=self._generator))
        self._next += 1
        return out.copy_(self._masks[self._next - 1])


class _Seen(Layer):
    """Nothing, in front of the last dense layer: it keeps what passes there."""

    def forward(self, x: Tensor, draws: Draws) -> Tensor:
        self.values = x
        return x

    def backward(self, grad: Tensor, needs_input: bool) -> Tensor | None:
        self.gradient = grad
        return grad


class _ProbeStack:
    """Several models, their batches and the layers that run them."""

    def __init__(self, subjects: Sequence[Subject], criterion: Loss) -> None:
        models = [s.model for s in subjects]
        chains = [_chain_of(s.model, s.batch[0]) for s in subjects]
        self._chains = [chain for chain in chains if chain is not None]
        if len(self._chains) < len(models):
            raise Unstackable("it is no chain of dense layers over vectors, two at least")
        self._criterion = criterion
        self._layers = layers_of(models[0], len(models))
        self._hidden = _Seen()
        self._layers.insert(max(i for i, layer in enumerate(self._layers) if isinstance(layer, Linear)), self._hidden)
        self._parameters: list[StackedParameter] = [p for layer in self._layers for p in layer.parameters]
        self._lrs = [s.lr for s in subjects]
        self._x = torch.stack([s.batch[0].detach() for s in subjects])
        self._y = torch.stack([s.batch[1] for s in subjects])
        for slot, model in enumerate(models):
            for stacked, p in zip(self._parameters, model.parameters(), strict=True):
                stacked.value[slot].copy_(p.detach())

    def norms(self) -> list[Norms]:
        """Return the per-sample norms of each model (batch norm in eval mode, dropout off)."""
        values = [p.value for p in self._parameters]
        return chain_norms(self._chains, self._x, self._y, Wanted(self._criterion), values)

    def first_steps(self) -> list[FirstStep]:
        """Return what AdamW's first update is about to do to each model; its parameters here are then spoilt."""
        masks, slots = _FixedMasks(), range(len(self._lrs))
        outputs = self._forward(masks)
        losses, grad = loss_gradients(self._criterion, outputs, self._y)
        if not all(math.isfinite(l0) and l0 > 0.0 for l0 in losses.tolist()):
            raise ModelError("A loss at initialization is not positive and finite.")
        for _ in backwards(self._layers, grad):
            pass
        hidden = self._hidden.values
        ends = [
            end_signals(hidden[slot], self._hidden.gradient[slot], self._y[slot], losses[slot].item()) for slot in slots
        ]
        gradients = [
            gradient_signals(
                [p.value[slot] for p in self._parameters], [p.grad[slot] for p in self._parameters], self._lrs[slot]
            )
            for slot in slots
        ]
        for p in self._parameters:
            p.grad.sign_()
        redrawn = self._forward(_FixedMasks(seed=1)) if masks.drawn else outputs
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
                self._criterion, outputs[slot], self._y[slot], losses[slot].item(), gradients[slot], ends[slot],
                [there[slot] for there in moved], [values[slot] for values in after],
                draw_noise(outputs[slot], redrawn[slot]),
            )
            for slot in slots
        ]  # fmt: skip

    def _forward(self, masks: _FixedMasks) -> Tensor:
        masks.again()
        x = self._x
        for layer in self._layers:
            x = layer.forward(x, masks)
        return x
