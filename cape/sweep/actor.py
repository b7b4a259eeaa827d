"""The worker of a sweep: a Ray Tune trainable that owns a GPU (or a share of the CPU) and runs one shard at a time.

One Tune trial is one shard and one ``step`` is one chunk of it, because a Tune trial costs the driver about 18 ms and
a step 5 to 11 ms whatever they hold. The actor is reused from shard to shard; rows go to files, never through Tune.
"""

from __future__ import annotations

import gc
from typing import Any

import ray
import torch
from ray import tune

from cape.errors import CapeError, DependencyError
from cape.sweep.job import Job, ShardRun
from cape.sweep.plan import Shard


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
        self._device = _device(config["gpus"])
        torch.set_num_threads(max(1, int(config["cpus"])))
        self._run = ShardRun(job, shards[config["shard"]], self._device)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Go on to another shard in the same process, with the memory of the last one freed."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        self._run = ShardRun(self._job, self._shards[new_config["shard"]], self._device)
        return True

    def step(self) -> dict[str, Any]:
        """Run and commit one chunk; an error that no other worker would escape goes to the driver as text."""
        try:
            return self._run.step()
        except CapeError as error:
            return {"done": True, "error": str(error), "trials": 0, "rows": 0, "failed": 0}


def _device(gpus: float) -> torch.device:
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DependencyError(
            f"Ray gave this worker GPU {ray.get_gpu_ids()}, but torch sees no CUDA device; install torch with CUDA"
            " there, or run with --gpus-per-worker 0."
        )
    return torch.device("cuda")  # the only one that Ray lets this process see
