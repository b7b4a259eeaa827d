"""Handlers of raw parameters: added, multiplied, concatenated, compared, or used as an attention bias.

All of them broadcast against the data; what differs is only the shape in which parameter and data meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cape.probing.handlers import bind
from cape.probing.intercept import Interceptor, handles
from cape.probing.uses import BroadcastUse


def meet_raw(
    mode: Interceptor, kind: str, p: Tensor, data: Tensor, shape: Sequence[int], along: int | None = None
) -> Tensor:
    """Return what takes the place of a raw parameter that broadcasts to ``shape``.

    ``data`` has the batch's layout; ``along`` is a dimension that cannot be the batch (concatenation).
    """
    core = mode.core(p)
    state, layout = mode.verdict(kind, data, (core,))
    if state in ("scan", "again"):
        return mode.expand(core, shape, None)
    aligned = [1] * (len(shape) - core.dim()) + list(core.shape)
    fits = layout is not None and layout.dim < len(shape) and layout.dim != along and aligned[layout.dim] == 1
    if layout is None or not fits or shape[layout.dim] != layout.outer * mode.batch_size * layout.inner:
        mode.undo(kind, data, (core,))
        return p
    return mode.expand(core, shape, mode.register(BroadcastUse(core, aligned, layout)).arrive)


# fmt: off
_POINTWISE = (
    "add", "sub", "mul", "div", "true_divide", "multiply", "divide", "subtract", "pow", "maximum", "minimum", "where",
    "lerp", "addcmul", "addcdiv", "atan2", "logaddexp", "fmod", "remainder", "clamp", "clip", "clamp_min", "clamp_max",
    "hypot", "copysign", "xlogy",
)
_POINTWISE_METHODS = (
    "__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__", "__pow__",
    "__rpow__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "add_", "sub_", "mul_", "div_", "rsub",
)
# fmt: on


@handles(
    *(getattr(torch, n, None) for n in [*_POINTWISE, "rsub"]),
    *(getattr(Tensor, n, None) for n in [*_POINTWISE, *_POINTWISE_METHODS]),
)
def pointwise(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [a for a in [*args, *kwargs.values()] if isinstance(a, Tensor)]
    if "out" in kwargs:
        return NotImplemented
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    data = next(t for t in tensors if mode.is_data(t))
    if data.dim() < len(shape):
        data = data.expand(shape)

    def swap(a: Any) -> Any:
        return meet_raw(mode, "pointwise", a, data, shape) if mode.of_parameters(a) else a

    return func(*(swap(a) for a in args), **{n: swap(v) for n, v in kwargs.items()})


@handles(torch.masked_fill, Tensor.masked_fill)
def masked_fill(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, mask, value = bind("input mask value", args, kwargs)
    if not mode.of_parameters(value):
        return NotImplemented
    with mode:
        return torch.where(mask, value, x)


@handles(torch.prelu, F.prelu, Tensor.prelu)
def prelu(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, w = bind("input weight", args, kwargs)
    if not mode.is_data(x) or mode.is_data(w):
        return NotImplemented
    with mode:  # as watched operators
        slope = w.view(-1, *[1] * (x.dim() - 2)) if x.dim() > 1 else w
        return torch.where(x > 0, x, slope * x)  # at zero torch's derivative is the slope


@handles(torch.cat, torch.concat, torch.concatenate, torch.stack)
def join(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors, dim = bind("tensors dim", args, kwargs, dim=kwargs.get("axis", 0))
    if dim is None or not isinstance(tensors, (list, tuple)) or "out" in kwargs:
        return NotImplemented
    data = next((t for t in tensors if mode.is_data(t) and t.dim() == tensors[0].dim()), None)
    if data is None:
        return NotImplemented
    rank = data.dim() + (func is torch.stack)
    along = None if func is torch.stack else dim % rank
    swapped = [meet_raw(mode, "join", t, data, t.shape, along) if mode.of_parameters(t) else t for t in tensors]
    return func(swapped, dim)


@handles(F.scaled_dot_product_attention)
def attention_bias(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    q, k, v, mask, *rest = bind("query key value attn_mask dropout_p is_causal scale enable_gqa", args, kwargs)
    if not mode.of_parameters(mask) or not mode.is_data(q) or any(mode.of_parameters(t) for t in (q, k, v)):
        return NotImplemented
    shape = (*q.shape[:-1], k.shape[-2])
    settings = {
        n: r for n, r in zip(["dropout_p", "is_causal", "scale", "enable_gqa"], rest, strict=True) if r is not None
    }
    bias = meet_raw(mode, "attention_bias", mask, q, shape)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **settings)
