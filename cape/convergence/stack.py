"""A stack: many trials of one architecture in training at once, each in a slot of its own.

Two kinds share one interface: ``LayerStack`` (layers with written-out backward passes, for the models that it knows)
and ``vmapped.VmapStack`` (any other model that ``torch.func`` can batch).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, nn

from cape.config import StoppingRule
from cape.convergence.draws import draws_for
from cape.convergence.layers import Layer, StackedParameter
from cape.convergence.single import BETAS, WEIGHT_DECAY
from cape.probing.chain import rounds_apart
from cape.tasks import IGNORE_INDEX, Loss


@dataclass(frozen=True)
class Subject:
    """What one trial trains; the arguments of ``measure`` that may differ within a stack.

    Attributes:
        model: initialized; never changed.
        batch: (inputs [B, ...], targets [B, ...]) on the model's device.
        lr: learning rate.
        epsilons: fractions of L_0 whose crossings are recorded.
        stopping: cap and plateau exit.
        seed: of dropout and whatever else the model draws.
    """

    model: nn.Module
    batch: tuple[Tensor, Tensor]
    lr: float = 1e-3
    epsilons: tuple[float, ...] = (0.2, 0.15, 0.1)
    stopping: StoppingRule = field(default_factory=StoppingRule)
    seed: int = 0


# Rows of stacked values, gradients, first and second moments, and numbers of updates: what the fused kernel takes.
_Rows: TypeAlias = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class StackedAdamW:
    """AdamW of the trials in a stack's slots, each with its own learning rate and number of updates.

    It calls torch's fused kernel on the rows of the stacked tensors: the update of a trial is, bit for bit, the one
    that ``torch.optim.AdamW(fused=True)`` makes.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._lrs = [0.0] * capacity
        # The same on the device, where a replayed graph finds them. CUDA's kernel wants float32, into which it rounds
        # any learning rate of a float32 parameter.
        dtype = torch.float32 if device.type == "cuda" else torch.float64
        self._rates = torch.zeros(capacity, dtype=dtype, device=device)
        self._steps = torch.zeros(capacity, dtype=torch.float32, device=device)
        self._lists: dict[int, list[tuple[int, _Rows]]] = {}
        self._each: dict[int, list[_Rows]] = {}  # by slot: the same rows whoever is in it
        self._width = 0

    def load(self, slot: int, lr: float) -> None:
        """Begin a trial in a slot."""
        self._lrs[slot] = lr
        self._rates[slot] = lr
        self._steps[slot] = 0.0
        self._lists.clear()

    def move(self, source: int, target: int) -> None:
        """Let the trial of one slot go on in another."""
        self._lrs[target] = self._lrs[source]
        self._rates[target] = self._rates[source]
        self._steps[target] = self._steps[source]
        self._lists.clear()

    def count(self, width: int) -> None:
        """Begin an update of the trials in slots 0..width-1."""
        if width != self._width:
            self._width = width
            self._lists.clear()
        self._steps[:width] += 1.0

    def step(self, parameters: Sequence[StackedParameter]) -> None:
        """Update some of the parameters; every parameter once between two calls of ``count``."""
        key = id(parameters[0])
        if key not in self._lists:
            self._lists[key] = self._rows(parameters)
        for slot, lists in self._lists[key]:
            # A number where no graph is made: on a CPU the kernel would have to read the tensor first.
            _fused(lists, self._rates[slot] if self._rates.is_cuda else self._lrs[slot])

    def step_each(self, parameters: Sequence[StackedParameter]) -> None:
        """Do what ``step`` does, bit for bit, by one call for each trial: which one has which learning rate is data.

        A graph of these calls is right for any trials that come into the slots later; it has a launch for each trial
        where ``step`` has one for some dozen tensors.
        """
        rows = self._each.setdefault(id(parameters[0]), [])
        for slot in range(len(rows), self._width):
            rows.append(_no_rows())
            self._add_rows(rows[slot], parameters, slot)
        for slot in range(self._width):
            _fused(rows[slot], self._rates[slot])

    def _rows(self, parameters: Sequence[StackedParameter]) -> list[tuple[int, _Rows]]:
        """Return the rows of all trials by learning rate, with a slot that has it."""
        by_lr: dict[float, tuple[int, _Rows]] = {}
        for slot in range(self._width):
            _, lists = by_lr.setdefault(self._lrs[slot], (slot, _no_rows()))
            self._add_rows(lists, parameters, slot)
        return list(by_lr.values())

    def _add_rows(self, lists: _Rows, parameters: Sequence[StackedParameter], slot: int) -> None:
        for p in parameters:
            for held, tensor in zip(lists, (p.value, p.grad, p.exp_avg, p.exp_avg_sq, self._steps), strict=True):
                held.append(tensor[slot])


def _no_rows() -> _Rows:
    return [], [], [], [], []


def _fused(rows: _Rows, lr: float | Tensor) -> None:
    values, grads, exp_avgs, exp_avg_sqs, steps = rows
    torch._fused_adamw_(
        values, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lr, beta1=BETAS[0], beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


class Stack(ABC):
    """Trials of one architecture in slots 0..width-1 of ``capacity``; one ``forward`` and one ``update`` at a time.

    Attributes:
        model: the module whose own forward the stack runs; None where it runs none.
    """

    model: nn.Module | None = None

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.width = 0

    @abstractmethod
    def load(self, subject: Subject) -> int:
        """Begin a trial in the next free slot, before ``forward``; return the slot."""

    @abstractmethod
    def forward(self) -> Tensor:
        """Return the outputs [width, B, ...], without a graph."""

    @abstractmethod
    def losses(self) -> Tensor:
        """Return the loss of each trial, [width], after ``forward``."""

    @abstractmethod
    def drop(self, slot: int) -> None:
        """Remove a trial, between ``losses`` and ``update`` or before ``forward``; the last one takes its slot."""

    @abstractmethod
    def update(self, for_capture: bool = False) -> None:
        """Go back through the last ``forward`` and make one update of each trial.

        Args:
            for_capture: let nothing that differs between trials, learning rates included, be fixed by the calls. The
                bits are the same.
        """

    def step(self, for_capture: bool = False) -> Tensor:
        """Make one whole step of all trials: return their losses [width] before the update.

        What it reads of a trial is data in the stack's own memory, so that a captured step serves all trials that will
        ever be in the slots, as long as there are ``width`` of them.
        """
        self.forward()
        losses = self.losses()
        self.update(for_capture)
        return losses


def stacked_losses(criterion: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each trial, [k], of outputs [k, B, ...] and targets [k, B, ...], for a named loss."""
    if criterion.name in ("binary_cross_entropy", "bce") and rounds_apart(outputs):
        each = [stacked_losses(criterion, o[None], t[None]) for o, t in zip(outputs, targets, strict=True)]
        return torch.cat(each)
    per_sample = criterion.per_sample(outputs.flatten(0, 1), targets.flatten(0, 1))
    return per_sample.view(len(outputs), -1).mean(1)


class LayerStack(Stack):
    """Trials of a model that is a chain of layers with written-out backward passes.

    Args:
        layers: of ``capacity`` trials, see ``convert.layers_of``.
        subject: one of the trials: the others have its shapes.
        criterion: a named loss.
        capacity: trials at most.
    """

    def __init__(self, layers: Sequence[Layer], subject: Subject, criterion: Loss, capacity: int) -> None:
        super().__init__(capacity)
        x, y = subject.batch
        self._layers, self._criterion = layers, criterion
        self._x, self._y = x.new_zeros(capacity, *x.shape), y.new_zeros(capacity, *y.shape)
        self._draws = draws_for(x.device, capacity)
        self._optimizer = StackedAdamW(capacity, x.device)
        self._outputs: Tensor = torch.empty(0)
        self._grad: Tensor = torch.empty(0)

    def load(self, subject: Subject) -> int:
        slot = self.width
        self._x[slot].copy_(subject.batch[0])
        self._y[slot].copy_(subject.batch[1])
        values = iter([p.detach() for p in subject.model.parameters()])
        for layer in self._layers:
            for parameter in layer.parameters:
                parameter.load(slot, next(values))
        self._draws.seed(slot, subject.seed)
        self._optimizer.load(slot, subject.lr)
        self.width += 1
        return slot

    def forward(self) -> Tensor:
        x = self._x[: self.width]
        for layer in self._layers:
            x = layer.forward(x, self._draws)
        self._outputs = x
        return x

    def losses(self) -> Tensor:
        losses, self._grad = loss_gradients(self._criterion, self._outputs, self._y[: self.width])
        return losses

    def drop(self, slot: int) -> None:
        last = self.width - 1
        if slot != last:
            for tensor in (self._x, self._y, self._outputs, self._grad):
                if len(tensor) > last:
                    tensor[slot].copy_(tensor[last])
            for layer in self._layers:
                layer.move(last, slot)
            self._draws.move(last, slot)
            self._optimizer.move(last, slot)
        for layer in self._layers:
            layer.narrow(last)
        self._outputs, self._grad = self._outputs[:last], self._grad[:last]
        self.width = last

    def update(self, for_capture: bool = False) -> None:
        self._optimizer.count(self.width)
        for layer in backwards(self._layers, self._grad):
            if not for_capture:
                self._optimizer.step(layer.parameters)
        if for_capture:
            self._optimizer.step_each([p for layer in self._layers for p in layer.parameters])


def backwards(layers: Sequence[Layer], grad: Tensor) -> Iterator[Layer]:
    """Go back through a chain's last ``forward`` from the gradient of its outputs [k, B, ...].

    Yields:
        Each layer that has parameters, as soon as their gradients are there: while they are in the cache.
    """
    first = next(i for i, layer in enumerate(layers) if layer.parameters)
    passed: Tensor | None = grad
    for i in range(len(layers) - 1, first - 1, -1):
        layer = layers[i]
        assert passed is not None
        passed = layer.backward(passed, needs_input=i > first)
        if layer.parameters:
            yield layer
        layer.saved = []


def loss_gradients(criterion: Loss, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss of each trial, [k], and the gradient of its own loss in the outputs [k, B, ...]."""
    if criterion.name == "cross_entropy" and outputs.dim() == 3 and targets.dim() == 2:
        return _cross_entropy_gradients(outputs, targets)
    outputs = outputs.detach().requires_grad_()
    with torch.enable_grad():
        losses = stacked_losses(criterion, outputs, targets)
        (grad,) = torch.autograd.grad(losses.sum(), outputs)
    return losses.detach(), grad


def _cross_entropy_gradients(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``loss_gradients`` does, by the kernels that autograd would call: it takes longer to call them."""
    width, batch, classes = outputs.shape
    targets = targets.long()
    logs = outputs.view(-1, classes).log_softmax(1)
    valid = (targets != IGNORE_INDEX).flatten()[:, None]
    index = targets.flatten()[:, None].where(valid, 0)
    losses = -(logs.gather(1, index) * valid)
    share = valid.to(logs.dtype).div_(-batch)
    of_logs = torch.zeros_like(logs).scatter_(1, index, share)
    grad = torch.ops.aten._log_softmax_backward_data(of_logs, logs, 1, logs.dtype)
    return losses.view(width, batch).mean(1), grad.view_as(outputs)
