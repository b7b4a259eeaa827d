"""All cotangents in one backward pass: a hidden batch dimension of the gradients, taken off and put on.

The backward pass runs under one vmap layer. Operators of torch have batching rules; what is ours (hooks, recurrent
layers) works on the physical tensors, [K, *shape], with K in front.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_functorch: Any = torch._C._functorch

Rewrap = Callable[[Tensor], Tensor]


@contextmanager
def hidden(v: Tensor) -> Iterator[Tensor]:
    """Give gradients [K, *shape] as one tensor of that shape inside a block, K being hidden from the operators in it.

    A block of ``torch.func.vmap``'s, without what vmap does for a function's arguments and results: for a small model
    that takes longer than an operator.
    """
    _load_rules()
    level = _functorch._vmap_increment_nesting(len(v), "error")
    try:
        yield _functorch._add_batch_dim(v, 0, level)
    finally:
        _functorch._vmap_decrement_nesting()


@functools.cache
def _load_rules() -> None:
    """Let torch register the batching rules that it has in Python: it does so at the first use of vmap."""
    torch.func.vmap(torch.neg)(torch.zeros(1))


def physical(*grads: Tensor) -> tuple[list[Tensor], Rewrap]:
    """Return gradients as [K, *shape], and what gives a result [K, *shape] back to autograd.

    K is 1 outside a batched pass. A gradient that does not depend on the cotangent is expanded.
    """
    levels = [_functorch.maybe_get_level(g) for g in grads if _functorch.is_batchedtensor(g)]
    if not levels:
        return [g.unsqueeze(0) for g in grads], lambda t: t.squeeze(0)
    level = max(levels)
    bare = [_bare(g, level) for g in grads]
    count = next(g.shape[0] for g, batched in bare if batched)
    tensors = [g if batched else g.expand(count, *g.shape) for g, batched in bare]
    return tensors, lambda t: _functorch._add_batch_dim(t, 0, level)


def _bare(g: Tensor, level: int) -> tuple[Tensor, bool]:
    if not _functorch.is_batchedtensor(g) or _functorch.maybe_get_level(g) != level:
        return g, False
    bare, at = _functorch.get_unwrapped(g), _functorch.maybe_get_bdim(g)
    return (bare.movedim(at, 0) if at else bare), True
