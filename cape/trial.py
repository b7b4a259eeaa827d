"""One trial from its seed to its rows: the one place where the probe and T* meet. Knows nothing of Ray."""

from __future__ import annotations

import logging
import math
import platform
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cape.config import Augmentation, ModelSpec, TrialSpec
from cape.convergence import Outcome, Subject, Trajectory
from cape.convergence.batched import measure_in_lane, measure_singly, plain_step_seconds
from cape.convergence.convert import Unstackable
from cape.convergence.engine import lanes_for, same_bits, single_because
from cape.convergence.later import with_later
from cape.convergence.stacked_probe import probe_many, probed_together
from cape.convergence.streams import take_turns
from cape.drawn import Drawn, draw, prepare
from cape.errors import ModelError, SpecError, did_you_mean
from cape.jsonconfig import canonical_json
from cape.logs import log_once
from cape.memory import kept_memory, out_of_memory
from cape.probing import Features, probe
from cape.tasks import TASK_LOSS, Loss

_LOG = logging.getLogger(__name__)
Row = dict[str, Any]

ENGINES = ("auto", "single")

# How many losses of a trajectory, L_0 first, a row keeps.
KEPT_LOSSES = 64

# Trials that are looked at together, to find those that can share a stack: a shard's worth.
_LOOKAHEAD = 512

# Seconds of one plain training step by (model, task, batch size, precision, device): measured once in a process.
_step_seconds: dict[tuple[str, str, int, str, str], float] = {}


def run_trials(
    trials: Iterable[TrialSpec],
    device: str | torch.device = "cpu",
    data_root: str | Path | None = None,
    sweep_hash: str = "",
    engine: str = "auto",
    begun: Callable[[TrialSpec], None] | None = None,
) -> Iterator[list[Row]]:
    """Probe and train each trial, and yield its rows (one for each ε) as soon as it is done.

    A trial's numbers follow from its seed alone: the model's choice, its initialization, the batch and the dropout
    masks each have a seed of their own. Trials of the same model and batch size are trained together where that is
    faster (``convergence.engine``), so that rows come in the order in which trials finish. A trial whose model fails
    (``ModelError``, out of memory, any other ``RuntimeError``) yields rows with ``stop_reason`` "failed" and its error;
    it does not disturb the others.

    Args:
        trials: what to run.
        device: where to run it.
        data_root: folder of the data; see ``datasets.data_root``.
        sweep_hash: written into every row.
        engine: ``auto``, or ``single`` for one trial after the other, each as ``measure`` runs it.
        begun: called with each trial right before its model is built; trials are taken from ``trials`` long before.

    Raises:
        SpecError, DataError: an unknown family or dataset, data that is missing or does not fit: no trial of the
            same kind could succeed.
        RuntimeError: the device itself failed (a sticky CUDA error); nothing after it in this process can be trusted.
    """
    if engine not in ENGINES:
        raise SpecError(f"Unknown engine '{engine}'.{did_you_mean(engine, ENGINES)}")
    device = torch.device(device)
    rest = iter(trials)
    with kept_memory(device, give_back=False) if engine == "auto" else nullcontext():
        while window := list(islice(rest, _LOOKAHEAD)):
            groups: dict[Any, list[Drawn]] = {}
            for number, trial in enumerate(window):
                drawn = draw(trial, data_root)
                # Where the choice of the model fails there is nothing to share.
                alike = number if drawn.spec is None or engine == "single" else _key(drawn, device)
                groups.setdefault(alike, []).append(drawn)
            by_lanes: dict[int, list[Callable[[int], Iterator[list[Row] | None]]]] = {}
            for group in groups.values():
                lanes = 1 if engine == "single" else lanes_for(len(group), device)
                run = partial(_run_alike, group, device, sweep_hash, engine, begun, lanes)
                by_lanes.setdefault(lanes, []).append(run)
            for lanes, runs in by_lanes.items():
                yield from take_turns(runs, lanes)


def _key(drawn: Drawn, device: torch.device) -> tuple[str, str, int, str, str]:
    """Return what trials of one stack have in common."""
    assert drawn.spec is not None
    trial, model = drawn.trial, canonical_json(drawn.spec.to_dict())
    return model, drawn.dataset.task, trial.batch_size, trial.precision, str(device)


def _run_alike(
    group: list[Drawn],
    device: torch.device,
    sweep_hash: str,
    engine: str,
    begun: Callable[[TrialSpec], None] | None,
    lanes: int,
    lane: int,
) -> Iterator[list[Row] | None]:
    """Run trials of the same model and batch size and yield their rows, and None where another lane may go on."""
    subjects = _Subjects(group, device, sweep_hash, together=engine == "auto", begun=begun)
    for outcome in _outcomes(subjects, group, device, engine, lanes, lane):
        while subjects.failed:
            yield subjects.failed.popleft()
        if outcome is None:
            yield None
            continue
        rows = subjects.started[outcome.index]
        if outcome.error is not None:
            yield _failed(rows, outcome.error)
            continue
        assert outcome.trajectory is not None
        for row in rows:
            row.update(_truth(outcome.trajectory, row["epsilon"]))
        yield rows
    yield from subjects.failed
    if device.type == "cuda":
        torch.cuda.empty_cache()


class _Subjects(Iterator[Subject]):
    """Builds and probes a group's trials, a few when one is asked for.

    Args:
        group: trials of one model and batch size.
        device: where they run.
        sweep_hash: written into every row.
        together: whether trials may be probed several at once. A trial is then probed the same way if it is the only
            one, so that its numbers do not depend on its neighbours.

    Attributes:
        started: rows of the trials handed out, in order.
        failed: rows of those that failed before.
        beside_a_stack: whether an out-of-memory error may be a stack's fault: it is then raised, once for each trial,
            and the trial is built again when the next one is asked for.
    """

    def __init__(
        self,
        group: list[Drawn],
        device: torch.device,
        sweep_hash: str,
        *,
        together: bool,
        begun: Callable[[TrialSpec], None] | None = None,
    ) -> None:
        self._waiting, self._device, self._sweep_hash = deque(group), device, sweep_hash
        self._begun = begun
        self._at_once: int | None = None if together else 0  # None: not known yet; 0: each by itself
        self._ready: deque[tuple[list[Row], Subject]] = deque()
        self._again: Drawn | None = None
        self.started: list[list[Row]] = []
        self.failed: deque[list[Row]] = deque()
        self.beside_a_stack = False

    def __next__(self) -> Subject:
        while not self._ready:
            if not self._waiting:
                raise StopIteration
            self._probe(self._build())
        rows, subject = self._ready.popleft()
        self.started.append(rows)
        return subject

    def _build(self) -> list[tuple[Drawn, list[Row], Subject]]:
        """Take the next trials that are to be probed together and build their models."""
        built: list[tuple[Drawn, list[Row], Subject]] = []
        while self._waiting and len(built) < max(1, self._at_once or 0):
            drawn = self._waiting[0]
            rows = _base_rows(drawn.trial, self._device, self._sweep_hash)
            if self._begun is not None:
                self._begun(drawn.trial)
            try:
                for row in rows:
                    row.update(_described(drawn))
                subject = prepare(drawn, self._device)
            except (ModelError, RuntimeError) as error:
                if built and out_of_memory(error):
                    break  # first those that have been built: they may be what fills the memory
                if self._to_be_raised(error, drawn):
                    self._again = drawn
                    raise
                self._waiting.popleft()
                self.failed.append(_failed(rows, error))
                continue
            self._waiting.popleft()
            built.append((drawn, rows, subject))
            if self._at_once is None:
                self._at_once = probed_together(subject.model, subject.batch, TASK_LOSS[drawn.dataset.task])
        return built

    def _probe(self, built: list[tuple[Drawn, list[Row], Subject]]) -> None:
        """Write what the probe says into the rows; put those trials among the ready or the failed."""
        began = time.perf_counter()
        known: list[Features | None] = [None] * len(built)
        if self._at_once and built:
            known = _probe_together([drawn for drawn, _, _ in built], [subject for _, _, subject in built])
        seconds = (time.perf_counter() - began) / max(1, len(built))
        for i, (drawn, rows, subject) in enumerate(built):
            began = time.perf_counter()
            try:
                found = _all_features(known[i], drawn, subject)
            except (ModelError, RuntimeError) as error:
                if self._to_be_raised(error, drawn):
                    self._waiting.extendleft(drawn for drawn, _, _ in reversed(built[i:]))
                    self._again = drawn
                    raise
                self.failed.append(_failed(rows, error))
                continue
            for row in rows:
                row.update(found, probe_seconds=seconds + time.perf_counter() - began)
            self._ready.append((rows, subject))

    def _to_be_raised(self, error: Exception, drawn: Drawn) -> bool:
        return self.beside_a_stack and out_of_memory(error) and drawn is not self._again


def _outcomes(
    subjects: _Subjects, group: list[Drawn], device: torch.device, engine: str, lanes: int, lane: int
) -> Iterator[Outcome | None]:
    """Choose the engine and run it; None where another lane may go on."""
    first = next(subjects, None)
    if first is None:
        return
    precision, loss = group[0].trial.precision, TASK_LOSS[group[0].dataset.task]
    everyone = chain([first], subjects)
    why = single_because(first, precision, len(group))
    if engine == "single" or why is not None:
        if why is not None:
            log_once(_LOG, logging.INFO, f"{group[0].trial.family} {type(first.model).__name__} runs singly: {why}.")
        yield from measure_singly(enumerate(everyone), loss=loss, precision=precision)
        return
    key, apart = _key(group[0], device), 0
    if key not in _step_seconds:
        if same_bits(first):  # then the first trial may run plain, and its own steps are timed
            (outcome,) = measure_singly([(0, first)], loss=loss, precision=precision)
            yield outcome
            seconds = outcome.trajectory.step_seconds if outcome.trajectory else float("nan")
            everyone, apart = chain(subjects), 1
            if len(group) <= 2:  # a stack of one gains nothing
                yield from measure_singly(enumerate(everyone, start=1), loss=loss, precision=precision)
                return
        else:
            seconds = plain_step_seconds(first, Loss(loss), precision)
        if math.isfinite(seconds):
            _step_seconds[key] = seconds
    known = _step_seconds.get(key, float("nan"))
    subjects.beside_a_stack = True
    stacked = measure_in_lane(
        everyone, loss=loss, precision=precision, step_seconds=known, count=max(1, len(group) - apart),
        lanes=lanes, lane=lane,
    )  # fmt: skip
    for found in stacked:
        yield None if found is None else replace(found, index=found.index + apart)


def _failed(rows: list[Row], error: Exception) -> list[Row]:
    """Return the rows of a trial that failed; raise the error again where the device did."""
    if isinstance(error, torch.AcceleratorError):  # out of memory is the trial's fault, this is not
        raise error
    for row in rows:
        row.update(converged=False, stop_reason="failed", t_star=None, error=_one_line(error))
    return rows


def failed_rows(trial: TrialSpec, device: str | torch.device, sweep_hash: str, error: str) -> list[Row]:
    """Return the rows of a trial that was given up: what is known without running it, and the error."""
    rows = _base_rows(trial, torch.device(device), sweep_hash)
    for row in rows:
        row.update(converged=False, stop_reason="failed", t_star=None, error=error[:500])
    return rows


def _base_rows(trial: TrialSpec, device: torch.device, sweep_hash: str) -> list[Row]:
    """Return what is known of a trial's rows before it runs."""
    shared = {
        "trial_id": trial.trial_id,
        "sweep_hash": sweep_hash,
        "family": trial.family,
        "dataset": trial.dataset,
        "task": trial.task,
        "batch_size": trial.batch_size,
        "lr": trial.lr,
        "seed": trial.seed,
        "replicate": trial.replicate,
        "precision": trial.precision,
        "preprocess": trial.preprocess,
        "augmentation": None if trial.augmentation is None else trial.augmentation.to_json(),
        "device": device_name(device),
    }
    return [{**shared, "epsilon": e, "log_epsilon": math.log(e)} for e in trial.epsilons]


def trial_of(row: Mapping[str, Any]) -> TrialSpec:
    """Return the trial of a row that a sweep wrote: its seed, model and augmentation draw what was drawn then.

    The family is the model's: readers may call a row's otherwise (``metamodel.rows``). A row of a version that had no
    such column yet was run by the default.
    """
    model, augmentation = ModelSpec.from_json(row["model"]), row.get("augmentation")
    return TrialSpec(
        family=model.family,
        dataset=row["dataset"],
        batch_size=int(row["batch_size"]),
        lr=float(row["lr"]),
        seed=int(row["seed"]),
        task=row["task"],
        model=model,
        augmentation=None if augmentation is None else Augmentation.from_json(augmentation),
        **{name: row[name] for name in ("precision", "preprocess") if row.get(name) is not None},
    )


def _described(drawn: Drawn) -> Row:
    """Return the columns of a trial that its draw decides."""
    if drawn.spec is None:
        return {}
    model = canonical_json(drawn.spec.to_dict())
    return {"architecture": drawn.spec.architecture, "model": model, "task": drawn.dataset.task}


def probe_trial(
    trial: TrialSpec, device: str | torch.device = "cpu", data_root: str | Path | None = None
) -> tuple[dict[str, float | None], float]:
    """Return the features of a trial by name, as ``run_trials`` finds them, and the seconds that the probe took.

    Raises:
        ModelError, SpecError, DataError: see ``run_trials``.
    """
    drawn = draw(trial, data_root)
    subject = prepare(drawn, torch.device(device))
    start = time.perf_counter()
    together = probed_together(subject.model, subject.batch, TASK_LOSS[drawn.dataset.task])
    (features,) = _probe_together([drawn], [subject]) if together else [None]
    return _all_features(features, drawn, subject), time.perf_counter() - start


def _probe_together(drawn: list[Drawn], subjects: list[Subject]) -> list[Features | None]:
    """Return the features of trials of one model; of none of them where something is wrong with one."""
    loss = TASK_LOSS[drawn[0].dataset.task]
    try:
        return list(probe_many(subjects, [d.dataset.full_train_size for d in drawn], loss))
    except (ModelError, Unstackable, RuntimeError) as error:  # each finds out by itself
        log_once(_LOG, logging.INFO, f"{drawn[0].trial.family} trials are probed one by one: {error}")
        return [None] * len(drawn)


def _all_features(known: Features | None, drawn: Drawn, subject: Subject) -> dict[str, float | None]:
    """Return a trial's features by name; ``known``: what a probe of several has said of it.

    They are rounded to float32, the precision of the passes that they come from: the digits beyond are noise, and a
    sixth of a meta-dataset's size.
    """
    dataset = drawn.dataset
    loss, size = TASK_LOSS[dataset.task], dataset.full_train_size
    features = known or probe(subject.model, subject.batch, loss=loss, lr=subject.lr, dataset_size=size)
    found = with_later(features, subject.model, subject.batch, loss=loss, lr=subject.lr, dataset_size=size)
    return {name: value if value is None else float(np.float32(value)) for name, value in found.items()}


def _truth(trajectory: Trajectory, epsilon: float) -> Row:
    """Return the columns of one row that the trajectory decides."""
    t_star = trajectory.t_star[epsilon]
    return {
        "t_star": t_star,
        "converged": t_star is not None,
        "stop_reason": None if t_star is not None else trajectory.stop_reason,
        "stopped_at": trajectory.stopped_at,
        "l0": trajectory.l0,
        "final_loss": float(trajectory.losses[-1]),
        "losses": trajectory.losses[:KEPT_LOSSES].tolist(),
        "truth_seconds": trajectory.seconds,
        "step_seconds": trajectory.step_seconds if math.isfinite(trajectory.step_seconds) else None,
    }


@lru_cache(maxsize=16)
def device_name(device: torch.device) -> str:
    """Return what a person calls the device: the GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]
