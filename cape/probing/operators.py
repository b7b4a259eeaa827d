"""What torch's operators do with values, as far as interception must know: no parameter uses here."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Types that hold no tensor: asking for these first, and by type, takes a third of the time.
_PLAIN = frozenset({
    type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format,
})  # fmt: skip


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among arguments or results, looking into lists, tuples and mappings."""
    found: list[Tensor] = []
    stack = [values]
    while stack:
        value = stack.pop()
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind is tuple or kind is list:
            stack += value
        elif isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            stack += value
        elif isinstance(value, Mapping):
            stack += value.values()
    return found


def mark_data(values: Any) -> Any:
    """Mark every tensor among the values as computed from the inputs, and return them; see ``is_marked``."""
    for t in tensors_in(values):
        if not isinstance(t, nn.Parameter):  # data was written into it; it is the model's, and bears no mark
            t._cape_data = True  # type: ignore[attr-defined]
    return values


def is_marked(t: Tensor) -> bool:
    """Return whether ``mark_data`` was given a tensor."""
    return getattr(t, "_cape_data", False)


# Functions that take shape and type from a tensor, but no value.
CONSTANTS = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor,
}  # fmt: skip


# Functions that read what a tensor is, but no value, and switches: they return no tensor.
PASSIVE = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.is_contiguous, Tensor.is_floating_point,
    Tensor.is_complex, Tensor.__len__, torch._C._set_grad_enabled,
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device", "requires_grad")),
}  # fmt: skip


# Functions through which data can decide which rows go where: indexing by data, and reading values into Python.
INDEXING = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        "__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim", "masked_select", "scatter",
        "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy", "index_copy_", "index_put",
        "index_put_", "masked_scatter", "masked_scatter_",
    )
    if hasattr(owner, name)
}  # fmt: skip
READING = {
    torch._VF._pack_padded_sequence,  # lengths, which masks may have been, decide which rows there are
    torch.equal, torch.allclose, torch.is_nonzero, Tensor.equal, Tensor.allclose, Tensor.is_nonzero,
    Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__array__, torch.unique, Tensor.unique,
}  # fmt: skip
# Functions that take shape or type, but no value, from their second tensor.
TEMPLATES = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
# Convolutions by their spatial dimensions, plain and transposed; data has its channels before these.
CONVOLUTIONS = (
    (1, torch.conv1d, torch.conv_transpose1d),
    (2, torch.conv2d, torch.conv_transpose2d),
    (3, torch.conv3d, torch.conv_transpose3d),
)
# Derivatives inside the model: what they consume of a parameter goes past the operators that the mode watches.
DERIVATIVES = {torch.autograd.grad, torch.autograd.backward, Tensor.backward, torch._VF._make_dual}
RENORMALIZING = {F.embedding, F.embedding_bag}


@functools.cache
def _in_place(func: Any) -> bool:
    """Whether an operator writes into its first argument."""
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name in ("__setitem__", "__set__") or (
            name.startswith("__i") and name not in ("__init__", "__invert__", "__index__", "__int__", "__iter__")
        )
    return name.endswith("_")


def written_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors that a call writes into."""
    written = tensors_in(kwargs["out"]) if "out" in kwargs else []
    if _in_place(func):
        written += tensors_in(args[:1])
    elif func in RENORMALIZING and (len(args) > 3 or kwargs.get("max_norm") is not None):
        written += [args[1]] if len(args) > 1 else [kwargs["weight"]]
    return written


def _in_projection_packed(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, b: Tensor | None = None
) -> tuple[Tensor, ...] | list[Tensor]:
    """torch's own, but self-attention's projection is cut into copies, not into selected parts of one copy.

    The backward pass of a selection fills a tensor of the whole with zeros, and the three are then added up; that of
    this is one concatenation.
    """
    if k is not v or q is not k:
        return F._in_projection_packed(q, k, v, w, b)  # type: ignore[attr-defined]
    return tuple(part.contiguous() for part in F.linear(q, w, b).chunk(3, -1))


_opened_functions: dict[Any, Any] = {}
_REWRITTEN = {"_in_projection_packed": _in_projection_packed}  # private functions of torch that opened ones call


def opened(func: Any) -> Any | None:
    """Return a Python function of torch without its override check, so that its parts can be watched."""
    if not isinstance(func, types.FunctionType) or "has_torch_function" not in func.__globals__:
        return None
    if func not in _opened_functions:

        def no(*args: Any) -> bool:
            return False

        scope = dict(func.__globals__)
        scope.update({n: no for n in scope if n.startswith("has_torch_function")})
        scope.update({n: f for n, f in _REWRITTEN.items() if n in scope})
        copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _opened_functions[func] = copy
    return _opened_functions[func]


# torch.autograd's own without their override checks: a mode sees what a checkpoint recomputes inside them.
watched_backward = opened(torch.autograd.backward) or torch.autograd.backward
watched_grad = opened(torch.autograd.grad) or torch.autograd.grad


# ---- copies of one tensor ----

_COPIES = {Tensor.contiguous, Tensor.clone, torch.clone}
_VIEWS = {
    Tensor.__getitem__, Tensor.transpose, torch.transpose, Tensor.permute, torch.permute, Tensor.unsqueeze,
    torch.unsqueeze, Tensor.select, torch.select,
}  # fmt: skip


def core_of_copies(
    func: Any, args: Sequence[Any], kwargs: dict[str, Any], core: Callable[[Tensor], Tensor], batch_size: int
) -> Tensor | None:
    """Return a tensor whose expansion a call on parameters gave, where the call made copies of the same numbers.

    ``core`` gives the same for its arguments.
    """
    if func is F.embedding and isinstance(args[0], Tensor):  # one row of indices for every sample
        index = args[0]
        same = index.dim() > 0 and len(index) == batch_size and bool((index == index[:1]).all())
        return func(index[:1], *args[1:], **kwargs) if same else None
    if func in (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__) and args and isinstance(args[0], Tensor):
        rows = core(args[0])
        constant = rows is args[0] and not rows.requires_grad  # a recurrence's first state, the same for every sample
        if constant and rows.dim() > 1 and len(rows) == batch_size and bool((rows == rows[:1]).all()):
            rows = rows[:1]
        if rows is args[0] or rows.dim() != args[0].dim() or rows.dim() < 2:
            return None
        return func(rows.expand(*rows.shape[:-1], args[0].shape[-1]), *args[1:], **kwargs)
    if not args or not isinstance(args[0], Tensor) or kwargs:
        return None
    p = core(args[0])
    if func in _COPIES:
        return p if p is not args[0] else None
    if func in (Tensor.repeat, Tensor.tile, torch.tile):
        sizes = list(args[1]) if len(args) == 2 and not isinstance(args[1], int) else list(args[1:])
        sizes = [1] * (args[0].dim() - len(sizes)) + sizes
        p = p.reshape([1] * (len(sizes) - p.dim()) + list(p.shape))
        return p if all(n == 1 or r == 1 for n, r in zip(p.shape, sizes, strict=True)) else None
    if func in _VIEWS and p is not args[0]:
        try:
            made = func(p, *args[1:])
        except IndexError:  # beyond the first of the copies
            return None
        return made if made.numel() else None  # all but the first of them
    return None
