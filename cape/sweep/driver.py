"""Run a sweep on Ray: on this machine, or on a cluster.

The driver plans, schedules and counts. It never touches CUDA (it sees every GPU of its node, and a context on each
would cost memory on all of them), and it keeps nothing that matters: the files are the truth, Tune's own state is
thrown away, and to resume is to run what the files do not hold.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cape.config import SweepSpec
from cape.errors import DependencyError, SpecError
from cape.sweep.inline import interrupted
from cape.sweep.job import Job, SweepResult, finish, prepare
from cape.sweep.plan import Plan, Shard, cut
from cape.sweep.progress import Progress

_RETRIES = 3  # of a shard whose worker died; what it had committed is not run again

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "30",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches us as KeyboardInterrupt
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_sweep(
    spec: SweepSpec,
    out: str | Path,
    *,
    resume: bool = False,
    address: str | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    data_root: str | Path | None = None,
    progress: bool = True,
) -> SweepResult:
    """Run a sweep with Ray Tune and return what was written.

    Args:
        spec: the sweep.
        out: folder of the meta-dataset; on a cluster, one that every node sees.
        resume: run only what is missing in ``out``.
        address: of a running Ray cluster (``auto``, ``ray://...``); where None, the Ray that this process is
            connected to, or else one started on this machine for this sweep.
        workers: how many at most; as many as the resources hold where None.
        gpus_per_worker: whole or fractional; 0 runs on CPUs. None: 1 where the cluster has a GPU.
        data_root: see ``datasets.data_root``.
        progress: print a progress line to standard error.

    Raises:
        SpecError, DataError, StoreError: see ``job.prepare``; StoreError also where trials are missing at the end.
        DependencyError: Ray is not installed.
        KeyboardInterrupt: as it came; what was committed is kept.
    """
    if workers is not None and workers < 1:
        raise SpecError(f"workers must be at least 1, not {workers}.")
    if gpus_per_worker is not None and gpus_per_worker < 0:
        raise SpecError(f"gpus_per_worker must be zero or more, not {gpus_per_worker}.")
    job = prepare(spec, out, resume=resume, data_root=data_root)
    missing = Plan(spec).missing(job.done)
    if not missing:
        return finish(job)
    error: str | None = None
    try:
        with _environment(), _cluster(address) as resources:
            cpus, gpus, concurrent = _share(resources, workers, gpus_per_worker)
            error = _tune(job, cut(missing, concurrent), cpus, gpus, concurrent, progress)
    except KeyboardInterrupt:
        print(interrupted(job.out), file=sys.stderr)
        raise
    finally:
        shutil.rmtree(job.out / ".tune", ignore_errors=True)
    return finish(job, error)


def _share(resources: dict[str, float], workers: int | None, gpus_per_worker: float | None) -> tuple[int, float, int]:
    """Return (CPUs of a worker, GPUs of a worker, workers at the same time)."""
    total_cpus, total_gpus = int(resources.get("CPU", 0)), resources.get("GPU", 0.0)
    gpus = (1.0 if total_gpus >= 1 else 0.0) if gpus_per_worker is None else float(gpus_per_worker)
    if total_cpus < 1:
        raise SpecError("The Ray cluster has no CPU to run workers on.")
    if gpus > total_gpus:
        raise SpecError(f"A worker asks for {gpus:g} GPU, but the Ray cluster has {total_gpus:g}.")
    room = int(total_gpus / gpus) if gpus else total_cpus
    concurrent = max(1, min(workers or room, room, total_cpus))
    return (1 if gpus else max(1, total_cpus // concurrent)), gpus, concurrent


def _tune(job: Job, shards: list[Shard], cpus: int, gpus: float, concurrent: int, progress: bool) -> str | None:
    """Run the shards as Tune trials; return the first error that ended a shard for good."""
    from ray import tune

    from cape.sweep.actor import ShardWorker

    todo = sum(map(len, shards))
    line = Progress(todo, len(Plan(job.spec)) - todo, enabled=progress)

    hopeless: list[str] = []  # data that disappeared, a disk that is full: trying again or elsewhere does not help

    class Report(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            line.add(result["trials"], result["rows"], result["failed"])
            if "error" in result:
                hopeless.append(result["error"])

    class StopWhereHopeless(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return bool(hopeless)

    tuner = tune.Tuner(
        tune.with_parameters(ShardWorker, job=dataclasses.replace(job, done=frozenset()), shards=shards),
        param_space={"shard": tune.grid_search(list(range(len(shards)))), "cpus": cpus, "gpus": gpus},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(job.out / ".tune"),
            verbose=0,
            callbacks=[Report()],
            stop=StopWhereHopeless(),
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    try:
        results = tuner.fit()
    finally:
        line.close()
    crashes = [" ".join(str(e).split())[-500:] for e in results.errors]
    return next(iter(hopeless + crashes), None)


@contextmanager
def _cluster(address: str | None) -> Iterator[dict[str, float]]:
    """Connect to Ray, or start one; give the resources; leave a Ray that was there before as it was."""
    try:
        import ray
    except ImportError as error:
        raise DependencyError("Ray is not installed; run pip install 'ray[tune,train,default]'.") from error

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=address or "local",
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0"}},
                include_dashboard=None if address else False,
            )
        except ConnectionError as error:
            raise SpecError(f"There is no Ray cluster at '{address}': {error}") from error
    try:
        yield ray.cluster_resources()
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _environment() -> Iterator[None]:
    """Make Tune quiet, inside the block."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
