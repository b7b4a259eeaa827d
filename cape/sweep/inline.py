"""Run a sweep in this process, without Ray: for a small sweep, a debugger, or a machine that has no Ray."""

from __future__ import annotations

import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from cape.config import SweepSpec
from cape.sweep.estimate import trial_seconds_of
from cape.sweep.job import CHUNK_SECONDS, TRIAL_SECONDS, Job, SweepResult, finish, running
from cape.sweep.plan import Group, Plan, Shard
from cape.sweep.progress import Progress, Reporter
from cape.sweep.shard_run import ShardRun
from cape.sweep.shards import cut


def run_inline(
    spec: SweepSpec,
    out: str | Path,
    *,
    resume: bool = False,
    data_root: str | Path | None = None,
    device: str | None = None,
    trial_seconds: float = TRIAL_SECONDS,
    chunk_seconds: float = CHUNK_SECONDS,
    imports: Sequence[str] = (),
    progress: bool = True,
) -> SweepResult:
    """Run a sweep in this process, on one device; the rows are those that ``driver.run_sweep`` writes.

    Args:
        spec: the sweep.
        out: folder or URI of the meta-dataset.
        resume: run only what is missing in ``out``.
        data_root: see ``datasets.data_root``.
        device: ``cuda`` where there is one, else ``cpu``.
        trial_seconds: a trial that takes longer ends this process (nothing else can stop it); after three such ends,
            each followed by a resume, it is recorded as failed. 0 for no limit.
        chunk_seconds: every worker commits about so often.
        imports: modules that register families or datasets of your own.
        progress: print a progress line to standard error.

    Raises:
        SpecError, DataError, StoreError: see ``job.running``.
        KeyboardInterrupt: as it came; what was committed is kept.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    settings = {"trial_seconds": trial_seconds, "chunk_seconds": chunk_seconds, "imports": imports, "inline": True}
    with running(spec, out, resume=resume, data_root=data_root, **settings) as (job, done):  # type: ignore[arg-type]
        missing = Plan(spec).missing(done)
        report = reporter(job, missing, trial_seconds_of(spec, job.location)[0], progress)
        state = "failed"
        try:
            with terminable():
                for shard in cut(missing, 1):
                    _run(ShardRun(job, shard, device), report)
            state = "finished"
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        finally:
            report.close(state)
            if state == "interrupted":
                print(interrupted(job), file=sys.stderr)
        return finish(job)


def _run(run: ShardRun, report: Reporter) -> None:
    try:
        ended = False
        while not ended:
            chunk = run.step()
            ended = chunk["done"]
            report.chunk(chunk)
    finally:
        run.close()


def reporter(job: Job, missing: Sequence[Shard], seconds: Callable[[Group], float], enabled: bool) -> Reporter:
    """Begin to report on a run; ``seconds`` is what one trial of a group is expected to take."""
    plan = Plan(job.spec)
    todo: Counter[str] = Counter(dict.fromkeys(job.spec.families, 0))
    before: Counter[str] = Counter()
    expected: dict[str, float] = dict.fromkeys(job.spec.families, 0.0)
    for shard in missing:
        todo[shard.group.family] += len(shard)
        expected[shard.group.family] += len(shard) * seconds(shard.group)
    for group in plan.groups:
        before[group.family] += group.count
    before.subtract(todo)
    one = {(g.family, g.dataset, g.batch_size): seconds(g) for g in plan.groups}
    rows = sum(before.values()) * len(job.spec.epsilons)
    progress = Progress(todo, before, rows=rows, expected=expected, enabled=enabled)
    return Reporter(job.location, job.run, progress, one)


@contextmanager
def terminable() -> Iterator[None]:
    """Take SIGTERM, which batch systems and `ray job stop` send, for Ctrl-C inside the block (in the main thread)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def interrupted(job: Job) -> str:
    """Return what to tell someone who stopped a sweep."""
    return f"Stopped. What was committed is kept in {job.location}; run the same command with --resume to go on."
