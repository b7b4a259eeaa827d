"""See every use of a parameter while an unmodified model runs.

A torch-function mode watches each operator call. Where an operator consumes a parameter (or a tensor computed from
parameters alone) together with data, the call runs with the parameter detached, so that no weight gradient will be
computed, and a ``Use`` records what its per-sample gradient needs. Modules play no part: functional code, packed
projections and raw parameters are seen alike. What the mode does not know stays attached to the autograd graph, where
``per_sample`` finds it and computes it another way; nothing is ever silently left out.

The mode runs in two phases: ``scan`` (two samples, twice: learns the batch layout of every use) and ``record``.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from cape.probing.cotangents import physical
from cape.probing.layout import Layout, observe
from cape.probing.uses import Use

GradSink = Callable[[Tensor], None]
Handler = Callable[["Interceptor", Any, Sequence[Any], dict[str, Any]], Any]

# Operator -> what it does with its parameters; the handler modules fill it.
HANDLERS: dict[Any, Handler] = {}


def handles(*functions: Any) -> Callable[[Handler], Handler]:
    """Register a handler for operators (``None`` entries, absent in some versions, are passed over)."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update({f: handler for f in functions if f is not None})
        return handler

    return register


@dataclass
class Sighting:
    """What a scan saw at one use: which call it was, and the data that met the parameter."""

    key: tuple[Any, ...]
    data: Tensor


@dataclass
class Recorded:
    """A use seen in the recording phase, and the latest gradients that reached it, [K, *shape]."""

    use: Use
    gradient: Tensor | None = None


class _Tap(torch.autograd.Function):
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


Back = Callable[[Tensor], Tensor]


class _Watched(torch.autograd.Function):
    """An operator on data whose backward pass is ours: it hands on the output's gradients and pulls them back itself.

    ``back`` maps gradients [K, *output shape] to those of the data, [K, *data shape]: one operator for all cotangents,
    where a batching rule would often copy or repeat.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, data: Tensor, run: Callable[[], Tensor], back: Back, sink: GradSink) -> Tensor:
        ctx.back, ctx.sink = back, sink
        return run()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None, None, None]:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            (g,), rewrap = physical(*grads)
            ctx.sink(g)
            return None, rewrap(ctx.back(g)) if ctx.needs_input_grad[1] else None, None, None, None


class _Expand(torch.autograd.Function):
    """A parameter expanded to the shape in which it meets the data; reads the gradient there."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, anchor: Tensor, shape: torch.Size, sink: GradSink) -> Tensor:
        ctx.sink = sink
        return p.expand(shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.sink(grads[0])
        return None, None, None, None


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among arguments or results, looking into lists, tuples and mappings."""
    found: list[Tensor] = []
    stack = [values]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
        elif isinstance(value, Mapping):
            stack.extend(value.values())
    return found


# Functions that take shape and type from a tensor, but no value.
_CONSTANTS = {
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like, torch.randn_like,
    Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor,
}  # fmt: skip


# Functions through which data can decide which rows go where: indexing by data, and reading values into Python.
_INDEXING = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in (
        "__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim", "masked_select", "scatter",
        "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_", "index_copy", "index_copy_", "index_put",
        "index_put_", "masked_scatter", "masked_scatter_",
    )
    if hasattr(owner, name)
}  # fmt: skip
_READING = {
    Tensor.tolist, Tensor.item, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
    Tensor.__array__,
}  # fmt: skip


def _repeat_as_view(args: Sequence[Any]) -> Tensor:
    """Return ``p.repeat(...)`` as an expanded, traceable view where only dimensions of size 1 repeat."""
    p, *sizes = args
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)):
        sizes = list(sizes[0])
    shape = [1] * (len(sizes) - p.dim()) + list(p.shape)
    if all(isinstance(r, int) for r in sizes) and all(n == 1 or r == 1 for n, r in zip(shape, sizes, strict=True)):
        return p.expand([n * r for n, r in zip(shape, sizes, strict=True)])
    return p.repeat(*sizes)


class Interceptor(TorchFunctionMode):
    """The mode. ``verdicts`` is ``None`` while scanning, else one layout (or ``None``: leave attached) per use.

    Attributes:
        sightings: what a scan saw, in order.
        uses: what a recording saw, in order.
        mismatch: a use came that the scan did not see in that place; the record cannot be trusted.
        steered: data chose rows or control flow; the batch order must be verified on the batch itself.
        late: parameters first used inside the backward pass (re-entrant checkpoints).
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], batch_size: int, verdicts: list[tuple[Any, Layout | None]] | None
    ) -> None:
        super().__init__()
        self.parameters = {id(p): p for p in parameters}
        self.batch_size = batch_size
        self.verdicts = verdicts
        self.sightings: list[Sighting] = []
        self.uses: list[Recorded] = []
        self.mismatch = False
        self.steered = False
        self.late: set[int] = set()
        self.known: set[int] = set()
        self.in_backward = False
        self.on_gradient: Callable[[Recorded], None] = lambda recorded: None
        self._derived: dict[int, Tensor] = {}
        self._names: dict[int, int] = {}
        self._watched: set[tuple[Any, ...]] = set()
        self._next = 0
        device = parameters[0].device
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    # ---- what a tensor is ----------------------------------------------------------------------------------------

    def of_parameters(self, t: Any) -> bool:
        """Whether a value is a trainable parameter or was computed from such parameters alone."""
        return id(t) in self.parameters or id(t) in self._derived

    @staticmethod
    def is_data(t: Any) -> bool:
        """Whether a value was computed from the inputs."""
        return isinstance(t, Tensor) and getattr(t, "_cape_data", False)

    @staticmethod
    def mark_data(values: Any) -> Any:
        """Mark every tensor among the values as computed from the inputs."""
        for t in tensors_in(values):
            t._cape_data = True  # type: ignore[attr-defined]
        return values

    def inputs(self, x: Any) -> Any:
        """Return aliases of the input tensors, marked as data (the caller's own tensors stay unmarked)."""
        if isinstance(x, Tensor):
            return self.mark_data(x.detach().view_as(x))
        if isinstance(x, Mapping):
            return {k: self.inputs(v) for k, v in x.items()}
        if isinstance(x, (tuple, list)):
            return tuple(self.inputs(v) for v in x)
        return x

    # ---- the mode ------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = tensors_in(args) if not kwargs else tensors_in((args, kwargs))
        data = any(getattr(t, "_cape_data", False) for t in found)
        if data and (func in _READING or (func in _INDEXING and any(self.is_data(t) for t in tensors_in(args[1:])))):
            self.steered = True
        if not any(self.of_parameters(t) for t in found):
            result = func(*args, **kwargs)
            return self.mark_data(result) if data and func not in _CONSTANTS else result
        if not torch.is_grad_enabled():
            if self.in_backward or not data:
                return func(*args, **kwargs)
            return self.mark_data(func(*args, **kwargs))
        if not data:
            return self._derive(_repeat_as_view(args) if func is Tensor.repeat else func(*args, **kwargs))
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(self, func, args, kwargs)
            if result is not NotImplemented:
                return self.mark_data(result)
        inner = opened(func)
        if inner is not None:  # a composite of torch.nn.functional: watch what it is made of
            with self:
                return self.mark_data(inner(*args, **kwargs))
        return self.mark_data(func(*args, **kwargs))

    def _derive(self, result: Any) -> Any:
        for t in tensors_in(result):
            if t.requires_grad and id(t) not in self.parameters:
                self._derived[id(t)] = t
        return result

    # ---- what handlers call ------------------------------------------------------------------------------------

    def meet(
        self,
        kind: str,
        data: Tensor,
        weights: Sequence[Tensor | None],
        run: Callable[..., Tensor],
        make: Callable[[Layout], Use | None],
        back: Back | None = None,
    ) -> Tensor:
        """Run an operator with its weights detached and read the gradient of its output.

        Args:
            kind: names the operator for matching scan and recording.
            data: the tensor whose batch layout decides.
            weights: the operator's parameter arguments, in the order in which ``run`` takes them.
            run: computes the output from those arguments.
            make: builds the use for a layout, or gives ``None`` where it cannot serve that layout.
            back: pulls gradients [K, *output shape] back to ``data``; autograd does it where ``None``.
        """
        detached = [
            w.detach() if w is not None and self.of_parameters(w) else w
            for w in weights
            if w is None or isinstance(w, Tensor)
        ]
        live = [w for w in weights if self.of_parameters(w)]
        state, layout = self.verdict(kind, data, live)
        if state == "live":
            return run(*weights)
        use = make(layout) if layout is not None else None
        if state == "record" and use is None:
            return run(*weights)
        place = (kind, *map(id, live))
        if state == "again" and place in self._watched:  # what a checkpoint saves must come again in the same order
            return _Watched.apply(self.anchor, data, lambda: run(*detached), back, lambda g: None)
        if state != "record" or use is None:
            return run(*detached)
        arrival = self.register(use)
        if back is not None and not torch.is_autocast_enabled(data.device.type):
            self._watched.add(place)
            return _Watched.apply(self.anchor, data, lambda: run(*detached), back, arrival.take)
        y = run(*detached)
        self.tap(y, arrival.arrive)
        return y

    def verdict(self, kind: str, data: Tensor, live: Sequence[Tensor | None]) -> tuple[str, Layout | None]:
        """Return what to do with a use: ``scan``, ``record`` (with its layout), ``again`` or ``live``."""
        key = (kind, tuple(self._name(w) for w in live), data.dim())
        if self.in_backward:  # a checkpoint recomputes; what it showed in the forward pass is already recorded
            unseen = [w for w in live if w is not None and self._name(w) not in self.known]
            self.late.update(id(w) for w in unseen)
            return ("live", None) if unseen else ("again", None)
        self.known.update(key[1])
        if self.verdicts is None:
            self.sightings.append(Sighting(key, data.detach()))
            return "scan", None
        index = self._next
        self._next += 1
        if index >= len(self.verdicts) or self.verdicts[index][0] != key:
            self.mismatch = True
            return "live", None
        layout = self.verdicts[index][1]
        if layout is None or not layout.fits(data, self.batch_size):
            return "live", None
        return "record", layout

    def register(self, use: Use) -> _Arrival:
        """Add a use and return what its gradient must be handed to."""
        recorded = Recorded(use)
        self.uses.append(recorded)
        return _Arrival(self, recorded)

    def tap(self, y: Tensor, sink: GradSink) -> None:
        """Arrange that ``sink`` receives the gradient of ``y`` in every backward pass."""
        if y.requires_grad:
            y.register_hook(sink)
        else:
            _Tap.apply(y, self.anchor, sink)

    def expand(self, p: Tensor, shape: Sequence[int], sink: GradSink) -> Tensor:
        """Return a detached parameter expanded to ``shape``; ``sink`` receives the gradient there."""
        return _Expand.apply(p.detach(), self.anchor, torch.Size(shape), sink)

    def _name(self, w: Tensor | None) -> Any:
        """Name a parameter (or a derived tensor, by order of use) alike in scan and recording."""
        if id(w) in self.parameters:
            return id(w)
        return -1 - self._names.setdefault(id(w), len(self._names))


class _Arrival:
    """Receives a use's gradient; ignores calls made after the interceptor let go of it."""

    def __init__(self, interceptor: Interceptor, recorded: Recorded) -> None:
        self.interceptor = interceptor
        self.recorded = recorded

    def arrive(self, g: Tensor) -> None:
        """Take a gradient as autograd hands it over."""
        with torch._C.DisableTorchFunction(), torch.no_grad():
            (bare,), _ = physical(g)
            self.take(bare)

    def take(self, g: Tensor) -> None:
        """Take gradients [K, *shape]."""
        self.recorded.gradient = g
        self.interceptor.on_gradient(self.recorded)


_opened_functions: dict[Any, Any] = {}


def opened(func: Any) -> Any | None:
    """Return a Python function of torch without its override check, so that its parts can be watched."""
    if not isinstance(func, types.FunctionType) or "has_torch_function" not in func.__globals__:
        return None
    if func not in _opened_functions:

        def no(*args: Any) -> bool:
            return False

        scope = dict(func.__globals__)
        scope.update({n: no for n in scope if n.startswith("has_torch_function")})
        copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
        copy.__kwdefaults__ = func.__kwdefaults__
        _opened_functions[func] = copy
    return _opened_functions[func]


def judge(first: list[Sighting], second: list[Sighting]) -> list[tuple[Any, Layout | None]]:
    """Return the verdicts of two scans (the same two samples, the first one changed in the second scan)."""
    if [s.key for s in first] != [s.key for s in second]:
        return []  # control flow depends on the data: nothing can be matched
    return [(a.key, observe(a.data, b.data)) for a, b in zip(first, second, strict=True)]
