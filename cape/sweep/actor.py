"""The worker of a sweep: a Ray Tune trainable that owns a GPU (or a share of one, or of the CPU), one shard at a time.

One Tune trial is one shard and one ``step`` is one chunk of it, because a Tune trial costs the driver about 18 ms and
a step 5 to 11 ms whatever they hold. The actor is reused from shard to shard; rows go to files, never through Tune.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import ray
import torch
from ray import tune
from ray.util.metrics import Counter

from cape.errors import CapeError, DependencyError
from cape.memory import give_back
from cape.sweep.job import Job, load_imports
from cape.sweep.plan import Shard
from cape.sweep.shard_run import ShardRun

_NOTHING = {"trials": 0, "rows": 0, "failed": 0, "run_seconds": 0.0, "commit_seconds": 0.0, "fenced": False}


class ShardWorker(tune.Trainable):
    """Run the shards whose number Tune hands over in ``config["shard"]``."""

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """Return what one worker owns: CPUs, and a GPU or a share of one."""
        bundle = {"CPU": float(config["cpus"])}
        if config["gpus"]:
            bundle["GPU"] = float(config["gpus"])
        return tune.PlacementGroupFactory([bundle])

    def setup(self, config: dict[str, Any], job: Job, shards: list[Shard]) -> None:  # type: ignore[override]
        """Pin the worker to its device; called once for each actor."""
        self._job, self._shards = job, shards
        self._run: ShardRun | None = None
        self._error: str | None = None
        self._ended = time.monotonic()
        self._counters = {
            name: Counter(f"cape_{name}", description=f"{name} that a sweep's workers committed", tag_keys=("family",))
            for name in ("trials", "rows", "failed")
        }
        torch.set_num_threads(max(1, int(config["cpus"])))
        try:
            load_imports(job.imports, job.import_folders)
            self._device = _device(float(config["gpus"]))
        except CapeError as error:
            self._error = str(error)
            return
        self._open(config["shard"])
        gc.collect()
        gc.freeze()  # torch's and Ray's half a million objects stay: to look through them again takes 0.14 s a shard

    def _open(self, number: int) -> None:
        try:
            self._run = ShardRun(self._job, self._shards[number], self._device)
        except CapeError as error:
            self._error = str(error)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on to another shard in the same process, with the memory of the last one freed."""
        self.cleanup()
        gc.collect()
        give_back()
        if self._error is None:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._open(new_config["shard"])
        return True

    def step(self) -> dict[str, Any]:
        """Run and commit one chunk; an error that no other worker would escape goes to the driver as text."""
        waited = time.monotonic() - self._ended
        try:
            if self._error is not None or self._run is None:
                return {**_NOTHING, "done": True, "family": "", "error": self._error or "the worker was not set up"}
            done = self._run.step()
            for name, counter in self._counters.items():
                if done[name]:
                    counter.inc(done[name], tags={"family": done["family"]})
            return {**done, "waited_seconds": waited, "worker": ray.get_runtime_context().get_actor_id()}
        except CapeError as error:
            return {**_NOTHING, "done": True, "family": "", "error": str(error)}
        finally:
            self._ended = time.monotonic()

    def cleanup(self) -> None:
        """Let the shard go; called by Tune before the process ends as well."""
        if self._run is not None:
            self._run.close()
            self._run = None


def _device(gpus: float) -> torch.device:
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DependencyError(
            f"Ray gave this worker GPU {ray.get_gpu_ids()}, but torch sees no CUDA device; install torch with CUDA"
            " there, or run with --gpus-per-worker 0."
        )
    if gpus < 1:  # those who share the GPU share its memory: one that takes too much fails, not its neighbours
        torch.cuda.set_per_process_memory_fraction(gpus)
    return torch.device("cuda")  # the only one that Ray lets this process see
