"""A stack of any model that ``torch.func`` can batch: the model's own forward, vectorized over stacked parameters.

Autograd runs below ``vmap``, on the batched operators, so that one backward pass serves all trials. Two things inside a
model depend on the trial: dropout, whose masks come from the trial's own draws, and batch norm, which uses the batch's
statistics and keeps none.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, replace_all_batch_norm_modules_, vmap

from cape.convergence.convert import Unstackable, refuse_special
from cape.convergence.draws import Draws, draws_for
from cape.convergence.graphed import Host, same_host
from cape.convergence.layers import StackedParameter, scaled_mask
from cape.convergence.stack import Stack, StackedAdamW, Subject, stacked_losses
from cape.state import unmoved_draws
from cape.tasks import Loss

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class _MaskedDropout(nn.Module):
    """Dropout whose mask, scale included, is a buffer: ``functional_call`` hands each trial its own."""

    mask: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.shape: tuple[int, ...] = ()
        self.order: list[int] = []
        self.register_buffer("mask", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.mask.dim() == 0:  # the dry run, which learns the shapes
            if self.order:
                raise Unstackable("a dropout layer is used twice")
            # The plain layer fills a mask in the order in which its input lies in memory.
            self.order = sorted(range(x.dim()), key=x.stride, reverse=True)
            self.shape = tuple(x.shape[d] for d in self.order)
            return x
        return x * self.mask

    def draw(self, draws: Draws, width: int, like: Tensor) -> Tensor:
        """Return the masks of ``width`` trials, [width, *shape of the input]."""
        mask = scaled_mask(draws, like.new_empty(width, *self.shape), self.p)
        back = [self.order.index(d) + 1 for d in range(len(self.order))]
        return mask.permute(0, *back)


class VmapStack(Stack):
    """Trials of any module without recurrent layers.

    Args:
        subject: one of the trials: the others have its shapes.
        criterion: a named loss.
        capacity: trials at most.
        precision: ``bf16`` runs the forward under autocast.

    Raises:
        Unstackable: the model cannot be batched; the message says why.
    """

    def __init__(self, subject: Subject, criterion: Loss, capacity: int, precision: str = "float32") -> None:
        super().__init__(capacity)
        x, y = subject.batch
        self._criterion = criterion
        self._autocast = precision == "bf16"
        self._template, self._dropouts = _template(subject.model, x)
        self.model = self._template
        self._names = [name for name, _ in self._template.named_parameters()]
        self._parameters = [StackedParameter(p.detach(), capacity) for p in self._template.parameters()]
        masks = {f"{name}.mask" for name, _ in self._dropouts}
        self._buffers = {
            name: b.new_zeros(capacity, *b.shape) for name, b in self._template.named_buffers() if name not in masks
        }
        self._x, self._y = x.new_zeros(capacity, *x.shape), y.new_zeros(capacity, *y.shape)
        self._draws = draws_for(x.device, capacity)
        self._optimizer = StackedAdamW(capacity, x.device)
        self._outputs = torch.empty(0)
        self._leaves: list[Tensor] = []
        self._fresh = False  # whether the gradients at hand belong to the last forward
        self._try(subject)

    def _try(self, subject: Subject) -> None:
        """Run one trial forward and back, so that a model which cannot be batched is found out at once."""
        self.load(subject)
        try:
            self.forward()
            self.losses()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.func names what it has no rule for in its first sentence
            raise Unstackable(" ".join(str(error).split())[:160]) from error
        self.width, self._fresh = 0, False

    def load(self, subject: Subject) -> int:
        slot = self.width
        self._x[slot].copy_(subject.batch[0])
        self._y[slot].copy_(subject.batch[1])
        for stacked, p in zip(self._parameters, subject.model.parameters(), strict=True):
            stacked.load(slot, p.detach())
        given = dict(subject.model.named_buffers())
        for name, stacked_buffer in self._buffers.items():
            stacked_buffer[slot].copy_(given[name])
        self._draws.seed(slot, subject.seed)
        self._optimizer.load(slot, subject.lr)
        self.width += 1
        return slot

    def forward(self) -> Tensor:
        k = self.width
        self._leaves = [p.value[:k].detach().requires_grad_() for p in self._parameters]
        state: dict[str, Tensor] = {name: b[:k] for name, b in self._buffers.items()}
        for name, module in self._dropouts:
            state[f"{name}.mask"] = module.draw(self._draws, k, self._parameters[0].value)

        def one(parameters: Sequence[Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
            return functional_call(self._template, {**dict(zip(self._names, parameters)), **buffers}, (x,))

        with torch.enable_grad():
            context = torch.autocast(self._x.device.type, torch.bfloat16) if self._autocast else nullcontext()
            with context:
                outputs = vmap(one, randomness="error")(self._leaves, state, self._x[:k])
            self._outputs = outputs.float() if self._autocast else outputs
        return self._outputs.detach()

    def losses(self) -> Tensor:
        with torch.enable_grad():
            losses = stacked_losses(self._criterion, self._outputs, self._y[: self.width])
            grads = torch.autograd.grad(losses.sum(), self._leaves, allow_unused=True)
        unused = [name for name, grad in zip(self._names, grads) if grad is None]
        if unused:
            raise Unstackable(f"the parameter '{unused[0]}' does not reach the loss")
        for parameter, grad in zip(self._parameters, grads):
            parameter.grad[: self.width].copy_(grad)
        self._outputs, self._leaves = self._outputs.detach(), []
        self._fresh = True
        return losses.detach()

    def drop(self, slot: int) -> None:
        last = self.width - 1
        if slot != last:
            for tensor in (self._x, self._y, *self._buffers.values()):
                tensor[slot].copy_(tensor[last])
            for parameter in self._parameters:
                parameter.move(last, slot)
                if self._fresh:
                    parameter.grad[slot].copy_(parameter.grad[last])
            self._draws.move(last, slot)
            self._optimizer.move(last, slot)
        self.width = last

    def update(self, for_capture: bool = False) -> None:
        self._optimizer.count(self.width)
        (self._optimizer.step_each if for_capture else self._optimizer.step)(self._parameters)
        self._fresh = False


def _template(model: nn.Module, x: Tensor) -> tuple[nn.Module, list[tuple[str, _MaskedDropout]]]:
    """Return a copy of the model that keeps no statistics and draws nothing, and its dropout layers in call order."""
    refuse_special(model)
    kinds = {type(m) for m in model.modules()}
    recurrent = sorted(k.__name__ for k in kinds if issubclass(k, nn.RNNBase))
    if recurrent:
        raise Unstackable(f"torch.func has no rule for {recurrent[0]}")
    template = copy.deepcopy(model)
    template.train()
    if not all(m.training for m in template.modules()):
        raise Unstackable("parts of it stay in eval mode")
    # Stacked parameters are told apart by name: tied ones would count twice.
    if len(list(template.named_parameters())) != len(list(template.named_parameters(remove_duplicate=False))):
        raise Unstackable("two of its parameters are one")
    replace_all_batch_norm_modules_(template)
    for module in template.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # read by nothing while the batch's own are used
            module.running_mean = module.running_var = None
    for name, module in list(template.named_modules()):
        if isinstance(module, _DROPOUTS) and module.p > 0.0:
            if type(module) is not nn.Dropout or not name:
                raise Unstackable(f"{type(module).__name__} has no stacked form")
            parent, _, leaf = name.rpartition(".")
            setattr(template.get_submodule(parent), leaf, _MaskedDropout(module.p))
    order: list[_MaskedDropout] = []
    dropouts = {name: m for name, m in template.named_modules() if isinstance(m, _MaskedDropout)}
    handles = [m.register_forward_hook(lambda m, *_: order.append(m)) for m in dropouts.values()]
    host = Host(template, torch.device("cpu"))  # torch's own draws are refused by vmap
    with torch.no_grad(), unmoved_draws([x.device.index] if x.is_cuda else []):
        before = host.state()
        template(x)
        changed = not same_host(before, host.state())
    for handle in handles:
        handle.remove()
    if changed:
        raise Unstackable("its forward changes something on the host, or draws from it")
    names = {id(m): name for name, m in dropouts.items()}
    return template, [(names[id(m)], m) for m in order]
