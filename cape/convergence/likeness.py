"""Which trials a stack may take beside each other: those of models that differ in nothing but their numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from cape.convergence.convert import special
from cape.convergence.stack import Subject
from cape.state import OF_EVERY_MODULE

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, np.generic)


def shape_of(subject: Subject | None) -> object:
    """Return what all trials of a stack share."""
    if subject is None:
        return None
    x, y = subject.batch
    parameters = tuple((name, *_form(p)) for name, p in subject.model.named_parameters())
    inputs = (x.shape, x.dtype) if isinstance(x, Tensor) else None
    modules = tuple((name, type(m), *_settings(m)) for name, m in subject.model.named_modules())
    return modules, parameters, special(subject.model), inputs, y.shape, y.dtype


def _form(p: Tensor) -> tuple[object, ...]:
    return (type(p),) if is_lazy(p) else (p.shape, p.dtype, p.device)


def _settings(module: nn.Module) -> Iterator[object]:
    """Yield the forms of a module's buffers, and what else it holds beside parameters, with their names."""
    for name, buffer in module._buffers.items():
        yield name, None if buffer is None else _form(buffer)
    own = {id(p): name for name, p in module._parameters.items()}
    for name, value in vars(module).items():
        if name not in OF_EVERY_MODULE:
            yield name, _value(value, own)


def _value(value: Any, own: dict[int, str]) -> object:
    """Return what is equal for equal values, and for anything that is not known only for the very same object."""
    if isinstance(value, _PLAIN):
        return type(value), str(value)  # as words, for NaN
    if isinstance(value, weakref.ref):  # recurrent layers list their parameters once more
        value = value()
    if id(value) in own:
        return own[id(value)]
    if isinstance(value, Tensor) and value.layout is torch.strided:
        plain = value.detach().resolve_conj().resolve_neg().cpu()
        numbers = plain.flatten().contiguous().view(torch.uint8)
        return value.shape, value.dtype, numbers.numpy().tobytes()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return value.shape, value.dtype, value.tobytes()
    if type(value) in (list, tuple, torch.Size):
        return type(value), tuple(_value(v, own) for v in value)
    if type(value) is dict:
        return dict, tuple((_value(k, own), _value(v, own)) for k, v in value.items())
    return _Itself(value)


class _Itself:
    """An object, a function say, that is equal to nothing but itself, whatever its kind says."""

    def __init__(self, held: object) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other._held is self._held
