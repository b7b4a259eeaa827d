"""Steps that repeat: captured once into a CUDA graph and replayed from then on.

A training step of a small model is hundreds of launches, and most of its time is Python and the driver. A graph makes
them one. What it replays is the step itself, bit for bit, because of four rules that its users keep:

* whatever differs between two steps lies on the device (counters, numbers of updates, learning rates, batches), and
  always in the same memory; a graph is made for one number of trials and for no particular trials;
* no tensor that a step makes is read by the next one: parameters, moments and counters carry everything;
* the steps before the capture, the capture and the replays run on one stream. The libraries' workspaces and the nodes
  of autograd belong to a stream: two graphs captured on one stream and replayed on two would share a workspace;
* nothing on the host changes from step to step: no random draws of Python, NumPy or torch's CPU generator, no number
  that a module keeps, no buffer that a forward replaces. A model that does such a thing is found out in the steps
  before the capture.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cape.logs import log_once
from cape.state import has_hooks

_LOG = logging.getLogger(__name__)

# Looks of the host (each one step or more) before the same step is captured. A capture is reckoned (not measured) at
# about three steps: launches into the graph, its instantiation, and memory that is asked for anew. Nobody knows
# how many steps are ahead; who pays once as much has been spent without it never spends more than twice what hindsight
# would have. These steps are also the warm-up that a capture needs.
LOOKS_BEFORE_CAPTURE = 4

_enabled: ContextVar[bool] = ContextVar("cape_graphs", default=True)


class Graph(Protocol):
    """Work on a device that is recorded once and can be done again, on the same memory."""

    def capture(self, work: Callable[[], object]) -> None:
        """Record what ``work`` gives the device to do, without doing it.

        Raises:
            RuntimeError: it cannot be recorded, or there is no memory for it; nothing has changed on the device.
        """

    def replay(self) -> None:
        """Do it, on the current stream."""


class CudaGraph:
    """A ``torch.cuda.CUDAGraph`` with memory of its own, which goes when the graph goes.

    It is captured on the current stream, which must not be the default one.
    """

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, work: Callable[[], object]) -> None:
        stream = torch.cuda.current_stream()
        generator = torch.cuda.default_generators[stream.device.index]
        state = generator.clone_state()
        pool = torch.cuda.graph_pool_handle()
        try:
            # Other threads may allocate meanwhile; autograd's work for this stream is captured whatever its thread.
            with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                work()
        except RuntimeError:
            # Where the capture itself was broken off, torch leaves its allocator (and before 2.14 its generator) in
            # the middle of it: no cached memory would ever be given back, and no number drawn.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(stream.device.index, pool)
                torch._C._cuda_releasePool(stream.device.index, pool)
            generator.graphsafe_set_state(state)
            raise

    def replay(self) -> None:
        self._graph.replay()


def graph_maker(device: torch.device) -> Callable[[], Graph] | None:
    """Return what makes a graph for a device, or None where steps run one by one: on a CPU, and where switched off."""
    return CudaGraph if device.type == "cuda" and _enabled.get() else None


@contextmanager
def use_graphs(enabled: bool) -> Iterator[None]:
    """Switch graphs on or off inside a block (for comparisons; no number depends on it)."""
    token = _enabled.set(enabled)
    try:
        yield
    finally:
        _enabled.reset(token)


class RepeatedStep:
    """A training step that is made again and again: one by one at first, by a graph when that pays.

    Where a graph cannot be captured, one line of the log says why and the steps go on one by one.

    Args:
        step: makes one step (forward, backward, update) and returns the losses before the update, [width] or a scalar.
            Its argument says whether the step must be fit to be captured: a form that is dearer one by one is asked
            for only right before a capture, and both compute the same bits.
        new_graph: makes an empty graph.
        name: of what is trained, for the log.
        rows, columns: steps between two looks, and losses of a step, at most.
        device: where the losses are.
        model: a module of the caller's whose forward the step runs; None where it runs none, and nothing on the host
            has to be watched.
        unless: why no graph may be made, where that is known.
    """

    def __init__(
        self,
        step: Callable[[bool], Tensor],
        new_graph: Callable[[], Graph],
        *,
        name: str,
        rows: int,
        columns: int,
        device: torch.device,
        model: nn.Module | None = None,
        unless: str | None = None,
    ) -> None:
        self._step, self._new_graph, self._name = step, new_graph, name
        # float64 holds every loss exactly, whatever the model's dtype. A replay finds its row on the device.
        self._table = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._host = None if model is None else Host(model, device)
        self._unless = unless or _unseen(model)
        self._graph: Graph | None = None
        self._width = 0
        self._looks = 0
        self._given_up = False

    @property
    def captured(self) -> bool:
        """Whether steps are being replayed."""
        return self._graph is not None

    def run(self, steps: int, width: int = 1) -> Tensor:
        """Make some steps of ``width`` trials.

        Returns:
            Their losses, float64 [steps, width], on the device; the next call writes over them.
        """
        if width != self._width:
            self._graph, self._width, self._looks = None, width, 0
        self._row.zero_()
        if self._graph is None and self._looks >= LOOKS_BEFORE_CAPTURE and not self._given_up:
            self._capture()
        if self._graph is not None:
            for _ in range(steps):
                self._graph.replay()
        else:
            self._one_by_one(steps)
        return self._table[:steps, :width]

    def _one_by_one(self, steps: int) -> None:
        watched = None if self._given_up else self._host
        before = watched.state() if watched else None
        for _ in range(steps):
            self._once(for_capture=self._looks == LOOKS_BEFORE_CAPTURE - 1 and not self._given_up)
        self._looks += 1
        if watched and before and not same_host(before, watched.state()):
            self._give_up("a step changes something on the host, which a replay would not")

    def _once(self, for_capture: bool) -> None:
        losses = self._step(for_capture).detach().to(torch.float64).view(1, -1)
        self._table[:, : self._width].index_copy_(0, self._row, losses)
        self._row += 1

    def _capture(self) -> None:
        if self._unless is not None:
            self._give_up(self._unless)
            return
        graph = self._new_graph()
        try:
            graph.capture(lambda: self._once(for_capture=True))
        except RuntimeError as error:  # also out of memory; a device that has failed fails again in the next step
            self._give_up(" ".join(str(error).split())[:160])
        else:
            self._graph = graph

    def _give_up(self, why: str) -> None:
        self._given_up = True
        log_once(_LOG, logging.WARNING, f"{self._name} is trained without a CUDA graph: {why}.")


def _unseen(model: nn.Module | None) -> str | None:
    """Return what a model does in Python or elsewhere that cannot be watched, or None."""
    if model is None:
        return None
    if has_hooks(model):
        return "it has hooks, which a replay would not call"
    if any(isinstance(m, torch.jit.ScriptModule) for m in model.modules()):
        return "it has scripted modules, whose state cannot be seen"
    return None


class Host:
    """What a step could change on the host: the numbers and tensors that modules hold, and where generators are."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._modules = list(model.modules())
        self._draws_on_host = device.type != "cpu"  # there torch's CPU generator is not the device's own

    def state(self) -> tuple[list[object], list[Tensor]]:
        """Return the states of the host's generators with the numbers that modules hold, and the tensors they hold."""
        kind, keys, position, *_ = np.random.get_state()
        values: list[object] = [random.getstate(), kind, bytes(keys), position]  # type: ignore[arg-type]
        if self._draws_on_host:
            values.append(bytes(torch.get_rng_state().numpy()))
        tensors = []
        for module in self._modules:
            for name, value in [*vars(module).items(), *module._buffers.items()]:
                if isinstance(value, (bool, int, float, str)):
                    values.append((name, value))
                elif isinstance(value, Tensor):
                    tensors.append(value)
        return values, tensors


def same_host(before: tuple[list[object], list[Tensor]], after: tuple[list[object], list[Tensor]]) -> bool:
    """Return whether two states are equal; tensors are where they are the same objects, whatever is in them."""
    same_tensors = len(before[1]) == len(after[1]) and all(a is b for a, b in zip(before[1], after[1]))
    return same_tensors and before[0] == after[0]
