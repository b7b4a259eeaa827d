"""Where a model's weights first meet its data and where they last do: what it reads, and what its head sees.

A torch-function mode watches one ordinary forward pass for the operators that take a weight (a trainable parameter of
two dimensions or more, or what was computed from such alone) together with data. The data of the first is the *entry*
(of an embedding: the rows that it looks up), the data of the last the *hidden* representation. Both are in the pass's
graph, so that the backward pass that follows gives their gradients as well. Nothing that is computed changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cape.probing import operators
from cape.probing.operators import is_marked, mark_data, tensors_in, watched_backward, watched_grad, written_by
from cape.probing.separation import hardness
from cape.probing.signals import log_ratio
from cape.probing.uses import wide
from cape.state import as_real, map_tensors

_CHANNELS_FIRST = {function for _, *functions in operators.CONVOLUTIONS for function in functions}


@dataclass(frozen=True)
class Entry:
    """The data of the first weight: ``values`` of any layout; whether the channels come before the positions."""

    values: Tensor
    channels_first: bool


@dataclass(frozen=True)
class EndSignals:
    """Natural logarithms; see ``end_signals``."""

    hidden_hardness: float
    hidden_size: float
    hidden_pull: float
    entry_pull: float
    late_share: float


class Ends(TorchFunctionMode):
    """The mode.

    Attributes:
        entry, hidden: what was seen, each as this use of it alone has it; ``None`` where no weight met data: a
            scripted model shows no operator, and one that is batched or differentiated inside is passed over.
        differentiates: whether the model takes derivatives of its own, and so needs a graph in every pass.
        repeating: whether a pass is only made again, as checkpoints do in the backward pass, which then sees what the
            first pass saw.
    """

    def __init__(self, parameters: Sequence[Tensor], count: int, constants: Iterable[Tensor] = ()) -> None:
        """Args: ``parameters``: that are trained. ``count``: samples of the batch. ``constants``: no data for sure."""
        super().__init__()
        self._count = count
        self.repeating = self.differentiates = False
        self.entry: Entry | None = None
        self.hidden: Tensor | None = None
        self._of_parameters = {id(p): p for p in parameters}
        self._constants = {id(t): t for t in constants}

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in operators.PASSIVE or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self.differentiates |= func in operators.DERIVATIVES
        found = tensors_in(args[:1] if func in operators.TEMPLATES else (args, kwargs))
        of_parameters = [t for t in found if id(t) in self._of_parameters]
        data = [t for t in found if self._is_data(t)]
        if of_parameters and not data:
            result = func(*args, **kwargs)
            self._of_parameters.update((id(t), t) for t in tensors_in(result) if t.requires_grad)
            return result
        weighs = any(t.dim() >= 2 for t in of_parameters if t.layout is torch.strided)
        if data and weighs and not written_by(func, args, kwargs) and not _transformed():
            result = self._meet(func, args, kwargs, data[::-1])  # ``tensors_in`` finds the last one first
        else:
            result = func(*args, **kwargs)
        if data and func not in operators.CONSTANTS:
            mark_data(result)
        return result

    def _is_data(self, t: Tensor) -> bool:
        """Whether a value was computed from the inputs, also by what shows no operator (numpy, scripted parts)."""
        if id(t) in self._of_parameters:
            return False
        if is_marked(t) or t.requires_grad:
            return True
        return id(t) not in self._constants and t.is_floating_point() and t.dim() > 0 and len(t) == self._count

    def _meet(self, func: Any, args: Any, kwargs: Any, data: Sequence[Tensor]) -> Any:
        """Run an operator on data that a backward pass gives the gradient of, and remember it."""
        met = next(filter(_is_plain, data), None)
        if met is None:
            seen = result = func(*args, **kwargs)
        else:
            seen = met.view_as(met) if met.requires_grad else met.detach().requires_grad_()

            def given(t: Tensor) -> Tensor:
                if t is met:
                    return seen
                # Only because of ``seen`` does the graph keep the weight, which the model may write into afterwards.
                return t.clone() if not met.requires_grad and not t.is_leaf and id(t) in self._of_parameters else t

            result = func(*map_tensors(given, args), **map_tensors(given, kwargs))
        if self.repeating or not (isinstance(seen, Tensor) and _is_plain(seen)):
            return result
        if self.entry is None and seen.requires_grad:
            self.entry = Entry(seen, func in _CHANNELS_FIRST)
        if met is not None and by_sample(seen, self._count) is not None:
            self.hidden = seen
        return result

    def gradients(
        self,
        loss: Tensor,
        parameters: Sequence[Tensor],
        outputs: Tensor,
        targets: Tensor,
        l0: float,
        accumulating: bool = False,
    ) -> tuple[list[Tensor | None], EndSignals]:
        """Return the gradients of a mean loss, whose value is ``l0``, for the parameters, and what the ends say.

        The outputs are the hidden representation where no other was seen. ``accumulating``: by ``backward``, into
        the ``grad`` of all leaves, which must be none.
        """
        hidden = outputs if self.hidden is None else self.hidden
        wanted = [*parameters, hidden, *([] if self.entry is None else [self.entry.values])]
        self.repeating = True
        with self:
            if accumulating:
                for t in wanted:
                    t.retain_grad()
                watched_backward(loss)
                found = [t.grad for t in wanted]
            else:
                found = list(watched_grad(loss, wanted, allow_unused=True))
        grads, (of_hidden, *of_entry) = found[: len(parameters)], found[len(parameters) :]
        return grads, end_signals(hidden, of_hidden, targets, l0, self.entry, *of_entry)


def _is_plain(t: Tensor) -> bool:
    return t.is_floating_point() and t.layout is torch.strided


def _transformed() -> bool:
    """Whether the model is inside a transformation or a forward-mode derivative of its own."""
    inside = torch._C._functorch.peek_interpreter_stack() is not None
    return inside or torch.autograd.forward_ad._current_level >= 0


def end_signals(
    hidden: Tensor,
    hidden_gradient: Tensor | None,
    targets: Tensor,
    l0: float,
    entry: Entry | None = None,
    entry_gradient: Tensor | None = None,
) -> EndSignals:
    """Return what the two ends say.

    ``hidden_hardness``: ``separation``'s of the hidden representation: how hard the targets are to tell apart where
    the head stands. ``hidden_size``: log of its root mean square. ``hidden_pull``: log Σ|h·∂L/∂h| / L_0: the relative
    change of the loss when every hidden value grows or shrinks by its own size, to first order. ``entry_pull``: the
    same of the entry, where samples have positions there (a sequence, an image), else 0. ``late_share``: log of the
    share of Σ|∂L/∂entry| that the last eighth of the positions has, over an eighth, the mean of the samples' shares:
    high where a recurrent model is read at its end, 0 where all positions count alike.

    Args:
        hidden, hidden_gradient: of one layout, with the batch where ``by_sample`` finds it.
        targets: [B, ...].
        l0: mean loss.
        entry, entry_gradient: where the model has an entry, and the loss depends on it.
    """
    hidden = as_real(hidden.detach())
    hidden_gradient = None if hidden_gradient is None else as_real(hidden_gradient)
    values = by_sample(hidden, len(targets))
    assert values is not None
    size = math.sqrt(wide(hidden).square().sum(dtype=torch.float64).item() / max(1, hidden.numel()))
    entry_pull, late_share = 0.0, 0.0
    if entry is not None and entry_gradient is not None:
        each = by_sample(entry_gradient, len(targets))
        if each is not None and each.dim() >= 3:
            entry_pull, late_share = (
                _pull(entry.values, entry_gradient, l0),
                _late(each, 1 if entry.channels_first else -1),
            )
    return EndSignals(
        hidden_hardness=hardness(values, targets),
        hidden_size=log_ratio(_finite(size), 1.0),
        hidden_pull=_pull(hidden, hidden_gradient, l0),
        entry_pull=entry_pull,
        late_share=late_share,
    )


def by_sample(t: Tensor, count: int) -> Tensor | None:
    """Return [B, ...] of a tensor whose batch is its first dimension, its second, or a part of its first.

    ``None`` where it is none of these.
    """
    if t.dim() and len(t) == count:
        return t
    if t.dim() > 1 and t.shape[1] == count:
        return t.transpose(0, 1)
    return t.reshape(count, -1, *t.shape[1:]) if t.dim() and len(t) % count == 0 else None


def _pull(values: Tensor, gradient: Tensor | None, l0: float) -> float:
    if gradient is None:
        return log_ratio(0.0, l0)
    change = (wide(values.detach()) * wide(gradient)).abs_().sum(dtype=torch.float64).item()
    return log_ratio(_finite(change), l0)


def _finite(value: float) -> float:
    """Return a value, infinity where it is no number: ``log_ratio`` cuts it off."""
    return math.inf if math.isnan(value) else value


def _late(gradient: Tensor, channels: int) -> float:
    """Return the signal for gradients [B, ...] whose dimension ``channels`` is no position."""
    each = wide(gradient).abs().sum(channels, dtype=torch.float64).flatten(1)
    each = torch.nan_to_num(each / each.sum(1, keepdim=True)).mean(0)
    last = max(1, each.numel() // 8)
    even = float(each.sum()) * last / each.numel()
    return log_ratio(float(each[-last:].sum()), even) if even else 0.0
