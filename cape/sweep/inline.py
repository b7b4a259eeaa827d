"""Run a sweep in this process, without Ray: for a small sweep, a debugger, or a machine that has no Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from cape.config import SweepSpec
from cape.sweep.job import ShardRun, SweepResult, finish, prepare
from cape.sweep.plan import Plan
from cape.sweep.progress import Progress


def run_inline(
    spec: SweepSpec,
    out: str | Path,
    *,
    resume: bool = False,
    data_root: str | Path | None = None,
    device: str | None = None,
    progress: bool = True,
) -> SweepResult:
    """Run a sweep in this process, on one device; the rows are those that ``driver.run_sweep`` writes.

    Args:
        spec: the sweep.
        out: folder of the meta-dataset.
        resume: run only what is missing in ``out``.
        data_root: see ``datasets.data_root``.
        device: ``cuda`` where there is one, else ``cpu``.
        progress: print a progress line to standard error.

    Raises:
        SpecError, DataError, StoreError: see ``job.prepare``.
        KeyboardInterrupt: as it came; what was committed is kept.
    """
    job = prepare(spec, out, resume=resume, data_root=data_root)
    shards = Plan(spec).shards(done=job.done)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    line = Progress(sum(map(len, shards)), len(Plan(spec)) - sum(map(len, shards)), enabled=progress)
    try:
        for shard in shards:
            run = ShardRun(job, shard, device)
            ended = False
            while not ended:
                chunk = run.step()
                ended = chunk["done"]
                line.add(chunk["trials"], chunk["rows"], chunk["failed"])
    except KeyboardInterrupt:
        line.close()
        print(interrupted(job.out), file=sys.stderr)
        raise
    line.close()
    return finish(job)


def interrupted(out: Path) -> str:
    """Return what to tell someone who stopped a sweep."""
    return f"Stopped. What was committed is kept in {out}; run the same command with --resume to go on."
