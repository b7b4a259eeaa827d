"""CUDA graphs emulated on a CPU: operators are recorded with the tensors they had, and run again on the same tensors.

As with a real graph, a capture changes nothing, a replay reads and writes the memory of the capture whatever Python has
done since, numbers that Python computed are fixed, and no value may reach the host. A graph's own memory is used again
for other tensors, so that nothing in it lasts from one replay to the next: here it is spoilt before each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cape.state import tensors_of

_TO_HOST = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

_aten = torch.ops.aten
_NO_LAUNCH = (_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Recorder(TorchDispatchMode):
    def __init__(self, refused: str | None) -> None:
        super().__init__()
        self._refused = refused
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.own: list[Tensor] = []  # memory that the captured work has asked for
        self.before: list[tuple[Tensor, Tensor]] = []  # what an operator has written over, and its values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(tag in func.tags for tag in _TO_HOST):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        if self._refused is not None and self._refused in str(func):
            raise torch.OutOfMemoryError(f"CUDA out of memory at {self._refused}")
        for argument, value in [*zip(func._schema.arguments, args), *self._named(func, kwargs)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before += [(tensor, tensor.detach().clone()) for tensor in tensors_of(value)]
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, tensors_of(result)))
        given = {_memory(tensor) for tensor in tensors_of([args, kwargs])}
        self.own += [tensor for tensor in tensors_of(result) if _memory(tensor) not in given]
        return result

    @staticmethod
    def _named(func: Any, kwargs: dict[str, Any]) -> list[tuple[Any, Any]]:
        by_name = {argument.name: argument for argument in func._schema.arguments}
        return [(by_name[name], value) for name, value in kwargs.items()]


class RecordedGraph:
    """A ``graphed.Graph`` of operators on a CPU.

    Attributes:
        made: all that were made.
        refused: name of an operator at which a capture runs out of memory.
    """

    made: list[RecordedGraph] = []
    refused: str | None = None

    def __init__(self) -> None:
        self._recorder = _Recorder(self.refused)
        self.replays = 0
        self.made.append(self)

    def capture(self, work: Callable[[], object]) -> None:
        generator = torch.get_rng_state()
        try:
            with self._recorder:
                work()
        finally:
            torch.set_rng_state(generator)
            with torch.no_grad():
                for tensor, values in reversed(self._recorder.before):
                    tensor.detach().copy_(values)
            self._recorder.before = []

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode(False), torch._C._AutoDispatchBelowAutograd():
            for tensor in self._recorder.own:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 101)
            for func, args, kwargs, results in self._recorder.operations:
                if func.overloadpacket in _NO_LAUNCH:
                    continue
                for held, new in zip(results, tensors_of(func(*args, **kwargs)), strict=True):
                    if held.data_ptr() != new.data_ptr():
                        held.copy_(new)
