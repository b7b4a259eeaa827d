"""Handlers of matrix products and contractions with raw parameters: ``@``, ``addmm``, ``einsum``, ``tensordot``, ..."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cape.probing.handlers import bind
from cape.probing.intercept import Interceptor, handles
from cape.probing.layout import Layout
from cape.probing.uses import EinsumUse, LinearUse, Part, Use

# Largest outer product of two inputs, per row, that a bilinear map may form.
_OUTER_ELEMENTS = 1 << 16


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
        once = mode.core(w)
        w = once.expand([m if c in xs else n for c, m, n in zip(ws, once.shape, w.shape, strict=True)])
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
