"""What each operator does with its parameters: one handler per way of using a weight.

A handler receives the interceptor, the operator and its arguments, at least one of which is a parameter (or computed
from parameters) and at least one of which is data. It returns the operator's result, or ``NotImplemented`` to leave
the call attached to the autograd graph, where the fallback finds it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cape.errors import ModelError
from cape.probing import ops
from cape.probing.intercept import Handler, Interceptor, handles
from cape.probing.layout import Layout
from cape.probing.operators import CONVOLUTIONS
from cape.probing.ops import ConvGeometry
from cape.probing.uses import (
    AffineUse,
    ConvUse,
    EmbeddingUse,
    LinearUse,
    Part,
    Use,
    channel_dim,
    wide,
)


def bind(names: str, args: Sequence[Any], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    """Return the named arguments in order, from positions, keywords or defaults."""
    order = _split(names)
    return [*args[: len(order)], *(kwargs.get(name, defaults.get(name)) for name in order[len(args) :])]


_split = functools.cache(str.split)


# ---- linear maps ---------------------------------------------------------------------------------------------------


@handles(F.linear)
def linear(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, w, b = bind("input weight bias", args, kwargs)
    if not mode.is_data(x) or mode.is_data(w) or mode.is_data(b) or x.dim() < 2 or w.dim() != 2:
        return NotImplemented
    if w.is_complex() or (b is not None and b.shape != w.shape[:1]):  # a bias of positions, or one for all outputs
        with mode:
            return torch.matmul(x, w.mT) if b is None else torch.matmul(x, w.mT) + b
    return watched_linear(mode, "linear", x, x, w, b)


def watched_linear(mode: Interceptor, kind: str, data: Tensor, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """y = x Wᵀ + b, with the batch layout taken from ``data`` (which has the leading dimensions of ``x``)."""

    def make(layout: Layout) -> Use | None:
        if layout.dim == x.dim() - 1:
            return None
        pairs = [(w, Part(x.detach())), (b, Part(None))]
        live = [(t, part) for t, part in pairs if t is not None and mode.of_parameters(t)]
        return LinearUse([t for t, _ in live], [part for _, part in live], layout)

    def back(g: Tensor) -> Tensor:
        return (g.reshape(-1, g.shape[-1]) @ w.detach()).view(*g.shape[:-1], w.shape[1])

    # Only what the layout is read from can be pulled back here; a cell's hidden state goes its own way.
    return mode.meet(kind, data, (w, b), lambda w, b: F.linear(x, w, b), make, back if data is x else None)


# ---- convolutions --------------------------------------------------------------------------------------------------


def _tuple(value: Any, spatial: int) -> tuple[int, ...]:
    return (int(value),) * spatial if isinstance(value, int) else tuple(int(v) for v in value) * (spatial // len(value))


def _convolution(spatial: int, transposed: bool) -> Handler:
    names = "input weight bias stride padding " + (
        "output_padding groups dilation" if transposed else "dilation groups"
    )

    def handler(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        bound = dict(
            zip(names.split(), bind(names, args, kwargs, stride=1, padding=0, dilation=1, groups=1), strict=True)
        )
        x, w, b = bound["input"], bound["weight"], bound["bias"]
        if not mode.is_data(x) or mode.is_data(w) or mode.is_data(b) or x.dim() != spatial + 2 or w.is_complex():
            return NotImplemented
        stride, dilation = _tuple(bound["stride"], spatial), _tuple(bound["dilation"], spatial)
        kernel, padding, padded = tuple(w.shape[2:]), bound["padding"], x
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            padded = F.pad(x, [n for t in reversed(total) for n in (t // 2, t - t // 2)])
            padding = 0
        elif padding == "valid":
            padding = 0
        geometry = ConvGeometry(kernel, stride, _tuple(padding, spatial), dilation, int(bound["groups"]))
        settings = {k: v for k, v in bound.items() if k not in ("input", "weight", "bias") and v is not None}

        def make(layout: Layout) -> Use | None:
            if layout.dim != 0:
                return None
            live = [(t, kind) for t, kind in ((w, "weight"), (b, "bias")) if t is not None and mode.of_parameters(t)]
            seen = padded.detach()
            return ConvUse([t for t, _ in live], [k for _, k in live], seen, layout, geometry, transposed)

        def back(g: Tensor) -> Tensor:
            flat = g.flatten(0, 1)
            image = x.new_empty(flat.shape[0], *x.shape[1:])  # only its shape is read
            extra = _tuple(bound.get("output_padding") or 0, spatial)
            grad, _, _ = torch.ops.aten.convolution_backward(
                flat, image, w.detach(), None, stride, geometry.padding, dilation, transposed, extra,
                geometry.groups, [True, False, False],
            )  # fmt: skip
            return grad.view(g.shape[0], *x.shape)

        run = lambda w, b: func(x, w, b, **settings)  # noqa: E731
        kind = "convolution" if geometry.groups == 1 else "grouped convolution"
        return mode.meet(kind, x, (w, b), run, make, back if padded is x else None)

    return handler


for _spatial, _plain, _transposed in CONVOLUTIONS:
    handles(_plain)(_convolution(_spatial, False))
    handles(_transposed)(_convolution(_spatial, True))


# ---- normalization -------------------------------------------------------------------------------------------------


Statistics = Callable[[], tuple[Tensor | None, Tensor]]


def _affine(
    mode: Interceptor,
    kind: str,
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
    aligned: Sequence[int],
    statistics: Statistics,
    run: Callable[..., Tensor],
    back: Callable[[Tensor], Tensor] | None = None,
    own: bool | None = None,
) -> Any:
    """``back`` and ``own`` go together: see ``AffineUse``."""
    if not mode.is_data(x) or mode.is_data(w) or mode.is_data(b):
        return NotImplemented

    def make(layout: Layout) -> Use | None:
        if layout.dim >= channel_dim(aligned):
            return None
        live = [(t, kind) for t, kind in ((w, "weight"), (b, "bias")) if t is not None and mode.of_parameters(t)]
        weight = None if w is None else w.detach()
        return AffineUse(
            [t for t, _ in live], [k for _, k in live], x.detach(), statistics, aligned, layout, weight, own
        )

    return mode.meet(kind, x, (w, b), run, make, back)


def _per_channel(x: Tensor) -> list[int]:
    return [1, x.shape[1]] + [1] * (x.dim() - 2)


def _moments(x: Tensor, dims: Sequence[int], eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and inverse deviation over some dimensions, which stay with size 1."""
    var, mean = torch.var_mean(wide(x.detach()), list(dims), correction=0, keepdim=True)
    return mean, (var + eps).rsqrt()


@handles(F.batch_norm)
def batch_norm(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, mean, var, w, b, training, momentum, eps = bind(
        "input running_mean running_var weight bias training momentum eps",
        args, kwargs, training=False, momentum=0.1, eps=1e-5,
    )  # fmt: skip
    if training or mean is None or var is None:
        return NotImplemented

    def statistics() -> tuple[Tensor, Tensor]:
        shape, kind = _per_channel(x), torch.promote_types(x.dtype, torch.float32)
        inverse = (wide(var.detach()) + eps).rsqrt()
        return mean.detach().to(kind).view(shape), inverse.to(kind).view(shape)

    def back(g: Tensor) -> Tensor:
        _, inverse = statistics()
        return g * (inverse if w is None else inverse * w.detach().view(inverse.shape)).to(g.dtype)

    return _affine(
        mode, "batch_norm", x, w, b, _per_channel(x), statistics,
        lambda w, b: F.batch_norm(x, mean, var, w, b, False, momentum, eps), back, False,
    )  # fmt: skip


@handles(F.instance_norm)
def instance_norm(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, mean, var, w, b, use_input_stats, momentum, eps = bind(
        "input running_mean running_var weight bias use_input_stats momentum eps",
        args, kwargs, use_input_stats=True, momentum=0.1, eps=1e-5,
    )  # fmt: skip
    if use_input_stats and (mean is not None or var is not None):
        return NotImplemented  # would update running statistics
    if not use_input_stats:
        return batch_norm(mode, func, (x, mean, var, w, b, False, momentum, eps), {})

    def run(w: Tensor | None, b: Tensor | None) -> Tensor:
        y = F.instance_norm(x, None, None, w, b, True, momentum, eps)
        if y.requires_grad:  # to torch it is batch norm of one sample, whose backward pass mis-reads transposed ones
            y = y.clone() if y._is_view() else y  # see Interceptor.tap
            y.register_hook(Tensor.contiguous)
        return y

    return _affine(mode, "instance_norm", x, w, b, _per_channel(x), lambda: _moments(x, range(2, x.dim()), eps), run)


@handles(F.group_norm)
def group_norm(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, groups, w, b, eps = bind("input num_groups weight bias eps", args, kwargs, eps=1e-5)

    def statistics() -> tuple[Tensor, Tensor]:
        split = x.detach().unflatten(1, (groups, -1))
        mean, inverse = (t.expand(*split.shape[:3], *t.shape[3:]) for t in _moments(split, range(2, split.dim()), eps))
        return mean.flatten(1, 2), inverse.flatten(1, 2)

    return _affine(
        mode, "group_norm", x, w, b, _per_channel(x), statistics, lambda w, b: F.group_norm(x, groups, w, b, eps)
    )


@handles(F.layer_norm)
def layer_norm(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, shape, w, b, eps = bind("input normalized_shape weight bias eps", args, kwargs, eps=1e-5)
    first = x.dim() - len(shape)
    aligned = [1] * first + list(shape)
    moments: list[tuple[Tensor, Tensor]] = []

    def statistics() -> tuple[Tensor, Tensor]:
        return moments[0] if moments else _moments(x, range(first, x.dim()), eps)

    def run(w: Tensor | None, b: Tensor | None) -> Tensor:
        if not mode.direct or not mode.plain(x, w, b):  # autograd pulls back
            return F.layer_norm(x, shape, w, b, eps)
        y, mean, inverse = torch.native_layer_norm(x, shape, w, b, eps)
        moments[:] = [(mean.detach(), inverse.detach())]
        return y

    def back(g: Tensor) -> Tensor:
        rows = x.shape[:first].numel()
        mean, inverse = (t.to(x.dtype).reshape(1, rows, 1) for t in statistics())
        grads, seen = g.reshape(g.shape[0], 1, rows, -1, 1), x.detach().reshape(1, rows, -1, 1)
        weight = None if w is None else w.detach().reshape(-1)
        return ops.affine_back_torch(grads, seen, mean, inverse, weight, True).view(g.shape)

    # On a GPU, torch's kernel is one for each cotangent, and a formula of small operators would be slower.
    ours = back if isinstance(x, Tensor) and not x.is_cuda else None
    return _affine(mode, "layer_norm", x, w, b, aligned, statistics, run, ours, True)


@handles(F.rms_norm)
def rms_norm(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, shape, w, eps = bind("input normalized_shape weight eps", args, kwargs)
    first = x.dim() - len(shape)
    aligned = [1] * first + list(shape)

    def statistics() -> tuple[None, Tensor]:
        squares = wide(x.detach()).square().mean(list(range(first, x.dim())), keepdim=True)
        return None, (squares + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt()

    return _affine(mode, "rms_norm", x, w, None, aligned, statistics, lambda w, _: F.rms_norm(x, shape, w, eps))


# ---- tables --------------------------------------------------------------------------------------------------------


_BY_FREQUENCY = (
    "An embedding with scale_grad_by_freq divides a row's gradient by how often the batch has it, so that samples"
    " influence each other's gradients and there is no per-sample gradient; leave scale_grad_by_freq out."
)


def _lookup(
    mode: Interceptor, index: Tensor, w: Tensor, padding_idx: int | None, run: Callable[[Tensor], Tensor]
) -> Any:
    return mode.meet("lookup", index, (w,), run, lambda layout: EmbeddingUse(w, index.detach(), layout, padding_idx))


@handles(F.embedding)
def embedding(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    index, w, padding_idx, max_norm, _norm_type, by_frequency, _sparse = bind(
        "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs
    )
    if by_frequency:
        raise ModelError(_BY_FREQUENCY)
    if not mode.is_data(index) or mode.is_data(w) or max_norm is not None:
        return NotImplemented
    return _lookup(mode, index, w, padding_idx, lambda w: F.embedding(index, w, padding_idx))


@handles(F.embedding_bag)
def embedding_bag(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    index, w, offsets, max_norm, _norm, by_frequency, how, _sparse, weights, _last, padding_idx = bind(
        "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights"
        " include_last_offset padding_idx",
        args, kwargs, mode="mean",
    )  # fmt: skip
    if by_frequency:
        raise ModelError(_BY_FREQUENCY)
    plain = offsets is None and max_norm is None and how in ("sum", "mean") and index.dim() == 2
    if not plain or not mode.is_data(index) or mode.is_data(w) or (weights is not None and weights.requires_grad):
        return NotImplemented
    if padding_idx is not None and how == "mean":
        return NotImplemented

    def make(layout: Layout) -> Use | None:
        if layout.dim != 0:
            return None
        scale = torch.full(index.shape, 1.0 / index.shape[1] if how == "mean" else 1.0, dtype=w.dtype).to(w.device)
        if weights is not None:
            scale = scale * weights.detach()
        per_row = layout.rows(scale, 0).unsqueeze(-1)
        return _BagUse(w, index.detach(), layout, padding_idx, per_row)

    run = lambda w: F.embedding_bag(index, w, mode=how, per_sample_weights=weights, padding_idx=padding_idx)  # noqa: E731
    return mode.meet("bag", index, (w,), run, make)


class _BagUse(EmbeddingUse):
    """An embedding bag over [N, T] indices: every row of a bag receives the bag's gradient."""

    def _rows(self, g: Tensor) -> Tensor:
        bags = g.shape[0]
        per_row = g.unsqueeze(1).expand(bags, self.index.numel() // bags, g.shape[-1])
        return super()._rows(per_row)


@handles(Tensor.__getitem__, torch.index_select, Tensor.index_select)
def pick(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs or mode.is_data(args[0]):
        return NotImplemented
    w, index = args[0], args[-1]
    if len(args) == 3 and args[1] != 0:
        return NotImplemented
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or not mode.is_data(index):
        return NotImplemented
    return _lookup(mode, index, w, None, lambda w: w[index])
