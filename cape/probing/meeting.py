"""Which calls of a model may let the samples of a batch meet, by their shapes.

A false alarm costs passes that look at it (``alone.Alone``); what is not noticed is only seen where the scanned
samples, or those at the ends of the batch, are among those that meet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cape.probing.operators import is_marked, tensors_in


def _functions(*names: str) -> set[Any]:
    """Return torch's functions and methods of these names."""
    return {getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)}


# Functions that go along a dimension: along the first one, the samples of a batch see those before them, or all.
_RUNNING = _functions("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "argsort")
# Functions that leave one number, or a part, of a dimension, or turn it: where they take it among their arguments, and
# what it is where they get none (nothing: all dimensions).
_REDUCING = (
    *("mean", "sum", "std", "var", "amax", "amin", "max", "min", "median", "nanmedian", "mode", "logsumexp", "prod"),
    *("any", "all", "argmax", "argmin", "nansum", "nanmean", "count_nonzero", "std_mean", "var_mean", "aminmax"),
    *("select", "narrow", "flip"),
)
_ALONG = ("softmax", "log_softmax", "softmin")
_CUTTING = ("split", "chunk", "tensor_split", "quantile", "nanquantile", "kthvalue", "topk", "norm", "roll", "diff")
_DIMENSION: dict[Any, tuple[int, Any]] = {
    function: taken
    for names, taken in ((_REDUCING, (1, ())), (("unbind",), (1, 0)), (_ALONG, (1, -1)), (_CUTTING, (2, 0)))
    for function in _functions(*names)
} | {
    **{getattr(F, name): (1, 0) for name in _ALONG},
    **{getattr(torch.fft, name): (2, -1) for name in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")},
    **{getattr(torch.fft, name): (2, (-2, -1)) for name in ("fft2", "ifft2", "rfft2", "irfft2")},
    F.normalize: (2, 1),
}
# Functions that go along all dimensions but the first two: samples that were moved there meet.
_SPATIAL = {
    getattr(F, name)
    for name in ("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
                 "adaptive_max_pool1d", "adaptive_max_pool2d", "interpolate", "unfold", "fold")
}  # fmt: skip
_TRANSPOSING = _functions(
    "t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint"
) | {getattr(Tensor, name).__get__ for name in ("T", "H", "mT", "mH")}  # fmt: skip
_PRODUCTS = _functions("matmul", "mm", "bmm", "mv", "__matmul__", "__rmatmul__")
_ADDED = _functions("addmm", "baddbmm", "addbmm", "addmv")


def meets(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether samples do meet in a call, with parameters or without: a batch norm over the batch's own statistics."""
    return func is F.batch_norm and bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def is_turned(t: Tensor) -> bool:
    """Whether the first dimension of data was moved to another place, as far as transpositions tell."""
    return getattr(t, "_cape_turned", False)


def turn(func: Any, found: Sequence[Tensor], result: Any) -> None:
    """Note of what a call made of data whether its first dimension is elsewhere: ``is_turned``."""
    turned = any(map(is_turned, found))
    given = found[0]
    if func in _TRANSPOSING and _is_plain(given) and isinstance(result, Tensor) and result.dim() > 1:
        turned ^= (given.shape[0], given.stride(0)) != (result.shape[0], result.stride(0))
    for t in tensors_in(result):
        if turned or is_turned(t):
            t._cape_turned = turned  # type: ignore[attr-defined]


def may_meet(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], found: Sequence[Tensor], result: Any, batch_size: int
) -> bool:
    """Whether samples may have met in a call without parameters.

    Args:
        found: the tensors among its arguments, the last one first, of which one at least is data.
    """
    if func in _RUNNING:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        given = found[0]
        if dim in (0, -given.dim()) and (given.dim() > 1 or len(given) == batch_size):
            return True
    return (
        _loses_samples(found[0], result, batch_size)
        or _parts_samples(args[0] if args else None, _narrowed(func, args, kwargs), batch_size)
        or (func in _SPATIAL and is_turned(found[0]))
        or _pairs(func, args, found, result, batch_size)
    )


def _narrowed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[int]:
    """Return the dimensions of its first argument of which a call leaves a part or one number, or which it turns."""
    if func is Tensor.__getitem__:
        first = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        picks = isinstance(first, (int, slice)) and not isinstance(first, bool)
        return [0] if picks and first != slice(None) else []
    if func is F.scaled_dot_product_attention:
        return [-2]
    if func is F.layer_norm:
        shape = kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())
        return list(range(-len(shape), 0)) if isinstance(shape, (list, tuple)) else [-1]
    if func is F.pad:
        pad = kwargs.get("pad", args[1] if len(args) > 1 else ())
        return [-1 - i // 2 for i, n in enumerate(pad) if n]
    if func not in _DIMENSION:
        return []
    place, default = _DIMENSION[func]
    dims = kwargs.get("dim", kwargs.get("dims", args[place] if len(args) > place else default))
    return [d for d in (dims if isinstance(dims, (list, tuple)) else [dims]) if isinstance(d, int)]


def _parts_samples(given: Any, dims: Sequence[int], batch_size: int) -> bool:
    """Whether one of these dimensions may be the batch's.

    The first one where its size allows it, or the second. Once the first one was moved: the second one where it has the
    batch's size, or any whose size allows it.
    """
    if not dims or not isinstance(given, Tensor) or given.dim() == 0:
        return False
    second = given.dim() > 1 and given.shape[1] == batch_size
    if is_turned(given):
        return any(d % given.dim() == 1 if second else given.shape[d] % batch_size == 0 for d in dims)
    place = 0 if given.shape[0] % batch_size == 0 else 1 if second else None
    return place is not None and any(d % given.dim() == place for d in dims)


def _loses_samples(given: Tensor, result: Any, batch_size: int) -> bool:
    """Whether an operator made fewer numbers, and no dimension of them is the batch's any more."""
    if type(result) is not tuple and isinstance(result, tuple):  # values and where they were
        result = result[0]
    if not isinstance(result, Tensor) or result.numel() >= given.numel():
        return False
    return result.numel() == 1 or all(n % batch_size for n in result.shape)


def _pairs(func: Any, args: Sequence[Any], found: Sequence[Tensor], result: Any, batch_size: int) -> bool:
    """Whether a call on several tensors, of which one at least is data, may bring samples together."""
    data = [t for t in found if is_marked(t)]
    if len(found) < 2 or not isinstance(result, Tensor) or result.dim() == 0:
        return False
    if not all(map(_is_plain, (*data, result))):
        return False
    if func is torch.einsum:
        operands = args[1] if len(args) == 2 and isinstance(args[1], (list, tuple)) else args[1:]
        return isinstance(args[0], str) and _mixes(args[0].replace(" ", ""), operands, batch_size)
    if func in _PRODUCTS or func in _ADDED:
        b, a = found[:2]  # by position or by name
        return _mixes(_as_einsum(a, b), (a, b), batch_size)
    if func is torch.cdist:
        b, a = found[:2]
        rows = a.shape[-2] % batch_size == 0 and b.shape[-2] % batch_size == 0
        return rows and math.prod(result.shape[:-2]) % batch_size != 0
    if len(data) < 2:
        return False
    # By broadcasting: more dimensions may be the batch's than in any of them, and not all have it first.
    first = all(t.dim() == result.dim() and t.shape[0] == result.shape[0] for t in data)
    return not first and _count(result, batch_size) > max(_count(t, batch_size) for t in data)


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor has one shape and strides."""
    return t.layout is torch.strided and not t.is_nested


def _count(t: Tensor, batch_size: int) -> int:
    return sum(n == batch_size for n in t.shape)


def _as_einsum(a: Tensor, b: Tensor) -> str:
    """Return what a matrix product is in letters, leading dimensions as capitals from the right."""
    lead = "ZYXWVUTSRQPONM"
    first, second = (lead[t.dim() - 3 :: -1] if t.dim() > 2 else "" for t in (a, b))
    left, right = "mk" if a.dim() > 1 else "k", "kn" if b.dim() > 1 else "k"
    out = max(first, second, key=len) + ("m" if a.dim() > 1 else "") + ("n" if b.dim() > 1 else "")
    return f"{first}{left},{second}{right}->{out}"


def _mixes(equation: str, operands: Sequence[Tensor], batch_size: int) -> bool:
    """Whether a product sums over samples, or makes a number for each pair of them, for none of them alone.

    One of a constant and data sums over them where no dimension that is left may be theirs.
    """
    given, _, out = equation.partition("->")
    names = given.split(",")
    if not out and "->" not in equation:
        out = "".join(sorted(c for c in set(given) - {","} if given.count(c) == 1))
    of_data: list[set[str]] = []
    leads = ""  # what may be the batch in the first place of data
    for letters, t in zip(names, operands, strict=False):
        if not is_marked(t):
            continue
        sizes = dict.fromkeys(letters.replace("...", ""), 0)
        before, _, after = letters.partition("...")
        sizes |= dict(zip(before, t.shape, strict=False))
        sizes |= dict(zip(reversed(after), reversed(t.shape), strict=False))
        if "..." in letters:
            rest = t.shape[len(before) : t.dim() - len(after)]
            sizes["..."] = batch_size if any(n % batch_size == 0 for n in rest) else 1
        of_data.append({name for name, size in sizes.items() if size and size % batch_size == 0})
        leads = letters[:1] if letters[:1] in of_data[-1] and not is_turned(t) else ""
    if len(of_data) < 2:  # with a constant: the samples are gone, each of what comes out has some of all
        return any(mine and not mine.intersection(out) for mine in of_data) or bool(leads and leads not in out)
    kept = {name for mine in of_data for name in mine if name in out}
    shared = of_data[0].intersection(*of_data[1:])
    if kept & shared:
        return False  # every sample has its own product
    summed = bool(shared - kept)
    return summed or sum(bool(mine & kept) for mine in of_data) > 1
