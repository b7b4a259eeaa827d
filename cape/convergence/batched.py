"""T* of many trials of one architecture at once: what ``measure`` says of each, faster.

A stack holds the trials in training, one in each slot. A trial that has finished leaves before the next backward pass
and the next one waiting takes its slot, so that a slow trial does not hold up a full stack, and the stack stays full.
Nothing that a trial computes depends on its slot or on the trials beside it.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from cape.config import StoppingRule, check_count, check_precision
from cape.convergence.convert import Unstackable
from cape.convergence.engine import width_for
from cape.convergence.likeness import shape_of
from cape.convergence.single import measure
from cape.convergence.stack import Subject
from cape.convergence.training import Live, Outcome, Training
from cape.errors import first_line
from cape.logs import log_once
from cape.memory import out_of_memory
from cape.tasks import Loss, LossLike

_LOG = logging.getLogger(__name__)


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
    and one line of the log says why; so does a trial that is not like the first (other shapes, layers or settings). An
    out-of-memory error halves the stack and begins its trials anew.

    Args:
        subjects: taken one by one, as slots become free. Where making one raises an out-of-memory error, the stack is
            halved and the same iterator is asked again.
        loss: as for ``measure``; a stack needs a named one.
        precision: as for ``measure``.
        width: trials at the same time; None: as many as ``engine.width_for`` says.
        step_seconds: of one plain training step of this model, where it is known; else it is measured once.
        count: how many trials there are at most, where that is known: no stack is made for more.

    Yields:
        One ``Outcome`` for each trial, in the order in which they finish. A trial that fails (``ModelError``, out of
        memory at a width of one, whatever else its model raises) has an error and disturbs no other.

    Raises:
        SpecError: an unknown precision, or a width below 1.
        RuntimeError: the device itself failed (``torch.AcceleratorError``).
    """
    found = measure_in_lane(
        subjects, loss=loss, precision=precision, width=width, step_seconds=step_seconds, count=count
    )
    return (outcome for outcome in found if outcome is not None)


def measure_in_lane(
    subjects: Iterable[Subject],
    *,
    loss: LossLike | Loss,
    precision: str = "float32",
    width: int | None = None,
    step_seconds: float | None = None,
    count: int | None = None,
    lane: int = 0,
    lanes: int = 1,
) -> Iterator[Outcome | None]:
    """Do what ``measure_many`` does, and yield None whenever the device has been given work and the host would wait.

    Args:
        lane: whose stream the stack runs on, beside those of the other lanes.
        lanes: stacks that share the device, and its memory.

    The other arguments, the outcomes and the errors are those of ``measure_many``.
    """
    criterion = loss if isinstance(loss, Loss) else Loss(loss)
    check_precision(precision)
    if width is not None:
        check_count(width, "width")
    queue = _Queue(subjects)
    while (head := queue.peek()) is not None:
        running: list[Live] = []
        singly: Iterable[tuple[int, Subject]] = ()
        training: Training | None = None
        try:
            if width is None:
                width = min(width_for(head, criterion, precision, lanes), count or sys.maxsize)
            if step_seconds is None:
                step_seconds = plain_step_seconds(head, criterion, precision)
            training = Training(head, running, criterion, precision, width, step_seconds, lane)
            yield from _run(training, queue)
        except Unstackable as why:
            log_once(_LOG, logging.WARNING, f"{type(head.model).__name__} runs singly: {why}.")
            queue.put_back(running)
            singly = queue
        except Exception as error:  # whatever a model raises, it is one trial's
            full = out_of_memory(error)
            if isinstance(error, torch.AcceleratorError) or (error is queue.error and not full):
                raise
            queue.put_back(running)
            if full and width is not None and width > 1:
                width //= 2
                _LOG.warning("Out of memory: the stack shrinks to %d trials and begins them anew.", width)
            elif error is not queue.error:
                # One of them broke the stack: each runs alone, so that the error is that one's own.
                log_once(
                    _LOG, logging.WARNING,
                    f"A stack of {type(head.model).__name__} broke, and its trials run singly: {first_line(error)}",
                )  # fmt: skip
                singly = [queue.pop() for _ in range(max(1, len(running)))]
            queue.error = None
        finally:
            training = None  # its memory is needed
        yield from measure_singly(singly, loss=criterion, precision=precision)


def measure_singly(
    subjects: Iterable[tuple[int, Subject]], *, loss: LossLike | Loss, precision: str = "float32"
) -> Iterator[Outcome]:
    """Yield what ``measure`` says of each numbered trial, one after the other."""
    for index, subject in subjects:
        try:
            # Steps are timed: what other lanes have begun must not run beside them.
            if getattr(subject.batch[1], "is_cuda", False):
                torch.cuda.synchronize(subject.batch[1].device)
            trajectory = measure(
                subject.model, subject.batch, loss=loss, lr=subject.lr, epsilons=subject.epsilons,
                stopping=subject.stopping, seed=subject.seed, precision=precision,
            )  # fmt: skip
        except Exception as error:
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


class _Queue:
    """Numbered trials that wait; those that were put back come first."""

    def __init__(self, subjects: Iterable[Subject]) -> None:
        self._rest = iter(enumerate(subjects))
        self._front: deque[tuple[int, Subject]] = deque()
        self.error: Exception | None = None  # raised by whoever makes the trials: no stack is to blame

    def __iter__(self) -> Iterator[tuple[int, Subject]]:
        while self.peek() is not None:
            yield self.pop()

    @property
    def index(self) -> int:
        """The number of the trial that ``peek`` has returned."""
        return self._front[0][0]

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

    def put_back(self, running: Iterable[Live]) -> None:
        for one in sorted(running, key=lambda one: one.index, reverse=True):
            self._front.appendleft((one.index, one.subject))


def _run(training: Training, queue: _Queue) -> Iterator[Outcome | None]:
    """Run the queue to its end.

    No context is held while a trial is handed out or asked for, or another lane has its turn: these run other code.
    """
    running = training.running
    while True:
        while len(running) < training.stack.capacity and (subject := queue.peek()) is not None:
            if shape_of(subject) != training.like:
                yield from measure_singly([queue.pop()], loss=training.criterion, precision=training.precision)
                continue
            training.load(queue.index, subject)
            queue.pop()  # only now: where it cannot be loaded, it is not lost
        if not running:
            return
        if not training.waits:
            yield from training.look()
            continue
        look = training.begin()
        if look.history is not None:
            yield None
        yield from training.end(look)
