"""What a run of a sweep needs, with Ray or without: checks before, chunks in between, an account after."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as pds
import torch

from cape import datasets, families
from cape.config import SweepSpec, TrialSpec
from cape.errors import StoreError
from cape.store import reader, writer
from cape.sweep.plan import Plan, Shard
from cape.trial import run_trials

# Trials are committed in chunks of about this many seconds: long enough that a file and a message cost nothing
# beside them, short enough that little is lost with a killed worker.
CHUNK_SECONDS = 5.0


@dataclass(frozen=True)
class SweepResult:
    """What lies in the folder after a sweep: read from its files.

    Attributes:
        rows: number of rows.
        trials: number of trials.
        failed: trials that were run and failed (their rows say why).
        seconds: wall time of this run.
        out: folder of the meta-dataset.
    """

    rows: int
    trials: int
    failed: int
    seconds: float
    out: Path

    def __str__(self) -> str:
        failed = f", {self.failed} of them failed" if self.failed else ""
        return f"{self.rows} rows of {self.trials} trials{failed}, in {self.seconds:.1f} s: {self.out}"


@dataclass(frozen=True)
class Job:
    """One run of a sweep: everything that a worker has to be told."""

    spec: SweepSpec
    out: Path
    data_root: Path | None
    done: frozenset[str]
    began: float


def prepare(spec: SweepSpec, out: str | Path, *, resume: bool, data_root: str | Path | None) -> Job:
    """Check a sweep before anything is started, and claim its folder.

    Raises:
        SpecError: an unknown family or dataset, or two that do not fit each other.
        DataError: data that is missing or too small.
        StoreError: the folder holds another sweep, or rows of this one while ``resume`` is False.
    """
    root = datasets.data_root(data_root)
    for family in spec.families:
        families.get(family)
    for name in spec.datasets:
        dataset = datasets.load(name, root)
        if spec.task is not None:
            dataset = dataset.with_task(spec.task)
        for family in spec.families:
            member = families.get(family)
            layout, preprocess = member.layout_for(dataset), member.preprocess_for(spec.preprocess)
            dataset.batch(max(spec.batch_sizes), 0, layout, preprocess=preprocess)
    folder = Path(out).resolve()
    writer.claim(folder, spec, resume=resume)
    done = frozenset(reader.done_trials(folder)) if resume else frozenset()
    return Job(spec, folder, None if root is None else Path(root).resolve(), done, time.monotonic())


def finish(job: Job, error: str | None = None) -> SweepResult:
    """Count what was committed.

    Args:
        error: what ended a shard for good.

    Raises:
        StoreError: trials of the plan are missing.
    """
    plan = Plan(job.spec)
    mine = pds.field("sweep_hash") == job.spec.spec_hash
    done: set[str] = set()
    rows = failed = 0
    if reader.list_files(job.out):
        table = reader.read(job.out, columns=["trial_id", "stop_reason"], filter=mine)
        done = set(table["trial_id"].to_pylist())
        broken = table.filter(pds.field("stop_reason") == "failed")
        rows, failed = table.num_rows, len(set(broken["trial_id"].to_pylist()))
    if len(done) < len(plan):
        why = f" The error was: {error}" if error else ""
        raise StoreError(
            f"{len(plan) - len(done)} of {len(plan)} trials are missing in {job.out}; what is there is kept. Run the"
            f" sweep again with --resume.{why}"
        )
    return SweepResult(rows, len(done), failed, time.monotonic() - job.began, job.out)


class ShardRun:
    """One shard in progress: each ``step`` runs and commits a chunk of trials.

    What an earlier attempt at the same shard committed is left alone.
    """

    def __init__(self, job: Job, shard: Shard, device: str | torch.device) -> None:
        self._job, self._shard = job, shard
        done = reader.done_trials(job.out, shard.family, shard.dataset, prefix=shard.key)
        todo = (t for t in Plan(job.spec).trials_of(shard) if t.trial_id not in done)
        self._left = len(shard) - len(done)
        self._rows = self._run(todo, device)

    def _run(self, trials: Iterator[TrialSpec], device: str | torch.device) -> Iterator[list[dict[str, Any]]]:
        return run_trials(trials, device, self._job.data_root, self._job.spec.spec_hash)

    def step(self) -> dict[str, Any]:
        """Run trials for about ``CHUNK_SECONDS``, commit them and return what was done: numbers, and ``done``."""
        start = time.monotonic()
        chunk: list[dict[str, Any]] = []
        trials = failed = 0
        for rows in self._rows:
            chunk += rows
            trials += 1
            failed += rows[0].get("stop_reason") == "failed"
            if time.monotonic() - start > CHUNK_SECONDS:
                break
        if chunk:
            writer.write_shard(chunk, self._job.out, prefix=self._shard.key)
        self._left -= trials
        return {
            "done": self._left <= 0,
            "family": self._shard.family,
            "trials": trials,
            "rows": len(chunk),
            "failed": failed,
            "busy_seconds": time.monotonic() - start,
        }
