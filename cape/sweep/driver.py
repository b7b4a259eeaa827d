"""Run a sweep on Ray: on this machine, or on a cluster.

The driver plans, schedules and counts. It never touches CUDA (it sees every GPU of its node, and a context on each
would cost memory on all of them), and it keeps nothing that matters: the files are the truth, Tune's own state is
thrown away, and to resume is to run what the files do not hold.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cape.cluster import check_address
from cape.config import SweepSpec
from cape.errors import DependencyError, SpecError, first_line
from cape.store import claims, reader
from cape.sweep.estimate import relative, trial_seconds_of
from cape.sweep.inline import interrupted, reporter, terminable
from cape.sweep.job import CHUNK_SECONDS, TRIAL_SECONDS, Job, SweepResult, finish, running
from cape.sweep.plan import Group, Plan, Shard
from cape.sweep.progress import Reporter
from cape.sweep.shards import cut

# Of a shard whose worker died. What it had committed is not run again, and a trial that ends its process is given up
# long before (see shard_run.py): this is for nodes that come and go.
_RETRIES = 100
_PASSES = 3  # over what a pass left missing, as long as each brings something

_TUNE = ".tune"  # Tune's own state, thrown away

_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "30",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C reaches us as KeyboardInterrupt
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # inside a Ray job: what `_cluster` sets joins what the job has set
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
    trial_seconds: float = TRIAL_SECONDS,
    chunk_seconds: float = CHUNK_SECONDS,
    imports: Sequence[str] = (),
    progress: bool = True,
) -> SweepResult:
    """Run a sweep with Ray Tune and return what was written.

    Args:
        spec: the sweep.
        out: folder or URI of the meta-dataset; on a cluster, one that every node sees.
        resume: run only what is missing in ``out``.
        address: of a running Ray cluster (``auto``, ``ray://...``); where None, the Ray that this process is
            connected to, or else one started on this machine for this sweep.
        workers: how many at most; as many as the resources hold where None.
        gpus_per_worker: whole or fractional; 0 runs on CPUs. None: 1 where the cluster has a GPU.
        data_root: see ``datasets.data_root``.
        trial_seconds: a trial that takes longer ends its worker and is tried again; recorded as failed after three
            times. 0 for no limit.
        chunk_seconds: every worker commits about so often.
        imports: modules that register families or datasets of your own; every node must have them.
        progress: print a progress line to standard error.

    Raises:
        SpecError, DataError, StoreError: see ``job.running``; StoreError also where trials are missing at the end.
        DependencyError: Ray is not installed.
        KeyboardInterrupt: as it came; what was committed is kept.
    """
    if workers is not None and workers < 1:
        raise SpecError(f"workers must be at least 1, not {workers}.")
    if gpus_per_worker is not None and not 0 <= gpus_per_worker < math.inf:
        raise SpecError(f"gpus_per_worker must be zero or more, not {gpus_per_worker}.")
    check_address(address)  # before anything is written
    settings = {"trial_seconds": trial_seconds, "chunk_seconds": chunk_seconds, "imports": imports}
    with running(spec, out, resume=resume, data_root=data_root, **settings) as (job, done):  # type: ignore[arg-type]
        missing = Plan(spec).missing(done)
        if not missing:
            return finish(job)
        seconds = trial_seconds_of(spec, job.location)[0]
        report = reporter(job, missing, seconds, progress)
        state, error = "failed", None
        try:
            with _environment(), _cluster(address) as resources:
                cpus, gpus, concurrent = _share(resources, workers, gpus_per_worker)
                report.progress.workers = concurrent
                error = _passes(job, missing, relative(seconds, spec), cpus, gpus, concurrent, report)
            state = "failed" if error else "finished"
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        finally:
            job.location.delete_tree(_TUNE)
            report.close(state, error)
            if state == "interrupted":
                print(interrupted(job), file=sys.stderr)
        return finish(job, error)


def _passes(
    job: Job,
    missing: list[Shard],
    costs: Callable[[Group], float] | None,
    cpus: int,
    gpus: float,
    concurrent: int,
    report: Reporter,
) -> str | None:
    """Run what is missing, and what a pass leaves missing again; return the error that stopped it, if any did."""
    for _ in range(_PASSES):
        before = sum(map(len, missing))
        error, hopeless = _tune(job, cut(missing, concurrent, costs), cpus, gpus, concurrent, report)
        if error is None or hopeless:
            break
        claims.revoke(job.location, job.run)
        missing = Plan(job.spec).missing(reader.done_ids(job.location))
        if not missing or sum(map(len, missing)) == before:
            break
    return error


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


def _tune(
    job: Job, shards: list[Shard], cpus: int, gpus: float, concurrent: int, report: Reporter
) -> tuple[str | None, bool]:
    """Run the shards as Tune trials; return the first error that ended one for good, and whether it is hopeless."""
    from ray import tune

    from cape.sweep.actor import ShardWorker

    hopeless: list[str] = []  # data that disappeared, a disk that is full: trying again or elsewhere does not help

    class Report(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            report.chunk(result)
            if "error" in result:
                hopeless.append(result["error"])
            elif result["fenced"] and not claims.is_current(job.location, job.run):
                hopeless.append(f"another run has taken {job.location} over.")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            report.log("worker died", shard=trial.config["shard"])

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            report.log("worker died", shard=trial.config["shard"])

    class StopWhereHopeless(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            return bool(hopeless)

    storage: dict[str, Any] = {"storage_path": job.location.path(_TUNE)}
    if job.location.folder is None:
        storage["storage_filesystem"] = job.location.filesystem
    tuner = tune.Tuner(
        tune.with_parameters(ShardWorker, job=job, shards=shards),
        param_space={"shard": tune.grid_search(list(range(len(shards)))), "cpus": cpus, "gpus": gpus},
        tune_config=tune.TuneConfig(reuse_actors=True, max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(
            name="sweep",
            **storage,
            verbose=0,
            callbacks=[Report()],
            stop=StopWhereHopeless(),
            failure_config=tune.FailureConfig(max_failures=_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    results = tuner.fit()
    crashes = [" ".join(str(e).split())[-500:] for e in results.errors]
    return next(iter(hopeless + crashes), None), bool(hopeless)


@contextmanager
def _cluster(address: str | None) -> Iterator[dict[str, float]]:
    """Connect to Ray, or start one; give the resources; leave a Ray that was there before as it was."""
    try:
        import ray
    except ImportError as error:
        raise DependencyError("Ray is not installed; run pip install 'ray[tune,train,default]'.") from error

    ours = not ray.is_initialized()
    address = address or "local"
    if ours:
        try:
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env={"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0"}},
                include_dashboard=False if address == "local" else None,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            local = address == "local"
            what = "Ray could not be started on this machine" if local else f"There is no Ray cluster at '{address}'"
            raise SpecError(f"{what}: {first_line(error)}.") from error
    try:
        with terminable():  # Ray's own handler, installed above, would end this process at once
            yield ray.cluster_resources()
    finally:
        if ours:
            ray.shutdown()


@contextmanager
def _environment() -> Iterator[None]:
    """Make Tune quiet, inside the block."""
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    # It misses the result files of each Tune trial, which are switched off above: a line a shard.
    analysis = logging.getLogger("ray.tune.analysis.experiment_analysis")
    level = analysis.level
    analysis.setLevel(logging.ERROR)
    try:
        yield
    finally:
        analysis.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
