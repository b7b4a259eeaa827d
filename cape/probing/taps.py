"""Reading gradients off the autograd graph: functions that a gradient passes through, and what a graph reaches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction, once_differentiable

from cape.probing.cotangents import physical

GradSink = Callable[[Tensor], object]
PullingSink = Callable[[Tensor], Tensor | None]
Back = Callable[[Tensor], Tensor]


class Tap(torch.autograd.Function):
    """Identity that reads the gradient of a tensor which autograd would otherwise not visit."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, sink: GradSink) -> Tensor:
        ctx.mark_dirty(y)
        ctx.sink = sink
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.sink(grads[0])
        return None, None, None


def _shares(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def once(backward: Any) -> Any:
    """``once_differentiable``, without switching grad mode off where it is off: the function mode sees each switch."""
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


class Watched(torch.autograd.Function):
    """An operator on data whose backward pass is ours: it hands on the output's gradients and pulls them back itself.

    ``back`` maps gradients [K, *output shape] to those of the data, [K, *data shape]: one operator for all cotangents,
    where a batching rule would often copy or repeat. A sink that has done so already returns them.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, data: Tensor, run: Callable[[], Tensor], back: Back, sink: PullingSink
    ) -> Tensor:
        ctx.back, ctx.sink = back, sink
        y = run()
        # What a Function returns may be written into, but not where it is a view (a linear map's, of a matrix).
        if y._is_view() and not _shares(y, data):
            return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.shape, y.stride())
        return y

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        with torch._C.DisableTorchFunction():
            (g,), rewrap = physical(*grads)
            pulled = ctx.sink(g)
            if not ctx.needs_input_grad[1]:
                return None, None, None, None, None
            return None, rewrap(ctx.back(g) if pulled is None else pulled), None, None, None


class Expand(torch.autograd.Function):
    """A parameter expanded to the shape in which it meets the data; reads the gradient there."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, anchor: Tensor, shape: torch.Size, sink: GradSink) -> Tensor:
        ctx.sink = sink
        return p.expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.sink(grads[0])
        return None, None, None, None


def ignore(gradient: Any) -> None:
    """Take a gradient that nobody needs."""


def _nodes_behind(roots: Iterable[Tensor | None]) -> Iterator[Any]:
    """Yield each node of the autograd graph behind some tensors once."""
    stack = [t.grad_fn for t in roots if t is not None and t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def leaves_behind(roots: Iterable[Tensor | None]) -> list[Tensor]:
    """Return the leaves that the autograd graph behind some tensors reaches."""
    roots = list(roots)
    found: dict[int, Tensor] = {id(t): t for t in roots if t is not None and t.requires_grad and t.grad_fn is None}
    for node in _nodes_behind(roots):
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
    return list(found.values())


def has_own_backward(root: Tensor) -> bool:
    """Return whether the graph behind a tensor holds a backward pass written in Python, and not by us or a checkpoint.

    A module's backward hooks are such nodes.
    """
    written: Iterator[Any] = (type(n) for n in _nodes_behind([root]) if isinstance(n, BackwardCFunction))
    return any(not n._forward_cls.__module__.startswith(("cape.", "torch.utils.checkpoint")) for n in written)


# torch's batching rules of these backward passes are wrong (2.14): only the first cotangent's gradients are right.
_TAKING_TURNS = frozenset({"CdistBackward0", "AsStridedScatterBackward0"})


def takes_turns(root: Tensor) -> bool:
    """Return whether the cotangents must go back through the graph behind a tensor one by one."""
    return any(node.name() in _TAKING_TURNS for node in _nodes_behind([root]))


@contextmanager
def gradients_kept(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Run backward passes and leave every ``.grad`` of some leaves as it was."""
    held = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None  # else it would be added to in place
    try:
        yield
    finally:
        for leaf, grad in zip(leaves, held, strict=True):
            leaf.grad = grad


def parameters_behind(roots: Iterable[Tensor | None], among: Mapping[int, nn.Parameter]) -> list[nn.Parameter]:
    """Return the parameters that some tensors are, or that the autograd graph behind them still reaches."""
    roots = [t for t in roots if t is not None]
    reached = [*roots, *leaves_behind(roots)]
    return list({id(t): among[id(t)] for t in reached if id(t) in among}.values())
