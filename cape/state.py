"""Leave a model exactly as it was found: parameters, buffers, gradients, modes, flags and the RNG."""

from __future__ import annotations

import operator
import random
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cape.held import Held, frozen, put_back, within
from cape.surroundings import turns

Inputs = Tensor | Sequence[Any] | Mapping[str, Any]

OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Names of what torch keeps in every module, a user's as well."""


class Kept:
    """What ``preserved`` remembers of a model, and how to go back to it before the block ends."""

    def __init__(self, model: nn.Module, parameters: bool) -> None:
        modules = list(model.modules())
        plain = [m for m in modules if not isinstance(m, torch.jit.ScriptModule)]  # whose state lies in Python
        self._modes = [(m, m.training) for m in modules]
        self._attributes = [(vars(m), dict(vars(m))) for m in plain]
        for _, held in self._attributes:
            held.pop("training", None)
        own = within(
            v for m in plain for name, v in vars(m).items() if name not in OF_EVERY_MODULE or isinstance(v, set)
        )
        self._held = Held(own)
        # Parameters, buffers, modules and hooks; what a module of its own holds has been looked through.
        tables = [t for m in plain for n, t in vars(m).items() if n in OF_EVERY_MODULE and isinstance(t, dict)]
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = [(table, dict(table)) for table in tables]
        self._params = list(model.parameters())
        self._flags = [(p, p.requires_grad, p.grad, dict(vars(p))) for p in self._params]
        self._places = [(p, p.data) for p in self._params if _has_a_place(p)]
        buffers = [*model.buffers(), *(t for t in own if isinstance(t, Tensor) and not isinstance(t, nn.Parameter))]
        # What was made in inference mode, or of which numbers share a place, cannot be written into here.
        buffers = [b for b in buffers if not (is_lazy(b) or b.is_meta or b.is_inference() or overlaps(b))]
        self._buffers = [(b, b.data if _has_a_place(b) else None, b.detach().clone(), dict(vars(b))) for b in buffers]
        self._versions = [b._version for b in buffers]
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._in_memory: dict[int, list[nn.Parameter]] = {}  # parameters by their memory, from the first write on
        if parameters or switches_itself(model):
            self._values = {id(p): (p, p.detach().clone()) for p in self._params}
        self.devices = sorted({t.device.index for t in [*self._params, *buffers] if t.device.type == "cuda"})
        # A backward pass inside the block adds to no gradient and steps no optimizer. What hooks make of a gradient is
        # part of training, but not of the gradient.
        hooks: list[Any] = [p._post_accumulate_grad_hooks for p in self._params]
        hooks += [] if parameters else [p._backward_hooks for p in self._params]
        self._hooks = [(table, dict(table)) for table in hooks if table]
        left = {id(table) for table, _ in self._hooks}
        self._hooked = [
            (p, h, {} if id(h) in left else dict(h or ())) for p in self._params for h in [p._backward_hooks]
        ]
        self._foreign: list[tuple[Tensor, Tensor | None]] = []

    def set_aside(self) -> None:
        """Take off what a backward pass would add to or call. Until here, what breaks in changes nothing."""
        for table, _ in self._hooks:
            table.clear()
        for p in self._params:
            p.grad = None

    def draws(self) -> tuple[Any, ...]:
        """Return what is another value once the model drew a number, from a global generator or one of its own."""
        return *draws_of(self.devices), *self._held.draws()

    def spare(self, leaves: Iterable[Tensor]) -> None:
        """Put back the gradients of leaves that the model is not known to hold, too: of a teacher in a list, say."""
        own = {id(p) for p in self._params}
        self._foreign += [(leaf, leaf.grad) for leaf in leaves if id(leaf) not in own]
        for leaf, _ in self._foreign:
            leaf.grad = None

    def before_write(self, t: Tensor) -> None:
        """Remember the parameters that lie in a tensor's memory: something is about to be written there."""
        if not self._in_memory:
            for p, place in self._places:
                self._in_memory.setdefault(place.untyped_storage().data_ptr(), []).append(p)
        for p in self._in_memory.get(t.untyped_storage().data_ptr(), ()):
            self._values.setdefault(id(p), (p, p.detach().clone()))

    @torch.no_grad()
    def rewind(self) -> None:
        """Put back what forward passes may change: buffers, attributes, generators, and the parameters remembered."""
        for p, place in self._places:  # a forward may have given a parameter other memory
            if not p.is_set_to(place):
                p.data = place
        for q, value in self._values.values():
            q.copy_(value)
        for table, held in self._tables:  # a forward may have rebound a buffer to a new tensor
            if (table or held) and (
                list(table) != list(held) or not all(map(operator.is_, table.values(), held.values()))
            ):
                table.clear()
                table.update(held)
        for p, hooks, of_caller in self._hooked:  # a forward may have put some on
            if p._backward_hooks is not hooks:
                p._backward_hooks = hooks
            elif hooks and len(hooks) > len(of_caller):
                put_back(hooks, of_caller)
        for now, held in self._attributes:
            now.update(held)
            if len(now) > len(held) + ("training" in now):
                for name in now.keys() - held.keys() - {"training"}:
                    del now[name]
        self._held.put_back()
        for b, memory, _, marks in self._buffers:
            if memory is not None and not b.is_set_to(memory):
                b.data = memory
            vars(b).clear()
            vars(b).update(marks)
        # Without a write where none is needed: a graph may hold the buffer, and would not be differentiated any more.
        for i, written in enumerate(self._written()):
            if written:
                b, _, value, _ = self._buffers[i]
                b.copy_(value)
                self._versions[i] = b._version

    def _written(self) -> list[bool]:
        """Return which buffers hold other numbers than they did. What writes through ``data`` counts nothing."""
        found = [b._version != version for (b, *_), version in zip(self._buffers, self._versions, strict=True)]
        unknown = []
        for i, (b, _, value, _) in enumerate(self._buffers):
            if b.layout is torch.strided and b.device.type == "cpu":
                found[i] = not torch.equal(b, value)
            elif b.layout is torch.strided and not found[i]:
                unknown.append((i, (b != value).any()))
        if unknown:  # one copy from the device for all of them
            places, differs = zip(*unknown, strict=True)
            for i, other in zip(places, torch.stack([d.to(differs[0].device) for d in differs]).tolist(), strict=True):
                found[i] = other
        return found

    def restore(self) -> None:
        """Put everything back; where a value cannot be, all the rest is."""
        try:
            self.rewind()
        finally:
            for p, requires_grad, grad, marks in self._flags:
                if p.requires_grad is not requires_grad:
                    p.requires_grad_(requires_grad)
                p.grad = grad
                if vars(p).keys() != marks.keys():
                    vars(p).clear()
                vars(p).update(marks)
            for leaf, grad in self._foreign:
                leaf.grad = grad
            for table, held in self._hooks:
                table.update(held)
            for module, training in self._modes:
                if module.training is not training:  # a module looks long at what it is given
                    module.training = training


def overlaps(t: Tensor) -> bool:
    """Return whether two numbers of a tensor must be one place in memory, as where it was expanded."""
    return t.layout is torch.strided and t.numel() > 1 + sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride()))


def is_dense(t: Tensor) -> bool:
    """Return whether a strided tensor's numbers lie side by side in memory, in whatever order of its dimensions."""
    return t.permute(sorted(range(t.dim()), key=t.stride, reverse=True)).is_contiguous()


def _has_a_place(p: Tensor) -> bool:
    return p.layout is torch.strided and not (is_lazy(p) or p.is_meta or p.is_quantized)


@contextmanager
def preserved(model: nn.Module, seed: int | None = None, *, parameters: bool = False) -> Iterator[Kept]:
    """Run a block and put everything of ``model`` back bit for bit, also where the block raises.

    Args:
        model: any module.
        seed: of all that draws inside the block, see ``seed_draws``; afterwards each generator is where it was.
        parameters: also restore parameter values (needed only by what trains the model).
    """
    kept = Kept(model, parameters)
    with unmoved_draws(kept.devices):
        try:
            kept.set_aside()
            if seed is not None:
                seed_draws(seed, kept.devices)
            yield kept
        finally:
            try:
                kept.restore()
            except KeyboardInterrupt:  # half a model is put back
                kept.restore()
                raise


@contextmanager
def evaluated(model: nn.Module, beside: nn.Module, seed: int | None = None) -> Iterator[Kept]:
    """Run a block with a model in eval mode, and put everything of ``beside``, which holds it, back as ``preserved``.

    ``rewind`` goes back to what the model is in eval mode: adapters, say, merge their weights when they are switched.
    torch's fast path of frozen transformers is off: it gives zeros in padded places, where training sees numbers.
    """
    with without_fast_path(), preserved(beside) if switches_itself(model) else nullcontext() as before:
        if before is not None:
            model.eval()
        with preserved(beside, seed) as kept:
            model.eval()
            yield kept


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let ``nn.TransformerEncoder`` and attention run in eval mode what they run in train mode."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def switches_itself(model: nn.Module) -> bool:
    """Return whether some module does something of its own where it is put into train or eval mode."""
    kinds = {type(m) for m in model.modules()}
    own = any(k.train is not nn.Module.train or k.eval is not nn.Module.eval for k in kinds)
    return own or any("train" in vars(m) or "eval" in vars(m) for m in model.modules())


def overrides(module: nn.Module) -> bool:
    """Return whether a method of a module's class is replaced on the module itself."""
    return any(callable(getattr(type(module), name, None)) for name in vars(module))


@contextmanager
def unmoved_draws(devices: Iterable[int] = ()) -> Iterator[None]:
    """Run a block and put the global generators back: torch's, on some GPUs too, Python's and NumPy's."""
    with turns, torch.random.fork_rng(devices=list(devices)):
        others = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(others[0])
            np.random.set_state(others[1])


def seed_draws(seed: int, devices: Iterable[int] = ()) -> None:
    """Seed the global generators that a model may draw from: torch's, on some GPUs too, Python's and NumPy's."""
    torch.random.default_generator.manual_seed(seed)
    for index in devices:
        with torch.cuda.device(index):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def draws_of(devices: Iterable[int] = ()) -> tuple[Any, ...]:
    """Return what is another value once a number was drawn from a global generator (see ``seed_draws``)."""
    of_torch = [torch.get_rng_state(), *(torch.cuda.get_rng_state(index) for index in devices)]
    return *(state.numpy().tobytes() for state in of_torch), random.getstate(), frozen(np.random.get_state())


def has_hooks(model: nn.Module) -> bool:
    """Return whether code of the caller's runs within a forward or backward pass of a model."""
    if torch.nn.modules.module._has_any_global_hook():
        return True
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(m, table) for m in model.modules() for table in tables)


def has_gradient_hooks(parameters: Iterable[Tensor]) -> bool:
    """Return whether code of the caller's changes a parameter's gradient."""
    return any(p._backward_hooks for p in parameters)


def eagerly() -> AbstractContextManager[Any]:
    """Run compiled modules as they were written: compiled code shows no operator."""
    compiling = "torch._dynamo" in sys.modules  # else nothing is compiled, and importing it would take seconds
    return torch.compiler.set_stance("force_eager") if compiling else nullcontext()


def call(model: nn.Module, x: Inputs) -> Any:
    """Return ``model(x)``; a tuple or list of inputs is unpacked, a mapping becomes keyword arguments."""
    if isinstance(x, Mapping):
        return model(**x)
    if isinstance(x, (tuple, list)):
        return model(*x)
    return model(x)


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor of nested tuples, lists, mappings and dataclasses; leave the rest as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        mapped = {k: map_tensors(function, v) for k, v in value.items()}
        if type(value) is dict or not isinstance(value, (dict, UserDict)):
            return mapped
        made: Any = copy(value)  # which may have attributes, an order or defaults of its own
        for k, v in mapped.items():
            made[k] = v
        return made
    if is_dataclass(value) and not isinstance(value, type):
        made = copy(value)
        for field in fields(value):
            object.__setattr__(made, field.name, map_tensors(function, getattr(value, field.name)))
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple
        return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, v) for v in value) if type(value) in (tuple, list) else value
    return value


class Untouched:
    """Inputs for many passes of a model, the same for each, whatever it writes into them; the given ones stay as is.

    Call it inside ``torch.inference_mode(False)``.
    """

    def __init__(self, given: Inputs) -> None:
        self._given = tensors_of(given)
        self._lent = map_tensors(lambda t: t.detach().clone(), given)
        self._known = [t._version for t in tensors_of(self._lent)]

    @torch.no_grad()
    def again(self) -> Inputs:
        """Return the inputs as they were given. What writes through ``data`` or NumPy counts no version."""
        for i, (lent, given) in enumerate(zip(tensors_of(self._lent), self._given, strict=True)):
            if lent._version != self._known[i]:
                lent.copy_(given)
                self._known[i] = lent._version
            elif lent.layout is torch.strided:  # nor does this: a graph may hold them
                lent.data.copy_(given)
        return self._lent


def tensors_of(value: Any) -> list[Tensor]:
    """Return every tensor of nested tuples, lists, mappings and dataclasses, in order."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(note, value)
    return found


def as_real(t: Tensor) -> Tensor:
    """Return a view of complex numbers as AdamW sees them: each as two real ones, in one dimension more."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def ordinary_tensor(t: Tensor) -> Tensor:
    """Return a tensor of no graph that a graph may hold: of one made in inference mode, which must be off, a copy."""
    return t.clone() if t.is_inference() else t.detach()
