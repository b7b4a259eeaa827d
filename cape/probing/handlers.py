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

from cape.probing.intercept import Handler, Interceptor, handles
from cape.probing.layout import Layout
from cape.probing.ops import ConvGeometry
from cape.probing.uses import (
    AffineUse,
    ConvUse,
    EinsumUse,
    EmbeddingUse,
    LinearUse,
    Part,
    Use,
    wide,
)

# Largest outer product of two inputs, per row, that a bilinear map may form.
_OUTER_ELEMENTS = 1 << 16


def bind(names: str, args: Sequence[Any], kwargs: dict[str, Any], **defaults: Any) -> list[Any]:
    """Return the named arguments in order, from positions, keywords or defaults."""
    values = dict(zip(names.split(), args, strict=False))
    return [{**defaults, **values, **kwargs}.get(name) for name in names.split()]


# ---- linear maps ---------------------------------------------------------------------------------------------------


@handles(F.linear)
def linear(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, w, b = bind("input weight bias", args, kwargs)
    if not mode.is_data(x) or mode.is_data(w) or mode.is_data(b) or x.dim() < 2 or w.dim() != 2:
        return NotImplemented
    if w.is_complex():
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


_PRODUCTS = (torch.mm, torch.matmul, torch.bmm, torch.mv, Tensor.mm, Tensor.matmul, Tensor.bmm, Tensor.mv)


@handles(*_PRODUCTS, Tensor.__matmul__)
def matmul(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    operands = [*args, *kwargs.values()]
    if len(operands) != 2 or not set(kwargs) <= {"other", "mat2", "tensor2", "vec"}:
        return NotImplemented
    return _matmul(mode, operands[0], operands[1])


@handles(Tensor.__rmatmul__)
def rmatmul(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    return _matmul(mode, args[1], args[0])


def _matmul(mode: Interceptor, a: Tensor, b: Tensor) -> Any:
    if mode.is_data(a) and mode.is_data(b):
        return NotImplemented
    if mode.is_data(a) and b.dim() == 2 and a.dim() > 1 and not b.is_complex():
        return _right_product(mode, a, b)
    batch = "abcdefgh"[: max(a.dim(), b.dim()) - 2]
    left = batch[len(batch) - a.dim() + 2 :] + "mk" if a.dim() > 1 else "k"
    right = batch[len(batch) - b.dim() + 2 :] + "kn" if b.dim() > 1 else "k"
    out = batch + ("m" if a.dim() > 1 else "") + ("n" if b.dim() > 1 else "")
    return _contract(mode, a, b, (left, right, out)) if mode.is_data(a) else _contract(mode, b, a, (right, left, out))


def _right_product(mode: Interceptor, x: Tensor, w: Tensor) -> Any:
    """y = x W with W [d, p]."""

    def make(layout: Layout) -> Use | None:
        if layout.dim == x.dim() - 1:
            return None
        return LinearUse([w], [Part(x.detach(), transposed=True)], layout)

    return mode.meet("product", x, (w,), lambda w: torch.matmul(x, w), make)


@handles(torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm, torch.addmv, Tensor.addmv)
def add_product(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if len(args) != 3 or not set(kwargs) <= {"alpha", "beta"}:
        return NotImplemented
    b, x, w = args
    with mode:  # as watched operators
        y = torch.matmul(x, w)
        return y * kwargs.get("alpha", 1) + b * kwargs.get("beta", 1) if kwargs else y + b


@handles(torch.linalg.multi_dot)
def multi_dot(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    if kwargs:
        return NotImplemented
    with mode:
        return functools.reduce(torch.matmul, args[0])


@handles(torch.inner, Tensor.inner)
def inner(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b = bind("input other", args, kwargs)
    if a.dim() == 0 or b.dim() == 0:
        return NotImplemented
    left, right = "abcdefgh"[: a.dim() - 1], "ijklmnop"[: b.dim() - 1]
    with mode:
        return torch.einsum(f"{left}z,{right}z->{left}{right}", a, b)


@handles(torch.tensordot)
def tensordot(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    a, b, dims, out = bind("a b dims out", args, kwargs, dims=2)
    if isinstance(dims, Tensor) or out is not None:
        return NotImplemented
    pairs = (list(range(-dims, 0)), list(range(dims))) if isinstance(dims, int) else dims
    first, second = ([d] if isinstance(d, int) else list(d) for d in pairs)
    left, right = list("abcdefgh"[: a.dim()]), list("ijklmnop"[: b.dim()])
    for i, k in zip(first, second, strict=True):
        right[k] = left[i]
    kept = [c for c in left if c not in right] + [c for c in right if c not in left]
    with mode:
        return torch.einsum(f"{''.join(left)},{''.join(right)}->{''.join(kept)}", a, b)


@handles(F.bilinear)
def bilinear(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    x, z, w, b = bind("input1 input2 weight bias", args, kwargs)
    if not mode.of_parameters(w) or x.shape[-1] * z.shape[-1] > _OUTER_ELEMENTS:
        return NotImplemented
    with mode:
        return F.linear((x.unsqueeze(-1) * z.unsqueeze(-2)).flatten(-2), w.flatten(1), b)


@handles(torch.einsum)
def einsum(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    parsed = _letters(args)
    if parsed is None:
        return NotImplemented
    operands, inputs, out = parsed
    if len(operands) > 2:  # two at a time, from the left
        kept = "".join(c for c in dict.fromkeys(inputs[0] + inputs[1]) if c in "".join(inputs[2:]) + out)
        with mode:
            pair = torch.einsum(f"{inputs[0]},{inputs[1]}->{kept}", operands[0], operands[1])
            return torch.einsum(f"{','.join([kept, *inputs[2:]])}->{out}", pair, *operands[2:])
    first, second = operands
    if mode.is_data(first) == mode.is_data(second):
        return NotImplemented
    left, right = inputs
    if mode.is_data(first):
        return _contract(mode, first, second, (left, right, out))
    return _contract(mode, second, first, (right, left, out))


def _letters(args: Sequence[Any]) -> tuple[list[Tensor], list[str], str] | None:
    """Return the operands of an einsum, their letters and the output's: no ellipsis, an output in any case."""
    if isinstance(args[0], str):
        equation, *operands = args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        terms, arrow, out = equation.replace(" ", "").partition("->")
        inputs = terms.split(",")
    else:  # operand, sublist, operand, sublist, ..., [output sublist]
        operands, lists = list(args[: len(args) // 2 * 2 : 2]), [list(s) for s in args[1::2]]
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
        named = ["".join("..." if i is Ellipsis else alphabet[i] for i in s) for s in lists]
        arrow = "->" if len(args) % 2 else ""
        out = "".join("..." if i is Ellipsis else alphabet[i] for i in args[-1]) if arrow else ""
        inputs = named
    if len(operands) < 2 or len(operands) != len(inputs) or not all(isinstance(t, Tensor) for t in operands):
        return None
    spare = [c for c in "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSRQPONMLKJIHGFEDCBA" if c not in "".join(inputs) + out]
    spread = [t.dim() - len(s) + 3 if "..." in s else 0 for t, s in zip(operands, inputs, strict=True)]
    if min(spread) < 0 or max(spread) > len(spare):
        return None
    common = "".join(spare[: max(spread)])
    inputs = [s.replace("...", common[len(common) - n :]) for s, n in zip(inputs, spread, strict=True)]
    if arrow:
        return operands, inputs, out.replace("...", common)
    every = "".join(inputs)
    return operands, inputs, common + "".join(c for c in sorted(set(every)) if every.count(c) == 1 and c not in common)


def _contract(mode: Interceptor, x: Tensor, w: Tensor, letters: tuple[str, str, str]) -> Any:
    """y = einsum(x, W) for data x and a parameter W, where neither has a letter twice."""
    xs, ws, ys = letters
    if any(len(set(s)) != len(s) for s in letters) or len(xs) != x.dim() or len(ws) != w.dim():
        return NotImplemented
    with mode:  # reduce W, in watched steps, to one that meets every number of x once
        w = mode.core(w)
        if summed := [i for i, c in enumerate(ws) if c not in xs + ys]:
            w, ws = w.sum(summed), "".join(c for c in ws if c in xs + ys)
        sizes = dict(zip(xs, x.shape, strict=True))
        if spread := [i for i, c in enumerate(ws) if w.shape[i] == 1 and sizes.get(c, 1) != 1]:
            w, ws = w.squeeze(spread), "".join(c for i, c in enumerate(ws) if i not in spread)
    lengths = dict(zip(ws, w.shape, strict=True))
    seen = x.detach().expand([lengths.get(c, n) if n == 1 else n for c, n in zip(xs, x.shape, strict=True)])
    if any(n != lengths.get(c, n) for c, n in zip(xs, seen.shape, strict=True)) or not mode.of_parameters(w):
        return NotImplemented

    def make(layout: Layout) -> Use | None:
        letter = xs[layout.dim]
        if letter in ws or letter not in ys:
            return None
        return EinsumUse(w, seen, (xs, ws, ys), layout, ys.index(letter))

    return mode.meet("contract", x, (w,), lambda w: torch.einsum(f"{xs},{ws}->{ys}", x, w), make)


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
        return mode.meet("convolution", x, (w, b), run, make, back if padded is x else None)

    return handler


for _spatial, _plain, _transposed in (
    (1, torch.conv1d, torch.conv_transpose1d),
    (2, torch.conv2d, torch.conv_transpose2d),
    (3, torch.conv3d, torch.conv_transpose3d),
):
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
) -> Any:
    if not mode.is_data(x) or mode.is_data(w) or mode.is_data(b):
        return NotImplemented

    def make(layout: Layout) -> Use | None:
        if aligned[layout.dim] != 1:
            return None
        live = [(t, kind) for t, kind in ((w, "weight"), (b, "bias")) if t is not None and mode.of_parameters(t)]
        return AffineUse([t for t, _ in live], [k for _, k in live], x.detach(), statistics, aligned, layout)

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
        shape = _per_channel(x)
        return mean.detach().to(wide(x).dtype).view(shape), (wide(var.detach()) + eps).rsqrt().to(wide(x).dtype).view(
            shape
        )

    def back(g: Tensor) -> Tensor:
        _, inverse = statistics()
        return g * (inverse if w is None else inverse * w.detach().view(inverse.shape)).to(g.dtype)

    return _affine(
        mode, "batch_norm", x, w, b, _per_channel(x), statistics,
        lambda w, b: F.batch_norm(x, mean, var, w, b, False, momentum, eps), back,
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
    return _affine(
        mode, "instance_norm", x, w, b, _per_channel(x), lambda: _moments(x, range(2, x.dim()), eps),
        lambda w, b: F.instance_norm(x, None, None, w, b, True, momentum, eps),
    )  # fmt: skip


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
    return _affine(
        mode, "layer_norm", x, w, b, aligned, lambda: _moments(x, range(first, x.dim()), eps),
        lambda w, b: F.layer_norm(x, shape, w, b, eps),
    )  # fmt: skip


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


def _lookup(
    mode: Interceptor, index: Tensor, w: Tensor, padding_idx: int | None, run: Callable[[Tensor], Tensor]
) -> Any:
    return mode.meet("lookup", index, (w,), run, lambda layout: EmbeddingUse(w, index.detach(), layout, padding_idx))


@handles(F.embedding)
def embedding(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    index, w, padding_idx, max_norm, _norm_type, by_frequency, _sparse = bind(
        "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs
    )
    if not mode.is_data(index) or mode.is_data(w) or max_norm is not None or by_frequency:
        return NotImplemented
    return _lookup(mode, index, w, padding_idx, lambda w: F.embedding(index, w, padding_idx))


@handles(F.embedding_bag)
def embedding_bag(mode: Interceptor, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    index, w, offsets, max_norm, _norm, by_frequency, how, _sparse, weights, _last, padding_idx = bind(
        "input weight offsets max_norm norm_type scale_grad_by_freq mode sparse per_sample_weights"
        " include_last_offset padding_idx",
        args, kwargs, mode="mean",
    )  # fmt: skip
    plain = offsets is None and max_norm is None and not by_frequency and how in ("sum", "mean") and index.dim() == 2
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
