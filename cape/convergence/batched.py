"""T* of many trials of one architecture at once: what ``measure`` says of each, faster.

A stack holds the trials in training, one in each slot. A trial that has finished leaves before the next backward pass
and the next one waiting takes its slot, so that a slow trial does not hold up a full stack, and the stack stays full.
Nothing that a trial computes depends on its slot or on the trials beside it.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cape.config import StoppingRule
from cape.convergence.convert import Unstackable
from cape.convergence.engine import make_stack, width_for
from cape.convergence.single import Trajectory, fixed_precision, measure, not_above_zero, trajectory_of
from cape.convergence.stack import Stack, Subject
from cape.convergence.stopping import TrajectoryScan
from cape.errors import ModelError
from cape.tasks import Loss, LossLike

_LOG = logging.getLogger(__name__)
_said: set[str] = set()  # reasons for running singly: each is logged once


@dataclass(frozen=True)
class Outcome:
    """What became of one trial.

    Attributes:
        index: its place among the trials given.
        trajectory: None where it failed.
        error: why it failed; None where it did not.
    """

    index: int
    trajectory: Trajectory | None
    error: Exception | None = None


@dataclass
class _Live:
    """A trial in a slot."""

    index: int
    subject: Subject
    scan: TrajectoryScan
    seconds: float = 0.0


def measure_many(
    subjects: Iterable[Subject],
    *,
    loss: LossLike | Loss = "cross_entropy",
    precision: str = "float32",
    width: int | None = None,
    step_seconds: float | None = None,
    count: int | None = None,
) -> Iterator[Outcome]:
    """Train many trials of one architecture at once, and yield what ``measure`` would say of each, as it finishes.

    On a CPU, stacked layers reproduce the plain engine's float32 numbers bit for bit, dropout included; recurrent
    layers and ``vmap`` agree with it to rounding. What cannot be stacked runs through ``measure``, one after the other,
    and one line of the log says why; so does a trial that is not like the first (other shapes). An out-of-memory error
    halves the stack and begins its trials anew.

    Args:
        subjects: taken one by one, as slots become free. Where making one raises an out-of-memory error, the stack is
            halved and the same iterator is asked again.
        loss: as for ``measure``; a stack needs a named one.
        precision: as for ``measure``.
        width: trials at the same time; None: as many as ``engine.width_for`` says.
        step_seconds: of one plain training step of this model, where it is known; else it is measured once.
        count: how many trials there are at most, where that is known: no stack is made for more.

    Yields:
        One ``Outcome`` for each trial, in the order in which they finish. A trial whose model fails (``ModelError``,
        out of memory at a width of one, any other ``RuntimeError``) has an error and disturbs no other.

    Raises:
        RuntimeError: the device itself failed (``torch.AcceleratorError``).
    """
    criterion = loss if isinstance(loss, Loss) else Loss(loss)
    queue = _Queue(subjects)
    while (head := queue.peek()) is not None:
        running: list[_Live] = []
        singly: Iterable[tuple[int, Subject]] = ()
        try:
            if width is None:
                width = min(width_for(head, criterion, precision), count or sys.maxsize)
            if step_seconds is None:
                step_seconds = plain_step_seconds(head, criterion, precision)
            stack: Stack | None = make_stack(head, criterion, width, precision)
            assert stack is not None
            yield from _run(stack, queue, running, criterion, precision, step_seconds)
        except Unstackable as why:
            _say_once(f"{type(head.model).__name__} runs singly: {why}.")
            queue.put_back(running)
            singly = queue
        except RuntimeError as error:
            full = out_of_memory(error)
            if isinstance(error, torch.AcceleratorError) or (error is queue.error and not full):
                raise
            queue.put_back(running)
            if full and width is not None and width > 1:
                width //= 2
                _LOG.warning("Out of memory: the stack shrinks to %d trials and begins them anew.", width)
            elif error is not queue.error:
                # One of them broke the stack: each runs alone, so that the error is that one's own.
                singly = [queue.pop() for _ in range(max(1, len(running)))]
            queue.error = None
        finally:
            stack = None  # its memory is needed
        yield from measure_singly(singly, loss=criterion, precision=precision)


def measure_singly(
    subjects: Iterable[tuple[int, Subject]], *, loss: LossLike | Loss, precision: str = "float32"
) -> Iterator[Outcome]:
    """Yield what ``measure`` says of each numbered trial, one after the other."""
    for index, subject in subjects:
        try:
            trajectory = measure(
                subject.model, subject.batch, loss=loss, lr=subject.lr, epsilons=subject.epsilons,
                stopping=subject.stopping, seed=subject.seed, precision=precision,
            )  # fmt: skip
        except (ModelError, RuntimeError) as error:
            if isinstance(error, torch.AcceleratorError):
                raise
            yield Outcome(index, None, error)
        else:
            yield Outcome(index, trajectory)


def plain_step_seconds(subject: Subject, criterion: Loss, precision: str) -> float:
    """Return the time of one plain training step, warmed up; NaN where the model fails or diverges at once."""
    short = replace(subject, stopping=StoppingRule(max_steps=1))
    (outcome,) = measure_singly([(0, short)], loss=criterion, precision=precision)
    return outcome.trajectory.step_seconds if outcome.trajectory else float("nan")


def out_of_memory(error: Exception) -> bool:
    """Return whether a device or the host had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class _Queue:
    """Numbered trials that wait; those that were put back come first."""

    def __init__(self, subjects: Iterable[Subject]) -> None:
        self._rest = iter(enumerate(subjects))
        self._front: deque[tuple[int, Subject]] = deque()
        self.error: Exception | None = None  # raised by whoever makes the trials: no stack is to blame

    def __iter__(self) -> Iterator[tuple[int, Subject]]:
        while self.peek() is not None:
            yield self.pop()

    def pop(self) -> tuple[int, Subject]:
        return self._front.popleft()

    def peek(self) -> Subject | None:
        """Return the next trial, or None where there is none; ``pop`` takes it."""
        if not self._front:
            try:
                item = next(self._rest, None)
            except Exception as error:  # whatever it was, it is only noted here
                self.error = error
                raise
            if item is not None:
                self._front.append(item)
        return self._front[0][1] if self._front else None

    def put_back(self, running: Iterable[_Live]) -> None:
        for one in sorted(running, key=lambda one: one.index, reverse=True):
            self._front.appendleft((one.index, one.subject))


def _run(
    stack: Stack,
    queue: _Queue,
    running: list[_Live],
    criterion: Loss,
    precision: str,
    step_seconds: float,
) -> Iterator[Outcome]:
    """Run the queue to its end; ``running`` holds, at any time, the trials in the stack's slots.

    No context is held while a trial is handed out or asked for: both run the caller's code.
    """
    like = _shape(queue.peek())
    while True:
        while len(running) < stack.capacity and (subject := queue.peek()) is not None:
            index, _ = queue.pop()
            if _shape(subject) != like:
                yield from measure_singly([(index, subject)], loss=criterion, precision=precision)
                continue
            running.append(_Live(index, subject, TrajectoryScan(subject.stopping, subject.epsilons)))
            with torch.no_grad():
                stack.load(subject)
        if not running:
            return
        device = running[0].subject.batch[1].device
        with fixed_precision(precision, device), torch.inference_mode(False), torch.no_grad():
            outcomes = _advance(stack, running, criterion, step_seconds)
        yield from outcomes


def _advance(stack: Stack, running: list[_Live], criterion: Loss, step_seconds: float) -> list[Outcome]:
    """Make some steps of all trials in the stack, take out those that have ended and return what became of them."""
    began = time.perf_counter()
    steps = _steps(running)
    outcomes: list[Outcome] = []
    history: Tensor | None = None
    for step in range(steps):
        outputs = stack.forward()
        if step == 0:
            outcomes = _take_out_misfits(stack, running, criterion, outputs)
            if not running:
                return outcomes
            history = torch.empty(steps, len(running), dtype=torch.float64, device=outputs.device)
        assert history is not None
        history[step] = stack.losses()
        if step < steps - 1:
            stack.update()
    assert history is not None
    losses = history.cpu().numpy()  # the one synchronization
    width = len(running)
    for slot in range(width - 1, -1, -1):
        one = running[slot]
        begins = not len(one.scan)
        if begins and losses[0, slot] <= 0.0:
            outcomes.append(Outcome(one.index, None, ModelError(not_above_zero(losses[0, slot]))))
        elif one.scan.feed(losses[:, slot]):
            seconds = one.seconds + (time.perf_counter() - began) / width
            outcomes.append(Outcome(one.index, trajectory_of(one.scan, seconds, step_seconds)))
        else:
            continue
        _take_out(stack, running, slot)
    if running:
        stack.update()
    for one in running:
        one.seconds += (time.perf_counter() - began) / width
    return outcomes


def _steps(running: list[_Live]) -> int:
    """Steps until the host looks: every one on a CPU; on a device more, the longer all trials have run."""
    shortest = min(len(one.scan) for one in running)
    on_cpu = running[0].subject.batch[1].device.type == "cpu"
    return 1 if on_cpu else min(16, max(1, shortest // 4))


def _take_out_misfits(stack: Stack, running: list[_Live], criterion: Loss, outputs: Tensor) -> list[Outcome]:
    """Take out the new trials whose outputs and targets cannot belong together."""
    failed = []
    for slot in range(len(running) - 1, -1, -1):
        if len(running[slot].scan):
            continue
        try:
            criterion.check(outputs[slot].nan_to_num(), running[slot].subject.batch[1])
        except ModelError as error:
            failed.append(Outcome(running[slot].index, None, error))
            _take_out(stack, running, slot)
    return failed


def _take_out(stack: Stack, running: list[_Live], slot: int) -> None:
    stack.drop(slot)
    last = running.pop()
    if slot < len(running):
        running[slot] = last


def _shape(subject: Subject | None) -> object:
    """Return what all trials of a stack share."""
    if subject is None:
        return None
    x, y = subject.batch
    parameters = tuple((name, p.shape, p.dtype, p.device) for name, p in subject.model.named_parameters())
    inputs = (x.shape, x.dtype) if isinstance(x, Tensor) else None
    return type(subject.model), parameters, inputs, y.shape, y.dtype


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        _LOG.warning(reason)
