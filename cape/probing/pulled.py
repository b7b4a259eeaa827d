"""Operators without parameters of which torch's batched backward pass copies: here the cotangents take turns instead.

Their gradients are written where they stay, [K, ...] in the memory format of the input, so that the views before the
operator remain views on the way back. Measured on one core (B = 64, ms for two cotangents, batched against in turn):
attention of 4 heads over 256 positions 212, 196; of 3 heads over 65 positions 19.5, 15.9; GELU of 65 x 768 8.1, 5.9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cape.probing.cotangents import physical
from cape.probing.handlers import bind
from cape.probing.intercept import PULLED, Interceptor, handles
from cape.probing.taps import once
from cape.state import is_dense

_FLASH = 1  # torch.nn.attention.SDPBackend.FLASH_ATTENTION


def _room(count: int, like: Tensor) -> Tensor:
    """Return memory for ``count`` gradients of a tensor, [count, *shape], each in its memory format."""
    if is_dense(like):
        return like.new_empty_strided((count, *like.shape), (like.numel(), *like.stride()))
    return like.new_empty(count, *like.shape)


class _Attention(torch.autograd.Function):
    """softmax(QKᵀ·scale)V by torch's fused kernel for a CPU; q, k and v are [B, heads, T, d]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.settings = causal, scale
        return out

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> Any:
        q, k, v, out, sums = ctx.saved_tensors  # inside the mode: a checkpoint recomputes its forward pass here
        causal, scale = ctx.settings
        with torch._C.DisableTorchFunction():
            (g,), rewrap = physical(*grads)
            made = [_room(len(g), t) for t in (q, k, v)]
            for i, one in enumerate(g):
                found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    one, q, k, v, out, sums, 0.0, causal, scale=scale
                )
                for room, grad in zip(made, found, strict=True):
                    room[i].copy_(grad)
            needed = zip(made, ctx.needs_input_grad[:3], strict=True)
            return (*(rewrap(room) if need else None for room, need in needed), None, None)


@handles(F.scaled_dot_product_attention, table=PULLED)
def attention(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Attention without mask and dropout, where torch would take its fused kernel for a CPU."""
    q, k, v, mask, dropout, causal, scale, grouped = bind(
        "query key value attn_mask dropout_p is_causal scale enable_gqa", args, kwargs, dropout_p=0.0, is_causal=False
    )
    tensors = all(type(t) is Tensor and t.dim() == 4 and t.is_cpu for t in (q, k, v))
    if mask is not None or dropout or grouped or not tensors or not mode.plain(q, k, v):
        return NotImplemented
    if torch._fused_sdp_choice(q, k, v, None, 0.0, causal, scale=scale) != _FLASH:
        return NotImplemented
    return _Attention.apply(q, k, v, causal, scale)


class _Elementwise(torch.autograd.Function):
    """y = f(x); ``derivative`` writes the gradient [*shape] of one cotangent into memory that it is given."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, run: Callable[[Tensor], Tensor], derivative: Callable[[Tensor, Tensor, Tensor], object]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.derivative = derivative
        return run(x)

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            (g,), rewrap = physical(*grads)
            made = _room(len(g), x)
            for one, room in zip(g, made, strict=True):
                ctx.derivative(one, x, room)
            return rewrap(made), None, None


@handles(F.gelu, table=PULLED)
def gelu(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """GELU, exact or by tanh."""
    x, approximate = bind("input approximate", args, kwargs, approximate="none")
    if type(x) is not Tensor or not x.is_cpu or not mode.plain(x):
        return NotImplemented

    def derivative(g: Tensor, x: Tensor, out: Tensor) -> object:
        return torch.ops.aten.gelu_backward.grad_input(g, x, approximate=approximate, grad_input=out)

    return _Elementwise.apply(x, lambda x: F.gelu(x, approximate=approximate), derivative)
