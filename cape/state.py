"""Leave a model exactly as it was found: parameters, buffers, gradients, modes, flags and the RNG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cape.errors import ModelError

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]


@contextmanager
def preserved(model: nn.Module, seed: int | None = None, *, parameters: bool = False) -> Iterator[None]:
    """Run a block and put everything of ``model`` back bit for bit, also where the block raises.

    Args:
        model: any module.
        seed: seeds the (forked) RNG of the CPU and of the model's devices inside the block.
        parameters: also restore parameter values (needed only by what trains the model).
    """
    modes = [(m, m.training) for m in model.modules()]
    params = list(model.parameters())
    flags = [(p, p.requires_grad, p.grad) for p in params]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    saved_buffers = [(b, b.detach().clone()) for b in model.buffers()]
    saved_params = [(p, p.detach().clone()) for p in params] if parameters else []
    cuda = sorted({t.device.index for t in [*params, *model.buffers()] if t.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        for p in params:
            p.grad = None  # a backward inside the block must not add to the caller's gradients
        if seed is not None:
            torch.random.default_generator.manual_seed(seed)
            for index in cuda:
                with torch.cuda.device(index):
                    torch.cuda.manual_seed(seed)
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in saved_params:
                    p.copy_(value)
                for module, held in buffers:  # a forward may have rebound a buffer to a new tensor
                    module._buffers.clear()
                    module._buffers.update(held)
                for b, value in saved_buffers:
                    if not _same(b, value):
                        b.copy_(value)
            for p, requires_grad, grad in flags:
                p.requires_grad_(requires_grad)
                p.grad = grad
            for module, training in modes:
                module.training = training


def _same(a: Tensor, b: Tensor) -> bool:
    return a.device.type == "cpu" and torch.equal(a, b)


def call(model: nn.Module, x: Inputs) -> Any:
    """Return ``model(x)``; a tuple or list of inputs is unpacked, a mapping becomes keyword arguments."""
    if isinstance(x, Mapping):
        return model(**x)
    if isinstance(x, (tuple, list)):
        return model(*x)
    return model(x)


def slice_inputs(x: Inputs, index: slice | Tensor, batch_size: int) -> Inputs:
    """Return the samples ``index`` of the inputs: every tensor whose first dimension is the batch is cut."""

    def cut(value: Any) -> Any:
        return value[index] if isinstance(value, Tensor) and value.dim() and len(value) == batch_size else value

    if isinstance(x, Mapping):
        return {k: cut(v) for k, v in x.items()}
    if isinstance(x, (tuple, list)):
        return tuple(cut(v) for v in x)
    return cut(x)


def check_batch(batch: Any) -> tuple[Inputs, Tensor, int]:
    """Return (inputs, targets, batch size) of a batch, or raise ``ModelError`` where it is none."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ModelError("A batch is a pair (inputs, targets).")
    x, y = batch
    if not isinstance(y, Tensor) or y.dim() == 0:
        raise ModelError("The targets of a batch must be a tensor whose first dimension is the batch.")
    if y.shape[0] == 0:
        raise ModelError("The batch is empty; at least one sample is needed.")
    tensors = [t for t in (x.values() if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else [x])]
    if not any(isinstance(t, Tensor) and t.dim() and t.shape[0] == y.shape[0] for t in tensors):
        raise ModelError(f"No input has {y.shape[0]} samples, as the targets do.")
    return x, y, int(y.shape[0])


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require grad, each once, by name; raises ``ModelError`` where there is none."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ModelError("The model has no trainable parameter.")
    return found
