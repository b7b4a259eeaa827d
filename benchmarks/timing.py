"""Timing that survives a noisy machine: variants take turns, medians and ratios are reported."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def interleave(
    variants: Mapping[str, Callable[[], Any]], device: str, seconds: float = 4.0, least: int = 5, most: int = 40
) -> dict[str, dict[str, float]]:
    """Time all variants in turn, round after round, until ``seconds`` per variant have passed.

    Returns, per variant, ``median_ms``, ``min_ms``, ``max_ms`` and ``runs``.
    """
    for run in variants.values():
        run()
        synchronize(device)
    times: dict[str, list[float]] = {name: [] for name in variants}
    start = time.perf_counter()
    while True:
        for name, run in variants.items():
            begin = time.perf_counter()
            run()
            synchronize(device)
            times[name].append((time.perf_counter() - begin) * 1e3)
        rounds = len(next(iter(times.values())))
        if rounds >= most or (rounds >= least and time.perf_counter() - start > seconds * len(variants)):
            break
    return {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t), "runs": len(t)}
        for name, t in times.items()
    }


def machine(device: str) -> dict[str, Any]:
    """Name the machine that the numbers belong to."""
    about: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
    else:
        cpu = Path("/proc/cpuinfo")
        names = (
            [li.split(":")[1].strip() for li in cpu.read_text().splitlines() if "model name" in li]
            if cpu.exists()
            else []
        )
        about["device"] = names[0] if names else platform.processor()
    return about


def write_json(path: str | None, result: dict[str, Any]) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
