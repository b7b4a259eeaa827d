"""The Ray half of fitting: one Ray Train run that fits the boosters, and selection folds as Ray tasks."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cape.cluster import check_address
from cape.errors import DependencyError, SpecError, StoreError
from cape.logs import counted
from cape.metamodel.line import POOLED, Line
from cape.metamodel.presets import Preset
from cape.metamodel.regressors import Design, load_booster, train_boosters

if TYPE_CHECKING:
    import xgboost as xgb


@contextmanager
def ray_trainer(directory: Path, workers: int, address: str | None) -> Iterator[tuple[Any, Any]]:
    """Yield (trainer, mapper) for ``fit_table`` over a running or a quiet local Ray.

    Args:
        directory: model directory; Ray Train's storage is a hidden folder beside it, removed at the end, because
            every node of a cluster must see it.
    """
    with ExitStack() as undone:
        try:
            import ray

            mine = not ray.is_initialized()
            with ThreadPoolExecutor(1) as pool:  # Ray's processes start while this one reads its modules
                # Absent where ray came without its train extra.
                modules = pool.submit(importlib.import_module, "ray.train.xgboost")
                if mine:
                    undone.callback(ray.shutdown)
                    _start(ray, address, workers)
                modules.result()
        except ImportError as error:
            raise DependencyError("`cape fit` needs Ray; install it with `pip install 'ray[train]'`.") from error
        directory.parent.mkdir(parents=True, exist_ok=True)
        storage = Path(tempfile.mkdtemp(prefix=f".{directory.name}.train-", dir=directory.parent.resolve()))
        undone.callback(shutil.rmtree, storage, ignore_errors=True)
        cpus = int(ray.cluster_resources().get("CPU", 0))
        if cpus <= workers:
            # Ray Data needs a CPU of its own: with none free, Train waits for data forever.
            raise SpecError(
                f"{workers} workers need at least {workers + 1} CPUs and Ray has {cpus};"
                " use fewer workers or more CPUs."
            )
        spare = cpus - workers - 1
        yield (
            lambda data, preset: train_with_ray(data, preset, workers, storage),
            lambda function, arguments: _map_tasks(function, arguments, spare),
        )


def _start(ray: Any, address: str | None, workers: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "configure_logging": True, "logging_level": "ERROR"}
    if address is not None:
        check_address(address)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError) as error:
            raise SpecError(f"There is no Ray cluster at '{address}'; start one or leave the address out.") from error
        return
    ray.init(
        address="local",
        # Those of Ray Train mostly wait: every core is there for the folds beside them.
        num_cpus=workers + 1 + (os.cpu_count() or 1),
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": _spare_scikit_learn()},
        **options,
    )


def _spare_scikit_learn() -> Callable[[], None]:
    """Return what the workers of our own Ray do first: have XGBoost not find scikit-learn.

    It imports it wherever it is installed, one to two seconds in each of the four processes that fit or hold the
    trainer, for estimator classes that none of them uses. Defined in here, so that it travels by value: by name, every
    process of Ray would import this package for it.
    """

    def hide() -> None:
        import sys

        sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]  # what makes its import an ImportError

    return hide


def _map_tasks(
    function: Callable[..., np.ndarray], arguments: Sequence[tuple[Any, ...]], spare: int
) -> list[np.ndarray]:
    """Run calls as Ray tasks on the spare CPUs; a large argument that repeats is stored once.

    Where Ray Train needs every CPU for itself, one call at a time runs beside it and takes none.
    """
    import ray

    held: dict[int, Any] = {}
    task, most = ray.remote(num_cpus=min(1, spare))(_call), max(1, spare)
    calls: list[Any] = []
    for first, *rest in counted(arguments, len(arguments), "folds begun"):
        if len(calls) >= most:  # what waits in a queue would take the CPU that Ray Train waits for
            ray.wait(calls, num_returns=len(calls) - most + 1)
        reference = held.setdefault(id(first), ray.put(first)) if id(first) not in held else held[id(first)]
        calls.append(task.remote(function, reference, *rest))
    return ray.get(calls)


def _call(function: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
    return function(*arguments)


def train_with_ray(data: Design, preset: Preset, workers: int, storage: Path) -> dict[str, xgb.Booster]:
    """Fit the boosters of a preset in one Ray Train run and return them.

    Every worker receives all rows and fits on every ``workers``-th (Ray Data's own split would drop a remainder). Each
    reports once, at the end, and not after every tree as ``RayTrainReportCallback`` does: a report costs about two
    seconds. The pooled booster has that callback's file name, so that its ``get_model`` reads our checkpoints.
    """
    import ray.data
    import ray.train
    from ray.train.xgboost import RayTrainReportCallback, XGBoostTrainer

    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = ray.cluster_resources().get("GPU", 0)
    use_gpu = gpus >= workers and _cuda()
    trainer = XGBoostTrainer(
        _worker,
        train_loop_config={
            "preset": preset.to_dict(),
            "families": list(data.families),
            "lines": {name: line.to_dict() for name, line in data.lines.items()},
        },
        datasets={"rows": ray.data.from_arrow(_table(data))},
        dataset_config=ray.train.DataConfig(datasets_to_split=[]),
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=ray.train.RunConfig(name="fit", storage_path=str(storage)),
    )
    try:
        with _watched_closely():
            result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        text = str(error)
        why = (
            "a node ran out of memory" if "low on memory" in text else (text.strip().splitlines() or ["no reason"])[-1]
        )
        raise StoreError(f"Ray Train gave up ({why}); free memory or use fewer workers, and fit again.") from error
    if result.error is not None or result.checkpoint is None:
        raise StoreError(f"Ray Train did not return a model: {result.error}.")
    with result.checkpoint.as_directory() as folder:
        files = {p.name: p for p in sorted(Path(folder).glob("*.ubj"))}
        pooled = files.pop(RayTrainReportCallback.CHECKPOINT_NAME)
        return {POOLED: load_booster(pooled), **{p.stem: load_booster(p) for p in files.values()}}


@contextmanager
def _watched_closely() -> Iterator[None]:
    """Let Ray Train look at its workers five times a second, where the user has not said how often.

    It does so every two seconds, and waits so long before its first look and after a worker's report: for a run of
    seconds that is a third of it (measured: 13.6 s and 10.3).
    """
    name = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
    mine = name not in os.environ
    os.environ.setdefault(name, "0.2")
    try:
        yield
    finally:
        if mine:
            del os.environ[name]


def _worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: read, fit with the others, report once."""
    import pyarrow as pa
    import ray.train
    from ray.train.xgboost import RayTrainReportCallback

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    shard = ray.train.get_dataset_shard("rows")
    table = pa.concat_tables(shard.iter_batches(batch_format="pyarrow", batch_size=None)).sort_by("index")
    preset, families = Preset.from_dict(config["preset"]), tuple(config["families"])
    lines = {name: Line.from_dict(line) for name, line in config["lines"].items()}
    data = _design(table, len(preset.features), families, lines)
    # XGBoost would silently fall back to the CPU: ask torch whether this worker really has a GPU.
    use_gpu = bool(ray.get_gpu_ids()) and _cuda()
    boosters = train_boosters(data, preset, "cuda" if use_gpu else "cpu", 0, rank, world)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            for name, booster in boosters.items():
                file = RayTrainReportCallback.CHECKPOINT_NAME if name == POOLED else f"{name}.ubj"
                booster.save_model(Path(folder) / file)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"rows": len(data.y), "boosters": len(boosters), "workers": world}, checkpoint=checkpoint)


_VECTORS = ("y", "weight", "codes", "trials", "censored", "margin")


def _table(data: Design) -> Any:
    import pyarrow as pa

    columns = {f"x{j}": data.x[:, j] for j in range(data.x.shape[1])}
    columns |= {name: getattr(data, name) for name in _VECTORS}
    columns["index"] = np.arange(len(data.y))
    # NaN stays NaN (not null), so that the matrix comes back bit for bit.
    return pa.table({k: pa.array(v, from_pandas=False) for k, v in columns.items()})


def _design(table: Any, features: int, families: tuple[str, ...], lines: dict[str, Line]) -> Design:
    """Return what ``_table`` wrote."""
    vectors = {name: table.column(name).to_numpy() for name in _VECTORS}
    x = np.stack([table.column(f"x{j}").to_numpy() for j in range(features)], axis=1)
    return Design(x=x, **vectors, families=families, lines=lines)


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
