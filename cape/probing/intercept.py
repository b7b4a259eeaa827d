"""See every use of a parameter while an unmodified model runs.

A torch-function mode watches each operator call. Where an operator consumes a parameter (or a tensor computed from
parameters alone) together with data, the call runs with the parameter detached, so that no weight gradient will be
computed, and a ``Use`` records what its per-sample gradient needs. Modules play no part: functional code, packed
projections and raw parameters are seen alike. What the mode does not know stays attached to the autograd graph, where
``per_sample`` finds it and computes it another way; nothing is ever silently left out.

The mode runs in two phases: ``scan`` (two samples, twice: learns the batch layout of every use) and ``record``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cape.probing import operators
from cape.probing.cotangents import physical
from cape.probing.layout import Glimpse, Layout, Sighting, Verdict, digits, rows_at_ends, same_rows
from cape.probing.meeting import may_meet, meets, turn
from cape.probing.operators import core_of_copies, is_marked, mark_data, opened, tensors_in, written_by
from cape.probing.taps import Back, Expand, GradSink, Tap, Watched, ignore, parameters_behind
from cape.probing.uses import Use
from cape.state import map_tensors

Handler = Callable[["Interceptor", Any, Sequence[Any], dict[str, Any]], Any]

# Operator -> what it does with its parameters; the handler modules fill it.
HANDLERS: dict[Any, Handler] = {}


# Operator -> how it runs on data alone where the cotangents go back together; see ``pulled``.
PULLED: dict[Any, Handler] = {}


def handles(*functions: Any, table: dict[Any, Handler] = HANDLERS) -> Callable[[Handler], Handler]:
    """Register a handler for operators (``None`` entries, absent in some versions, are passed over)."""

    def register(handler: Handler) -> Handler:
        table.update({f: handler for f in functions if f is not None})
        return handler

    return register


@dataclass
class Recorded:
    """A use seen in the recording phase, and the latest gradients that reached it, [K, *shape].

    ``pulled`` are those pulled back to the data, where the norms gave them too.
    """

    use: Use
    versions: tuple[int, ...]  # of the use's targets
    gradient: Tensor | None = None
    pulls: bool = False  # whether who hands the gradient over takes it back, pulled back to the use's data
    pulled: Tensor | None = None


class Interceptor(TorchFunctionMode):
    """The mode. ``verdicts`` is ``None`` while scanning, else one verdict per use.

    Attributes:
        sightings: what a scan saw, in order.
        uses: what a recording saw, in order.
        mismatch: a use came that the scan did not see in that place, or the model takes derivatives of its own; the
            record cannot be trusted.
        unsettled: data did not have the layout that the scan saw.
        steered: data chose rows or control flow; the batch order must be verified on the batch itself.
        met: samples may have met (see ``meeting``).
        hooked: the model has put a hook of its own on a gradient.
        late: parameters used inside the backward pass only (re-entrant checkpoints).
        recorded: parameters with a recorded use.
        dropped: those whose uses a derivative inside the model may pass through (a second-order use is not recorded),
            or whose gradient a hook of the model's changes behind a use.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        batch_size: int,
        verdicts: list[Verdict] | None,
        keep: Callable[[Tensor], None] = ignore,
        places: Mapping[int, int] | None = None,
    ) -> None:
        """Args: ``keep`` is told of a tensor before it is written into; ``places``: see ``out_of_order``."""
        super().__init__()
        self.parameters = {id(p): p for p in parameters}
        self.batch_size = batch_size
        self.verdicts = verdicts
        self.keep = keep
        self.places = places or {}
        self.sightings: list[Sighting] = []
        self.uses: list[Recorded] = []
        self.mismatch = False
        self.steered = False
        self.met = False
        self.hooked = False
        self.late: set[int] = set()
        self.recorded: set[int] = set()
        self.dropped: set[int] = set()
        self.in_backward = False
        self.level = 0  # of the backward pass's own vmap layer
        self.direct = False  # whether operators may pull gradients back themselves
        self.on_gradient: Callable[[Recorded], None] = ignore
        self._derived: dict[int, Tensor] = {}
        self._filled: dict[int, Tensor] = {}  # tensors that data was written into
        self._cores: dict[int, tuple[Tensor, int]] = {}
        self._names: dict[int, Any] = {}
        self._decisions: dict[Any, bool | None] = {}
        self._unwatched: set[Any] = set()  # names of what was used without grad mode
        self._compared: list[tuple[Glimpse, Glimpse, float]] = []
        self.unsettled = False
        self._next = 0
        self.anchor = torch.zeros((), device=parameters[0].device, requires_grad=True)

    # ---- what a tensor is ----------------------------------------------------------------------------------------

    def of_parameters(self, t: Any) -> bool:
        """Whether a value is a trainable parameter or was computed from such parameters alone."""
        return (id(t) in self.parameters and t.requires_grad) or id(t) in self._derived

    def is_data(self, t: Any) -> bool:
        """Whether a value was computed from the inputs (what has a gradient of unknown origin may have been)."""
        if not isinstance(t, Tensor):
            return False
        if is_marked(t) or id(t) in self._filled:
            return True
        return t.requires_grad and not self.of_parameters(t)

    def _may_permute(self, index: Tensor) -> bool:
        """Whether an index may put samples into another order: data chose it, or it has a place for each of them."""
        return self.is_data(index) or (
            index.dim() > 0 and len(index) == self.batch_size and not index.is_floating_point()
        )

    def inputs(self, x: Any) -> Any:
        """Return copies of the input tensors, marked as data: the model may write into what it is given."""
        return map_tensors(lambda t: mark_data(t.detach().clone()), x)

    # ---- the mode ------------------------------------------------------------------------------------------------

    def _transforming(self) -> bool:
        """Whether the model itself is inside one of torch.func's transformations."""
        inner = torch._C._functorch.peek_interpreter_stack()
        return inner is not None and inner.level() > self.level

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in operators.PASSIVE:
            return func(*args, **kwargs)
        found = tensors_in(args[:1]) if func in operators.TEMPLATES else tensors_in((args, kwargs) if kwargs else args)
        data = any(map(self.is_data, found))
        if written := written_by(func, args, kwargs):
            self._write(written, data)
        if func in operators.DERIVATIVES and not self._transforming():
            self._differentiate(func)
        if func is Tensor.register_hook:
            self.hooked = True
            if id(args[0]) in self._derived:  # a use hands over the gradient before the hook
                self.dropped |= self._behind(args[0])
        if data and (
            func in operators.READING
            or (func in operators.INDEXING and any(map(self._may_permute, tensors_in(args[1:]))))
        ):
            self.steered = True
        self.met = self.met or (data and meets(func, args, kwargs))
        if not any(map(self.of_parameters, found)):
            pulled = PULLED.get(func) if data and self.direct else None
            result = NotImplemented
            if pulled is not None and torch.is_grad_enabled() and not self._transforming():
                result = pulled(self, func, args, kwargs)
            if result is NotImplemented:
                result = func(*args, **kwargs)
            if not data or func in operators.CONSTANTS:
                return result
            self.met = self.met or may_meet(func, args, kwargs, found, result, self.batch_size)
            return self._data(func, found, result)
        if self._transforming():
            return func(*args, **kwargs)  # inside torch.func: attached, as the result will be
        if not torch.is_grad_enabled():
            if self.in_backward or not data:
                return func(*args, **kwargs)
            self._unwatched.update(self._name(t) for t in found if self.of_parameters(t))
            return self._data(func, found, func(*args, **kwargs))
        if not data:
            return self._derive(func, args, kwargs)
        handler = HANDLERS.get(func)
        if handler is not None:
            result = handler(self, func, args, kwargs)
            if result is not NotImplemented:
                return self._data(func, found, result)
        inner = opened(func)
        if inner is not None:  # a composite of torch.nn.functional: watch what it is made of
            with self:
                return mark_data(inner(*args, **kwargs))
        return self._data(func, found, func(*args, **kwargs))

    @staticmethod
    def _data(func: Any, found: Sequence[Tensor], result: Any) -> Any:
        """Mark and return what a call made of data."""
        turn(func, found, result)
        return mark_data(result)

    def _differentiate(self, func: Any) -> None:
        """Take what a derivative inside the model may pass through out of the record."""
        if func is torch._VF._make_dual or (self.in_backward and func is torch.autograd.grad):
            self.mismatch = True
        elif not self.in_backward:  # inside the backward pass, a re-entrant checkpoint calls backward
            self.dropped |= self.recorded

    def _write(self, written: Sequence[Tensor], data: bool) -> None:
        """Note what a call writes into: parameters are put back later, and what data is written into is data."""
        for t in written:
            if t.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(t):
                self.keep(t)
            if data and not self.is_data(t) and id(t) not in self.parameters:
                for changed in (t, t._base if t._is_view() else None):
                    if changed is not None and id(changed) not in self.parameters:
                        self._derived.pop(id(changed), None)
                        self._filled[id(changed)] = changed

    def _derive(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run an operator on parameters alone."""
        result = func(*args, **kwargs)
        for t in tensors_in(result):
            if t.requires_grad and id(t) not in self.parameters:
                self._derived[id(t)] = t
        core = core_of_copies(func, args, kwargs, self.core, self.batch_size) if isinstance(result, Tensor) else None
        if core is not None:
            if id(core) not in self.parameters:
                self._derived[id(core)] = core
            self._cores[id(result)] = (core, result._version)
        return result

    def core(self, p: Tensor) -> Tensor:
        """Return a tensor that expands to ``p`` and holds each of its numbers once, as far as that is known."""
        if p.layout is not torch.strided:
            return p
        known, version = self._cores.get(id(p), (p, p._version))
        if version != p._version:
            return p
        for d in range(0 if known.is_nested else known.dim()):
            if known.stride(d) == 0 and known.shape[d] > 1:
                known = known.narrow(d, 0, 1)
                self._derived[id(known)] = known
        return known

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
        use = make(layout) if state == "record" and layout is not None else None
        self.met = self.met or (state == "record" and use is None)  # it may go along the batch
        if state == "live" or (state == "record" and use is None):
            self.undo(kind, data, live)
            return run(*weights)
        arrival = self.register(use) if use is not None else None
        if back is not None and self.direct and state != "scan" and self.plain(data, *detached):
            take = ignore if arrival is None else arrival.take
            if arrival is not None:
                arrival.recorded.pulls = data.requires_grad
            return Watched.apply(self.anchor, data, lambda: run(*detached), back, take)
        return self.tap(run(*detached), arrival.arrive if arrival is not None else None)

    @staticmethod
    def plain(*tensors: Tensor | None) -> bool:
        """Whether an operator on these is what it looks like: no autocast, no conjugates."""
        kinds = {(t.dtype, t.device.type) for t in tensors if t is not None}
        return len(kinds) == 1 and all(d.is_floating_point and not torch.is_autocast_enabled(on) for d, on in kinds)

    def verdict(self, kind: str, data: Tensor, live: Sequence[Tensor | None]) -> tuple[str, Layout | None]:
        """Return what to do with a use: ``scan``, ``record`` (with its layout), ``again`` or ``live``."""
        key = self._key(kind, data, live)
        if self.in_backward:  # a checkpoint recomputes: do as in the forward pass, which holds what is recorded
            decision = None if self._unwatched.intersection(key[1]) else self._decisions.get(key)
            if decision is None:
                self.late.update(*map(self._behind, live))
            return ("again" if decision else "live"), None
        if self.verdicts is None:
            if self.mismatch:
                return "live", None
            self.sightings.append(Sighting(key, data.detach().clone()))  # the model may write into it
            return "scan", None
        index = self._next
        self._next += 1
        if index >= len(self.verdicts) or self.verdicts[index].key != key:
            self.mismatch = True
        if self.mismatch:
            return "live", None
        _, layout, rows, _ = self.verdicts[index]
        if layout is None or not layout.fits(data, self.batch_size):
            self.unsettled = True
            return "live", None
        self._decisions[key] = self._decisions.get(key, True) or None
        self.recorded.update(*map(self._behind, live))
        with torch._C.DisableTorchFunction():
            if self.places:
                now = rows_at_ends(data, layout, list(self.places.values()))
                then = [seen.of(list(self.places)) for seen in rows]
                self._compared += [(*pair, digits(data.dtype)) for pair in zip(now, then, strict=True)]
        return "record", layout

    def undo(self, kind: str, data: Tensor, live: Sequence[Tensor | None]) -> None:
        """Note that a use stays attached after all, so that a checkpoint leaves it attached too."""
        if not self.in_backward and self.verdicts is not None:
            key = self._key(kind, data, live)
            self._decisions[key] = None if self._decisions.get(key) else False

    def _key(self, kind: str, data: Tensor, live: Sequence[Tensor | None]) -> tuple[Any, ...]:
        return kind, tuple(self._name(w) for w in live), data.dim()

    def out_of_order(self) -> bool:
        """Whether a use met other rows than the scan did: something moves the samples about.

        ``places`` says where in the batch the scan's two samples are: their rows at every use must be the same again,
        to what rounding leaves of them.
        """
        if not self._compared:
            return False
        return not same_rows(*zip(*self._compared, strict=True))

    def release(self) -> None:
        """Let go of every tensor: nodes of the graph hold the interceptor, and what it holds must not hold them."""
        self.on_gradient = ignore
        for held in (self.uses, self._compared, self._derived, self._filled, self._cores):
            held.clear()

    def register(self, use: Use) -> _Arrival:
        """Add a use and return what its gradient must be handed to."""
        recorded = Recorded(use, tuple(t._version for t in use.targets))
        self.uses.append(recorded)
        return _Arrival(self, recorded)

    def tap(self, y: Tensor, sink: GradSink | None) -> Tensor:
        """Return ``y``, arranged so that ``sink`` receives its gradient in every backward pass.

        Without a sink (while scanning, or recomputing) ``y`` still requires a gradient, as it does while recording.
        """
        if not y.requires_grad:
            return Tap.apply(y, self.anchor, sink or ignore)
        if sink is not None:
            if y._is_view():  # what the model then writes into it would take the hook away
                y = y.clone()
            node, place = y.grad_fn, y.output_nr
            assert node is not None  # it takes part in a gradient
            # A hook of the node and not of the tensor: it sees what the model's own hooks make of the gradient.
            node.register_prehook(lambda grads: None if grads[place] is None else sink(grads[place]))
        return y

    def expand(self, p: Tensor, shape: Sequence[int], sink: GradSink | None) -> Tensor:
        """Return a detached parameter expanded to ``shape``; ``sink`` receives the gradient there."""
        return Expand.apply(p.detach(), self.anchor, torch.Size(shape), sink or ignore)

    def _name(self, w: Tensor | None) -> Any:
        """Name a parameter, or a tensor derived from parameters, alike in every pass."""
        if w is None or id(w) in self.parameters:
            return id(w)
        if id(w) not in self._names:
            self._names[id(w)] = (*sorted(self._behind(w)), w.dim())
        return self._names[id(w)]

    def _behind(self, w: Tensor | None) -> set[int]:
        """Return the ids of the parameters that a tensor came from."""
        if w is None or id(w) in self.parameters:
            return set() if w is None else {id(w)}
        return {id(p) for p in parameters_behind([w], self.parameters)}


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

    def take(self, g: Tensor) -> Tensor | None:
        """Take gradients [K, *shape]; those of a derivative inside the model are not ours (their graph may hold us).

        Returns them pulled back to the use's data, where the norms' pass gave that too.
        """
        if not self.interceptor.in_backward:
            return None
        self.recorded.gradient = g
        self.interceptor.on_gradient(self.recorded)
        pulled, self.recorded.pulled = self.recorded.pulled, None
        return pulled
