"""T* of one model on one batch: the plain definition, which every faster path must reproduce."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cape.checks import check_batch, running, trainable
from cape.config import StoppingRule, check_count, check_epsilon, check_epsilons, check_lr, check_precision, check_seed
from cape.convergence.graphed import LOOKS_BEFORE_CAPTURE, RepeatedStep, graph_maker
from cape.convergence.stopping import TrajectoryScan
from cape.convergence.streams import handed_over, side_stream
from cape.errors import ModelError
from cape.memory import device_failed
from cape.probing.taps import leaves_behind
from cape.state import (
    Inputs,
    Untouched,
    call,
    has_gradient_hooks,
    is_dense,
    map_tensors,
    ordinary_tensor,
    preserved,
)
from cape.surroundings import fixed_precision
from cape.tasks import DETACHED, Loss, LossLike

WEIGHT_DECAY = 1e-4
BETAS = (0.9, 0.999)

# step_seconds: the first updates allocate the optimizer's state and warm the caches; they are not timed. A trajectory
# that ends sooner is continued (the model is put back anyway) until there is something to take a median of.
_WARMUP_UPDATES = 2
_TIMED_UPDATES = 2
assert LOOKS_BEFORE_CAPTURE >= _WARMUP_UPDATES + _TIMED_UPDATES  # replayed steps are no plain ones, and not timed


@dataclass(frozen=True)
class Trajectory:
    """What happened to the loss of the probe batch.

    Attributes:
        t_star: for each ε asked for, the smallest number of updates t with L_t ≤ ε·L_0, or None (censored).
        losses: L_0..L_stop, float64 [stopped_at + 1].
        stop_reason: ``reached`` (the smallest ε was crossed), ``plateau``, ``cap`` or ``diverged``.
        stopped_at: number of updates at which the trajectory ended.
        seconds: wall time of the trajectory.
        step_seconds: median wall time of one plain training step, warmed up, on this device.
    """

    t_star: Mapping[float, int | None]
    losses: NDArray[np.float64] = field(repr=False)
    stop_reason: str
    stopped_at: int
    seconds: float
    step_seconds: float

    @property
    def l0(self) -> float:
        """Loss of the batch before any update."""
        return float(self.losses[0])

    def reached(self, epsilon: float) -> bool:
        """Return whether the loss fell to ε·L_0 before the trajectory ended (any ε, also one not asked for)."""
        return bool((np.isfinite(self.losses) & (self.losses <= check_epsilon(epsilon) * self.l0)).any())


def measure(
    model: nn.Module,
    batch: tuple[Inputs, Tensor],
    *,
    loss: LossLike | Loss = "cross_entropy",
    lr: float = 1e-3,
    epsilons: Iterable[float] = (0.1, 0.15, 0.2),
    stopping: StoppingRule | None = None,
    seed: int = 0,
    precision: str = "float32",
    read_every: int | None = None,
) -> Trajectory:
    """Train a model on one batch until the smallest ε is reached, and put the model back as it was (Eq. 3).

    AdamW (weight decay 1e-4, betas 0.9 and 0.999), always in train mode, always on the same batch, one forward pass
    per update: the pass that gives L_t is the one that update t + 1 goes back through.

    Args:
        model: any module; trained on the device where its parameters are, then restored bit for bit.
        batch: (inputs, targets); the inputs as the model takes them, the targets [B, ...].
        loss: a name, an ``nn.Module`` or a callable ``(outputs, targets) -> per-sample or mean loss``.
        lr: learning rate.
        epsilons: fractions of L_0 whose crossings are recorded; the trajectory runs to the smallest.
        stopping: cap, plateau exit; the design's values where None.
        seed: seeds dropout and whatever else the model draws; the caller's RNG is left as it was.
        precision: ``float32``, ``tf32`` (matrix products and convolutions on CUDA; elsewhere the same as float32)
            or ``bf16`` (autocast; parameters and loss stay float32).
        read_every: how many losses to leave on the device between two looks of the host; the result does not depend
            on it. None: every one on a CPU, where looking is free, and 4 to 32, growing, elsewhere.

    Raises:
        SpecError: an argument out of range.
        ModelError: an empty batch, labels out of range, a model without trainable parameters, or a loss that is zero
            or negative at the start (a fraction of it means nothing).
    """
    check_lr(lr)
    epsilons = check_epsilons(epsilons)
    check_precision(precision)
    seed = check_seed(seed)
    if read_every is not None:
        check_count(read_every, "read_every")
    check_batch(batch)
    criterion = loss if isinstance(loss, Loss) else Loss(loss)
    scan = TrajectoryScan(StoppingRule() if stopping is None else stopping, epsilons)
    with _training(model, batch, criterion, lr, seed, precision, read_every or 32) as run:
        seconds, step_seconds = _follow(run, scan, read_every)
    return trajectory_of(scan, seconds, step_seconds)


@contextmanager
def updated(
    model: nn.Module, batch: tuple[Inputs, Tensor], criterion: Loss, *, lr: float, updates: int
) -> Iterator[None]:
    """Run a block in which a model has made the first updates of ``measure``; then put it back, bit for bit.

    Raises:
        ModelError: as ``measure``.
    """
    check_batch(batch)
    with _training(model, batch, criterion, lr, 0, "float32", updates) as run:
        run.train(updates)
        yield


@contextmanager
def _training(
    model: nn.Module, batch: tuple[Inputs, Tensor], criterion: Loss, lr: float, seed: int, precision: str, most: int
) -> Iterator[_Run]:
    """Run a block that trains a model on a batch, ``most`` updates between two looks; then put it back."""
    parameters = list(trainable(model).values())
    device = parameters[0].device
    with (
        fixed_precision(precision, device),  # first: no other thread's block changes what is kept
        preserved(criterion.beside(model), seed, parameters=True) as kept,
        torch.inference_mode(False),
        torch.enable_grad(),
        handed_over(side_stream(device)),
    ):
        targets = ordinary_tensor(batch[1]).to(device)
        run = _Run(model, move(batch[0], device), targets, criterion, parameters, lr, precision, most)
        kept.spare(leaves_behind([run.loss]))
        yield run


def trajectory_of(scan: TrajectoryScan, seconds: float, step_seconds: float) -> Trajectory:
    """Return what a scan that has ended says of its trajectory."""
    assert scan.stop_reason is not None and scan.stopped_at is not None
    return Trajectory(
        t_star=dict(scan.t_star),
        losses=scan.losses,
        stop_reason=scan.stop_reason,
        stopped_at=scan.stopped_at,
        seconds=seconds,
        step_seconds=step_seconds,
    )


def not_above_zero(l0: float) -> ModelError | None:
    """Return the error of a loss that has no fraction to aim at, else None: what is not finite has diverged."""
    if not math.isfinite(l0) or l0 > 0.0:
        return None
    return ModelError(
        f"The loss is {l0:g} before any update, so that no fraction of it can be aimed at; use a loss that starts above"
        " zero."
    )


def move(inputs: Inputs, device: torch.device) -> Inputs:
    """Return the inputs with every tensor on ``device``."""
    return map_tensors(lambda t: t.to(device), inputs)


class _Run:
    """A model in training: the loss at hand has a graph, through which the next update goes back."""

    def __init__(
        self,
        model: nn.Module,
        x: Inputs,
        y: Tensor,
        criterion: Loss,
        parameters: list[nn.Parameter],
        lr: float,
        precision: str,
        most: int,
    ) -> None:
        self.model, self.y, self.criterion = model, y, criterion
        with running(model, "in train mode"):
            model.train()  # which may return anything
        self._inputs = Untouched(x)
        self.device = parameters[0].device
        self._autocast = precision == "bf16"
        self.made = 0  # losses of the last ``updates`` that are there, also where it broke off
        # Measured on CPU, MLPs of width 128 to 1024, B = 32: fused 1.3-1.6 times as fast a step as foreach. There it
        # reads nothing of strides: what has gaps in memory would be trained wrongly, and what lies in them changed.
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") and is_dense(p) for p in parameters)
        self._optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=fused)
        self.loss = self._forward(check=True)
        # float64 holds every loss exactly, whatever the model's dtype.
        self._losses = torch.empty(most, dtype=torch.float64, device=self.device)
        self._no_graph = _no_graph(criterion, parameters, fused)

    def _forward(self, check: bool = False) -> Tensor:
        with (
            torch.autocast(self.device.type, torch.bfloat16) if self._autocast else nullcontext(),
            running(self.model, "in train mode") if check else nullcontext(),
        ):
            outputs = call(self.model, self._inputs.again())
        if self._autocast and isinstance(outputs, Tensor):
            outputs = outputs.float()
        if check:  # shapes and labels; a NaN is no error here, it is a trajectory that diverged at step 0
            self.criterion.check(outputs.detach().nan_to_num() if isinstance(outputs, Tensor) else outputs, self.y)
        loss = self.criterion.mean(outputs, self.y)
        if check and not loss.requires_grad:
            raise ModelError(DETACHED)
        return loss

    def repeated(self) -> RepeatedStep | None:
        """Return steps that a graph may replay, or None on a device that has none.

        The caller holds them: the run itself would close a circle, and a graph's memory would wait for the collector.
        """
        maker = graph_maker(self.device)
        if maker is None:
            return None
        return RepeatedStep(
            self._step, maker, name=type(self.model).__name__, rows=len(self._losses), columns=1, device=self.device,
            model=self.model, unless=self._no_graph,
        )  # fmt: skip

    def updates(self, count: int, repeated: RepeatedStep | None) -> Tensor:
        """Make some updates and return the loss after each, float64 [count], on the device."""
        self.made = 0
        if repeated is None:
            for i in range(count):
                self._losses[i] = self._update()
                self.made = i + 1
            return self._losses[:count]
        if self.loss.requires_grad:  # L_0 is at hand; from here on a step begins with its forward pass
            self._back()
            self.loss = self.loss.detach()
        return repeated.run(count)[:, 0]

    def train(self, count: int) -> None:
        """Make some updates, one at least, of which no loss is wanted, and keep nothing for more."""
        self.updates(count - 1, None)
        self._back()
        self.loss = self.loss.detach()
        self._optimizer.state.clear()

    def made_losses(self) -> NDArray[np.float64]:
        """Return the losses that ``updates`` got to before it broke off."""
        return np.asarray(self._losses[: self.made].cpu().numpy())

    def _update(self) -> Tensor:
        """Make one update and return the loss after it, detached."""
        self._back()
        self.loss = self._forward()
        return self.loss.detach()

    def _step(self, for_capture: bool = False) -> Tensor:
        """Return the next loss, detached, and make the update after it: ``_update`` cut at another place.

        From forward to update a step needs nothing that another has left, so that a graph can replay it.
        """
        self._optimizer.zero_grad(set_to_none=True)  # a capture that broke off would leave some
        self.loss = self._forward()
        self._back()
        self.loss = self.loss.detach()
        return self.loss

    def _back(self) -> None:
        """Go back through the loss at hand and update the parameters."""
        self.loss.backward()
        if self.device.type == "cuda":  # AdamW wants the flag in a capture, and complains of it elsewhere
            self._optimizer.param_groups[0]["capturable"] = torch.cuda.is_current_stream_capturing()
        try:
            self._optimizer.step()
        except RuntimeError as error:
            if "sparse" not in str(error):
                raise
            raise ModelError("AdamW takes no sparse gradients; make the embeddings with `sparse=False`.") from error
        self._optimizer.zero_grad(set_to_none=True)


def _no_graph(criterion: Loss, parameters: list[nn.Parameter], fused: bool) -> str | None:
    """Return why no graph can hold a step, or None."""
    if not criterion.is_named:
        return f"what the loss '{criterion.name}' does on the host is not known"
    if len({p.device for p in parameters}) > 1:
        return "its parameters lie on several devices"
    if has_gradient_hooks(parameters):
        return "its parameters have hooks, which a replay would not call"
    return None if fused else "there is no fused AdamW for its parameters"


def _follow(run: _Run, scan: TrajectoryScan, read_every: int | None) -> tuple[float, float]:
    """Train until the rule ends the trajectory; return (seconds, seconds of one warmed-up step)."""
    began = time.perf_counter()
    l0 = float(run.loss.detach())
    if (refused := not_above_zero(l0)) is not None:
        raise refused
    ended = scan.feed(l0)
    updates = 0
    timed: list[float] = []
    seconds = time.perf_counter() - began
    repeated = run.repeated()
    while not ended or (scan.stop_reason != "diverged" and len(timed) < _TIMED_UPDATES):
        chunk = read_every or (1 if run.device.type == "cpu" else min(32, max(4, updates // 4)))
        start = time.perf_counter()
        try:
            losses = run.updates(chunk, repeated).cpu().numpy()  # the one synchronization
        except Exception as error:  # steps after the end are no part of the trajectory
            if device_failed(error) or not (ended or scan.feed(run.made_losses())):
                raise
            break
        stop = time.perf_counter()
        if updates >= _WARMUP_UPDATES and not (repeated and repeated.captured):
            timed += [(stop - start) / chunk] * chunk
        updates += chunk
        if not ended:
            ended = scan.feed(losses)
            seconds = stop - began
    return seconds, float(np.median(timed)) if timed else float("nan")
