"""Let workers that Ray gave a GPU run on the CPU, and note which GPU of which node each was given.

``cape sweep --import fake_gpus`` on a machine without GPUs; ``CAPE_FAKE_GPUS`` names the folder for the notes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import ray
import torch

from cape.sweep import actor


def _device(gpus: float) -> torch.device:
    context = ray.get_runtime_context()
    note = {
        "node": context.get_node_id(),
        "gpus": ray.get_gpu_ids(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "pid": os.getpid(),
    }
    folder = Path(os.environ["CAPE_FAKE_GPUS"])
    (folder / f"{os.getpid()}.json").write_text(json.dumps(note))
    return torch.device("cpu")


actor._device = _device
