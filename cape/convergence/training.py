"""The stack in training: some steps of all its trials, a look at their losses, and who leaves.

A look has two halves, so that the host can do something else while the device makes the steps: ``Training.begin`` gives
it the work, and ``Training.end`` waits for the losses.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cape.config import check_lr, check_seed
from cape.convergence.engine import make_stack
from cape.convergence.graphed import RepeatedStep, graph_maker
from cape.convergence.likeness import shape_of
from cape.convergence.single import Trajectory, not_above_zero, trajectory_of
from cape.convergence.stack import Stack, Subject
from cape.convergence.stopping import TrajectoryScan
from cape.convergence.streams import Readback, handed_over, on, side_stream
from cape.errors import ModelError
from cape.surroundings import fixed_precision
from cape.tasks import Loss

_MOST_STEPS = 16  # between two looks of the host


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
class Live:
    """A trial in a slot."""

    index: int
    subject: Subject
    scan: TrajectoryScan
    seconds: float = 0.0


@dataclass
class Look:
    """Steps that the device is making: what has failed before them, their losses on the way, and the host's share."""

    outcomes: list[Outcome]
    history: Readback | None = None
    updated: bool = False  # whether the last step's update is among them
    seconds: float = 0.0


class Training:
    """A stack, the trials in its slots, and where its steps are made.

    Args:
        head: one of the trials.
        running: kept, at any time, equal to the trials in the stack's slots.
        lane: whose stream it runs on, where the device has streams.
    """

    def __init__(
        self,
        head: Subject,
        running: list[Live],
        criterion: Loss,
        precision: str,
        width: int,
        step_seconds: float,
        lane: int,
    ) -> None:
        device = head.batch[1].device
        self.running, self.like = running, shape_of(head)
        self.criterion, self.precision, self._step_seconds = criterion, precision, step_seconds
        self.device = device
        self._stream = side_stream(device, lane + 1)  # lane 0's is not `measure`'s
        maker = graph_maker(device)
        self._repeated: RepeatedStep | None = None
        with handed_over(self._stream), torch.inference_mode(False), torch.no_grad():
            self.stack = make_stack(head, criterion, width, precision)
            if maker is not None:
                self._repeated = RepeatedStep(
                    self.stack.step, maker, name=f"A stack of {type(head.model).__name__}", rows=_MOST_STEPS,
                    columns=width, device=device, model=self.stack.model,
                )  # fmt: skip
        self._outputs: Tensor | None = None  # [1, B, ...], once a forward pass has shown what a trial's are like

    def load(self, index: int, subject: Subject) -> None:
        check_lr(subject.lr)
        subject = replace(subject, seed=check_seed(subject.seed))
        one = Live(index, subject, TrajectoryScan(subject.stopping, subject.epsilons))
        with handed_over(self._stream), torch.no_grad():
            self.stack.load(subject)
        self.running.append(one)

    def look(self) -> list[Outcome]:
        """Do what ``begin`` and ``end`` do, where there is nothing to wait for."""
        with self._contexts():
            return self._end(self._begin())

    def begin(self) -> Look:
        """Give the device some steps of all trials to make, and take out the misfits among the new ones."""
        with self._contexts():
            return self._begin()

    def end(self, look: Look) -> list[Outcome]:
        """Wait for the losses, take out the trials that have ended, and return what became of them."""
        with self._contexts():
            return self._end(look)

    def _begin(self) -> Look:
        began = time.perf_counter()
        look = self._repeat() if self._repeated and self._outputs is not None else self._first_steps()
        look.seconds = time.perf_counter() - began
        return look

    def _repeat(self) -> Look:
        """Make steps that end with an update; a trial that ends within them has no use for it."""
        assert self._repeated is not None and self._outputs is not None
        outputs = self._outputs.expand(len(self.running), *self._outputs.shape[1:])
        failed = _take_out_misfits(self.stack, self.running, self.criterion, outputs)
        if not self.running:
            return Look(failed)
        history = self._repeated.run(_steps(self.running), len(self.running))
        return Look(failed, Readback(history), updated=True)

    def _first_steps(self) -> Look:
        """Make steps without a last update, so that a trial that ends is taken out before it."""
        stack, running, steps = self.stack, self.running, _steps(self.running)
        failed: list[Outcome] = []
        history: Tensor | None = None
        for step in range(steps):
            outputs = stack.forward()
            if step == 0:
                failed = _take_out_misfits(stack, running, self.criterion, outputs)
                if not running:
                    return Look(failed)
                history = torch.empty(steps, len(running), dtype=torch.float64, device=outputs.device)
                self._outputs = torch.zeros_like(outputs[:1]) if self._repeated else None
            assert history is not None
            history[step] = stack.losses()
            if step < steps - 1:
                stack.update()
        assert history is not None
        return Look(failed, Readback(history))

    def _end(self, look: Look) -> list[Outcome]:
        began = time.perf_counter()
        outcomes = look.outcomes
        if look.history is None:
            return outcomes
        losses = look.history.wait()
        running, width = self.running, len(self.running)
        for slot in range(width - 1, -1, -1):
            one = running[slot]
            refused = None if len(one.scan) else not_above_zero(losses[0, slot])
            if refused is not None:
                outcomes.append(Outcome(one.index, None, refused))
            elif one.scan.feed(losses[:, slot]):
                seconds = one.seconds + (look.seconds + time.perf_counter() - began) / width
                outcomes.append(Outcome(one.index, trajectory_of(one.scan, seconds, self._step_seconds)))
            else:
                continue
            _take_out(self.stack, running, slot)
        if running and not look.updated:
            self.stack.update()
        for one in running:
            one.seconds += (look.seconds + time.perf_counter() - began) / width
        return outcomes

    @property
    def waits(self) -> bool:
        """Whether the host has nothing to do between ``begin`` and ``end``: on a CPU the steps are already made."""
        return self.device.type != "cpu"

    @contextmanager
    def _contexts(self) -> Iterator[None]:
        with (
            fixed_precision(self.precision, self.device),
            torch.inference_mode(False),
            torch.no_grad(),
            on(self._stream),
        ):
            yield


def _steps(running: list[Live]) -> int:
    """Steps until the host looks: every one on a CPU; on a device more, the longer all trials have run."""
    shortest = min(len(one.scan) for one in running)
    on_cpu = running[0].subject.batch[1].device.type == "cpu"
    return 1 if on_cpu else min(_MOST_STEPS, max(1, shortest // 4))


def _take_out_misfits(stack: Stack, running: list[Live], criterion: Loss, outputs: Tensor) -> list[Outcome]:
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


def _take_out(stack: Stack, running: list[Live], slot: int) -> None:
    stack.drop(slot)
    last = running.pop()
    if slot < len(running):
        running[slot] = last
