"""Streams of a device: where a stack does its work beside that of others, and how tensors and numbers cross over.

On a CPU there is none, and everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

T = TypeVar("T")


def side_stream(device: torch.device, lane: int = 0) -> torch.cuda.Stream | None:
    """Return the stream of a lane on a device, always the same one; None on a CPU.

    The libraries keep a workspace for every stream that they have seen: a new one for every stack would fill the
    memory.
    """
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _stream(index, lane)


@cache
def _stream(index: int, lane: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(torch.device("cuda", index))


def on(stream: torch.cuda.Stream | None) -> AbstractContextManager[Any]:
    """Return a context that gives the work of a block to a stream, whatever the caller's stream is doing."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


@contextmanager
def handed_over(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Give the work of a block to a stream, after what the caller's stream has been given and before what it will be.

    What is read or written in the block may therefore belong to the caller's stream: its memory is used again only
    after the block's work.
    """
    if stream is None:
        yield
        return
    caller = torch.cuda.current_stream(stream.device)
    stream.wait_stream(caller)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        caller.wait_stream(stream)


class Readback:
    """Numbers on their way to the host: the device goes on meanwhile, and so may other lanes.

    Args:
        values: on any device; what is written over them later on the same stream does not matter.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def wait(self) -> NDArray[Any]:
        """Return the numbers as soon as they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.numpy()


def take_turns(works: Iterable[Callable[[int], Iterator[T | None]]], lanes: int) -> Iterator[T]:
    """Run some works at once, by turns: each goes on until it yields None, which says that its device is busy.

    No clock decides whose turn it is, so that the order of what comes out is the same in every run.

    Args:
        works: begun one by one, as lanes become free; each is given the number of its lane, 0..lanes - 1, which no
            other has at the same time.
        lanes: works at the same time.

    Yields:
        What the works yield, but for None.
    """
    waiting = iter(works)
    free = list(range(lanes - 1, -1, -1))
    active: list[tuple[int, Iterator[T | None]]] = []
    while True:
        while free and (work := next(waiting, None)) is not None:
            lane = free.pop()
            active.append((lane, work(lane)))
        if not active:
            return
        lane, running = active.pop(0)
        for item in running:
            if item is None:
                active.append((lane, running))
                break
            yield item
        else:
            free.append(lane)
